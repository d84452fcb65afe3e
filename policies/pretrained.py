"""Published weights in and out: safetensors, in one file or in shards with an index, mapped into memory rather than
read, and checked against the module before anything is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from embodied_rl.errors import UserError

SHOWN = 3
"""Keys named in an error."""


def read_json(path: Path) -> dict:
    """The JSON object in `path`; raises `UserError` when there is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not a JSON object; copy it again")
    return found


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a checkpoint: `stem`.safetensors, or the shards listed in `stem`.safetensors.index.json.

    Raises `UserError` when there are none or a shard is missing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder} holds neither {single.name} nor {index.name}: give the folder of a checkpoint")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map of file names; copy it again")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{index} lists {file.name}, which is not in {folder}; copy the missing shard")
    return files


def read_weights(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU in their stored type; bytes are read when they are used.

    Raises `UserError` naming the file that is missing, truncated or damaged, or the key that the index promises and no
    shard holds.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder, stem):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    weights[key] = opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or damaged ({error}); copy it again") from error
    index = folder / f"{stem}.safetensors.index.json"
    if not (folder / f"{stem}.safetensors").is_file():
        absent = sorted(read_json(index)["weight_map"].keys() - weights.keys())
        if absent:
            raise UserError(f"{index} lists {_some(absent)}, which no shard holds; copy the shards again")
    return weights


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Make `weights` the parameters and buffers of `module`, whatever they were (also on the meta device).

    Raises `UserError` naming `source` and up to three keys when one is missing, unexpected or shaped otherwise; then
    `module` is as it was.
    """
    wanted = module.state_dict()
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    misshapen = [
        f"{key} ({tuple(weights[key].shape)} instead of {tuple(value.shape)})"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = {"has no": missing, "has the unexpected": unexpected, "has another shape of": misshapen}
    if found := [f"{what} {_some(keys)}" for what, keys in problems.items() if keys]:
        raise UserError(f"{source} does not fit the model: it {'; it '.join(found)}. Is it of another family or size?")
    module.load_state_dict(dict(weights), assign=True)


def write_weights(folder: Path, weights: Mapping[str, Tensor], stem: str = "model", shard_bytes: float = 5e9) -> None:
    """Write `weights` as `stem`.safetensors, or in shards of at most `shard_bytes` with an index when they are larger.

    Nothing that was there is replaced before everything is written. Raises `UserError` when the disk refuses.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    shards = list(_shards(weights, shard_bytes))
    count = len(shards)
    files = [folder / f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = [single]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, shard in zip(files, shards, strict=True):
            whole = {key: value.detach().cpu().contiguous() for key, value in shard.items()}
            save_file(whole, _partial(file), metadata={"format": "pt"})
        old = set(folder.glob(f"{stem}-*-of-*.safetensors")) | {single, index}
        for file in files:
            _partial(file).replace(file)
        if count > 1:
            content = {
                "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
                "weight_map": {key: file.name for file, shard in zip(files, shards, strict=True) for key in shard},
            }
            _partial(index).write_text(json.dumps(content, indent=2))
            _partial(index).replace(index)
            files.append(index)
        for file in old.difference(files):
            file.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; free disk space or choose another place") from error


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _shards(weights: Mapping[str, Tensor], shard_bytes: float) -> Iterator[dict[str, Tensor]]:
    """The weights in order, cut so that no part exceeds `shard_bytes` (a larger tensor is a part of its own)."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, value in weights.items():
        if shard and size + value.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[key] = value
        size += value.nbytes
    yield shard


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def save_heads(folder: Path, heads: Mapping[str, nn.Module | None]) -> None:
    """Write `heads` for `load_heads`, to a file of their own that only we read. Raises `UserError` as `write_weights`
    does."""
    own = {f"{name}.{key}": value for name, head in heads.items() if head for key, value in head.state_dict().items()}
    write_weights(folder, own, "heads")


def load_heads(folder: Path, heads: Mapping[str, nn.Module | None]) -> None:
    """Weights of `folder`/heads.safetensors for those of `heads` that it has; the others stay new. Raises `UserError`
    for other sizes."""
    path = folder / "heads.safetensors"
    if not path.is_file():
        return
    weights = read_weights(folder, "heads")
    for name, head in heads.items():
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        if head is not None and own:
            load_strict(head, own, path)
