"""Grippers that an action server drives: which goals they get, and what is said of servers that do not take them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
actions = pytest.importorskip("control_msgs.action", reason="needs control_msgs")
pytest.importorskip("pi0_ros.msg", reason="needs the built messages")

from chunk_player_kit import DRY_RUN, MIXED, PLAYING, START, STOPPED, Stage  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rclpy.action import ActionServer, GoalResponse  # noqa: E402
from rclpy.task import Future  # noqa: E402

from pi0_ros.robot import Command, Joint  # noqa: E402
from pi0_ros.ros import gripper  # noqa: E402
from pi0_ros.ros.gripper import GripperGoals  # noqa: E402

ACTION = "/gripper/gripper_cmd"
MS = 1_000_000
SUCCEEDED, ABORTED = 4, 6  # of action_msgs/GoalStatus
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
    """Stands in for rclpy's, and for the node: goals as they go out, answered when the test says."""

    def __init__(self, *_: object) -> None:
        self.goals, self.answers, self.ends, self.ready, self.servers = [], [], [], True, [b"one"]

    def server_is_ready(self) -> bool:
        return self.ready

    def get_publishers_info_by_topic(self, topic: str) -> list:
        assert topic == f"{ACTION}/_action/status"
        return [SimpleNamespace(endpoint_gid=server) for server in self.servers]

    def send_goal_async(self, goal) -> Future:
        self.goals.append(goal.command)
        self.answers.append(Future())
        return self.answers[-1]

    def answer(self, accepted: bool = True) -> None:
        self.ends.append(Future())
        end = self.ends[-1]
        self.answers[-1].set_result(SimpleNamespace(accepted=accepted, get_result_async=lambda: end))

    def end(self, status: int, stalled: bool = False, reached_goal: bool = False) -> None:
        result = SimpleNamespace(stalled=stalled, reached_goal=reached_goal)
        self.ends[-1].set_result(SimpleNamespace(status=status, result=result))

    @property
    def told(self) -> list[float]:
        return [goal.position for goal in self.goals]


@pytest.fixture
def goals(monkeypatch):
    """Makes (goals, client). A way of 0.8: a hundredth of it is 0.008."""

    def make(**command) -> tuple[GripperGoals, Client]:
        client = Client()
        monkeypatch.setattr(gripper, "ActionClient", lambda *_: client)
        entry = {"topic": ACTION, "type": "GripperCommand", "joints": ["g"]} | command
        return GripperGoals(client, Command(**entry), JOINT), client

    return make


def play(made: GripperGoals, client: Client, ms: range, position, answer: bool = True) -> None:
    """Each 10 ms from `ms`: the position, or the one at that time; goals are accepted at once."""
    for time in ms:
        before = len(client.goals)
        made.send(position(time) if callable(position) else position, time * MS)
        if answer and len(client.goals) > before:
            client.answer()


def test_a_jump_is_one_goal_for_where_it_ends(goals):
    """A chunk's jump is a ramp between two actions: half ways on it are nowhere to go."""
    made, client = goals()
    play(made, client, range(0, 500, 10), 0.0)
    play(made, client, range(500, 1000, 10), lambda t: min(0.8, 0.8 * (t - 500) / 50))
    assert client.told == [0.0, 0.8]


def test_on_a_long_way_goals_are_a_tenth_of_a_second_apart(goals):
    made, client = goals()
    play(made, client, range(0, 410, 10), lambda t: 0.8 * t / 400)
    assert client.told == pytest.approx([0.2, 0.42, 0.64])  # a tenth after it was seen to move on


def test_a_change_below_a_hundredth_of_the_way_waits_until_the_position_stands(goals):
    made, client = goals()
    play(made, client, range(0, 200, 10), 0.4)
    play(made, client, range(200, 1000, 10), lambda t: 0.4 + 0.007 * ((t // 10) % 2))
    assert client.told == [0.4]
    play(made, client, range(1000, 1490, 10), 0.407)
    assert client.told == [0.4]
    play(made, client, range(1490, 1600, 10), 0.407)
    assert client.told == [0.4, 0.407]


def test_what_creeps_gets_a_goal_for_each_hundredth_of_the_way(goals):
    made, client = goals()
    play(made, client, range(0, 20_000, 10), lambda t: 0.8 * t / 40_000)
    assert 48 <= len(client.told) <= 51


def test_a_policy_that_wavers_does_not_move_the_gripper(goals):
    made, client = goals()
    play(made, client, range(0, 10_000, 10), lambda t: 0.4 + 0.002 * ((t // 50) % 3))
    assert len(client.told) == 1


def test_rounding_is_no_change(goals):
    made, client = goals()
    play(made, client, range(0, 3000, 10), lambda t: 0.4 + 1e-16 * (t % 3))
    assert client.told == pytest.approx([0.4])


def test_a_goal_that_is_not_answered_within_a_second_is_asked_again(goals):
    made, client = goals()
    play(made, client, range(0, 900, 10), 0.4, answer=False)
    assert client.told == [0.4]
    play(made, client, range(900, 1500, 10), 0.4)
    assert client.told == [0.4, 0.4]
    client.answers[0].set_result(SimpleNamespace(accepted=False))  # far too late
    assert not made.fault


def test_a_server_that_takes_long_to_accept_is_not_asked_for_ever(goals):
    made, client = goals()
    play(made, client, range(0, 900, 10), 0.4, answer=False)
    play(made, client, range(900, 1500, 10), 0.4, answer=False)
    assert made.fault == f"{ACTION} does not answer the gripper's goals" and len(client.told) == 2
    client.answers[0].set_result(SimpleNamespace(accepted=True, get_result_async=Future))
    play(made, client, range(1500, 10_000, 10), 0.4, answer=False)
    assert len(client.told) == 2 and not made.fault


def test_a_refused_goal_is_asked_again_a_second_later_and_another_one_at_once(goals):
    made, client = goals()
    play(made, client, range(0, 50, 10), 0.4, answer=False)
    client.answer(accepted=False)
    play(made, client, range(50, 1000, 10), 0.4)
    assert client.told == [0.4] and made.fault == f"{ACTION} refuses the gripper's goals"
    play(made, client, range(1000, 1100, 10), 0.4, answer=False)
    client.answer(accepted=False)
    assert client.told == [0.4, 0.4] and made.fault
    play(made, client, range(1100, 1200, 10), 0.8)
    assert client.told == [0.4, 0.4, 0.8] and not made.fault


def test_an_aborted_goal_is_asked_twice_more_a_second_later_each(goals):
    made, client = goals()
    for second in range(5):
        play(made, client, range(1000 * second, 1000 * second + 500, 10), 0.4)
        if second < 3:
            client.end(ABORTED)
        play(made, client, range(1000 * second + 500, 1000 * second + 1000, 10), 0.4)
    assert client.told == [0.4] * 3
    assert made.fault == f"{ACTION} aborts the gripper's goal 0.4"
    play(made, client, range(5000, 5200, 10), 0.8)  # another one goes out at once
    client.end(SUCCEEDED)
    assert client.told == [0.4] * 3 + [0.8] and not made.fault


def test_a_goal_that_is_aborted_three_times_is_given_up_until_there_is_another(goals):
    """A grasp that the server takes for a failure is not squeezed again and again."""
    made, client = goals()
    ended = 0
    for half in range(30):  # each is aborted within half a second
        play(made, client, range(500 * half, 500 * half + 500, 10), 0.4 if half < 10 or half >= 20 else 0.8)
        if len(client.ends) > ended:
            client.end(ABORTED)
            ended = len(client.ends)
    assert client.told == [0.4] * 3 + [0.8] * 3 + [0.4] * 3


def test_the_next_goal_waits_for_the_answer_to_the_last_one_and_a_tenth_of_a_second(goals):
    made, client = goals()
    play(made, client, range(0, 30, 10), 0.4, answer=False)  # goes out at 10 ms
    play(made, client, range(30, 500, 10), 0.8, answer=False)
    assert client.told == [0.4]
    client.answer()
    play(made, client, range(500, 530, 10), 0.8)
    assert client.told == [0.4, 0.8]
    begin = 500  # when that went out
    play(made, client, range(530, begin + 100, 10), 0.2)
    assert client.told == [0.4, 0.8]
    play(made, client, range(begin + 100, begin + 120, 10), 0.2)
    assert client.told == [0.4, 0.8, 0.2]


def test_a_server_that_is_seen_only_when_the_first_goal_goes_out_is_no_other_one(goals):
    made, client = goals()
    client.ready, client.servers = False, []
    play(made, client, range(0, 100, 10), 0.4)
    client.ready, client.servers = True, [b"one"]
    play(made, client, range(100, 2000, 10), 0.4)
    assert client.told == [0.4]


def test_the_end_of_a_goal_that_no_longer_counts_says_nothing(goals):
    made, client = goals()
    play(made, client, range(0, 50, 10), 0.4, answer=False)
    made.forget()
    client.answer()
    client.end(ABORTED)
    assert not made.fault
    play(made, client, range(50, 500, 10), 0.4)
    assert client.told == [0.4, 0.4]


@pytest.mark.parametrize("how", ["stalled", "reached_goal"])
def test_a_grasp_that_ends_on_the_object_is_no_failure(goals, how):
    made, client = goals()
    play(made, client, range(0, 200, 10), 0.8)
    client.end(ABORTED, **{how: True})
    play(made, client, range(200, 3000, 10), 0.8)
    assert client.told == [0.8] and not made.fault


@pytest.mark.parametrize("how", ["silence", "a motion begins", "another server", "no server for a while", "clock"])
def test_where_others_may_have_moved_the_gripper_it_is_told_again(goals, how):
    made, client = goals()
    play(made, client, range(5000, 6000, 10), 0.4)
    begin = {"silence": 6500, "clock": 20}.get(how, 6000)
    if how == "a motion begins":
        made.forget()
    if how == "another server":
        client.servers = [b"one", b"two"]  # the first was killed a moment ago, and counts for some seconds still
    if how == "no server for a while":
        client.ready, client.servers = False, []
        play(made, client, range(6000, 7000, 10), 0.4)
        client.ready, client.servers, begin = True, [b"one"], 7000
    play(made, client, range(begin, begin + 1000, 10), 0.4)
    assert client.told == [0.4, 0.4]


def test_goals_have_what_their_type_has(goals):
    made, client = goals(max_effort=40)
    play(made, client, range(0, 50, 10), 0.4)
    assert (client.goals[0].position, client.goals[0].max_effort) == (0.4, 40)
    for effort in (0, 40):
        made, client = goals(type="ParallelGripperCommand", max_effort=effort)
        play(made, client, range(0, 50, 10), 0.4)
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


def test_a_gripper_that_somebody_opened_during_a_stop_closes_again(ros, tmp_path, serve):
    """The policy says the same as before."""
    stage = Stage(ros, tmp_path, commands())
    serve(stage)
    stage.policy.motion = lambda time: np.tile([0.1, 0.5, 0.0], (len(np.atleast_1d(time)), 1))
    stage.player()
    ros.spin_until(lambda: stage.arm.position[2] < 0.01, what="the gripper has closed")
    stage.call("stop")
    ros.spin_until(stage.watch.is_in(STOPPED))
    stage.arm.position[2] = 0.7
    stage.call("start")
    ros.spin_until(lambda: stage.arm.position[2] < 0.01, what="it closes again")


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


def test_a_control_msgs_without_the_type_is_told_as_one_that_is_too_old(goals, monkeypatch):
    monkeypatch.delattr(actions, "ParallelGripperCommand")  # Humble's before 4.5
    with pytest.raises(gripper.GripperError, match="installed is too old to have ParallelGripperCommand: update it"):
        goals(type="ParallelGripperCommand")
