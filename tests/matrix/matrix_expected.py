"""What each network has to see and each simulator has to execute: slow, in numpy and Pillow, from what is known of the
original code."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matrix_families import (
    EMPTY,
    FLOW_SIZE,
    OPENVLA_SIZE,
    PAD,
    PIXELS,
    PROMPT,
    VOCABULARY,
    Dataset,
)
from PIL import Image

DIGITS = 1e-3
"""A pixel's value nearer to the next whole number than this may be either."""


# -- images ---------------------------------------------------------------------------------------------------------


def openvla_pixels(images: Sequence[np.ndarray], evaluated_in_libero: bool) -> np.ndarray:
    """[N,6,S,S] of uint8 [H,W,3] images: for DINOv2, then for SigLIP."""
    size, found = OPENVLA_SIZE, []
    for image in images:
        if evaluated_in_libero:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=95)
            image = _lanczos3(np.asarray(Image.open(buffer)), size)
            image = _middle(image, size)
        seen = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)
        found.append([(seen / 255 - mean) / std for mean, std in zip(*map(np.array, PIXELS.values()), strict=True)])
    return np.array(found).transpose(0, 1, 4, 2, 3).reshape(len(images), 6, size, size)


def _lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """tf.image.resize(method="lanczos3", antialias=True), one axis after the other."""
    scale = len(image) / size
    out = image.astype(np.float64)
    for _ in range(2):
        rows = np.zeros((size, *out.shape[1:]))
        for target in range(size):
            centre, weights = (target + 0.5) * scale, []
            for source in range(len(out)):
                x = (source + 0.5 - centre) / max(scale, 1)
                sinc = 1.0 if x == 0 else 3 * math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2
                weights.append(sinc if abs(x) < 3 else 0.0)
            rows[target] = np.tensordot(np.array(weights) / sum(weights), out, 1)
        out = rows.transpose(1, 0, 2)
    return np.rint(out).clip(0, 255).astype(np.uint8)


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    """tf.image.crop_and_resize of the central 90 % of the area, back to uint8."""
    side = math.sqrt(0.9)
    points = [(1 - side) / 2 * (len(image) - 1) + i * side * (len(image) - 1) / (size - 1) for i in range(size)]
    out = np.zeros((size, size, 3))
    for row, y in enumerate(points):
        for column, x in enumerate(points):
            top, left = int(y), int(x)
            bottom, right = min(top + 1, len(image) - 1), min(left + 1, len(image) - 1)
            for i, j, weight in (
                (top, left, (1 - y + top) * (1 - x + left)),
                (top, right, (1 - y + top) * (x - left)),
                (bottom, left, (y - top) * (1 - x + left)),
                (bottom, right, (y - top) * (x - left)),
            ):
                out[row, column] += weight * image[i, j] / 255
    return (out.clip(0, 1) * 255.5).astype(np.uint8)


def pi0_pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """[N,3,S,S] in [-1, 1]; square images need no padding."""
    small = [Image.fromarray(image).resize((FLOW_SIZE,) * 2, Image.Resampling.BILINEAR) for image in images]
    return np.array([np.asarray(image) for image in small]).transpose(0, 3, 1, 2) / 255 * 2 - 1


def gr00t_levels(images: Sequence[np.ndarray]) -> np.ndarray:
    """[N,3,S,S], what is cut to whole numbers of 255: the middle 95 %, bilinear with antialias."""
    found = []
    for image in images:
        kept = int(0.95 * len(image))
        first = round((len(image) - kept) / 2)
        middle = image[first : first + kept, first : first + kept].astype(np.float32)
        channels = [
            Image.fromarray(middle[..., c]).resize((FLOW_SIZE,) * 2, Image.Resampling.BILINEAR) for c in range(3)
        ]
        found.append([np.asarray(channel) for channel in channels])
    return np.array(found)


# -- prompts --------------------------------------------------------------------------------------------------------


def openvla_prompts(instructions: Sequence[str]) -> list[list[int]]:
    return [_left(f"In: What action should the robot take to {text.lower()}?\nOut:") for text in instructions]


def _left(text: str) -> list[int]:
    ids = [3 + byte for byte in text.encode()] + [EMPTY]
    return [PAD] * (PROMPT["openvla"] - len(ids)) + ids


def pi0_prompts(instructions: Sequence[str], family: str = "pi0") -> list[list[int]]:
    return [_right(family, [2, *_bytes(text), *_bytes("\n")]) for text in instructions]


def pi05_prompts(instructions: Sequence[str], states: np.ndarray) -> list[list[int]]:
    """`states` as normalised."""
    found = []
    for text, state in zip(instructions, states, strict=True):
        bins = [-1 if x < -1 else min(255, math.floor((x + 1) * 128)) for x in state]
        found.append(_right("pi05", [2, *_bytes(f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: ")]))
    return found


def gr00t_prompts(instructions: Sequence[str], images: int) -> list[list[int]]:
    patches, found = [1] * 16, []
    for text in instructions:
        ids = _bytes("<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n<|im_start|>user\n")
        for image in range(1, images + 1):
            ids += [*_bytes(f"<image {image}><img>"), *patches, *_bytes("</img>")]
        found.append(_right("gr00t", ids + _bytes(f"{text}<|im_end|>\n<|im_start|>assistant\n")))
    return found


def _bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def _right(family: str, ids: list[int]) -> list[int]:
    return ids + [0] * (PROMPT[family] - len(ids))


# -- states and actions ---------------------------------------------------------------------------------------------


def normalised_state(family: str, state: np.ndarray, data: Dataset) -> np.ndarray:
    """[N,S] in the network's units."""
    has = data.state
    if family == "pi0":
        return (state - has["mean"]) / (has["std"] + 1e-6)
    if family == "pi05":
        return (state - has["q01"]) / (has["q99"] - has["q01"] + 1e-6) * 2 - 1
    if family == "gr00t":
        return (state - has["min"]) / (has["max"] - has["min"]) * 2 - 1
    return np.clip(2 * (state - has["q01"]) / (has["q99"] - has["q01"] + 1e-8) - 1, -1, 1)


def decoded(tokens: np.ndarray) -> np.ndarray:
    """Action tokens as numbers in (-1, 1): 256 edges, 255 centres between them."""
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    return centres[np.clip(VOCABULARY - tokens - 1, 0, 254)]


def executed(
    family: str, output: np.ndarray, data: Dataset, opens: int | None, origin: np.ndarray | None = None
) -> np.ndarray:
    """The simulator's actions [...,7] for the network's [...,7 and more], numbers; `opens` is the sign that opens the
    simulator's gripper, None when the data's is the same; π₀'s first actions of row i are relative to `origin[i]`."""
    has, output = data.action, output[..., :7].astype(np.float64)
    if family == "pi0":
        actions = output * (has["std"] + 1e-6) + has["mean"]
        for row, start in enumerate([] if origin is None else origin):
            for step in actions[row]:
                step[: len(start)] += start
        return np.clip(actions, -1, 1)
    if family == "pi05":
        return np.clip((output + 1) / 2 * (has["q99"] - has["q01"] + 1e-6) + has["q01"], -1, 1)
    if family == "gr00t":
        actions = (output + 1) / 2 * (has["max"] - has["min"]) + has["min"]
        if opens is not None:  # the original rounds to -1 or 1, LIBERO takes the sign
            actions[..., 6] = opens * (2 * np.clip(actions[..., 6], 0, 1) - 1)
        return np.clip(actions, -1, 1)
    epsilon = 1e-8 if family == "openvla_oft" else 0.0
    actions = 0.5 * (output + 1) * (has["q99"] - has["q01"] + epsilon) + has["q01"]
    # the gripper is not scaled: 1 is open, and only which of both it is nearer to counts
    assert opens is not None
    actions[..., 6] = opens * np.sign(2 * output[..., 6] - 1)
    return np.clip(actions, -1, 1)
