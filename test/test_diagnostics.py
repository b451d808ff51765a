"""Sliding windows, judged values, parameters that refuse."""

import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray
from hypothesis import given
from hypothesis import strategies as st
from rcl_interfaces.srv import SetParameters
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from pi0_ros.ros.conversions import SECOND, stamp_ns
from pi0_ros.ros.diagnostics import DiagnosticsPublisher, Report, Window, title
from pi0_ros.ros.health import THRESHOLDS, Health, gpu_memory
from pi0_ros.ros.parameters import ParameterError, Parameters, Spec, usage


def test_a_window_forgets_what_is_older_than_its_length():
    window = Window(seconds=10.0)
    for now, value in ((0.0, 100.0), (5.0, 1.0), (10.0, 2.0), (11.0, 3.0)):
        window.add(now, value)
    summary = window.summary(11.0)
    assert (summary.count, summary.p50, summary.max) == (3, 2.0, 3.0)
    assert summary.p95 == pytest.approx(2.9)
    assert window.summary(30.0) is None


def test_a_clock_set_back_empties_the_window():
    window = Window()
    for now, value in ((90.0, 1.0), (100.0, 2.0), (95.0, 3.0)):
        window.add(now, value)
    assert window.values(96.0).tolist() == [3.0]
    assert window.values(101.0).tolist() == [3.0]  # nor does it come back when its time comes again


@given(st.lists(st.floats(0, 100), max_size=40), st.floats(0, 120))
def test_a_window_equals_looking_at_all_values(times, now):
    window = Window(seconds=10.0)
    for i, time in enumerate(sorted(times)):
        window.add(time, float(i))
    expected = [float(i) for i, time in enumerate(sorted(times)) if now - 10.0 <= time <= now]
    assert window.values(now).tolist() == expected


def test_the_rate_is_that_of_the_intervals_and_falls_when_the_stream_stops():
    window = Window(seconds=10.0)
    assert window.rate(0.0) == 0.0
    for now in np.arange(0, 2.01, 0.1):
        window.add(float(now))
    assert window.rate(2.0) == pytest.approx(10.0)
    assert window.rate(8.0) == pytest.approx(2.5)
    assert window.rate(50.0) == 0.0


def test_the_worst_value_decides_the_level_and_comes_first():
    report = Report("node: thing")
    report.judge("fine", 1.0, 2.0, 3.0)
    report.judge("odd", 2.5, 2.0, 3.0, " s")
    report.judge("bad", 3.5, 2.0, 3.0, " s")
    report.judge("unjudged", 9.0, 0.0, 0.0)
    report.judge("odd again", 2.1, 2.0, 3.0)
    report.judge("just", 2.0, 2.0, 3.0)  # at a threshold is not above it
    message = report.message("arm")
    assert message.level == b"\x02" and message.hardware_id == "arm"
    assert message.message == "bad is 3.5 s, above 3 s; odd is 2.5 s, above 2 s; odd again is 2.1, above 2"
    assert {pair.key: pair.value for pair in message.values}["unjudged"] == "9"
    assert Report("x").message("").message == "OK"


def test_the_health_of_policy_node_in_numbers():
    health, limits = Health(), {spec.name: spec.default for spec in THRESHOLDS}
    for k in range(5):
        now = (100 + k) * SECOND
        health.accept(now, 0.02)
        health.publish(now + SECOND // 10, now - SECOND // 5, {"vision": 0.01, "total": 0.1}, k > 0)
    health.reject(105 * SECOND, "no observation: it is dark")
    report = health.report("policy", 105 * SECOND, limits, max_skew=0.1)
    expected = {
        "chunks": "5", "rejections": "1", "prefix_reused": "4", "prefix_reuse_share": "0.8", "chunk_rate_hz": "0.8163",
        "latency_vision_ms_p50": "10", "latency_total_ms_p95": "100", "latency_p95_s": "0.1", "skew_ms_max": "20",
        "observation_age_ms_p50": "300", "skew_share": "0.2", "rejected_share": "0.1667",
        "blame": "no observation: it is dark",
    }  # fmt: skip
    assert report.values | expected == report.values
    assert "misses_share" not in report.values and "latency_prefix_ms_p50" not in report.values
    reasons = ["no observation: it is dark", "rejected_share is 0.1667, above 0.05"]
    assert (report.level, report.reasons) == (1, reasons)
    health.clear_windows()
    left = health.report("policy", 105 * SECOND, limits, max_skew=0.1)
    assert left.level == 0 and not [key for key in left.values if key.endswith(("_p50", "_share"))]
    health.accept(106 * SECOND, 0.02)
    assert "blame" not in health.report("policy", 106 * SECOND, limits, max_skew=0.1).values


def test_latency_and_skew_are_judged_by_what_19_of_20_keep_to():
    health, limits = Health(), {spec.name: spec.default for spec in THRESHOLDS}
    for k in range(101):
        health.accept(100 * SECOND, k / 100)
        health.publish(100 * SECOND, 100 * SECOND, {"total": k / 100}, False)
    report = health.report("policy", 100 * SECOND, limits, max_skew=1.0)
    assert (report.values["latency_p95_s"], report.values["skew_share"]) == ("0.95", "0.95")


def test_one_rejection_among_many_ticks_is_shown_and_no_reason():
    health, limits = Health(), {spec.name: spec.default for spec in THRESHOLDS}
    for _ in range(30):
        health.accept(100 * SECOND, 0.0)
    health.reject(100 * SECOND, "it is dark")
    report = health.report("policy", 100 * SECOND, limits, max_skew=1.0)
    assert (report.level, report.reasons, report.values["blame"]) == (0, [], "it is dark")


def test_ticks_that_came_too_late_are_judged_by_their_share():
    health, limits = Health(), {spec.name: spec.default for spec in THRESHOLDS}
    for k in range(4):
        health.missed.add(100.0, float(k < 2))
    report = health.report("policy", 100 * SECOND, limits, max_skew=1.0)
    assert report.reasons == ["misses_share is 0.5, above 0.1"]  # not above 0.5, where it would be an error
    health.clear_windows()
    assert health.report("policy", 100 * SECOND, limits, max_skew=1.0).reasons == []


def test_two_arms_have_names_of_their_own(ros):
    assert f"{title(ros.node('policy_node'))}: policy" == "policy_node: policy"
    assert f"{title(ros.node('policy_node', namespace='left'))}: policy" == "left/policy_node: policy"


def test_what_is_reported_bears_the_time_of_the_node(ros):
    seen: list[DiagnosticArray] = []
    ros.node("listener").create_subscription(DiagnosticArray, "/diagnostics", seen.append, 10)
    node = ros.node("reporter")
    before = node.get_clock().now().nanoseconds
    publisher = DiagnosticsPublisher(node, lambda: [Report("a")], period=0.05)
    ros.spin_until(lambda: seen)
    assert before <= stamp_ns(seen[0].header.stamp) and publisher.hardware_id == ""


def test_a_waiting_node_still_reports_while_simulated_time_stands_still(ros):
    node = ros.node("reporter", parameter_overrides=[Parameter("use_sim_time", value=True)])
    seen: list[DiagnosticArray] = []
    ros.node("listener").create_subscription(DiagnosticArray, "/diagnostics", seen.append, 10)
    publisher = DiagnosticsPublisher(node, lambda: [Report("a"), Report("b")], "arm", period=0.05)
    ros.spin_until(lambda: len(seen) > 2)
    assert [(status.name, status.hardware_id) for status in seen[0].status] == [("a", "arm"), ("b", "arm")]
    assert publisher.hardware_id == "arm"


SPECS = (
    Spec("speed", 1.0, "how fast", 0, 10),
    Spec("count", 3, "how many", 1, 5),
    Spec("mode", "a", "which", choices=("a", "b")),
    Spec("on", True, "whether", read_only=True),
    Spec("file", "", "from where", configured=True),
)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("speed", -1, "parameter 'speed': found -1, must be from 0 to 10"),
        ("speed", float("nan"), "speed"),
        ("speed", "x", "parameter 'speed': found 'x', must be a number"),
        ("speed", True, "parameter 'speed': found True, must be a number"),
        ("count", 1.5, "parameter 'count': found 1.5, must be a whole number"),
        ("count", 6, "count"),
        ("mode", "c", "parameter 'mode': found 'c', must be one of 'a', 'b'"),
        ("on", False, "read-only"),
    ],
)
def test_a_wrong_value_is_refused_with_the_reason_and_the_old_one_stays(ros, name, value, reason):
    node = ros.node()
    parameters = Parameters(node, SPECS)
    before = parameters[name]
    answer = node.set_parameters([Parameter(name, value=value)])[0]
    assert not answer.successful and reason in answer.reason
    assert parameters[name] == before


def test_a_whole_number_is_taken_for_a_float_and_changes_are_told(ros):
    node, told = ros.node(parameter_overrides=[Parameter("speed", value=2)]), []
    parameters = Parameters(node, SPECS, told.append)
    assert parameters["speed"] == 2.0 and isinstance(parameters["speed"], float) and not told
    node.set_parameters([Parameter("speed", value=4)])
    assert told == [{"speed": 4.0}]


def test_changes_are_told_by_a_humble_rclpy_too_by_call_and_by_service(ros, monkeypatch):
    monkeypatch.delattr(Node, "add_post_set_parameters_callback")  # which has none
    node, told = ros.node(), []
    parameters = Parameters(node, SPECS, lambda changed: told.append((changed, parameters["speed"])))
    node.set_parameters([Parameter("speed", value=4), Parameter("mode", value="c")])
    assert told == [({"speed": 4.0}, 4.0)]  # what was refused is not told, and what is told counts already
    assert not node.set_parameters_atomically([Parameter("speed", value=5), Parameter("mode", value="c")]).successful
    client = ros.node("other").create_client(SetParameters, "/test/set_parameters")
    request = SetParameters.Request(parameters=[Parameter("speed", value=2.5).to_parameter_msg()])
    assert ros.call(client, request).results[0].successful
    assert told[1:] == [({"speed": 2.5}, 2.5)]


def test_a_wrong_value_at_start_is_the_same_line_where_rclpys_error_has_two_arguments(ros, monkeypatch):
    def refuse(node, name, *_):
        error = ParameterException("", name)  # as Humble's InvalidParameterValueException
        error.args = "Invalid parameter value (z) for parameter. Reason: parameter 'speed': found 'z', no", name
        raise error

    monkeypatch.setattr(Node, "declare_parameter", refuse)
    monkeypatch.setattr(Node, "__init__", lambda *_: None)
    monkeypatch.setattr(Node, "add_on_set_parameters_callback", lambda *_: None)
    with pytest.raises(ParameterError, match="^parameter 'speed': found 'z', no$"):
        Parameters(Node(), SPECS)


def test_a_wrong_value_at_start_is_an_error(ros):
    with pytest.raises(ParameterError, match="^parameter 'mode': found 'z', must be one of 'a', 'b'$"):
        Parameters(ros.node(parameter_overrides=[Parameter("mode", value="z")]), SPECS)


def test_frozen_parameters_can_change_again_later(ros):
    node = ros.node()
    parameters = Parameters(node, SPECS)
    parameters.frozen = True
    assert "cleanup first" in node.set_parameters([Parameter("file", value="f")])[0].reason
    assert node.set_parameters([Parameter("speed", value=2.0)])[0].successful
    parameters.frozen = False
    assert node.set_parameters([Parameter("file", value="f")])[0].successful


def test_usage_names_every_parameter_with_what_it_may_be():
    text = usage("p", SPECS)
    assert all(f"  {spec.name} ({spec.default!r}): {spec.description}" in text for spec in SPECS)
    specs = (Spec("rate", 10.0, "Hz", 0.5, 1000), Spec("limits", "clamp", "what happens", choices=("clamp", "refuse")))
    assert "  rate (10.0): Hz; from 0.5 to 1000" in usage("p", specs)
    assert "  limits ('clamp'): what happens; one of: 'clamp', 'refuse'" in usage("p", specs)


def test_gpu_memory_is_that_of_the_policys_gpu_and_a_broken_one_is_an_error_not_the_end(monkeypatch):
    used = {0: 0, 1: 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", used.get)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((60 + device) * 2**20, 100 * 2**20))
    report = Report("gpu")
    gpu_memory(report, 0.3, 0.0)
    assert report.values == {
        "gpu_memory_policy_mb": "3",
        "gpu_memory_total_mb": "100",
        "gpu_memory_share": "0.39",
    }
    assert report.level == 1

    def broken(device):
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    report = Report("gpu")
    gpu_memory(report, 0.3, 0.0)
    assert (report.level, report.reasons) == (
        2,
        ["the GPU does not answer: CUDA error: device-side assert triggered"],
    )
