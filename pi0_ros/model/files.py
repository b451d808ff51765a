"""Reading and writing the files of a checkpoint without trusting them: JSON, safetensors, paths inside a folder.

Nothing here runs code from a file. Whatever is wrong with one becomes a `CheckpointError` of one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pi0_ros.wording import shown

MAX_JSON_BYTES = 16 * 2**20  # of a file, or of a safetensors header; real ones have some 100 kB

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: the file, what was found, the way out."""


def inside(folder: Path, name: object) -> Path:
    """`folder / name`, if that stays inside the folder, links followed.

    Two ways out are allowed: that of Hugging Face caches, where `snapshots/REVISION/FILE` links to a file in `blobs/`
    of the same repository, and that of `colcon build --symlink-install`, where `FOLDER/FILE` links to a `FOLDER/FILE`.

    Raises:
        CheckpointError: `name` is no relative path, or leads outside.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{folder}: {shown(name)} is no file name")
    root = folder.resolve()
    path = folder / name
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{path}: cannot be resolved: {error}") from None
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    parts = Path(name).parts
    linked = bool(parts) and resolved.parts[-len(parts) - 1 :] == (root.name, *parts)
    if Path(name).is_absolute() or ".." in parts or not (linked or any(a in resolved.parents for a in allowed)):
        raise CheckpointError(f"{folder}: {shown(name)} leads outside the folder; only files inside it are read")
    return path


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The whole of a small regular file. CheckpointError if there is none or it is larger than `limit` bytes."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, expected at most {limit}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_json(data: bytes, source: object) -> dict[str, Any]:
    """A JSON object whose keys differ; `source` names it in errors. CheckpointError for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except ValueError as error:  # UnicodeDecodeError is one too
        raise CheckpointError(f"{source}: not JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{source}: not JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON mapping, found {shown(value)}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON mapping in the file at `path`. CheckpointError if it cannot be read, or is something else."""
    return parse_json(read_bytes(path), path)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return result


def open_safetensors(path: Path) -> Any:
    """safetensors' memory-mapped reader of `path`, which checks that offsets, shapes and file size agree.

    Raises:
        CheckpointError: no such file, or not a whole and sound safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from None


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype (None: not a float) of each tensor of a safetensors file, by key, without reading any weight.

    Raises:
        CheckpointError: no such file, damaged (see `open_safetensors`), or a key twice.
    """
    open_safetensors(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes, expected at most {MAX_JSON_BYTES}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = parse_json(raw, f"{path} (header)")
    header.pop("__metadata__", None)
    return {key: (tuple(entry["shape"]), DTYPES.get(entry["dtype"])) for key, entry in header.items()}


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`, for JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name and rename it, so that `path` is there whole or not at all, and as it was if not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as they come, one in memory at a time.

    `shapes` names every tensor of `tensors`. The safetensors library writes whole dictionaries only, which would cost
    the weights' size in memory.
    """
    order = sorted(shapes, key=lambda key: (-shapes[key][1].itemsize, key))  # widest first keeps everything aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start, offsets = 0, {}
    for key in order:
        shape, dtype = shapes[key]
        end = start + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        offsets[key], start = start, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # weights that are mapped begin on a cache line
    base = 8 + len(text)
    missing = set(shapes)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(base + start)
        for key, tensor in tensors:
            if (tuple(tensor.shape), tensor.dtype) != shapes[key] or key not in missing:
                raise ValueError(f"{key}: {tensor.dtype} {list(tensor.shape)} was not announced")
            missing.remove(key)
            file.seek(base + offsets[key])
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    if missing:
        raise ValueError(f"no tensor came for {', '.join(sorted(missing))}")


def sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
