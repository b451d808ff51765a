"""The demo as a user runs it: real processes, real topics, and nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="the demo needs ROS 2")

import cv2
from rosbags.highlevel import AnyReader

from pi0_ros.demo.monitor import DemoFailed, Monitor
from pi0_ros.msg import ActionChunk
from pi0_ros.ros.domain import Domain
from pi0_ros.ros.qos import room_for_images

MODULES = {"robot_node": "demo_robot", "policy_node": "policy_node", "chunk_player": "chunk_player"}
MODULES |= {"visualiser": "visualiser"}


def start(output: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pi0_ros.demo.run", "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def children(parent: int) -> dict[str, int]:
    """Node name -> process number of the demo's living children."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            words = (entry / "cmdline").read_text().split("\0")
        except OSError:  # no process, or one that has just ended
            continue
        if fields[0] != "Z" and fields[1] == str(parent):
            modules = [word.rsplit(".", 1)[1] for word in words if word.startswith("pi0_ros.")]
            found |= {MODULES[module]: int(entry.name) for module in modules if module in MODULES}
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.05)
    return value


def test_a_run_ends_well_and_leaves_all_it_promises(tmp_path):
    demo = start(tmp_path / "out", "--episodes", "1", "--seed", "3")
    output = demo.communicate(timeout=170)[0]
    assert demo.returncode == 0, output
    assert "random weights" not in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["episodes"] == 1 and Path(summary["checkpoint"]).name == "demo_policy"
    assert summary["chunks_published"] > 3 and summary["ticks"] > 3 and summary["chunks_played"] > 1
    assert summary["chunks_continued"] > 0  # it was trained to
    assert 0 < summary["jerk_p50"] < 10_000
    assert summary["tick_latency_ms"]["p50"] > 0 and summary["observation_age_ms"]["p95"] > 0
    assert summary["runs"][0]["moved"] > 0.05
    sheet = cv2.imread(str(tmp_path / "out" / "contact_sheet.png"))
    assert sheet is not None and sheet.std() > 10
    film = cv2.VideoCapture(str(tmp_path / "out" / "rollout.mp4"))
    assert film.read()[0] and film.get(cv2.CAP_PROP_FRAME_COUNT) > 10
    with AnyReader([tmp_path / "out" / "bag"]) as bag:
        counts = {connection.topic: connection.msgcount for connection in bag.connections}
    for topic in (
        "/base_camera/image_raw/compressed",
        "/wrist_camera/image_raw/compressed",
        "/joint_states",
        "/joint_trajectory_controller/joint_trajectory",
        "/action_chunk",
        "/prompt",
        "/visualiser/markers",
    ):
        assert counts[topic] > 0, topic
    assert not list((tmp_path / "out").rglob("*.partial*"))


def test_a_node_that_dies_ends_the_demo_with_its_name(tmp_path):
    demo = start(tmp_path / "out", "--random", "--episodes", "5")
    pids = wait_for(lambda: (found := children(demo.pid)) and len(found) == 4 and found)
    log = tmp_path / "out" / "logs" / "chunk_player.log"
    wait_for(lambda: re.search("PLAYING|APPROACHING", log.read_text()), 100)
    os.kill(pids["policy_node"], signal.SIGKILL)
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == 1 and "error: policy_node ended with exit code -9" in output, output
    assert "No trained checkpoint: random weights." in output
    assert "Traceback" not in output
    wait_for(lambda: not any(alive(pid) for pid in pids.values()), 10)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["SIGKILL", "SIGINT", "SIGTERM"])
def test_however_the_demo_is_ended_no_process_stays(tmp_path, how):
    demo = start(tmp_path / "out", "--episodes", "5")
    pids = wait_for(lambda: (found := children(demo.pid)) and len(found) == 4 and found)
    demo.send_signal(how)
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == (-9 if how == signal.SIGKILL else 130), output
    wait_for(lambda: not any(alive(pid) for pid in pids.values()), 15)


def test_a_wrong_checkpoint_is_one_clear_line(tmp_path):
    demo = start(tmp_path / "out", "--checkpoint", str(tmp_path / "nowhere"))
    output = demo.communicate(timeout=60)[0]
    assert demo.returncode == 1
    assert output.strip() == f"error: --checkpoint: no such folder: {tmp_path / 'nowhere'}"


def test_a_domain_keeps_to_this_machine_by_the_variable_that_the_distribution_knows(monkeypatch):
    monkeypatch.setattr(os, "environ", {"ROS_DISTRO": "kilted"})
    with Domain() as domain:
        assert domain.environment() == {"ROS_DOMAIN_ID": str(domain.id), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        assert room_for_images()
        os.environ["ROS_DISTRO"] = "humble"
        os.environ.update(domain.environment())
        assert os.environ["ROS_LOCALHOST_ONLY"] == "1" and "ROS_AUTOMATIC_DISCOVERY_RANGE" not in os.environ
        assert room_for_images() == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run", ["--random", "--output", "OUT"]),
        ("realtime", ["--output", "OUT"]),
        ("translation", ["bag", "--robot", str(Path(__file__).parents[1] / "config/so101_demo.yaml")]),
    ],
)
def test_a_machine_without_a_free_domain_is_one_clear_line(monkeypatch, capsys, tmp_path, name, words):
    from pi0_ros.ros.domain import NoFreeDomainError

    def full():
        raise NoFreeDomainError("all ROS domains are taken")

    module = importlib.import_module(f"pi0_ros.demo.{name}")
    monkeypatch.setattr(module, "Domain", full)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [name, *(word.replace("OUT", str(tmp_path)) for word in words)])
    assert module.main() == 1
    assert capsys.readouterr().err == "error: all ROS domains are taken\n"


def test_a_message_without_actions_is_no_chunk(ros):
    begun = []
    monitor = Monitor("prompt", lambda: None, begun.append)
    publisher = ros.node("policy").create_publisher(ActionChunk, "action_chunk", 10)
    try:
        monitor.until(publisher.get_subscription_count, 20, "to be heard")
        publisher.publish(ActionChunk(sequence=0))  # what a policy says at a reset: older chunks are void
        publisher.publish(ActionChunk(sequence=1, horizon=2))
        monitor.until(lambda: monitor.seen.chunks, 20, "the chunk")
        assert [chunk.sequence for chunk in begun] == [1] and len(monitor.seen.tick_latency) == 1
        monitor.seen.diagnostics["policy"] = {"blame": "no observation: base_0_rgb: no message yet"}
        with pytest.raises(DemoFailed, match=r"^a chunk: not within 0 s; no observation: base_0_rgb: no message yet$"):
            monitor.until(lambda: False, 0, "a chunk")
    finally:
        monitor.destroy_node()
