"""Robot units to model space and back, equal to openpi's transforms."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from pi0_ros.model.config import PRESETS
from pi0_ros.policy import aloha
from pi0_ros.policy.bundle import BundleSettings, misfit
from pi0_ros.policy.statistics import NormStats, StatisticsError, Stats, load_statistics
from pi0_ros.policy.transforms import (
    AbsoluteActions,
    Group,
    Normalize,
    Pad,
    RelativeActions,
    Unnormalize,
    build_transforms,
)
from pi0_ros.robot import Joint
from pi0_ros.robot_file import load_robot

HERE = Path(__file__).parent
ROBOT = load_robot(HERE.parent / "config" / "so101_demo.yaml")  # five relative joints, a gripper open at 1.745
NANO = BundleSettings(PRESETS["nano"])
finite = st.floats(-1e3, 1e3)


@pytest.fixture(scope="module")
def fixture():
    return load_file(HERE / "data" / "transforms.safetensors")


@pytest.fixture(scope="module")
def stats():
    return load_statistics(HERE / "data" / "norm_stats.json")


def statistics(dims, seed=0):
    rng = np.random.default_rng(seed)

    def one():
        low = rng.normal(size=dims)
        return Stats(rng.normal(size=dims), rng.uniform(0.1, 2, dims), low, low + rng.uniform(0.1, 3, dims))

    return NormStats(one(), one())


def long_stats(fixture):
    parts = {
        key: Stats(*(fixture[f"long_stats.{key}.{name}"] for name in ("mean", "std", "q01", "q99")))
        for key in ("state", "actions")
    }
    return NormStats(**parts)


@pytest.mark.parametrize(("short", "quantile"), [("z", False), ("q", True)])
def test_normalisation_equals_openpi(fixture, stats, short, quantile):
    data = {key: fixture[f"norm.in.{key}"].astype(np.float64) for key in ("state", "actions")}
    normalised = Normalize(stats, quantile)(data)
    of_long = Normalize(long_stats(fixture), quantile)(data)
    back = Unnormalize(stats, quantile)({key: fixture[f"norm.{short}.{key}"] for key in data})
    padded = {key: fixture[f"unnorm.in_padded.{key}"].astype(np.float64) for key in data}
    padded = Unnormalize(stats, quantile)(padded)
    for key in data:
        np.testing.assert_allclose(normalised[key], fixture[f"norm.{short}.{key}"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(of_long[key], fixture[f"norm.{short}.long_stats.{key}"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(back[key], fixture[f"unnorm.{short}.{key}"], rtol=1e-12, atol=1e-12)
        # openpi adds 1 in the input's float32 here
        np.testing.assert_allclose(padded[key], fixture[f"unnorm.{short}.padded.{key}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["6_-1", "6_-1_6_-1", "batched"])
def test_relative_actions_equal_openpi(fixture, case):
    mask = tuple(fixture["delta.6_-1.mask" if case == "batched" else f"delta.{case}.mask"].tolist())
    data = {key: fixture[f"delta.{case}.in.{key}"] for key in ("state", "actions")}
    before = data["actions"].copy()
    relative = RelativeActions(mask)(data)
    np.testing.assert_allclose(relative["actions"], fixture[f"delta.{case}.delta"], atol=1e-6)
    np.testing.assert_array_equal(data["actions"], before)  # nothing in place
    if case != "batched":
        absolute = AbsoluteActions(mask)(relative)["actions"]
        np.testing.assert_allclose(absolute, fixture[f"delta.{case}.absolute_of_delta"], atol=1e-6)
        shifted = AbsoluteActions(mask)(data)["actions"]
        np.testing.assert_allclose(shifted, fixture[f"delta.{case}.absolute"], atol=1e-6)


def test_padding_equals_openpi(fixture):
    padded = Pad(32)({key: fixture[f"norm.in.{key}"][0] for key in ("state", "actions")})
    for key in padded:
        np.testing.assert_array_equal(padded[key], fixture[f"pad32.{key}"])


def test_aloha_equals_openpi(fixture):
    for row, expected in zip(fixture["aloha.state.in"], fixture["aloha.state.decoded"], strict=True):
        np.testing.assert_allclose(aloha.to_pi({"state": row.astype(np.float64)})["state"], expected, atol=1e-6)
    actions = fixture["aloha.actions.in"].astype(np.float64)
    encoded = aloha.from_pi({"actions": actions})["actions"]
    np.testing.assert_allclose(encoded, fixture["aloha.actions.encoded"], atol=1e-6)
    inverse = aloha.to_pi({"actions": actions})["actions"]
    np.testing.assert_allclose(inverse, fixture["aloha.actions.encoded_inv"], atol=1e-6)
    outputs = aloha.from_pi({"actions": fixture["aloha.outputs.in"][:, :14].astype(np.float64)})["actions"]
    np.testing.assert_allclose(outputs, fixture["aloha.outputs.adapt"], atol=1e-6)


def test_the_adapter_chooses_the_maps():
    state = np.linspace(0.1, 1.4, 14)
    settings = dataclasses.replace(NANO, adapter="aloha")
    adapted = build_transforms(BIMANUAL, None, settings).encode(state)["state"]
    np.testing.assert_array_equal(adapted, aloha.to_pi({"state": state})["state"])
    assert np.abs(adapted - build_transforms(BIMANUAL, None, NANO).encode(state)["state"]).max() > 0.1


def test_aloha_needs_its_fourteen_joints():
    settings = dataclasses.replace(NANO, adapter="aloha")
    assert "aloha adapter is for two arms of six joints and a gripper" in misfit(settings, ROBOT)


def test_the_pair_that_goes_in_last_comes_out_first():
    def named(name):
        return lambda data: {**data, "actions": np.append(data["actions"], name)}

    group = Group().push((named(1), named(-1))).push((named(2), named(-2)), (named(3), named(-3)))
    assert group.encode(np.zeros(1), np.zeros(0))["actions"].tolist() == [1, 2, 3]
    assert group.decode(np.zeros(1), np.zeros(0)).tolist() == [-3, -2, -1]


def test_grippers_are_zero_when_open_and_one_when_closed():
    group = build_transforms(ROBOT, None, NANO)
    state = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 1.745])
    actions = np.tile([0.3, 0.2, 0.3, 0.4, 0.4, -0.174], (2, 1))
    data = group.encode(state, actions)
    np.testing.assert_allclose(data["state"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.0])
    np.testing.assert_allclose(data["actions"], np.tile([0.2, 0, 0, 0, -0.1, 1.0], (2, 1)), atol=1e-12)
    back = group.decode(data["state"], data["actions"])
    np.testing.assert_allclose(back, np.tile([0.3, 0.2, 0.3, 0.4, 0.4, -0.174], (2, 1)))
    # Nothing in place.
    assert (state[5], actions[0, 5], data["state"][5], data["actions"][0, 5]) == (1.745, -0.174, 0.0, 1.0)


def test_each_gripper_of_a_robot_of_two_arms_is_zero_when_open_and_one_when_closed():
    state = np.zeros(14)
    state[[6, 13]] = 1.49, -0.62
    group = build_transforms(BIMANUAL, None, NANO)
    data = group.encode(state)
    np.testing.assert_allclose(data["state"][[6, 13]], [0.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(
        group.decode(data["state"], np.tile(data["state"], (2, 1)))[:, [6, 13]], [[1.49, -0.62]] * 2
    )


def test_a_robot_is_normalised_and_padded_for_the_model():
    stats = statistics(6)
    data = build_transforms(ROBOT, stats, NANO).encode(np.zeros(6), np.zeros((30, 6)))
    assert data["state"].shape == (32,)
    assert data["actions"].shape == (30, 32)
    assert not data["state"][6:].any()
    assert data["state"][0] == pytest.approx(-stats.state.mean[0] / (stats.state.std[0] + 1e-6))


@pytest.mark.parametrize("preset", ["nano", "pi05"])
@pytest.mark.parametrize(("normalisation", "expected"), [("zscore", 0.25), ("quantile", -0.5)])
def test_the_settings_choose_the_normalisation_whatever_the_model(preset, normalisation, expected):
    one = Stats(np.full(6, 0.5), np.full(6, 2.0), np.zeros(6), np.full(6, 4.0))
    settings = BundleSettings(PRESETS[preset], normalisation=normalisation)
    state = build_transforms(ROBOT, NormStats(one, one), settings).encode(np.ones(6))["state"]
    assert state[0] == pytest.approx(expected, abs=1e-5)


BIMANUAL = load_robot(HERE.parent / "config" / "bimanual.yaml")
VARIED = ROBOT.model_copy(
    update={
        "joints": (
            *ROBOT.joints[:4],
            Joint(name="slide", kind="prismatic", position=(0, 1), velocity=1, acceleration=1, action="absolute"),
            ROBOT.joints[5].model_copy(update={"action": "relative"}),
        )
    }
)


def test_actions_are_relative_where_the_robot_file_says_so_whatever_the_kind_of_joint():
    state, action = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 1.361]), np.array([0.3, 0.3, 0.3, 0.3, 0.7, -0.174])
    data = build_transforms(VARIED, None, NANO).encode(state, action[None])
    np.testing.assert_allclose(data["actions"], [[0.2, 0.1, 0.0, -0.1, 0.7, 1.535 / 1.919]], atol=1e-12)
    data = build_transforms(ROBOT, None, NANO).encode(state, action[None])
    np.testing.assert_allclose(data["actions"], [[0.2, 0.1, 0.0, -0.1, 0.2, 1.0]], atol=1e-12)


def test_whole_numbers_are_not_cut_off():
    data = build_transforms(ROBOT, None, NANO).encode(np.array([0, 0, 0, 0, 0, 1]), np.array([[0, 0, 0, 0, 0, 1]]))
    assert data["state"][5] == data["actions"][0, 5] == pytest.approx(0.745 / 1.919)


@pytest.mark.parametrize("robot", [ROBOT, VARIED, BIMANUAL], ids=["so101", "varied", "bimanual"])
@given(data=st.data(), normalisation=st.sampled_from(["zscore", "quantile"]))
def test_actions_come_back_as_they_went(robot, data, normalisation):
    joints = len(robot.joints)
    group = build_transforms(robot, statistics(joints), dataclasses.replace(NANO, normalisation=normalisation))
    state = data.draw(arrays(np.float64, (2, joints), elements=finite))
    actions = data.draw(arrays(np.float64, (2, 3, joints), elements=finite))
    encoded = group.encode(state, actions)
    np.testing.assert_allclose(group.decode(encoded["state"], encoded["actions"]), actions, atol=1e-9)
    one = group.encode(state[1])["state"]  # the node has no actions yet, and no batch
    np.testing.assert_array_equal(one, encoded["state"][1])
    np.testing.assert_allclose(group.decode(one, encoded["actions"][1]), actions[1], atol=1e-9)


@given(arrays(np.float64, (4, 14), elements=st.floats(-3, 3)), arrays(np.float64, 14, elements=st.floats(0, 1)))
def test_aloha_actions_come_back_as_they_went(actions, state):
    group = build_transforms(BIMANUAL, statistics(14), dataclasses.replace(NANO, adapter="aloha"))
    encoded = group.encode(state, actions)
    np.testing.assert_allclose(group.decode(encoded["state"], encoded["actions"]), actions, atol=1e-9)


def test_statistics_of_fewer_joints_are_refused():
    with pytest.raises(StatisticsError, match="statistics of 5 numbers for a robot of 6 joints"):
        build_transforms(ROBOT, statistics(5), NANO)


def test_statistics_of_32_dimensions_serve_a_smaller_robot():
    long, short = statistics(32), statistics(32)
    short = NormStats(
        *(Stats(*(getattr(s, n)[:6] for n in ("mean", "std", "q01", "q99"))) for s in (short.state, short.actions))
    )
    state = np.linspace(-1, 1, 6)
    actions = np.linspace(-1, 1, 12).reshape(2, 6)
    of_long, of_short = (build_transforms(ROBOT, s, NANO).encode(state, actions) for s in (long, short))
    np.testing.assert_array_equal(of_long["actions"], of_short["actions"])
    back = build_transforms(ROBOT, long, NANO).decode(of_long["state"], of_long["actions"])
    np.testing.assert_allclose(back, actions, atol=1e-12)


def test_a_model_of_fewer_dimensions_than_joints_is_refused():
    small = BundleSettings(dataclasses.replace(PRESETS["nano"], action_dim=4))
    assert "has 6 joints, the model 4 action dimensions" in misfit(small, ROBOT)
    assert misfit(BundleSettings(dataclasses.replace(PRESETS["nano"], action_dim=6)), ROBOT) == ""


def test_a_camera_that_a_robot_does_not_have_needs_no_slot_in_the_model():
    slots = tuple(ROBOT.present_cameras)
    missing = next(slot for slot in NANO.model.cameras if slot not in slots)
    robot = ROBOT.model_copy(update={"cameras": {**ROBOT.cameras, missing: None}})
    settings = BundleSettings(dataclasses.replace(PRESETS["nano"], cameras=slots))
    assert misfit(settings, robot) == ""
