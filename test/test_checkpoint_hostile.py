"""Damaged and hostile files: each is one clear line, nothing outside the folder is read, nothing runs."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_kit import TINY, one_line, random_weights, raw_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pi0_ros.model.checkpoint import CheckpointError, open_checkpoint
from pi0_ros.model.files import inside, parse_json, read_header, read_json, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", None),
        (b"\x80\x04pickle", b"", None),
        (b"{", b"", None),
        (b"[]", b"", None),
        (b"[" * 100_000, b"", None),
        ({"a": ENTRY}, bytes(8), 2**63),  # a header longer than any file
        ({"a": ENTRY}, bytes(8), 10**8),
        ({"a": ENTRY}, bytes(4), None),  # truncated
        ({"a": ENTRY}, bytes(80), None),  # more than declared
        ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": "two"}}, bytes(8), None),
        ({"a": {**ENTRY, "dtype": "OBJECT"}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {**ENTRY, "data_offsets": [0, 2**63]}}, bytes(8), None),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), None),  # two tensors on the same bytes
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, bytes(24), None),  # a hole
        ({"a": 1}, bytes(8), None),
    ],
)
def test_a_damaged_safetensors_file_is_one_clear_error(tmp_path, header, data, length):
    path = raw_safetensors(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
        open_checkpoint(path, config=TINY)
    one_line(error.value)


def test_a_header_of_absurd_size_is_not_parsed(tmp_path):
    text = json.dumps({"a": ENTRY}).encode() + b" " * (17 * 2**20)
    path = raw_safetensors(tmp_path / "x.safetensors", text, bytes(8))
    with pytest.raises(CheckpointError, match="a header of 178.* bytes, expected at most 16777216"):
        read_header(path)


def test_a_key_twice_in_a_header_is_refused(tmp_path):
    entry = json.dumps(ENTRY)
    path = raw_safetensors(tmp_path / "x.safetensors", f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(8))
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(path)


def test_integers_and_empty_tensors_are_no_weights(tmp_path):
    weights = random_weights(TINY)
    for value in (torch.ones(32, dtype=torch.int64), torch.ones(0)):
        weights["state_proj.bias"] = value
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match="weights must be F64, F32, F16, BF16 and not empty.* state_proj.bias"
        ):
            open_checkpoint(tmp_path, config=TINY)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_or_missing_byte_escapes_as_another_error(tmp_path, data):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 33))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as error:
        one_line(error)
    else:
        assert sum(len(shape) for shape, _ in header.values()) <= 4


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", ".", "a\0b"]
)
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="leads outside|no file name") as error:
        open_checkpoint(index(folder, {"a": name}), config=TINY)
    one_line(error.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(random_weights(TINY), tmp_path / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        open_checkpoint(folder, config=TINY)
    (folder / "model.safetensors").unlink()
    save_file(random_weights(TINY), folder / "model.safetensors")
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        open_checkpoint(folder, config=TINY)


def test_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(random_weights(TINY), blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_checkpoint(snapshot, config=TINY).config == TINY
    save_file(random_weights(TINY), tmp_path / "other")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../other")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_checkpoint(snapshot, config=TINY)
    elsewhere = tmp_path / "runs/abc"  # the same two folders up, but in no cache
    elsewhere.mkdir(parents=True)
    (elsewhere / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_checkpoint(elsewhere, config=TINY)


def test_a_link_to_the_folder_itself_is_fine_and_a_loop_is_not(tmp_path):
    (tmp_path / "step_100").mkdir()
    save_file(random_weights(TINY), tmp_path / "step_100/model.safetensors")
    (tmp_path / "last").symlink_to("step_100")
    assert open_checkpoint(tmp_path / "last", config=TINY).num_tensors == 88
    (tmp_path / "step_100/loop").symlink_to("loop")
    with pytest.raises(CheckpointError):
        read_header(inside(tmp_path / "step_100", "loop"))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([1], "'weight_map' must be a mapping"),
        ({}, "'weight_map' must be a mapping"),
        ({"a": 3}, "the file of a must be a name, found 3"),
        ({"a": "absent.safetensors"}, "absent.safetensors: no such file"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"missing in their shard: b \(one.safetensors\)"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, r"in a shard but not in the index: d \(two.safetensors\)"),
    ],
)
def test_an_index_that_its_shards_do_not_bear_out_is_refused(tmp_path, weight_map, message):
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(1), "d": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(index(tmp_path, weight_map), config=TINY)
    one_line(error.value)


def test_a_truncated_shard_is_named(tmp_path):
    save_file(random_weights(TINY), tmp_path / "one.safetensors")
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"one\.safetensors: damaged"):
        open_checkpoint(index(tmp_path, dict.fromkeys(random_weights(TINY), "one.safetensors")), config=TINY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[1, 2]", r"expected a JSON mapping, found \[1, 2\]"),
        (b"null", "expected a JSON mapping, found None"),
        (b'{"a": 1, "a": 2}', "key 'a' stands there twice"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"cos\nsystem\n(S'true'\ntR.", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),  # Python itself refuses such a number
    ],
)
def test_json_that_is_no_mapping_is_one_clear_error(text, message):
    with pytest.raises(CheckpointError, match="config.json: " + message) as error:
        parse_json(text, "config.json")
    one_line(error.value)


def test_a_huge_json_file_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="2147483648 bytes, expected at most"):
        read_json(tmp_path / "config.json")


def test_a_folder_where_a_file_should_be_is_one_clear_error(tmp_path):
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, config=TINY)


def test_written_files_are_read_by_the_library_and_hold_any_mix_of_dtypes(tmp_path):
    tensors = {"half": torch.ones(3, dtype=torch.bfloat16), "full": torch.arange(5.0), "odd": torch.ones(1).half()}
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", shapes, reversed(tensors.items()), {"note": "hi"})
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt", "note": "hi"}
        assert all(torch.equal(reader.get_tensor(key), value) for key, value in tensors.items())


def test_writing_refuses_a_tensor_that_was_not_announced_or_never_came(tmp_path):
    shapes = {"a": ((2,), torch.float32), "b": ((1,), torch.float32)}
    with pytest.raises(ValueError, match="no tensor came for b"):
        write_safetensors(tmp_path / "x", shapes, [("a", torch.ones(2))])
    with pytest.raises(ValueError, match="was not announced"):
        write_safetensors(tmp_path / "x", shapes, [("a", torch.ones(3))])


def test_a_folder_installed_by_links_is_read(tmp_path):
    source, installed = tmp_path / "source/policy", tmp_path / "install/share/policy"
    for folder in (source / "tokenizer", installed / "tokenizer"):
        folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer/words.json"):
        (source / name).write_text("{}")
        (installed / name).symlink_to(source / name)
        assert inside(installed, name).read_text() == "{}"
    (installed / "other.json").symlink_to(source / "config.json")
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        inside(installed, "other.json")
