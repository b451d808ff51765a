"""openpi's JAX checkpoints: the orbax `params/` tree, read with tensorstore alone (`pip install tensorstore`).

Orbax stores each array as zarr, under its path in the tree joined by dots (`params.PaliGemma.img.head.kernel.value`),
in one OCDBT database per checkpoint, or in a folder each in older ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi0_ros.model.files import DTYPES, CheckpointError
from pi0_ros.wording import first_line

MAX_ARRAY_BYTES = 2**33  # the largest of a real checkpoint, the VLM's gates in float32, has 5e9
_TENSORSTORE_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def read_params(folder: Path) -> dict[str, torch.Tensor]:
    """Every array of an orbax tree, by its path joined with '/'. The whole tree is held in memory.

    Raises:
        CheckpointError: tensorstore is not installed, the folder is damaged, an array is not of floats.
    """
    try:
        import tensorstore
    except ImportError:
        raise CheckpointError(
            f"{folder}: reading an orbax checkpoint needs tensorstore (pip install tensorstore)"
        ) from None
    stores = _stores(folder, tensorstore)
    if not stores:
        raise CheckpointError(f"{folder}: no arrays found in this orbax checkpoint")
    params = {}
    for name, kvstore in sorted(stores.items()):
        driver = "zarr3" if kvstore.pop("zarr3") else "zarr"
        try:
            store = tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True, read=True).result()
            kind = _TENSORSTORE_DTYPES.get(store.dtype.name)
            if kind is None:
                raise CheckpointError(f"{folder}: {name} has dtype {store.dtype.name}; weights must be floats")
            if store.size * store.dtype.numpy_dtype.itemsize > MAX_ARRAY_BYTES:
                raise CheckpointError(f"{folder}: {name} claims the shape {list(store.shape)}, which is too large")
            array = store.read().result()
        except (ValueError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{folder}: {name} cannot be read: {first_line(error)}") from None
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        params[name.replace(".", "/")] = raw.view(DTYPES[kind]).reshape(array.shape)
    return params


def _stores(folder: Path, tensorstore: Any) -> dict[str, dict[str, Any]]:
    """Array name -> where tensorstore finds it."""
    ends = {"/.zarray": False, "/zarr.json": True}
    if (folder / "manifest.ocdbt").is_file():
        base = {"driver": "ocdbt", "base": f"file://{folder.resolve()}/"}
        try:
            keys = tensorstore.KvStore.open(base).result().list().result()
        except ValueError as error:
            raise CheckpointError(f"{folder}: damaged orbax checkpoint: {first_line(error)}") from None
        names = {key.decode("utf-8", "replace") for key in keys}
        return {
            name.removesuffix(end): {**base, "path": name.removesuffix(end) + "/", "zarr3": zarr3}
            for name in names
            for end, zarr3 in ends.items()
            if name.endswith(end)
        }
    return {
        path.parent.name: {"driver": "file", "path": f"{path.parent.resolve()}/", "zarr3": path.name == "zarr.json"}
        for pattern in ("*/.zarray", "*/zarr.json")
        for path in folder.glob(pattern)
        if folder.resolve() in path.resolve().parents
    }
