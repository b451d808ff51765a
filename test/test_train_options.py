"""What a run can be told: what options do to the data, where they come from, and which cannot be."""

from __future__ import annotations

import bag_kit
import pytest

from pi0_ros.training.data import load_units


@pytest.fixture(scope="module")
def rested(tmp_path_factory):
    """A recording of three seconds, in the first of which nothing moves."""
    later = bag_kit.episode(bag_kit.START + bag_kit.SECOND, seconds=2.0)
    still = bag_kit.episode(seconds=1.0)
    for item in still:
        if item.topic == "/joint_states":
            item.message.position[:] = [0.0, 0.5, 1.0]
        elif item.topic == "/command":
            item.message.points[0].positions[:] = [0.0, 0.5, 1.0]
    return bag_kit.write_bag(tmp_path_factory.mktemp("rested") / "bags" / "episode", [*still, *later])


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({}, range(9, 30)),  # the shoulder moves from tick 10, less a quarter of a second
        ({"idle": 0.3}, range(18, 23)),  # only the gripper moves as far, at tick 20
        ({"idle": 0.0}, range(30)),
    ],
)
def test_idle_starts_and_ends_are_trimmed_as_told(rested, told, kept):
    (unit,) = load_units(rested, bag_kit.robot(), 28, jobs=1, **told)
    assert unit.arrays["usable"].nonzero()[0].tolist() == list(kept)
