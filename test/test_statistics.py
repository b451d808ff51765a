"""Normalisation statistics of every origin come into one form, and what cannot be used is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoint_kit import one_line
from safetensors.torch import save_file

from pi0_ros.model.files import CheckpointError
from pi0_ros.policy.statistics import NormStats, StatisticsError, Stats, find_statistics, load_statistics

OPENPI = {
    "norm_stats": {
        "state": {"mean": [0.5, -1.0], "std": [1.0, 0.0], "q01": [0.0, -1.0], "q99": [2.0, -1.0]},
        "actions": {"mean": [0.0, 0.0], "std": [0.1, 0.2], "q01": None, "q99": None},
    }
}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def test_openpi_statistics_come_in_and_go_out_the_same(tmp_path):
    stats = load_statistics(write(tmp_path / "norm_stats.json", OPENPI))
    assert (
        stats.state.q99.tolist() == [2.0, -1.0] and stats.actions.q01 is None and stats.state.mean.dtype == np.float64
    )
    stats.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == OPENPI
    assert load_statistics(tmp_path / "again.json") == stats


def test_what_never_changed_in_the_data_is_reported():
    stats = NormStats.from_dict(OPENPI)
    assert stats.constant() == ["state[1]"]
    low, high = np.zeros(3), np.array([1.0, 0.0, 1.0])  # the second is the same in 98 % of the data
    seldom = Stats(np.zeros(3), np.array([1.0, 1.0, 0.0]), low, high)
    assert NormStats(seldom, stats.actions).constant() == ["state[1]", "state[2]"]


def test_statistics_are_equal_where_all_their_numbers_are():
    assert Stats([0.0], [1.0]) == Stats([0.0], [1.0])
    assert Stats([0.0], [1.0]) not in (Stats([0.5], [1.0]), Stats([0.0], [2.0]), Stats([0.0], [1.0], [-1.0], [1.0]))


def test_the_statistics_of_one_robot_are_chosen_among_several(tmp_path):
    other = json.loads(json.dumps(OPENPI))
    other["norm_stats"]["state"]["mean"] = [9.0, 9.0]
    write(tmp_path / "assets/trossen/norm_stats.json", OPENPI)
    assert load_statistics(tmp_path).state.mean.tolist() == [0.5, -1.0]
    write(tmp_path / "assets/lab/droid/norm_stats.json", other)
    assert load_statistics(tmp_path, "lab/droid").state.mean.tolist() == [9.0, 9.0]
    assert load_statistics(tmp_path / "assets/trossen/norm_stats.json").state.mean.tolist() == [0.5, -1.0]
    with pytest.raises(StatisticsError, match="several robots, name one: lab/droid, trossen"):
        load_statistics(tmp_path)
    with pytest.raises(StatisticsError, match="no asset 'ur5', there are lab/droid, trossen"):
        load_statistics(tmp_path, "ur5")
    with pytest.raises(StatisticsError, match="no asset '../../etc'"):
        load_statistics(tmp_path, "../../etc")


def test_a_robot_that_is_named_counts_before_the_folders_own_statistics(tmp_path):
    other = json.loads(json.dumps(OPENPI))
    other["norm_stats"]["state"]["mean"] = [9.0, 9.0]
    write(tmp_path / "norm_stats.json", OPENPI)
    write(tmp_path / "assets/droid/norm_stats.json", other)
    assert load_statistics(tmp_path).state.mean.tolist() == [0.5, -1.0]
    assert load_statistics(tmp_path, "droid").state.mean.tolist() == [9.0, 9.0]


def test_assets_beside_the_jax_params_folder_are_found(tmp_path):
    write(tmp_path / "assets/trossen/norm_stats.json", OPENPI)
    (tmp_path / "params").mkdir()
    (tmp_path / "weights").mkdir()
    assert load_statistics(tmp_path / "params") == NormStats.from_dict(OPENPI)
    assert find_statistics(tmp_path / "weights") is None


@pytest.mark.parametrize(
    ("file", "asset_id"),
    [
        ("norm_stats.json", None),
        ("assets/trossen/norm_stats.json", None),
        ("assets/trossen/norm_stats.json", "trossen"),
    ],
)
def test_statistics_cannot_be_a_link_out_of_the_folder(tmp_path, file, asset_id):
    link = tmp_path / "checkpoint" / file
    link.parent.mkdir(parents=True)
    link.symlink_to(write(tmp_path / "secret.json", OPENPI))
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_statistics(tmp_path / "checkpoint", asset_id)


def lerobot(folder, state_file="policy_preprocessor_step_2_normalizer_processor.safetensors"):
    """The two processor files as lerobot writes them: every statistic of every feature, and counts beside them."""
    tensors = {
        "observation.state.mean": torch.tensor([0.5, -1.0]),
        "observation.state.std": torch.tensor([1.0, 0.25]),
        "observation.state.q01": torch.tensor([0.0, -2.0]),
        "observation.state.q99": torch.tensor([2.0, 0.0]),
        "observation.state.min": torch.tensor([-9.0, -9.0]),
        "observation.state.count": torch.tensor([100]),
        "observation.images.top.mean": torch.zeros(3, 1, 1),
        "action.mean": torch.tensor([3.0]),
        "action.std": torch.tensor([4.0]),
    }
    save_file(tensors, folder / "policy_preprocessor_step_2_normalizer_processor.safetensors")
    save_file(tensors, folder / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    steps = [
        {"registry_name": "rename_observations_processor", "config": {}, "state_file": "names.safetensors"},
        {"registry_name": "normalizer_processor", "config": {}},
    ]
    pre = [*steps, {"registry_name": "normalizer_processor", "config": {}, "state_file": state_file}]
    post = {"registry_name": "unnormalizer_processor", "config": {}}
    post["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    write(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": pre})
    write(folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": [post]})
    return folder


def test_lerobot_statistics_are_read_from_the_files_that_its_processors_name(tmp_path):
    stats = load_statistics(lerobot(tmp_path))
    assert stats.state.to_dict() == {"mean": [0.5, -1.0], "std": [1.0, 0.25], "q01": [0.0, -2.0], "q99": [2.0, 0.0]}
    assert stats.actions.to_dict() == {"mean": [3.0], "std": [4.0], "q01": None, "q99": None}


def test_a_robot_that_is_named_is_not_answered_with_the_statistics_of_another_layout(tmp_path):
    with pytest.raises(StatisticsError, match="no asset 'ur5', there is no assets folder"):
        load_statistics(lerobot(tmp_path), "ur5")


def test_processor_files_with_statistics_of_one_side_alone_are_refused(tmp_path):
    weights = lerobot(tmp_path) / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    save_file({"observation.state.mean": torch.zeros(2)}, weights)
    with pytest.raises(StatisticsError, match="the processor files hold no statistics of action"):
        load_statistics(tmp_path)
    write(tmp_path / "policy_preprocessor.json", {"steps": []})
    assert find_statistics(tmp_path) is None
    weights = lerobot(tmp_path) / "policy_preprocessor_step_2_normalizer_processor.safetensors"
    save_file({"action.mean": torch.zeros(2)}, weights)
    with pytest.raises(StatisticsError, match="the processor files hold no statistics of observation.state"):
        load_statistics(tmp_path)


def test_a_processor_file_cannot_name_a_file_outside_its_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="leads outside the folder"):
        load_statistics(lerobot(tmp_path / "a", state_file="../secret.safetensors"))


@pytest.mark.parametrize("steps", ["none", [{}, 3]])
def test_a_processor_file_without_steps_is_refused(tmp_path, steps):
    write(tmp_path / "policy_preprocessor.json", {"steps": steps})
    with pytest.raises(StatisticsError, match="'steps' must be a list"):
        load_statistics(tmp_path)


def test_transformers_statistics_are_in_its_processor_config(tmp_path):
    data = {"state_mean": [1.0], "state_std": [2.0], "actions_mean": [3.0], "actions_std": [4.0]}
    write(tmp_path / "processor_config.json", data)
    stats = load_statistics(tmp_path)
    assert (stats.state.mean[0], stats.state.std[0], stats.actions.mean[0], stats.actions.std[0]) == (1, 2, 3, 4)
    write(tmp_path / "older/preprocessor_config.json", data)
    assert load_statistics(tmp_path / "older") == stats
    write(tmp_path / "processor_config.json", {"state_mean": [1.0]})
    with pytest.raises(StatisticsError, match="state: std missing"):
        load_statistics(tmp_path)
    write(tmp_path / "processor_config.json", {"state_mean": None})
    assert find_statistics(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": [1.0]}, "std has 1 numbers where mean has 2"),
        ({"mean": [0.0, float("nan")]}, r"mean\[1\] must be finite, found \[nan\]"),
        ({"q99": [float("inf"), 1.0]}, r"q99\[0\] must be finite"),
        ({"std": [1.0, -1.0]}, r"std\[1\] must not be negative, found \[-1.0\]"),
        ({"q01": [3.0, -1.0]}, r"q01\[0\] must not be above q99"),
        ({"q01": None}, "q01 is missing where its partner is given"),
        ({"mean": None}, "mean missing"),
        ({"mean": "abc"}, "mean must be a list of numbers, found 'abc'"),
        ({"mean": [[1.0, 2.0]]}, r"mean must be a list of numbers, found shape \[1, 2\]"),
        ({"mean": [], "std": []}, r"mean must be a list of numbers, found shape \[0\]"),
        ({"mean": [1, [2]]}, "mean must be a list of numbers"),
        ({"median": [1.0, 2.0]}, "unknown field median"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(tmp_path, change, message):
    data = json.loads(json.dumps(OPENPI))
    data["norm_stats"]["state"] |= change
    with pytest.raises(StatisticsError, match="norm_stats.json: state: " + message) as error:
        load_statistics(write(tmp_path / "norm_stats.json", data))
    one_line(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected a mapping 'norm_stats'"),
        ({"norm_stats": 3}, "expected a mapping 'norm_stats'"),
        ({"norm_stats": {"state": OPENPI["norm_stats"]["state"]}}, "actions missing"),
        ({"norm_stats": {"state": [1], "actions": [2]}}, "state: expected a mapping with mean and std"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, data, message):
    with pytest.raises(StatisticsError, match=message):
        load_statistics(write(tmp_path / "norm_stats.json", data))


def test_statistics_must_serve_the_normalisation_and_the_robot():
    stats = NormStats.from_dict(OPENPI)
    stats.require("zscore", joints=2)
    stats.require("zscore", joints=1)  # padded statistics: the first ones count
    with pytest.raises(StatisticsError, match="actions: quantile normalisation needs q01 and q99"):
        stats.require("quantile")
    with pytest.raises(StatisticsError, match="state: quantile normalisation needs q01 and q99"):
        NormStats(stats.actions, stats.state).require("quantile")
    with pytest.raises(StatisticsError, match="state: statistics of 2 numbers for a robot of 3 joints"):
        stats.require("zscore", joints=3)
    with pytest.raises(StatisticsError, match="actions: statistics of 2 numbers for a robot of 3 joints"):
        NormStats(Stats(np.zeros(3), np.ones(3)), stats.actions).require("zscore", joints=3)


def test_no_statistics_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(StatisticsError, match="no statistics found"):
        load_statistics(tmp_path)
    assert find_statistics(tmp_path) is None


def test_statistics_cannot_be_changed_by_accident():
    stats = Stats(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="read-only"):
        stats.mean[0] = 1.0
