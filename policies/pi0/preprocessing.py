"""What openpi's data transforms do to images, states and instructions before the network sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Protocol

import numpy as np
from PIL import Image

from embodied_rl.errors import SpecError, UserError, unknown
from embodied_rl.specs import CAMERA_ALIASES, ObservationSpec

BINS = np.linspace(-1, 1, 257)[:-1]
"""Left edges of π₀.₅'s 256 state bins."""


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h,w,3] -> [size,size,3]: Pillow's antialiased bilinear, aspect ratio kept, centred on black."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    new_height, new_width = int(height / ratio), int(width / ratio)
    small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    padded = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    padded[top : top + new_height, left : left + new_width] = np.asarray(small)
    return padded


def find_views(spec: ObservationSpec, cameras: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """{network's camera: simulator's} for those of `cameras` that the simulator has, by `chosen` or by name. Raises
    `UserError` for a chosen camera it has not, `SpecError` when the first of `cameras` is not found."""
    views: dict[str, str] = {}
    for name in cameras:
        group = next((group for group in CAMERA_ALIASES if name in group), frozenset())
        same = [camera for camera in spec.cameras if camera in group]
        if name in chosen:
            if chosen[name] not in spec.cameras:
                raise unknown("camera of the simulator", chosen[name], spec.cameras)
            views[name] = chosen[name]
        elif name in spec.cameras:
            views[name] = name
        elif len(same) == 1:
            views[name] = same[0]
    if cameras[0] not in views:
        has = ", ".join(spec.cameras) or "none; choose its observation mode with images"
        raise SpecError(
            f"the policy needs an image for its camera '{cameras[0]}'; the simulator's cameras: {has}. "
            f'Say which with --policy.cameras \'{{"{cameras[0]}": "..."}}\''
        )
    return views


class Tokenizer(Protocol):
    """Any object that turns text into token ids: those of transformers and of tokenizers of your own."""

    bos_token_id: int
    """Begins a prompt."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with or without `bos_token_id` in front."""
        ...


class Bytes:
    """UTF-8 bytes as tokens, for networks trained here; ids 0 to 2 are padding, end and beginning."""

    bos_token_id = 2

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a local folder, or "bytes". Raises `UserError` when there is none."""
    if folder == "bytes":
        return Bytes()
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"no folder {folder} with a tokenizer; give PaliGemma's (google/paligemma-3b-pt-224) or 'bytes'"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be loaded ({str(error).splitlines()[0]}): copy PaliGemma's "
            f"tokenizer.json and tokenizer_config.json there, or give their folder with --policy.tokenizer"
        ) from error
    if tokenizer.bos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no beginning-of-sequence token; it is not PaliGemma's")
    return tokenizer


def clean(instruction: str) -> str:
    """An instruction on one line, without underscores."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def pi0_prompt(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """Token ids of π₀'s prompt: the instruction and a newline, encoded apart."""
    return [tokenizer.bos_token_id, *_ids(tokenizer, clean(instruction)), *_ids(tokenizer, "\n")]


def state_bins(state: np.ndarray) -> np.ndarray:
    """Bins [...,S] of normalised states: 0..255 in [-1, 1], -1 below, 255 above."""
    return np.digitize(state, BINS) - 1


def pi05_text(instruction: str, state: np.ndarray) -> str:
    """π₀.₅'s prompt for a normalised, unpadded state [S]."""
    return f"Task: {clean(instruction)}, State: {' '.join(map(str, state_bins(state)))};\nAction: "


def pi05_prompt(tokenizer: Tokenizer, instruction: str, state: np.ndarray) -> list[int]:
    """Token ids of `pi05_text`."""
    return [tokenizer.bos_token_id, *_ids(tokenizer, pi05_text(instruction, state))]


def pad(prompts: Sequence[Sequence[int]], instructions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids int64, mask bool) [B,length], padded with 0 on the right. Raises `UserError` naming the instruction
    whose prompt is longer."""
    tokens = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, instruction) in enumerate(zip(prompts, instructions, strict=True)):
        if len(prompt) > length:
            raise UserError(
                f"the prompt of '{shorten(instruction, 60)}' has {len(prompt)} tokens, the policy takes {length}: "
                f"shorten the instruction or raise --policy.prompt-length"
            )
        tokens[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return tokens, mask


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = list(tokenizer.encode(text))
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
