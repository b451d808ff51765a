"""The set that `make bench` runs: it ends in time, writes what it measured, and rewrites one place of a document."""

import json
import os
import sys

import pytest
import torch

from pi0_ros.benchmark import cli, machine, node, report, suite
from pi0_ros.benchmark.inputs import BenchmarkError
from pi0_ros.benchmark.peers import row
from pi0_ros.benchmark.timing import Ratio

DOCUMENT = f"# Before\n\n{report.BEGIN}\nold numbers\n{report.END}\n\nAfter.\n"


def peers_row(mode: str, fault: str = "") -> dict:
    return row("small", torch.float32, mode, Ratio(0.1, 0.2, 0.5, 0.4, 0.6), 9, 2e-5, 1e-4, fault)


def part(*rows: dict, weight: float = 1.0, seen: list | None = None) -> suite.Part:
    def measure(results: suite.Results, seconds: float) -> None:
        if seen is not None:
            seen.append(seconds)
        results.peers += rows

    return suite.Part("part", weight, measure)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder that looks like the source tree, as the working directory."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "package.xml").write_text("<package/>")
    (tmp_path / "docs/benchmarks.md").write_text(DOCUMENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_results_go_into_files_and_between_the_documents_markers(tree):
    assert suite.run_suite(tree / "out", 60, "the command", [part(peers_row("chunk"))]) == []
    (found,) = json.loads((tree / "out/peers.json").read_text())
    expected = {"config": "small", "dtype": "float32", "mode": "chunk", "ratio": 0.5, "ratio_min": 0.4}
    expected |= {"ratio_max": 0.6, "max_abs_diff": 2e-5, "ours_ms": 100.0, "peer_ms": 200.0, "aim": 0.6}
    assert expected.items() <= found.items()
    text = (tree / "docs/benchmarks.md").read_text()
    assert text.startswith("# Before") and text.endswith("After.\n") and "old numbers" not in text
    for fact in ("`the command`", machine.processor(), torch.__version__, "| small | float32 | chunk |"):
        assert fact in text
    assert sorted(path.name for path in (tree / "docs").iterdir()) == ["benchmarks.md"]


def test_the_document_is_left_alone_outside_a_source_tree(tree):
    (tree / "package.xml").unlink()
    suite.run_suite(tree / "out", 60, "", [part(peers_row("chunk"))])
    assert (tree / "docs/benchmarks.md").read_text() == DOCUMENT


def test_a_document_without_both_markers_is_left_alone(tmp_path):
    document = tmp_path / "page.md"
    for text in ("no place", f"{report.BEGIN} only", report.END + report.BEGIN):
        document.write_text(text)
        assert not report.rewrite(document, "new") and document.read_text() == text
    assert not report.rewrite(tmp_path / "none.md", "new")


def test_modes_that_disagree_are_returned_and_everything_is_written_still(tree):
    wrong = suite.run_suite(
        tree / "out", 60, "", [part(peers_row("chunk", "outputs differ by 1")), part(peers_row("step"))]
    )
    assert wrong == ["small float32, chunk: outputs differ by 1"]
    assert len(json.loads((tree / "out/peers.json").read_text())) == 2


def test_what_cannot_be_measured_here_is_said_and_left_out(tree, capsys):
    def fail(*_) -> None:
        raise BenchmarkError("this processor has no bfloat16 arithmetic")

    suite.run_suite(tree / "out", 60, "", [suite.Part("bf16", 1, fail), part(peers_row("chunk"))])
    assert "left out: this processor has no bfloat16 arithmetic" in capsys.readouterr().out
    assert "Left out: this processor has no bfloat16 arithmetic." in (tree / "docs/benchmarks.md").read_text()


def test_parts_share_the_time_that_is_left_by_weight(tree):
    seen: list[float] = []
    suite.run_suite(tree / "out", 40, "", [part(weight=1, seen=seen), part(weight=3, seen=seen)])
    assert seen == [pytest.approx(10, abs=1), pytest.approx(40, abs=1)]


def test_a_set_whose_time_is_over_ends_and_says_what_it_left_out(tree, capsys):
    suite.run_suite(tree / "out", 0, "", [part(peers_row("chunk"))])
    assert "left out: part: no time was left" in capsys.readouterr().out
    assert not (tree / "out/peers.json").exists()


def test_the_set_holds_every_comparison_and_leaves_bfloat16_to_processors_that_have_it(monkeypatch):
    parts = {part.title: part for part in suite.parts()}
    assert {"peers small float32", "peers mid float32", "peers mid bfloat16", "peers small training step"} <= set(parts)
    assert {"sampler nano", "sampler small", "node raw", "node jpeg"} <= set(parts)
    monkeypatch.setattr(suite, "has_bfloat16", lambda _: False)
    with pytest.raises(BenchmarkError, match="no bfloat16 arithmetic"):
        parts["peers mid bfloat16"].measure(suite.Results(), 0.0)


def test_no_subcommand_is_the_set(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "run_suite", lambda output, seconds, command: asked.append((str(output), seconds)) or [])
    monkeypatch.setattr(cli, "set_threads", lambda _: None)
    assert cli.main([]) == 0 and cli.main(["suite", "--minutes", "1"]) == 0
    assert asked == [("bench_output", 510.0), ("bench_output", 60.0)]


def test_tables_line_up_and_show_small_numbers_shortly():
    rows = [{"a": "x", "b": 1.5, "c": 2e-5}, {"a": "long", "b": None, "c": 0.0}]
    assert report.table(rows, {"a": "A", "b": "B", "c": "C"}) == (
        "| A    |   B |       C |\n|------|----:|--------:|\n| x    | 1.5 | 2.0e-05 |\n| long |     |     0.0 |"
    )


@pytest.mark.parametrize("transport", ["raw", "jpeg"])
def test_the_nodes_path_is_measured_over_real_topics(transport, monkeypatch):
    pytest.importorskip("rclpy")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the program puts itself into a domain of its own
    result = node.measure_node(transport, seconds=0.5)
    assert [row["part"] for row in result["parts"]] == list(node.PARTS)
    assert 0 < result["frames_in_a_chunk"] <= result["frames_sent"]
    spans = {row["part"]: row["p50_ms"] for row in result["parts"]}
    assert all(0 < span <= spans["total"] for span in spans.values())
    assert "frames came into a chunk" in report.node_text(result)


def test_the_nodes_path_counts_new_frames_whose_chunk_arrived():
    ms = 10**6
    asked = [  # newest frame, tick begun, observation ready, answered
        (10 * ms, 11 * ms, 13 * ms, 14 * ms),
        (10 * ms, 20 * ms, 21 * ms, 22 * ms),  # the same frame: joints woke the node
        (30 * ms, 31 * ms, 33 * ms, 34 * ms),  # its chunk did not arrive
        (50 * ms, 51 * ms, 53 * ms, 54 * ms),
    ]
    received = {str(11 * ms): 17 * ms, str(20 * ms): 25 * ms, str(51 * ms): 57 * ms}
    sent = {str(at * ms): 0.0005 for at in (10, 30, 40, 50, 70)}
    result = node.evaluate("raw", asked, {"received": received, "sent": sent})
    assert (result["frames_in_a_chunk"], result["frames_sent"]) == (2, 4)
    assert [row["p50_ms"] for row in result["parts"]] == [0.5, 1.0, 2.0, 3.0, 7.0]
    with pytest.raises(BenchmarkError, match="no chunk came back"):
        node.evaluate("raw", asked, {"received": {}, "sent": sent})


def test_a_robots_side_that_fails_is_said(monkeypatch):
    pytest.importorskip("rclpy")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(node.sys, "executable", "/bin/false")
    with pytest.raises(BenchmarkError, match="the process that plays the robot failed: exit code 1"):
        node.measure_node("raw", 0.1)


def test_without_ros_the_nodes_mode_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert cli.main(["node"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: node: needs ROS 2") and "make setup" in line
