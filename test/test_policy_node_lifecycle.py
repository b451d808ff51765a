"""policy_node's transitions, parameters and process."""

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import rclpy
from policy_node_kit import ROBOT, Bench, StubPolicy, robot
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

from pi0_ros.msg import ActionChunk
from pi0_ros.ros.parameters import ParameterError
from pi0_ros.ros.policy_node import PolicyNode, main
from pi0_ros.ros.program import end, forget_ending

POLICY = "policy_node: policy"


@pytest.fixture
def context():
    made = rclpy.Context()
    rclpy.init(context=made)
    yield made
    made.try_shutdown()


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_hundred_rounds_in_any_order_leak_neither_threads_nor_memory(context):
    policies = []

    class Heavy(StubPolicy):
        def __init__(self):
            super().__init__(robot())
            self.weights = bytearray(os.urandom(1 << 20) * 2)  # 2 MB each: a leak of it shows
            policies.append(self)

    node = PolicyNode(lambda _: Heavy(), context=context)
    draw = random.Random(0)
    threads, memory, warm, opened = threading.active_count(), [], [], []
    for round_ in range(100):
        for verb in draw.choices(["configure", "activate", "deactivate", "cleanup"], weights=[4, 3, 2, 1], k=5):
            getattr(node, f"trigger_{verb}")()
        if node.lifecycle == "active":
            node.trigger_deactivate()
        if node.lifecycle == "inactive":
            node.trigger_cleanup()
        assert node.lifecycle == "unconfigured"
        assert threading.active_count() == threads
        warm += [policy.warm for policy in policies]
        assert all(policy.closed == 1 for policy in policies)
        opened.append(len(policies))
        policies.clear()
        if round_ % 10 == 9:
            gc.collect()
            memory.append(resident_mb())
    node.destroy_node()
    assert sum(opened) > 50 and set(warm) == {1}
    assert memory[-1] - memory[2] < 10, memory


def test_transitions_over_the_graph_work_like_direct_ones(context):
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState

    b = Bench(context, rate=50.0)
    for transition, state in (
        (Transition.TRANSITION_CONFIGURE, "inactive"),
        (Transition.TRANSITION_ACTIVATE, "active"),
        (Transition.TRANSITION_DEACTIVATE, "inactive"),
        (Transition.TRANSITION_CLEANUP, "unconfigured"),
        (Transition.TRANSITION_CONFIGURE, "inactive"),
        (Transition.TRANSITION_INACTIVE_SHUTDOWN, "finalized"),
    ):
        request = ChangeState.Request()
        request.transition.id = transition
        assert b.call(ChangeState, "change_state", request).success
        assert b.call(GetState, "get_state").current_state.label == state
    assert b.policy.closed == 1
    b.close()


def test_a_transition_that_is_not_allowed_now_is_answered_and_the_node_lives_on(context, monkeypatch):
    from lifecycle_msgs.msg import Transition
    from lifecycle_msgs.srv import ChangeState, GetState

    def refused(_):
        raise RuntimeError("Failed to trigger lifecycle state machine transition")

    b = Bench(context, rate=50.0)
    request = ChangeState.Request()
    request.transition.id = Transition.TRANSITION_ACTIVATE
    assert not b.call(ChangeState, "change_state", request).success  # not configured yet
    with monkeypatch.context() as jazzy:  # whose rclpy lets this out
        jazzy.setattr(b.node, "_LifecycleNodeMixin__change_state", refused)
        assert not b.call(ChangeState, "change_state", request).success
    assert b.call(GetState, "get_state").current_state.label == "unconfigured"
    b.close()


def test_configure_fails_with_the_reason_in_diagnostics_and_can_be_tried_again(context):
    good = []

    def load(_):
        if not good:
            raise ValueError("checkpoint folder 'nowhere':\nno model.safetensors in it")
        return StubPolicy(robot())

    b = Bench(context, load=load)
    threads = threading.active_count()
    assert b.node.trigger_configure().name == "FAILURE"
    assert b.node.lifecycle == "unconfigured" and threading.active_count() == threads
    b.until(lambda: b.levels.get(POLICY) == 2)
    assert b.messages[POLICY] == "configure failed: checkpoint folder 'nowhere': no model.safetensors in it"
    good.append(True)
    assert b.node.trigger_configure().name == "SUCCESS"
    b.until(lambda: b.levels[POLICY] == 0)
    assert b.node.trigger_cleanup().name == "SUCCESS"  # and what failed once is over
    b.until(lambda: b.values[POLICY]["state"] == "unconfigured")
    assert b.levels[POLICY] == 0
    b.close()


def test_a_long_load_is_told_in_diagnostics_and_what_it_warns_of_in_the_log(context, capfd):
    heard = threading.Event()

    def load(_):
        logging.getLogger("pi0_ros.policy.policy").warning("joint %s never moved in training", "elbow")
        heard.wait(20)
        return StubPolicy(robot())

    b = Bench(context, load=load)
    configuring = threading.Thread(target=b.node.trigger_configure)
    b.executor.remove_node(b.node)
    configuring.start()
    b.until(lambda: b.values.get(POLICY, {}).get("state") == "loading")
    heard.set()
    configuring.join()
    assert "joint elbow never moved in training" in capfd.readouterr().err
    b.executor.add_node(b.node)
    b.close()


def test_a_process_that_is_told_to_end_does_not_wait_for_a_load(context):
    loaded = threading.Event()

    def load(_):
        end()
        loaded.wait(20)
        return StubPolicy(robot())

    node = PolicyNode(load, context=context)
    try:
        assert node.trigger_configure().name == "FAILURE"
    finally:
        loaded.set()
        forget_ending()
    assert node._failure == "configure failed: interrupted while the policy was loading"
    node.destroy_node()


def test_a_robot_file_that_is_wrong_fails_configure_with_its_line(context, tmp_path):
    path = tmp_path / "robot.yaml"
    path.write_text(ROBOT.replace("max_skew", "maximum_skew"))
    for value, reason in (
        ("", "parameter 'robot_file': found '', give a robot file or a checkpoint folder"),
        (str(tmp_path / "no.yaml"), "cannot be read"),
        (str(path), "maximum_skew: unknown field"),
    ):
        node = PolicyNode(context=context, parameter_overrides=[Parameter("robot_file", value=value)])
        assert node.trigger_configure().name == "FAILURE"
        assert reason in node._failure
        node.destroy_node()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("rate", -1.0, "rate"),
        ("rate", "fast", "parameter 'rate': found 'fast', must be a number"),
        ("num_steps", 0, "num_steps"),
        ("preset", "huge", "parameter 'preset': found 'huge', must be one of 'pi0'"),
        ("autostart", True, "read-only"),
        ("dtype", "int8", "must be one of 'auto', 'float32', 'bfloat16'"),
    ],
)
def test_wrong_values_are_refused_with_the_reason(context, name, value, reason):
    node = PolicyNode(lambda _: StubPolicy(robot()), context=context)
    answer = node.set_parameters([Parameter(name, value=value)])[0]
    assert not answer.successful and reason in answer.reason
    node.destroy_node()


def test_what_configure_reads_is_refused_until_cleanup(context):
    node = PolicyNode(lambda _: StubPolicy(robot()), context=context)
    assert node.set_parameters([Parameter("num_steps", value=5)])[0].successful
    node.trigger_configure()
    answer = node.set_parameters([Parameter("num_steps", value=6)])[0]
    assert not answer.successful and "cleanup first" in answer.reason
    assert node.set_parameters([Parameter("rate", value=5)])[0].successful
    node.trigger_cleanup()
    assert node.set_parameters([Parameter("num_steps", value=6)])[0].successful
    node.destroy_node()


def test_a_wrong_value_at_start_is_one_error(context):
    with pytest.raises(ParameterError, match="parameter 'preset': found 'huge', must be one of"):
        PolicyNode(context=context, parameter_overrides=[Parameter("preset", value="huge")])


def test_every_parameter_is_described(context):
    node = PolicyNode(lambda _: StubPolicy(robot()), context=context)
    for name in node._settings.values():
        assert len(node.describe_parameter(name).description) > 10
    assert node.describe_parameter("rate").floating_point_range[0].to_value == 1000
    assert node.describe_parameter("num_steps").integer_range[0].from_value == 1
    assert node.describe_parameter("autostart").read_only
    node.destroy_node()


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("rate:=-3.0", "rate"),
        ("autostart:=true", "give a robot file or a checkpoint folder"),
        ("rate", "rate"),  # rcl cannot read it
    ],
)
def test_the_program_ends_with_one_line_when_it_cannot_start(capsys, parameter, reason):
    assert main(["policy_node", "--ros-args", "-p", parameter]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and reason in printed.err


def test_arguments_that_are_not_ros_s_are_refused(capsys):
    assert main(["policy_node", "robot_file:=my_arm.yaml", "--ros-args"]) == 1
    assert capsys.readouterr().err == (
        "error: policy_node takes no 'robot_file:=my_arm.yaml': give parameters by --ros-args -p NAME:=VALUE\n"
    )


def test_help_lists_the_parameters(capsys):
    assert main(["policy_node", "--help"]) == 0
    assert "realtime_chunking ('auto'): keep" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_cleanly_and_tells_the_player(ros, tmp_path, number):
    """While it waits to be configured, and while it is active."""
    (tmp_path / "robot.yaml").write_text(ROBOT)
    options = ["-p", "autostart:=true", "-p", f"robot_file:={tmp_path}/robot.yaml", "-p", "rate:=20.0"]
    names = ("idle", "active")
    programs = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pi0_ros.ros.policy_node", "--ros-args", "-r", f"__node:={name}"]
            + (options if name == "active" else []),
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    listener, chunks = ros.node("listener"), []
    listener.create_subscription(ActionChunk, "action_chunk", chunks.append, 10)
    image, joints = Image(height=6, width=8, encoding="rgb8", step=24, data=bytes(144)), JointState()
    joints.name, joints.position = ["shoulder", "elbow"], [0.0, 0.0]
    publish = listener.create_publisher
    cameras = [publish(Image, f"{name}/image_raw", qos_profile_sensor_data) for name in ("base", "wrist")]
    states = publish(JointState, "joint_states", 10)

    def send() -> bool:
        image.header.stamp = joints.header.stamp = listener.get_clock().now().to_msg()
        for camera in cameras:
            camera.publish(image)
        states.publish(joints)
        return set(names) <= set(listener.get_node_names()) and any(chunk.horizon for chunk in chunks)

    try:
        ros.spin_until(send, 90.0, "the programs' nodes are there, and a chunk")
        for program in programs.values():
            program.send_signal(number)
        for program in programs.values():
            _, errors = program.communicate(timeout=60)
            assert program.returncode == 0 and "Traceback" not in errors, errors
    finally:
        for program in programs.values():
            program.kill()
    ros.spin_until(lambda: chunks[-1].horizon == 0, what="the void chunk")


def test_a_fault_is_told_even_where_nothing_can_be_published(context):
    b = Bench(context, rate=50.0)
    b.start()

    def silent(_):
        raise RuntimeError("publisher's context is invalid")

    b.node._worker._publish = silent
    b.until(lambda: b.node.lifecycle == "inactive", doing=b.send)
    b.until(lambda: b.levels.get(POLICY) == 2)
    assert b.messages[POLICY].startswith("inference failed: RuntimeError: publisher's context is invalid")
    assert not b.node._worker.ticking
    b.close()
