"""chunk_player as a node: real topics, an arm with simple controllers, a policy that can die."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("pi0_ros.msg", reason="needs the built messages")

from chunk_player_kit import MIXED, NAMED, START, STREAMED, Arm, Policy, Stage, Watch, robot_of, robot_text  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402

from pi0_ros.robot import Robot  # noqa: E402
from pi0_ros.ros.chunk_player import SPECS, settings_from  # noqa: E402
from pi0_ros.ros.judging import Settings  # noqa: E402
from pi0_ros.ros.motion import Commands, Plan  # noqa: E402
from pi0_ros.ros.outputs import Outputs, streamed_joints, trajectory_message  # noqa: E402
from pi0_ros.ros.player import Player  # noqa: E402

STOPPED, HOLDING, PLAYING, APPROACHING, DRY_RUN = range(5)
VELOCITY = np.array([2.0, 1.0, 3.0])


@pytest.fixture
def streamed(ros, tmp_path) -> Stage:
    return Stage(ros, tmp_path, STREAMED)


@pytest.fixture
def mixed(ros, tmp_path) -> Stage:
    return Stage(ros, tmp_path, MIXED)


def check_comes_to_rest(stage: Stage, since: float) -> None:
    """The arm rests, and braked rather than stopped dead on the way."""
    stage.ros.spin_until(lambda: stage.arm.at_rest(0.3), what="the arm rests")
    commands = np.array([position for _, position in stage.arm.streamed])
    assert np.isfinite(commands).all()
    # The player makes up for up to five late ticks in one command.
    assert (np.abs(np.diff(commands, axis=0)) <= VELOCITY[-commands.shape[1] :] * 0.051).all()
    if stage.arm.trajectories:
        recent = [(time, position) for time, position in stage.arm.trail if time > since - 0.1]
        times, way = np.array([time for time, _ in recent]), np.array([position for _, position in recent])
        # Ticks of arm and player drift against each other.
        assert (np.abs(np.diff(way, axis=0)) <= VELOCITY * (np.diff(times)[:, None] + 0.06)).all()


def check_follows(stage: Stage, recent: list) -> None:
    """The arm is where the policy wants it; the median, since a machine may be busy for a moment."""
    times, positions = np.array([time for time, _ in recent]), np.array([position for _, position in recent])
    assert (np.median(np.abs(positions - stage.policy.motion(times)), axis=0) < 0.02).all()


def test_the_player_without_the_node_has_the_nodes_defaults():
    assert settings_from({spec.name: spec.default for spec in SPECS}) == Settings()


def test_a_trajectory_message_leaves_out_what_is_past():
    now, ms = 5_000_000_000, 1_000_000
    times = now + ms * np.array([-10, 0, 5, 15, 25])
    rows = np.arange(5.0)[:, None]
    message = trajectory_message(["a"], times, rows, 0 * rows, now, 10 * ms)
    assert message.header.stamp.sec == 5 and message.header.stamp.nanosec == 0
    assert [point.time_from_start.nanosec for point in message.points] == [15 * ms, 25 * ms]
    assert [point.positions[0] for point in message.points] == [3.0, 4.0]
    late = trajectory_message(["a"], times, rows, None, now + 2_000_000_000, 10 * ms)
    assert [(p.positions[0], p.time_from_start.nanosec, len(p.velocities)) for p in late.points] == [(4.0, 10 * ms, 0)]


class Ear:
    """Stands in for a node and its publishers: keeps what is published, by topic."""

    def __init__(self) -> None:
        self.heard: dict[str, list] = {}

    def create_publisher(self, kind, topic, qos):
        class Publisher:
            publish = self.heard.setdefault(topic, []).append

        return Publisher()


@pytest.mark.parametrize("velocities", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["Float64MultiArray", "JointState"])
def test_each_controller_gets_its_own_joints_in_its_own_order(kind, stream, velocities):
    robot = robot_of(
        [
            {"topic": "/first", "type": kind, "joints": ["a"]},
            {"topic": "/rest", "type": "JointTrajectory", "joints": ["g", "b"]},
        ]
    )
    player = Player(robot, Settings(), streamed_joints(robot))
    player.commanded = np.array([0.1, 0.2, 0.3])
    ear = Ear()
    outputs = Outputs(ear, robot, player, 0.01, velocities)
    plan = Plan(np.array([20, 30]) * 10**6, np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 6.0], [0.0, 0.0]]))
    outputs.send(Commands(stream, plan), 7)
    outputs.send(Commands(False, None), 7)
    heard = ear.heard["/first"]
    if kind == "JointState":
        assert [(m.header.stamp.nanosec, m.name, list(m.position)) for m in heard] == [(7, ["a"], [0.1])] * stream
    else:
        assert [list(message.data) for message in heard] == [[0.1]] * stream
    (message,) = ear.heard["/rest"]
    assert message.joint_names == ["g", "b"]
    assert [list(point.positions) for point in message.points] == [[2.0, 1.0], [4.0, 3.0]]
    assert [list(point.velocities) for point in message.points] == (
        [[6.0, 5.0], [0.0, 0.0]] if velocities else [[], []]
    )


@pytest.mark.parametrize(("kind", "field"), [("Float64MultiArray", "data"), ("JointState", "position")])
def test_controllers_are_told_in_the_turn_in_which_joint_states_are(kind, field):
    commands = [
        {"topic": "/first", "type": kind, "joints": ["g", "a"]},
        {"topic": "/rest", "type": "JointTrajectory", "joints": ["b"]},
    ]
    joints = [joint.model_dump() for joint in robot_of(commands).joints]
    for joint in joints[:2]:
        joint |= {"kind": "continuous", "position": [2.0, 4.0]}
    robot = Robot.model_validate(robot_of(commands).model_dump() | {"joints": joints})
    player = Player(robot, Settings(), streamed_joints(robot))
    player.observe(robot.joint_names, [-3.0, 3.0 + 2 * np.pi, 0.5], 10**10, 10**10)
    player.commanded = np.array([3.3, 3.1, 0.5])
    ear = Ear()
    plan = Plan(np.array([10**10 + 20 * 10**6]), np.array([[3.2]]), np.zeros((1, 1)))
    Outputs(ear, robot, player, 0.01, velocities=True).send(Commands(True, plan), 10**10)
    np.testing.assert_allclose(getattr(ear.heard["/first"][0], field), [0.5, 3.3 - 2 * np.pi])
    np.testing.assert_allclose(ear.heard["/rest"][0].points[0].positions, [3.2 + 2 * np.pi])


def test_position_commands_follow_the_chunks(streamed):
    streamed.player()
    streamed.play(1.0)
    check_follows(streamed, streamed.arm.streamed[-50:])
    status = streamed.watch.status
    assert list(status.joint_names) == ["a", "b", "g"] and len(status.commanded) == 3
    assert status.handover_delay >= 2.0  # 0.1 s of 50 ms each, and a tick
    assert 0.0 < status.seconds_left <= 0.85
    assert status.chunks_played >= 3 and status.chunks_refused == 0 and status.holds == 0


def test_an_arm_that_takes_joint_states_as_commands_is_led_by_name(ros, tmp_path):
    stage = Stage(ros, tmp_path, NAMED)
    stage.player()
    stage.play(1.0)
    check_follows(stage, stage.arm.streamed[-50:])


def test_trajectories_are_made_as_the_controller_wants_them(mixed):
    mixed.player()
    mixed.play(1.0)
    assert len(mixed.arm.trajectories) >= 4
    for message in mixed.arm.trajectories:
        assert list(message.joint_names) == ["b", "a"]
        times = np.array([p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in message.points])
        assert times[0] >= 10_000_000 and (np.diff(times) > 0).all()
        assert list(message.points[-1].velocities) == [0.0, 0.0]
    check_follows(mixed, mixed.arm.trail[-50:])
    # The gripper goes its own way, position by position.
    assert len(mixed.arm.streamed) > 20 and len(mixed.arm.streamed[0][1]) == 1


@pytest.mark.parametrize("commands", [STREAMED, MIXED], ids=["positions", "trajectories"])
def test_the_arm_comes_to_rest_when_the_policy_dies_in_mid_motion(ros, tmp_path, commands):
    stage = Stage(ros, tmp_path, commands)
    stage.player()
    stage.play(0.4)
    ros.spin_until(stage.moving)
    stage.policy.die()
    died = stage.arm.now()
    ros.spin_until(stage.watch.is_in(HOLDING, "the chunk ended and no new one came"))
    assert stage.arm.now() - died > 0.5
    check_comes_to_rest(stage, died)
    assert stage.watch.status.holds == 1 and stage.watch.status.seconds_left == 0.0


def test_holds_when_joint_states_stop_and_says_so_in_diagnostics(streamed):
    reports = []
    streamed.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: reports.extend(m.status), 10)
    streamed.player()
    streamed.play(0.3)
    streamed.arm.sensing = False
    streamed.ros.spin_until(streamed.watch.is_in(HOLDING, "no joint state for more than 0.3 s"))
    check_comes_to_rest(streamed, streamed.arm.now())
    streamed.ros.spin_until(
        lambda: any(r.level == b"\x02" and "holding: no joint state" in r.message for r in reports),
        what="ERROR with the reason on /diagnostics",
    )
    streamed.arm.sensing = True
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))


def test_a_command_topic_without_a_controller_is_a_warning(ros, tmp_path):
    stage = Stage(ros, tmp_path, MIXED)
    reports = []
    stage.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: reports.extend(m.status), 10)
    (path := tmp_path / "robot.yaml").write_text(robot_text([MIXED[0], {**MIXED[1], "topic": "/griper/commands"}]))
    stage.player(robot_file=str(path))
    words = "no controller listens on /griper/commands: is it loaded, and is that its topic?"
    ros.spin_until(lambda: any(r.level == b"\x01" and r.message == words for r in reports), what="WARN with its name")


def test_two_policies_that_publish_at_once_are_a_warning(streamed):
    reports = []
    streamed.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: reports.extend(m.status), 10)
    Policy(streamed.ros.node("second"), streamed.robot, START)
    streamed.player()
    words = "2 nodes publish chunks: the arm would follow all of them in turn"
    streamed.ros.spin_until(lambda: any(r.level == b"\x01" and words in r.message for r in reports), what=words)


def test_a_robot_file_that_is_given_counts_before_that_of_the_checkpoint(ros, tmp_path):
    """With lower limits, perhaps: a launch file's checkpoint must not undo a parameter file's robot."""
    stage = Stage(ros, tmp_path, STREAMED, policy=False)
    (folder := tmp_path / "checkpoint").mkdir()
    (folder / "robot.yaml").write_text(stage.file.read_text().replace(stage.robot.name, "trained_with"))
    for robot_file, name in ((str(stage.file), stage.robot.name), ("", "trained_with"), (str(folder), "trained_with")):
        node = stage.player(active=False, robot_file=robot_file, checkpoint=str(folder))
        assert node._robot.name == name
        node.trigger_cleanup()


def test_who_comes_late_hears_the_status(streamed):
    streamed.player(active=False)
    late = Watch(streamed.ros.node("late"))
    streamed.ros.spin_until(lambda: late.status is not None and late.status.reason == "not started")


def test_stop_holds_until_start(mixed):
    mixed.player()
    mixed.play(0.3)
    mixed.ros.spin_until(mixed.moving)
    stopped = mixed.arm.now()
    assert mixed.call("stop").success
    mixed.ros.spin_until(mixed.watch.is_in(STOPPED, "stopped by ~/stop"))
    check_comes_to_rest(mixed, stopped)
    counts = len(mixed.arm.streamed), len(mixed.arm.trajectories)
    before = mixed.policy.sequence
    mixed.ros.spin_until(lambda: mixed.policy.sequence > before + 5)
    assert mixed.watch.status.state == STOPPED
    assert counts == (len(mixed.arm.streamed), len(mixed.arm.trajectories))
    assert mixed.call("start").success
    mixed.ros.spin_until(mixed.watch.is_in(PLAYING))


def test_activating_again_does_not_undo_a_stop(mixed):
    player = mixed.player()
    mixed.play(0.3)
    assert mixed.call("stop").success
    player.trigger_deactivate()
    player.trigger_activate()
    before = mixed.policy.sequence
    mixed.ros.spin_until(lambda: mixed.policy.sequence > before + 3)
    mixed.ros.spin_until(mixed.watch.is_in(STOPPED, "stopped by ~/stop"))
    assert mixed.call("start").success
    mixed.ros.spin_until(mixed.watch.is_in(PLAYING))


def test_a_stop_before_the_node_is_active_counts_when_it_is(streamed):
    player = streamed.player(active=False)
    answer = streamed.call("stop")
    assert answer.success and "nor when it is activated before ~/start" in answer.message
    player.trigger_activate()
    before = streamed.policy.sequence
    streamed.ros.spin_until(lambda: streamed.policy.sequence > before + 3)
    streamed.ros.spin_until(streamed.watch.is_in(STOPPED, "stopped by ~/stop"))
    assert streamed.arm.streamed == [] and streamed.watch.status.chunks_played == 0
    assert streamed.call("start").success
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))
    player.trigger_deactivate()
    streamed.ros.spin_until(streamed.watch.is_in(STOPPED, "deactivated"))
    player.trigger_activate()  # the stop is over
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))


def test_activating_again_does_not_undo_that_the_arm_does_not_follow(streamed):
    said = []
    streamed.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: said.extend(m.status), 10)
    player = streamed.player(approach_threshold=2.0)
    streamed.play(0.3)
    # Chunks that sway over where the arm is stuck need not count as not followed: these lead away, at full speed.
    streamed.arm.stuck, streamed.policy.centre = True, np.array([0.1, 1.5, 0.5])
    streamed.ros.spin_until(streamed.watch.is_in(STOPPED, "the arm does not follow"))
    why, before_that = streamed.watch.status.reason, len(streamed.watch.said)
    streamed.ros.spin_until(lambda: any(r.level == b"\x02" and why in r.message for r in said), what="an ERROR")
    for back in (("deactivate", "activate"), ("deactivate", "cleanup", "configure", "activate")):
        for transition in back:
            getattr(player, f"trigger_{transition}")()
        before = streamed.policy.sequence
        streamed.ros.spin_until(lambda: streamed.policy.sequence > before + 3)  # noqa: B023
        streamed.ros.spin_until(streamed.watch.is_in(STOPPED, why))
    # A player that went on would soon be stopped again, for the same reason.
    assert {state for state, _ in streamed.watch.said[before_that:]} == {STOPPED}
    streamed.arm.stuck, streamed.policy.centre = False, np.array(START)
    assert streamed.call("start").success
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))


def test_deactivate_brakes_and_cleanup_leaves_nothing(streamed):
    player = streamed.player()
    streamed.play(0.3)
    streamed.ros.spin_until(streamed.moving)
    now = streamed.arm.now()
    assert player.trigger_deactivate() == rclpy.lifecycle.TransitionCallbackReturn.SUCCESS
    streamed.ros.spin_until(streamed.watch.is_in(STOPPED, "deactivated"))
    check_comes_to_rest(streamed, now)
    sent = len(streamed.arm.streamed)
    assert not streamed.call("start").success
    player.trigger_cleanup()
    assert player.count_publishers("/all/commands") == 0
    for _ in range(5):
        player.trigger_configure()
        player.trigger_activate()
        player.trigger_deactivate()
        player.trigger_cleanup()
    assert len(streamed.arm.streamed) == sent
    player.trigger_configure()
    player.trigger_activate()
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))


def test_bad_chunks_are_refused_with_the_reason_in_status(streamed):
    streamed.player()
    streamed.play(0.3)
    for change, words in (
        ({"actions": [float("nan")] * 60}, "action 0 of joint 'a' is nan"),
        ({"joint_names": ["a", "b", "x"]}, "joints ['a', 'b', 'x'] are not"),
        ({"horizon": 7}, "60 values are not horizon 7 times 3 joints"),
        ({"sequence": 0}, "its sequence is not above"),
        ({"checkpoint": "random"}, "untrained random weights made it (play_untrained allows that, on a simulated arm)"),
    ):
        streamed.policy.change = change
        streamed.ros.spin_until(lambda words=words: words in streamed.watch.status.reason, what=words)
        status = streamed.watch.status
        assert status.newest_refused and f"refused chunk {status.refused_sequence}: " in status.reason
        streamed.policy.change = {}
        streamed.ros.spin_until(streamed.watch.is_in(PLAYING))
        streamed.ros.spin_until(lambda: streamed.watch.status.reason == "", what="all is well again")
    assert streamed.watch.status.chunks_refused >= 4 and not streamed.watch.status.newest_refused


def test_a_far_first_action_is_approached(ros, tmp_path):
    stage = Stage(ros, tmp_path, STREAMED)
    stage.policy.centre = np.array([0.6, 1.6, 0.5])
    stage.player(approach_speed=0.5, approach_threshold=0.25)
    ros.spin_until(stage.watch.is_in(APPROACHING, "approaching at limited speed"))
    ros.spin_until(stage.watch.is_in(PLAYING))
    assert stage.arm.position[1] > 1.0


def test_a_new_epoch_drops_the_chunk_at_once(streamed):
    streamed.player()
    streamed.play(0.3)
    streamed.policy.announce(3)
    streamed.policy.epoch = 2  # chunks on their way from before
    streamed.ros.spin_until(streamed.watch.is_in(HOLDING, "the policy voided its chunks"))
    streamed.ros.spin_until(lambda: "its epoch 2 is older than 3" in streamed.watch.status.reason)
    streamed.policy.epoch = 3
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))
    assert streamed.watch.status.epoch == 3


def test_dry_run_says_what_it_would_do_and_sends_nothing(mixed):
    mixed.player(dry_run=True)
    mixed.ros.spin_until(lambda: mixed.watch.status is not None and mixed.watch.status.chunks_played > 3)
    assert mixed.watch.status.state == DRY_RUN
    assert mixed.arm.streamed == [] and mixed.arm.trajectories == []


def test_waits_for_start_when_told_to(streamed):
    streamed.player(start_on_activate=False)
    before = streamed.policy.sequence
    streamed.ros.spin_until(lambda: streamed.policy.sequence > before + 5)
    assert streamed.watch.status.state == STOPPED and "call ~/start" in streamed.watch.status.reason
    assert streamed.arm.streamed == []
    assert streamed.call("start").success
    streamed.ros.spin_until(streamed.watch.is_in(PLAYING))


def test_simulated_time_is_the_players_time_and_a_jump_back_holds(ros, tmp_path):
    stage = Stage(ros, tmp_path, STREAMED, policy=False)
    clock = ros.node("clock")
    publisher = clock.create_publisher(Clock, "/clock", 10)
    time = {"now": 100.0}

    def beat() -> None:
        time["now"] += 0.01
        message = Clock()
        message.clock.sec, message.clock.nanosec = int(time["now"]), int(time["now"] % 1 * 1e9)
        publisher.publish(message)

    ticking = clock.create_timer(0.01, beat)
    simulated = ros.node("simulated", parameter_overrides=[Parameter("use_sim_time", value=True)])
    arm = Arm(simulated, stage.robot, START)
    policy = Policy(simulated, stage.robot, START)
    player = stage.player(use_sim_time=True)
    ros.spin_until(stage.watch.is_in(PLAYING))
    assert 100 <= stage.watch.status.header.stamp.sec < 130
    time["now"] = 50.0
    ros.spin_until(lambda: (HOLDING, "the clock jumped back") in stage.watch.said, what="holds after the jump")
    policy.announce(1)
    ros.spin_until(stage.watch.is_in(PLAYING))
    assert stage.watch.status.header.stamp.sec < 80 and stage.watch.status.epoch == 1
    assert np.isfinite(np.array([p for _, p in arm.streamed])).all()
    ros.spin_until(lambda: np.abs(arm.streamed[-1][1] - arm.streamed[-5][1]).max() > 0.02, what="it moves")
    clock.destroy_timer(ticking)  # the simulator died
    ros.spin_until(stage.watch.is_in(HOLDING, "no joint state"), what="holds when time stands still")
    ros.spin_until(lambda: player._player.at_rest, what="it rests")
    way = np.array([position for _, position in arm.streamed[-20:]])
    assert np.abs(np.diff(way, axis=0)).max() < 0.03  # without a step
    player.trigger_deactivate()


@pytest.mark.parametrize(
    ("stamp", "clock", "state", "words"),
    [
        (1000, "bag", PLAYING, ""),  # since the driver's computer was switched on
        (1000, "header", HOLDING, "s before this node's clock"),
        (0, "header", PLAYING, ""),  # some drivers leave it empty
    ],
)
def test_joint_states_count_from_their_stamps_unless_the_robot_goes_by_arrival_or_they_have_none(
    streamed, stamp, clock, state, words
):
    streamed.arm.sensing = False
    publisher = streamed.node.create_publisher(JointState, "/joint_states", 10)
    message = JointState(name=list("abg"), position=list(START))
    message.header.stamp.sec = stamp
    streamed.node.create_timer(0.01, lambda: publisher.publish(message))
    streamed.file.write_text(robot_text(STREAMED) + f"clock: {clock}\n")
    streamed.player()
    streamed.ros.spin_until(streamed.watch.is_in(state, words))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"robot_file": ""}, "parameter 'robot_file': found ''"),
        ({"robot_file": "/nowhere/robot.yaml"}, "/nowhere/robot.yaml: cannot be read"),
        ({"robot_file": "", "checkpoint": "/nowhere/robot.yaml"}, "/nowhere/robot.yaml: cannot be read"),
    ],
)
def test_configure_fails_with_the_reason(ros, tmp_path, parameters, words):
    stage = Stage(ros, tmp_path, STREAMED, policy=False)
    reports = []
    stage.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: reports.extend(m.status), 10)
    stage.player(active=False, **parameters)
    ros.spin_until(lambda: any(words in r.message and r.level == b"\x02" for r in reports), what=words)


def run_player(stage: Stage, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pi0_ros.ros.chunk_player", "--ros-args", "-p", f"robot_file:={stage.file}"]
    command += ["-p", "autostart:=true", "-p", "approach_threshold:=0.6", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_player_leaves_trajectories_that_end_at_rest(mixed):
    process = run_player(mixed)
    try:
        mixed.play(0.3)
        mixed.ros.spin_until(mixed.moving)
        process.kill()
        killed = mixed.arm.now()
        check_comes_to_rest(mixed, killed)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_brakes_before_the_player_goes_down(streamed, number):
    process = run_player(streamed)
    try:
        streamed.play(0.3)
        streamed.ros.spin_until(streamed.moving)
        process.send_signal(number)
        sent = streamed.arm.now()
        streamed.ros.spin_until(lambda: process.poll() is not None, what="the player ends")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        check_comes_to_rest(streamed, sent)
        # It slowed down to nothing: braking leaves a h^2 / 2 for the last step, of up to five periods where it is busy.
        last = np.array([position for _, position in streamed.arm.streamed[-2:]])
        assert (np.abs(last[1] - last[0]) <= np.array([10.0, 4.0, 20.0]) * 0.051**2 / 2).all()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("handover:=jump", "'handover': found 'jump', must be one of 'blend', 'ensemble', 'switch'"),
        ("velocty_scale:=0.2", "'velocty_scale': no such parameter, did you mean 'velocity_scale'?"),
    ],
)
def test_a_wrong_parameter_is_one_line(given, fault):
    command = [sys.executable, "-m", "pi0_ros.ros.chunk_player", "--ros-args", "-p", given]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: parameter {fault}"
