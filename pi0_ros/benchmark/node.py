"""What the node adds to the model's time: from the newest camera message to the chunk at the robot's side.

The real policy_node over real topics, with a policy that answers at once. Cameras, joints and the chunk's receiver are
another process (`robot_side.py`), so that their work does not take the node's interpreter. Nothing here is imported
before it is asked for: a training host has no ROS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from pi0_ros.benchmark.inputs import BenchmarkError
from pi0_ros.benchmark.timing import percentiles
from pi0_ros.policy.policy import Chunk, RobotObservation
from pi0_ros.robot import Robot
from pi0_ros.robot_file import parse_robot

AIMS_P95_MS = {"raw": 6.0, "jpeg": 12.0}
PARTS = (
    "camera's publish()",  # within the next
    "frame stamped to tick",
    "observation: align, decode",
    "chunk: build, publish, receive",
    "total",
)
HORIZON = 50
ROBOT = """
name: benchmark
control_rate: 30
cameras:
  base_0_rgb: {{topic: base/image_raw, max_age: 1, transport: {transport}}}
  left_wrist_0_rgb: {{topic: wrist/image_raw, max_age: 1, transport: {transport}}}
joints:
{joints}
state: {{topics: [joint_states], max_age: 1}}
commands: [{{topic: commands, type: Float64MultiArray}}]
max_skew: 1
prompt: {{default: pick up the cube, topic: prompt}}
"""
JOINT = "  - {{name: joint_{0}, position: [-2, 2], velocity: 1, acceleration: 5}}"


class InstantPolicy:
    """Answers with the state, held; keeps when it was asked, about which frame, and when it was done."""

    digest, num_steps, runs_on = "instant", 10, "nothing"
    settings = SimpleNamespace(rtc_max_delay=0)

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self.asked: list[tuple[int, int, int, int]] = []  # ns: newest frame, tick begun, observation ready, answered

    def warm_up(self) -> None:
        pass

    def infer(self, observation: RobotObservation, **_: Any) -> Chunk:
        ready = time.time_ns()
        chunk = Chunk(np.tile(observation.state, (HORIZON, 1)), False, len(observation.frames), self.num_steps, 0)
        newest = max(observation.frames.values())
        self.asked.append((newest, observation.stamp, ready, time.time_ns()))
        return chunk

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def measure_node(transport: str, seconds: float = 10.0) -> dict[str, Any]:
    """p50 and p95 of the path and its parts, over `seconds` of two 640x480 cameras at 30 Hz and joints at 100 Hz.

    Args:
        transport: "raw" (rgb8) or "jpeg".

    Raises:
        BenchmarkError: there is no ROS here, or the robot's side failed or heard no chunk.
    """
    robot = parse_robot(
        ROBOT.format(
            transport="raw" if transport == "raw" else "compressed",
            joints="\n".join(JOINT.format(i) for i in range(6)),
        )
    )
    policy = InstantPolicy(robot)
    try:
        heard = _listen(policy, transport, seconds)
    except RuntimeError as error:  # the node cannot be configured, or no ROS domain is free
        raise BenchmarkError(f"node: {error}") from None
    return evaluate(transport, policy.asked, heard)


def _listen(policy: InstantPolicy, transport: str, seconds: float) -> dict[str, Any]:
    """Run the node with `policy` and the robot's side for it; what the robot's side heard."""
    try:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.parameter import Parameter

        from pi0_ros.ros.domain import Domain
        from pi0_ros.ros.policy_node import PolicyNode
        from pi0_ros.ros.qos import room_for_images
    except ImportError as error:
        raise BenchmarkError(
            f"node: needs ROS 2 and the built package ({error}); source a ROS 2 distribution, or run make setup and "
            "source scripts/env.sh"
        ) from None
    context = rclpy.Context()
    with Domain() as domain, tempfile.TemporaryDirectory() as folder:
        output, complaints = Path(folder, "heard.json"), Path(folder, "stderr")
        os.environ.update(domain.environment())  # both sides keep to this machine, or do not find one another
        rclpy.init(context=context, domain_id=domain.id)
        given = [Parameter("rate", value=0.0), Parameter("autostart", value=True)]
        node = PolicyNode(lambda _: policy, context=context, parameter_overrides=given)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        command = [sys.executable, "-m", "pi0_ros.benchmark.robot_side", transport, str(seconds), str(output)]
        environment = {**os.environ, **room_for_images(), "OMP_NUM_THREADS": "1"}
        try:
            node.autostart()
            with complaints.open("w") as stderr, subprocess.Popen(command, env=environment, stderr=stderr) as process:
                try:
                    _spin(executor, process, f"node {transport}", seconds)
                finally:
                    process.kill()  # does nothing once it has ended
        finally:
            executor.shutdown()
            node.destroy_node()
            context.try_shutdown()
        if not output.exists():
            said = complaints.read_text(encoding="utf-8", errors="replace").split("\n")
            reason = next((line for line in reversed(said) if line.strip()), "") or f"exit code {process.returncode}"
            raise BenchmarkError(f"node: the process that plays the robot failed: {reason}")
        return json.loads(output.read_text(encoding="utf-8"))


def _spin(executor: Any, process: subprocess.Popen, title: str, seconds: float) -> None:
    with tqdm(total=round(seconds) + 3, desc=title, unit="s", leave=False) as bar:
        begin = time.monotonic()
        while process.poll() is None:
            executor.spin_once(timeout_sec=0.1)
            if time.monotonic() - begin >= bar.n + 1:
                bar.update()


def evaluate(transport: str, asked: list[tuple[int, int, int, int]], heard: dict[str, Any]) -> dict[str, Any]:
    """The parts of the path, for every frame that was new in a chunk that arrived."""
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    used, last = [], 0
    for newest, begun, ready, answered in asked:
        fresh, last = newest > last, max(last, newest)
        came, sent = heard["received"].get(str(begun)), heard["sent"].get(str(newest))
        if not fresh or came is None or sent is None:
            continue
        used.append(newest)
        spans = (sent * 1e9, begun - newest, ready - begun, came - answered, came - newest)
        for part, span in zip(PARTS, spans, strict=True):
            parts[part].append(span / 1e9)
    if not used:
        raise BenchmarkError("node: no chunk came back from the node; see its log above")
    rows = [{"part": part, **percentiles(np.array(values))} for part, values in parts.items()]
    return {
        "transport": transport,
        "cameras": "2 x 640x480 at 30 Hz",
        "frames_sent": sum(used[0] <= int(stamp) <= used[-1] for stamp in heard["sent"]),
        "frames_in_a_chunk": len(used),  # fewer: lost by the middleware, or overtaken while the node was busy
        "aim_p95_ms": AIMS_P95_MS[transport],
        "parts": rows,
    }
