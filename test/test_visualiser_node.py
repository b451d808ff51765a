"""visualiser over real topics: what it publishes, that it rests when nobody looks, how it starts and ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Path as PathMessage
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from visualization_msgs.msg import Marker, MarkerArray

from pi0_ros.msg import ActionChunk, PlayerStatus
from pi0_ros.robot_file import config_folder, load_robot
from pi0_ros.ros.visualiser import Visualiser

ROOT = Path(__file__).parents[1]
ROBOT_FILE = config_folder() / "so101_demo.yaml"
JOINTS = load_robot(ROBOT_FILE).joint_names
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class Bench:
    """The node, and everything around it: an arm, a policy, a player and a viewer in one other node."""

    def __init__(self, ros) -> None:
        self.ros = ros
        given = [Parameter("robot_file", value=str(ROBOT_FILE)), Parameter("rate", value=50.0)]
        self.visualiser = ros.add(Visualiser(parameter_overrides=given))
        self.node = ros.node("around")
        self.states = self.node.create_publisher(JointState, "/joint_states", 10)
        self.chunks = self.node.create_publisher(ActionChunk, "action_chunk", 1)
        self.statuses = self.node.create_publisher(PlayerStatus, "chunk_player/status", LATCHED)
        self.diagnostics = self.node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.markers: dict[str, Marker] = {}
        self.path: PathMessage | None = None
        self.ghost: dict[str, float] = {}

    def look(self) -> None:
        def markers(message: MarkerArray) -> None:
            self.markers = {marker.ns: marker for marker in message.markers}

        self.eye = self.node.create_subscription(MarkerArray, "/visualiser/markers", markers, 1)
        self.node.create_subscription(PathMessage, "/visualiser/trace", lambda m: setattr(self, "path", m), 1)
        self.node.create_subscription(
            JointState,
            "/visualiser/ghost_joint_states",
            lambda m: setattr(self, "ghost", dict(zip(m.name, m.position, strict=True))),
            1,
        )
        ours = (self.states, self.chunks, self.statuses, self.diagnostics)
        self.ros.spin_until(lambda: all(p.get_subscription_count() for p in ours), 20, "the visualiser listens")

    def measured(self, pan: float) -> None:
        self.states.publish(JointState(name=list(JOINTS), position=[pan, 0.0, 0.0, 0.0, 0.0, 0.0]))

    def chunk(self, sequence: int = 3, dt: float = 5.0) -> None:
        actions = np.zeros((10, 6))
        actions[:, 0] = np.linspace(0.0, 0.9, 10)
        message = ActionChunk(sequence=sequence, joint_names=list(JOINTS), horizon=10, dt=dt, prompt="touch it")
        message.actions = actions.ravel().tolist()
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.chunks.publish(message)

    def says(self, state: int, reason: str, **fields: object) -> None:
        message = PlayerStatus(state=state, reason=reason, sequence=3, **fields)
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.statuses.publish(message)

    def shown(self, name: str, action: int = Marker.ADD) -> bool:
        return name in self.markers and self.markers[name].action == action


@pytest.fixture
def bench(ros) -> Bench:
    return Bench(ros)


def test_markers_trace_and_ghost_show_chunk_and_arm(bench):
    bench.look()
    bench.measured(0.0)
    bench.ros.spin_until(lambda: bench.ghost, 20, "a ghost")
    assert bench.ghost["shoulder_pan"] == 0.0
    assert bench.shown("chunk", Marker.DELETE)

    bench.chunk()
    bench.ros.spin_until(lambda: bench.shown("chunk"), 20, "a path")
    line = bench.markers["chunk"]
    assert (line.type, line.header.frame_id) == (Marker.LINE_STRIP, "base_link")
    assert len(line.points) == len(line.colors) == 10
    assert 0.39 < line.points[0].x < 0.4  # straight ahead: the arm's own reach
    assert line.points[-1].y < -0.2  # positive pan turns to the right
    bench.ros.spin_until(lambda: bench.ghost["shoulder_pan"] > 0.0, 20, "a ghost ahead of the arm")

    bench.measured(0.3)
    bench.ros.spin_until(lambda: bench.path is not None and len(bench.path.poses) > 1, 20, "a trace")
    assert bench.shown("executed")
    turn = bench.path.poses[-1].pose.orientation
    assert turn.x**2 + turn.y**2 + turn.z**2 + turn.w**2 == pytest.approx(1.0)


def test_held_and_refused_chunks_and_complaints_are_seen(bench):
    bench.look()
    bench.measured(0.0)
    bench.chunk()
    bench.says(PlayerStatus.HOLDING, "no joint state for more than 0.2 s")

    def colour() -> tuple[float, ...] | None:
        if not bench.shown("chunk"):
            return None
        last = bench.markers["chunk"].colors[-1]
        return round(last.r, 2), round(last.g, 2), round(last.b, 2)

    def text() -> str:
        return bench.markers["status"].text if bench.shown("status") else ""

    bench.ros.spin_until(lambda: colour() == (0.55, 0.55, 0.6), 20, "a grey path")
    bench.ros.spin_until(lambda: "HOLDING: no joint state for more than 0.2 s" in text(), 20, "its reason")
    words = "refused chunk 3: its stamp is in the future"
    bench.says(PlayerStatus.PLAYING, words, newest_refused=True, refused_sequence=3)
    bench.ros.spin_until(lambda: colour() == (1.0, 0.08, 0.05), 20, "a red path")
    complaint = DiagnosticStatus(level=DiagnosticStatus.WARN, name="policy_node: base_0_rgb", message="too slow")
    stranger = DiagnosticStatus(level=DiagnosticStatus.ERROR, name="battery", message="empty")
    other_arm = DiagnosticStatus(level=DiagnosticStatus.ERROR, name="left/policy_node: policy", message="lost")
    bench.diagnostics.publish(DiagnosticArray(status=[stranger, other_arm, complaint]))
    bench.ros.spin_until(lambda: "WARN policy_node: base_0_rgb: too slow" in text(), 20, "the complaint")
    assert "battery" not in text() and "left/" not in text()


def test_without_a_viewer_it_listens_to_nothing_and_forgets(bench):
    bench.look()
    bench.measured(0.0)
    bench.ros.spin_until(lambda: bench.shown("status"), 20, "markers")
    bench.node.destroy_subscription(bench.eye)
    for subscription in list(bench.node.subscriptions):
        if subscription.topic_name.startswith("/visualiser/"):
            bench.node.destroy_subscription(subscription)
    topics = ("/joint_states", "/action_chunk", "/chunk_player/status", "/diagnostics")
    bench.ros.spin_until(lambda: not any(map(bench.node.count_subscribers, topics)), 20, "it no longer listens")
    assert bench.visualiser.view.measured is None


def test_a_malformed_chunk_does_not_end_it(bench):
    bench.look()
    bench.chunks.publish(ActionChunk(sequence=1, joint_names=list(JOINTS), horizon=10, dt=0.1, actions=[1.0]))
    bench.chunks.publish(ActionChunk(sequence=2, joint_names=["x"], horizon=1, dt=0.1, actions=[1.0]))
    bench.ros.spin_until(
        lambda: bench.shown("status") and "chunk 2 is for other joints" in bench.markers["status"].text, 20
    )


def start(*parameters: str, **options) -> subprocess.Popen:
    given = [part for parameter in parameters for part in ("-p", parameter)]
    command = [sys.executable, "-m", "pi0_ros.ros.visualiser", "--ros-args", *given]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ, **options)


def test_a_wrong_start_is_one_line_and_ctrl_c_ends_it_quietly(ros):
    wrong = [start(), start(f"robot_file:={ROBOT_FILE}", "tip_link:=tool0"), start("robot_file:=none.yaml")]
    running = start(f"robot_file:={ROBOT_FILE}")
    for process, words in zip(wrong, ("parameter 'robot_file'", "no link 'tool0'", "none.yaml"), strict=True):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert said.startswith("error: ")
        assert words in said
        assert said.count("\n") == 1
    node = ros.node("watcher")
    ros.spin_until(lambda: "visualiser" in node.get_node_names() or running.poll() is not None, 60, "it runs")
    running.send_signal(signal.SIGINT)
    running.send_signal(signal.SIGINT)  # launch passes on what the terminal already sent
    _, said = running.communicate(timeout=30)
    assert (running.returncode, said) == (0, "")
