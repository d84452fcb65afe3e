"""Instructions as token ids of a static length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Literal

import numpy as np

from embodied_rl.errors import UserError

Template = Literal["openvla", "openvla_v01"]
TEMPLATES: dict[str, str] = {
    "openvla": "In: What action should the robot take to {}?\nOut:",
    "openvla_v01": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: What action should the robot take to {}? "
    "ASSISTANT:",
}
BOS = 1
Tokenize = Callable[[str], list[int]]
"""Text -> token ids, with BOS first."""


class Prompts:
    """Instructions -> int64 [B,length], left-padded and without BOS, ending in the "empty" token (a lone space) behind
    which the model was trained to act."""

    def __init__(self, tokenize: Tokenize, template: Template, length: int, pad_token: int, empty_token: int) -> None:
        self.tokenize = tokenize
        self.template = TEMPLATES[template]
        self.length = length
        self.pad_token = pad_token
        self.empty_token = empty_token
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, instructions: Sequence[str]) -> np.ndarray:
        """Raises `UserError` naming an instruction that does not fit into `length`."""
        return np.stack([self._row(instruction) for instruction in instructions])

    def _row(self, instruction: str) -> np.ndarray:
        if instruction not in self._known:
            ids = self.tokenize(self.template.format(instruction.lower()))
            assert ids[0] == BOS, "the tokenizer puts no BOS first"
            ids = ids[1:] if ids[-1] == self.empty_token else [*ids[1:], self.empty_token]
            if len(ids) > self.length:
                raise UserError(
                    f"the prompt for '{shorten(instruction, 60)}' has {len(ids)} tokens: set the policy's "
                    f"prompt_length to at least that, not {self.length}"
                )
            self._known[instruction] = np.array([self.pad_token] * (self.length - len(ids)) + ids, np.int64)
        return self._known[instruction]


def llama_bytes(text: str) -> list[int]:
    """The text spelled in the 256 byte tokens of Llama 2: for networks that come without a tokenizer."""
    return [BOS, *(3 + byte for byte in text.encode())]


def local_tokenizer(folder: Path) -> Tokenize:
    """The tokenizer of a checkpoint folder, read from its files alone. Raises `UserError` when they are missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{folder} holds no usable tokenizer ({error}); copy tokenizer.json and tokenizer_config.json"
        ) from error
    return lambda text: tokenizer(text)["input_ids"]
