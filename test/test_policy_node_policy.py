"""policy_node with a real network: what comes out on the topic is what the policy says offline."""

import dataclasses

import numpy as np
import pytest
import rclpy
import torch
from policy_node_kit import ROBOT, Bench, robot
from rclpy.parameter import Parameter

from pi0_ros.model.config import PRESETS, GemmaConfig, VisionConfig
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.policy.policy import Policy, RobotObservation
from pi0_ros.policy.realtime import GuidanceSettings
from pi0_ros.policy.transforms import limit_statistics
from pi0_ros.ros.conversions import chunk_actions, stamp_ns
from pi0_ros.ros.policy_node import load_policy

GEMMA = GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
TINY = dataclasses.replace(
    PRESETS["nano"],
    vision=VisionConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=14, image_size=28),
    vlm=GEMMA,
    expert=GEMMA,
    action_horizon=8,
)


def tiny() -> Policy:
    return Policy.random(robot(), TINY, seed=3, device="cpu", num_steps=2)


@pytest.fixture
def context():
    made = rclpy.Context()
    rclpy.init(context=made)
    yield made
    made.try_shutdown()


def colour(value: int) -> np.ndarray:
    return np.full((6, 8, 3), value, np.uint8)


def offline(policy: Policy, base: int, wrist: int, state: list[float], seed: int, frame: int) -> np.ndarray:
    """The chunk for these inputs, everything computed anew."""
    policy.reset()
    observation = RobotObservation(
        frame,
        {"base_0_rgb": colour(base), "left_wrist_0_rgb": colour(wrist)},
        {"base_0_rgb": frame, "left_wrist_0_rgb": frame},
        np.array(state),
        "wave",
    )
    return policy.infer(observation, generator=torch.Generator().manual_seed(seed)).actions


def test_the_chunk_on_the_topic_is_the_policys_own_and_reuse_changes_nothing(context):
    b = Bench(context, load=lambda _: tiny(), rate=50.0, seed=0)
    stamp = b.now()
    b.send_frame("base_0_rgb", 40, stamp)

    def still(wrist: int, when: int):
        def send():
            b.send_frame("base_0_rgb", 40, stamp)
            b.send_frame("left_wrist_0_rgb", wrist, when)
            b.send_joints(elbow=0.2, shoulder=0.1)

        return send

    assert b.node.trigger_configure().name == b.node.trigger_activate().name == "SUCCESS"
    b.until(lambda: any(chunk.prefix_reused for chunk in b.chunks), doing=still(90, stamp))
    reference = tiny()
    expected = offline(reference, 40, 90, [0.1, 0.2], 0, 1)
    assert not b.chunks[0].prefix_reused and b.chunks[0].cameras_encoded == 2
    for chunk in b.chunks:
        np.testing.assert_allclose(chunk_actions(chunk), expected, atol=1e-5)
    reused = next(chunk for chunk in b.chunks if chunk.prefix_reused)
    assert reused.cameras_encoded == 0 and stamp_ns(reused.header.stamp) > stamp
    # One camera new: only that one goes through the vision tower, the chunk is as if all was new.
    b.until(lambda: b.chunks[-1].cameras_encoded == 1, doing=still(200, stamp + 1))
    np.testing.assert_allclose(chunk_actions(b.chunks[-1]), offline(reference, 40, 200, [0.1, 0.2], 0, 2), atol=1e-5)
    b.close()


def test_without_a_seed_every_chunk_starts_from_fresh_noise(context):
    b = Bench(context, load=lambda _: tiny(), rate=50.0)
    b.start()
    b.until(lambda: len(b.chunks) >= 2, doing=b.send)
    assert not np.allclose(chunk_actions(b.chunks[0]), chunk_actions(b.chunks[1]), atol=1e-3)
    b.close()


def test_the_default_policy_is_made_from_the_parameters_and_untrained_weights_are_called_so(context, tmp_path, capfd):
    path = tmp_path / "robot.yaml"
    path.write_text(ROBOT)
    b = Bench(context, load=load_policy, robot_file=str(path), device="cpu", num_steps=1, rate=20.0)
    b.start()
    chunk = b.chunks[0]
    assert (chunk.checkpoint, chunk.num_steps, chunk.horizon) == ("random", 1, PRESETS["nano"].action_horizon)
    b.close()  # what a thread logs while the log is read would be written over its beginning
    assert "untrained random weights" in capfd.readouterr().err


def test_what_a_policy_is_made_with_comes_from_the_parameters(context, tmp_path):
    path = tmp_path / "robot.yaml"
    path.write_text(ROBOT)
    given = {"guidance__schedule": "linear", "guidance__max_weight": 3.0, "guidance__jacobian": False}
    given |= {"robot_file": str(path), "device": "cpu", "preset": "nano05", "dtype": "bfloat16"}
    b = Bench(context, load=load_policy, **given)
    assert b.node.trigger_configure().name == "SUCCESS"
    policy = b.node._worker.policy
    assert policy.config == PRESETS["nano05"] and policy.runs_on == "cpu in bfloat16"
    assert policy._guidance == GuidanceSettings("linear", 3.0, False)
    b.close()


def test_a_small_model_takes_one_thread_and_a_parameter_says_otherwise(context, tmp_path):
    path, before = tmp_path / "robot.yaml", torch.get_num_threads()
    path.write_text(ROBOT)
    taken = []

    def load(parameters):
        policy = load_policy(parameters)
        taken.append(torch.get_num_threads())  # in the thread that infers
        return policy

    try:
        for threads in (0, 2):
            torch.set_num_threads(3)
            b = Bench(context, load=load, robot_file=str(path), device="cpu", num_steps=1, threads=threads)
            b.start()
            b.close()
    finally:
        torch.set_num_threads(before)
    assert taken == [1, 2]


def test_a_robot_that_contradicts_the_checkpoints_fails_configure_and_the_checkpoints_own_serves(context, tmp_path):
    settings = BundleSettings(TINY)
    model = Pi0(TINY, generator=torch.Generator().manual_seed(0))
    digest = save_bundle(tmp_path / "checkpoint", model, settings, robot(), limit_statistics(robot(), settings))
    (tmp_path / "other.yaml").write_text(ROBOT.replace("control_rate: 20", "control_rate: 30"))
    given = {"checkpoint": str(tmp_path / "checkpoint"), "device": "cpu", "num_steps": 1, "rate": 20.0}
    b = Bench(context, load=load_policy, robot_file=str(tmp_path / "other.yaml"), **given)
    assert b.node.trigger_configure().name == "FAILURE"
    assert "control_rate: 20 Hz in the checkpoint, 30 Hz in the robot file" in b.node._failure
    b.until(lambda: "control_rate" in b.messages.get("policy_node: policy", ""))
    for own in ("", str(tmp_path / "checkpoint")):  # a folder, as chunk_player and visualiser take it too
        assert b.node.set_parameters([Parameter("robot_file", value=own)])[0].successful
        b.chunks.clear()
        b.start()
        assert b.chunks[0].checkpoint == digest != "random"
        b.node.trigger_deactivate(), b.node.trigger_cleanup()
    b.node.set_parameters([Parameter("checkpoint", value=str(tmp_path / "nowhere"))])
    assert b.node.trigger_configure().name == "FAILURE"
    assert "nowhere" in b.node._failure
    b.close()
