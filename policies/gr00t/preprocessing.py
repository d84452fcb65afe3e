"""What GR00T N1.5's data transforms do to images, states and instructions before the network sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embodied_rl.errors import SpecError, UserError, unknown
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pi0.preprocessing import Bytes
from embodied_rl.specs import ObservationSpec


class MinMax(Normaliser):
    """[min, max] to [-1, 1], not clipped; a dimension that the data never moved becomes 0."""

    def __init__(self, size: int) -> None:
        super().__init__("lerobot_min_max", size)

    def normalise(self, x: Tensor) -> Tensor:
        low, high = self.statistics[2], self.statistics[3]
        return torch.where(low == high, 0.0, super().normalise(x))


def see(images: np.ndarray, mask: np.ndarray, crop: float, size: int) -> Tensor:
    """uint8 [B,h,w,3] -> uint8 [B,size,size,3]: the middle `crop` of both sides, bilinear with antialias, aspect ratio
    not kept; black where `mask` [B] is False."""
    height, width = images.shape[1:3]
    rows, columns = int(height * crop), int(width * crop)
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    middle = torch.tensor(images[:, top : top + rows, left : left + columns]).permute(0, 3, 1, 2).float() / 255
    if (rows, columns) != (size, size):
        middle = F.interpolate(middle, (size, size), mode="bilinear", antialias=True)
    seen = (middle * 255).to(torch.uint8).permute(0, 2, 3, 1)  # the reference cuts, it does not round
    return torch.where(torch.tensor(mask)[:, None, None, None], seen, 0)


def choose_cameras(spec: ObservationSpec, chosen: Sequence[str]) -> tuple[str, ...]:
    """The simulator's cameras in the prompt's order. Raises `UserError` for a camera that it has not, `SpecError` when
    it has none."""
    if not spec.cameras:
        raise SpecError("the policy needs images; choose the simulator's observation mode with images")
    for camera in chosen:
        if camera not in spec.cameras:
            raise unknown("camera of the simulator", camera, spec.cameras)
    return tuple(chosen or spec.cameras)


class Tokenizer(Protocol):
    """Any object that turns text into token ids: those of transformers and of tokenizers of your own."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens are written out in it."""
        ...


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a local folder, or "bytes". Raises `UserError` when there is none."""
    if folder == "bytes":
        return Bytes()
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder} with a tokenizer; give that of the Eagle backbone or 'bytes'")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"{folder} holds no tokenizer that can be loaded ({str(error).splitlines()[0]}): copy the tokenizer files "
            f"of the Eagle backbone there, or give their folder with --policy.tokenizer"
        ) from error


def prompt(tokenizer: Tokenizer, instruction: str, images: int, image_token: int, image_tokens: int) -> list[int]:
    """Token ids of the backbone's chat prompt with `images` images of `image_tokens` tokens each. Raises `UserError`
    when the instruction itself holds the image's token."""
    before = "<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n<|im_start|>user\n"
    pieces = [f"<image {number}><img>" for number in range(1, images + 1)]
    pieces = [before + pieces[0], *(f"</img>{piece}" for piece in pieces[1:])]
    pieces.append(f"</img>{instruction}<|im_end|>\n<|im_start|>assistant\n")
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        encoded = list(tokenizer.encode(piece))
        if image_token in encoded:
            raise UserError(f"the instruction '{instruction}' holds the token of an image; leave it out")
        ids += [image_token] * (image_tokens if number else 0) + encoded
    return ids
