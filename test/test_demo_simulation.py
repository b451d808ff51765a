"""The demo's world: what a seed decides, what counts as a touch, and whether the teacher finds every cube."""

import numpy as np
import pytest

from pi0_ros.demo.controller import CommandError
from pi0_ros.demo.scene import APART, CUBES, JOINTS, SHOULDER, named_cube
from pi0_ros.demo.simulation import TIME_LIMIT, TOUCH, Simulation, TaskError
from pi0_ros.demo.teacher import Teacher
from pi0_ros.robot_file import config_folder, load_robot


@pytest.fixture(scope="module")
def simulation():
    made = Simulation()
    yield made
    made.close()


def run_teacher(simulation: Simulation, seed: int, prompt: str = "") -> np.ndarray:
    simulation.reset(seed, prompt)
    teacher, commands = Teacher(simulation), []
    while not teacher.done and simulation.outcome().seconds < TIME_LIMIT:
        commands.append(teacher.act())
        simulation.command(commands[-1])
        simulation.step(0.05)
    return np.array(commands)


def place_cube(simulation: Simulation, name: str, offset: list[float]) -> None:
    """Put a cube at an offset from the fingertip, square to the world, and let nothing else happen."""
    simulation.data.joint(name).qpos = [*(simulation.fingertip + offset), 1, 0, 0, 0]
    simulation.data.joint(name).qvel = 0


@pytest.mark.parametrize("seed", range(6))
def test_the_teacher_touches_the_named_cube_within_the_joint_limits(simulation, seed):
    commands = run_teacher(simulation, seed)
    outcome = simulation.outcome()
    assert outcome.success, outcome
    assert outcome.reason == f"touched {named_cube(outcome.prompt)}"
    assert simulation.distances()[CUBES.index(simulation.target)] < 0.01
    robot = load_robot(config_folder() / "so101_demo.yaml")
    assert robot.joint_names == JOINTS
    low, high = np.array([joint.position for joint in robot.joints]).T
    assert (commands >= low - 1e-3).all() and (commands <= high + 1e-3).all()
    speed = np.abs(np.diff(commands, axis=0)) * robot.control_rate
    assert (speed <= [joint.velocity for joint in robot.joints]).all()


def test_the_teacher_goes_where_the_prompt_says(simulation):
    for cube in CUBES:
        run_teacher(simulation, 3, f"touch the {cube} cube")
        assert simulation.outcome().reason == f"touched {cube}"


def test_the_same_seed_is_the_same_episode_to_the_bit(simulation):
    first = run_teacher(simulation, 11)
    image = simulation.observe(size=(64, 48)).images["left_wrist_0_rgb"].copy()
    again = Simulation(11)
    second = run_teacher(again, 11)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, again.observe(size=(64, 48)).images["left_wrist_0_rgb"])
    again.close()


def test_seeds_differ_in_cubes_light_start_and_prompt(simulation):
    seen = []
    for seed in range(12):
        simulation.reset(seed)
        seen.append((simulation.positions.copy(), simulation.cube_pose("red")[0], simulation.model.light_pos[0].copy()))
    for values in zip(*seen, strict=True):
        assert len(np.unique(np.array(values), axis=0)) == 12


def test_cubes_stand_apart_within_reach_and_away_from_the_fingertip(simulation):
    for seed in range(40):
        simulation.reset(seed)
        places = np.array([simulation.cube_pose(name)[0] for name in CUBES])
        for i in range(3):
            assert np.linalg.norm(places[i] - places[(i + 1) % 3]) >= APART
            assert 0.18 < np.linalg.norm(places[i, :2] - SHOULDER) < 0.32
        assert simulation.distances().min() > TOUCH
        assert not simulation.outcome().done


@pytest.mark.parametrize("cubes", [("green",), ("red", "green"), CUBES])
def test_cubes_can_be_missing_and_nothing_else_changes(simulation, cubes):
    simulation.reset(5)
    places = {name: simulation.cube_pose(name)[0] for name in CUBES}
    simulation.reset(5, "touch the green cube", cubes)
    simulation.step(0.2)
    near = {name: np.allclose(simulation.cube_pose(name)[0], places[name], atol=1e-3) for name in CUBES}
    assert near == {name: name in cubes for name in CUBES}
    assert [distance < 0.5 for distance in simulation.distances()] == [name in cubes for name in CUBES]


def test_both_cameras_see_what_they_are_for(simulation):
    """The base camera sees all three cubes; over the touched cube the wrist camera sees it."""

    def pixels(image: np.ndarray, channel: int) -> int:
        image = image.astype(int)
        others = [image[..., other] for other in range(3) if other != channel]
        return int((image[..., channel] > 1.6 * np.maximum(*others) + 10).sum())

    for seed in range(4):
        simulation.reset(seed)
        base = simulation.observe(("base_0_rgb",), (320, 240)).images["base_0_rgb"]
        assert base.shape == (240, 320, 3) and base.dtype == np.uint8
        assert 60 < base.mean() < 200
        for channel, cube in enumerate(CUBES):
            assert pixels(base, channel) > 40, (seed, cube)
        run_teacher(simulation, seed)
        wrist = simulation.observe(("left_wrist_0_rgb",), (320, 240)).images["left_wrist_0_rgb"]
        assert pixels(wrist, CUBES.index(simulation.target)) > 300


def test_a_touch_is_two_centimetres_from_the_surface_of_the_named_cube(simulation):
    simulation.reset(0, "touch the green cube")
    place_cube(simulation, "green", [0.0, 0.0, -0.015 - 0.024])
    simulation.step(0.01)
    outcome = simulation.outcome()
    assert not outcome.done
    assert outcome.closest == pytest.approx(0.024, abs=0.0015)
    place_cube(simulation, "green", [0.0, 0.0, -0.015 - 0.018])
    simulation.step(0.01)
    outcome = simulation.outcome()
    assert (outcome.done, outcome.success, outcome.reason) == (True, True, "touched green")
    assert outcome.seconds == pytest.approx(0.02)


def test_touching_another_cube_first_fails_for_good(simulation):
    simulation.reset(0, "touch the green cube")
    place_cube(simulation, "blue", [0.0, 0.0, -0.03])
    simulation.step(0.01)
    place_cube(simulation, "blue", [0.3, 0.3, 0.0])
    place_cube(simulation, "green", [0.0, 0.0, -0.03])
    simulation.step(0.01)
    outcome = simulation.outcome()
    assert (outcome.done, outcome.success, outcome.reason) == (True, False, "touched blue first")


def test_time_is_up_after_eight_seconds(simulation):
    simulation.reset(0)
    simulation.step(TIME_LIMIT - 0.01)
    assert simulation.outcome().reason == "running"
    simulation.step(0.01)
    assert (simulation.outcome().done, simulation.outcome().reason) == (True, "time is up")
    place_cube(simulation, simulation.target, [0.0, 0.0, -0.03])
    simulation.step(0.05)
    assert (simulation.outcome().success, simulation.outcome().seconds) == (False, TIME_LIMIT)


def test_the_arm_holds_its_start_pose_and_follows_commands(simulation):
    simulation.reset(5)
    start = simulation.positions.copy()
    simulation.step(1.0)
    np.testing.assert_allclose(simulation.positions, start, atol=0.01)
    target = start + [0.3, -0.1, 0.1, -0.2, 0.2, 0.1]
    simulation.command(target, 0.5)
    simulation.step(1.5)
    np.testing.assert_allclose(simulation.positions, target, atol=0.02)


def test_skipped_time_moves_nothing(simulation):
    simulation.reset(5)
    simulation.command(simulation.positions + 0.1, 0.5)
    simulation.step(0.1)
    before, seconds = simulation.positions.copy(), simulation.outcome().seconds
    now = simulation.now
    simulation.skip(3_000_000_000)
    assert simulation.now == now + 3_000_000_000
    assert simulation.outcome().seconds == pytest.approx(seconds)
    np.testing.assert_array_equal(simulation.positions, before)


def test_garbage_is_refused_and_changes_nothing(simulation):
    simulation.reset(0)
    with pytest.raises(CommandError, match="not finite"):
        simulation.command([0, 0, 0, 0, 0, float("nan")])
    with pytest.raises(CommandError, match="5 values for 6 joints"):
        simulation.command([0.0] * 5)
    for prompt in ("touch the yellow cube", "touch the red and the blue cube", "infrared"):
        with pytest.raises(TaskError, match="must name one cube"):
            simulation.reset(1, prompt)
    with pytest.raises(TaskError, match="seed"):
        simulation.reset(-1)
    assert simulation.seed == 0


def test_the_urdf_for_markers_is_the_simulated_arm(simulation):
    """Forward kinematics of config/so101.urdf ends where MuJoCo's fingertip is."""
    import xml.etree.ElementTree as ET

    import mink

    robot = load_robot(config_folder() / "so101_demo.yaml")
    joints = {joint.find("child").get("link"): joint for joint in ET.parse(config_folder() / robot.urdf).iter("joint")}
    for seed in range(3):
        simulation.reset(seed)
        angles = dict(zip(JOINTS, simulation.positions, strict=True))
        pose, link = mink.SE3.identity(), robot.tip_link
        while link in joints:
            joint = joints[link]
            x, y, z = (float(v) for v in joint.find("origin").get("rpy").split())
            turn = mink.SO3.from_rpy_radians(x, y, z) @ mink.SO3.from_z_radians(angles.get(joint.get("name"), 0.0))
            offset = np.array(joint.find("origin").get("xyz").split(), float)
            pose = mink.SE3.from_rotation_and_translation(turn, offset) @ pose
            link = joint.find("parent").get("link")
        np.testing.assert_allclose(pose.translation(), simulation.fingertip, atol=1e-4)
