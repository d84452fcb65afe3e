"""Images as the published code prepares them, on uint8 numpy arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from embodied_rl.errors import UserError

Pixels = tuple[float, float, float]
CROP = 0.9
"""Share of the area that the centre crop keeps."""


@dataclass(frozen=True)
class ImageProcessor:
    """The checkpoint's own image processor (preprocessor_config.json), in two steps: `resize` in the rollout worker,
    `normalise` on the policy's device. Together they give its numbers bit by bit."""

    size: int
    letterbox: tuple[int, int, int] | None = None
    """Colour that pads the image to a square; None stretches it."""
    means: tuple[Pixels, Pixels] = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    """Of the two vision transformers. The published DINOv2 constants are ImageNet's rounded to bfloat16."""
    stds: tuple[Pixels, Pixels] = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))

    @staticmethod
    def from_json(config: Mapping[str, Any], source: str) -> ImageProcessor:
        """From preprocessor_config.json. Raises `UserError` naming `source` for anything else than the published
        bicubic processors."""
        try:
            resizes, crops = config["tvf_resize_params"], config["tvf_crop_params"]
            size = crops[0]["output_size"][0]
            fill = tuple(config["tvf_letterbox_fill"]) if config["tvf_do_letterbox"] else None
            wanted = [[size, size]] if fill is None else [size, [size]]
            usual = all(resize["size"] in wanted and resize["interpolation"] == 3 for resize in resizes)
            same = all(crop["output_size"] == [size, size] for crop in crops)
            dino, siglip = config["tvf_normalize_params"]
            means, stds = ((tuple(dino[name]), tuple(siglip[name])) for name in ("mean", "std"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{source} is not an OpenVLA image processor: {error} is missing or malformed") from error
        if not usual or not same:
            raise UserError(f"{source}: only bicubic resizing to one square size for both backbones is supported")
        return ImageProcessor(size, fill, means, stds)

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3] -> [size,size,3], by Pillow's bicubic filter."""
        height, width = image.shape[:2]
        if self.letterbox is not None and height != width:
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            square = np.full((side, side, 3), self.letterbox, np.uint8)
            square[top : top + height, left : left + width] = image
            image = square
        if image.shape[:2] == (self.size, self.size):
            return image
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [...,size,size,3] -> float32 [...,6,size,size]: for DINOv2, then for SigLIP."""
        unit = images.movedim(-1, -3).float() / 255
        views = []
        for mean, std in zip(self.means, self.stds, strict=True):
            mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (mean, std))
            views.append((unit - mean) / std)
        return torch.cat(views, -3)


Resize = Literal["processor", "lanczos", "jpeg_lanczos"]


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation scripts do before the checkpoint's processor; it has to be what the checkpoint was trained on."""

    resize: Resize = "processor"
    """"lanczos" resizes to the processor's size first, as TensorFlow does; "jpeg_lanczos" does so after a JPEG round
    trip, as the RLDS data sets of training had it."""
    center_crop: bool = False
    """Keep the central 90 % of the area: for checkpoints trained with random crops."""

    def __call__(self, image: np.ndarray, processor: ImageProcessor) -> np.ndarray:
        """uint8 [H,W,3] -> [size,size,3]."""
        if self.resize == "jpeg_lanczos":
            image = jpeg_round_trip(image)
        if self.resize != "processor":
            image = lanczos_resize(image, processor.size)
        if self.center_crop:
            image = center_crop(image, processor.size)
        return processor.resize(image)


def center_crop(image: np.ndarray, size: int, area: float = CROP) -> np.ndarray:
    """TensorFlow's crop_and_resize of the central square with this share of the area, [H,W,3] -> [size,size,3]:
    bilinear between the corners' centres, not antialiased, truncated to uint8 as tf.image.convert_image_dtype does."""
    unit = image.astype(np.float32) / np.float32(255)
    (top, bottom, down), (left, right, across) = (_samples(length, size, area) for length in image.shape[:2])
    # horizontally first, as there: then every pixel is the same
    rows = unit[:, left] + (unit[:, right] - unit[:, left]) * across[:, None]
    out = rows[top] + (rows[bottom] - rows[top]) * down[:, None, None]
    return (out.clip(0, 1) * np.float32(255.5)).astype(np.uint8)


@cache
def _samples(length: int, size: int, area: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of the `size` sample points along an axis of `length` pixels, and how far each is from the first."""
    side = np.sqrt(np.float32(area))
    low = (1 - side) / 2
    points = low * np.float32(length - 1) + np.arange(size, dtype=np.float32) * (
        side * np.float32(length - 1) / (size - 1)
    )
    first = np.floor(points).astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (points - first).astype(np.float32)


def lanczos_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow's antialiased lanczos3, [H,W,3] -> [size,size,3], rounded to uint8."""
    rows, columns = (_lanczos(length, size) for length in image.shape[:2])
    out = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float32), columns, optimize=True)
    return np.rint(out).clip(0, 255).astype(np.uint8)


@cache
def _lanczos(source: int, target: int) -> np.ndarray:
    """Weights float32 [target,source], rows summing to 1."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    x = np.abs(np.arange(source) - centres[:, None]) / max(scale, 1.0)
    weights = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Quality 95, the default of TensorFlow's encoder."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return np.asarray(Image.open(buffer))
