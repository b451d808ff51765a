"""Grippers that an action server drives: which goals they get, and what is said of servers that do not take them."""

import sys

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
actions = pytest.importorskip("control_msgs.action", reason="needs control_msgs")
pytest.importorskip("pi0_ros.msg", reason="needs the built messages")

from chunk_player_kit import DRY_RUN, MIXED, PLAYING, START, Stage  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rclpy.action import ActionServer, GoalResponse  # noqa: E402
from rclpy.task import Future  # noqa: E402

from pi0_ros.robot import Command, Joint  # noqa: E402
from pi0_ros.ros import gripper  # noqa: E402
from pi0_ros.ros.conversions import SECOND  # noqa: E402
from pi0_ros.ros.gripper import GripperGoals  # noqa: E402

ACTION = "/gripper/gripper_cmd"
MS = 1_000_000
JOINT = Joint(name="g", kind="gripper", position=(0, 0.8), velocity=3.0, acceleration=20.0, open=0.0, closed=0.8)


def commands(kind: str = "GripperCommand", **more) -> list[dict]:
    return [MIXED[0], {"topic": ACTION, "type": kind, "joints": ["g"], **more}]


class Gripper:
    """An action server that takes goals, or not, and is at once where the last one said."""

    def __init__(self, stage: Stage, kind: str = "GripperCommand") -> None:
        self.arm, self.kind, self.refuse, self.goals = stage.arm, getattr(actions, kind), False, []
        self.server = ActionServer(stage.node, self.kind, ACTION, self._move, goal_callback=self._came)

    def _came(self, request) -> GoalResponse:
        self.goals.append((self.arm.now(), request.command))
        return GoalResponse.REJECT if self.refuse else GoalResponse.ACCEPT

    def _move(self, goal):
        self.arm.position[2] = np.ravel(goal.request.command.position)[0]
        goal.succeed()
        return self.kind.Result()


@pytest.fixture
def serve():
    """Makes action servers, and destroys them: half of one that is left would keep later ones from being found."""
    made = []
    yield lambda *given: made.append(Gripper(*given)) or made[-1]
    for gripper_server in made:
        gripper_server.server.destroy()


class Warnings:
    """The text of the player's newest diagnostics."""

    def __init__(self, stage: Stage) -> None:
        self.newest = ""
        stage.node.create_subscription(DiagnosticArray, "/diagnostics", self._came, 10)

    def _came(self, message: DiagnosticArray) -> None:
        self.newest = next((s.message for s in message.status if s.name == "chunk_player: player"), self.newest)


class Client:
    """Stands in for rclpy's: goals as they go out, answered when the test says."""

    def __init__(self, node, kind, name) -> None:
        self.goals, self.answers, self.ready = [], [], True

    def server_is_ready(self) -> bool:
        return self.ready

    def send_goal_async(self, goal) -> Future:
        self.goals.append(goal.command)
        self.answers.append(Future())
        return self.answers[-1]

    def answer(self, accepted: bool = True) -> None:
        self.answers[-1].set_result(type("Handle", (), {"accepted": accepted}))


def goals(monkeypatch, **command) -> tuple[GripperGoals, Client]:
    monkeypatch.setattr(gripper, "ActionClient", Client)
    made = GripperGoals(None, Command(**{"topic": ACTION, "type": "GripperCommand", "joints": ["g"]} | command), JOINT)
    return made, made._client


def at(made: GripperGoals, times: list[int], position: float) -> None:
    for time in times:
        made.send(position, time * MS)


def test_a_goal_goes_out_where_the_position_has_changed_by_a_hundredth_of_the_way(monkeypatch):
    made, client = goals(monkeypatch)
    for k, position in enumerate([0.4, 0.4079, 0.4081, 0.416]):
        made.send(position, k * SECOND)
        if k in (0, 2):
            client.answer()
    assert [goal.position for goal in client.goals] == [0.4, 0.4081]


def test_a_small_change_goes_out_when_the_position_stands_still(monkeypatch):
    made, client = goals(monkeypatch)
    made.send(0.4, 0)
    client.answer()
    at(made, [1000, 1010, 1020], 0.401)
    assert [goal.position for goal in client.goals] == [0.4, 0.401]


def test_goals_are_a_tenth_of_a_second_apart(monkeypatch):
    made, client = goals(monkeypatch)
    for k in range(31):
        before = len(client.goals)
        made.send(0.02 * k, 10 * k * MS)
        if len(client.goals) > before:
            client.answer()
    assert [goal.position for goal in client.goals] == pytest.approx([0.0, 0.2, 0.4, 0.6])


def test_nothing_new_is_asked_before_the_server_has_answered_or_a_second_is_over(monkeypatch):
    made, client = goals(monkeypatch)
    at(made, [0], 0.4)
    at(made, [100, 500, 990], 0.6)
    assert [goal.position for goal in client.goals] == [0.4]
    at(made, [1000], 0.7)
    assert [goal.position for goal in client.goals] == [0.4, 0.7]
    assert client.answers[0].cancelled()


def test_a_refused_goal_is_asked_again(monkeypatch):
    made, client = goals(monkeypatch)
    at(made, [0], 0.4)
    client.answer(accepted=False)
    assert made.refuses
    at(made, [50, 100], 0.4)
    client.answer()
    assert not made.refuses
    at(made, [200, 300], 0.4)
    assert [goal.position for goal in client.goals] == [0.4, 0.4]


def test_nothing_is_sent_where_no_server_is(monkeypatch):
    made, client = goals(monkeypatch)
    client.ready = False
    at(made, [0, 100], 0.4)
    assert not client.goals and not made.heard
    client.ready = True
    at(made, [200], 0.4)
    assert [goal.position for goal in client.goals] == [0.4]


def test_a_server_that_was_started_again_is_told_anew(monkeypatch):
    made, client = goals(monkeypatch)
    at(made, [0], 0.4)
    client.answer()
    client.ready = False
    at(made, [500], 0.4)
    client.ready = True
    at(made, [1000], 0.4)
    assert [goal.position for goal in client.goals] == [0.4, 0.4]


def test_a_clock_that_jumps_back_does_not_silence_the_gripper(monkeypatch):
    made, client = goals(monkeypatch)
    at(made, [10_000], 0.4)
    client.answer()
    at(made, [20], 0.6)
    assert [goal.position for goal in client.goals] == [0.4, 0.6]


def test_goals_have_what_their_type_has(monkeypatch):
    made, client = goals(monkeypatch, max_effort=40)
    at(made, [0], 0.4)
    assert (client.goals[0].position, client.goals[0].max_effort) == (0.4, 40)
    for effort in (0, 40):
        made, client = goals(monkeypatch, type="ParallelGripperCommand", max_effort=effort)
        at(made, [0], 0.4)
        goal = client.goals[0]
        assert (list(goal.name), list(goal.position), list(goal.velocity)) == (["g"], [0.4], [])
        assert list(goal.effort) == ([40] if effort else [])


@pytest.mark.parametrize("kind", ["GripperCommand", "ParallelGripperCommand"])
def test_the_gripper_follows_the_chunks(ros, tmp_path, serve, kind):
    stage = Stage(ros, tmp_path, commands(kind))
    server = serve(stage, kind)
    stage.player()
    stage.play()
    ros.spin_until(lambda: len(server.goals) > 10)
    times = np.array([time for time, _ in server.goals])
    told = np.array([np.ravel(goal.position)[0] for _, goal in server.goals])
    # The first leads from where it is; then each is where the policy wanted it when it went out.
    meant = stage.policy.motion(times)[:, 2]
    assert np.median(np.abs(told - meant)) < 0.05
    assert np.ptp(told) > 0.1 and stage.arm.trajectories


def test_a_server_that_refuses_is_a_warning_until_it_takes_goals(ros, tmp_path, serve):
    stage = Stage(ros, tmp_path, commands())
    server = serve(stage)
    server.refuse = True
    warned = Warnings(stage)
    stage.player()
    ros.spin_until(lambda: f"{ACTION} refuses the gripper's goals" in warned.newest)
    server.refuse = False
    ros.spin_until(lambda: stage.watch.is_in(PLAYING)() and warned.newest == "OK")


def test_without_a_server_the_arm_moves_and_a_warning_says_so(ros, tmp_path, serve):
    stage = Stage(ros, tmp_path, commands())
    warned = Warnings(stage)
    stage.player()
    stage.play()
    ros.spin_until(lambda: f"no controller listens on {ACTION}" in warned.newest)
    server = serve(stage)
    ros.spin_until(lambda: server.goals and warned.newest == "OK")


def test_a_dry_run_sends_no_goals(ros, tmp_path, serve):
    stage = Stage(ros, tmp_path, commands())
    server = serve(stage)
    player = stage.player(dry_run=True)
    ros.spin_until(stage.watch.is_in(DRY_RUN))
    ros.spin_until(lambda: stage.watch.status.chunks_played > 5)
    assert not server.goals
    assert player.get_name() and stage.arm.position.tolist() == list(START)


def test_after_a_stop_the_gripper_gets_no_goals(ros, tmp_path, serve):
    stage = Stage(ros, tmp_path, commands())
    server = serve(stage)
    stage.player()
    stage.play()
    stage.call("stop")
    ros.spin_until(lambda: stage.arm.at_rest(0.3), what="the arm rests")
    count, begin = len(server.goals), stage.arm.now()
    ros.spin_until(lambda: stage.arm.now() > begin + 0.5)
    assert len(server.goals) == count


def test_configure_says_which_package_is_missing(ros, tmp_path, monkeypatch):
    stage = Stage(ros, tmp_path, commands(), policy=False)
    warned = Warnings(stage)
    for name in ("control_msgs", "control_msgs.action"):
        monkeypatch.setitem(sys.modules, name, None)
    stage.player(active=False)
    ros.spin_until(lambda: "needs the package control_msgs" in warned.newest)
