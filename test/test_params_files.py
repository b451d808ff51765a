"""Params files that do not mean the node that they were given to."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from pi0_ros.ros.parameters import ParameterError, check_files  # noqa: E402


def told(tmp_path, text: str, me: str = "/arm/chunk_player") -> list[tuple[str, str]]:
    """What is logged of a file with `text`, as (level, line)."""
    log, file = [], tmp_path / "p.yaml"
    file.write_text(text)
    levels = {level: lambda line, level=level: log.append((level, line)) for level in ("info", "warning")}
    node = SimpleNamespace(
        get_fully_qualified_name=lambda: me,
        get_name=lambda: me.rpartition("/")[2],
        get_logger=lambda: SimpleNamespace(**levels),
    )
    check_files(node, ["chunk_player", "--ros-args", "--params-file", str(file)])
    return log


@pytest.mark.parametrize(
    "name", ["/**", "/arm/chunk_player", "arm/chunk_player", "/*/chunk_player", "/**/chunk_player", "/arm/*"]
)
def test_a_section_for_this_node_says_nothing(name, tmp_path):
    assert not told(tmp_path, f"{name}: {{ros__parameters: {{dry_run: true}}}}")


def test_names_may_be_nested_and_others_sections_stand_beside(tmp_path):
    text = "policy_node: {ros__parameters: {rate: 5.0}}\narm:\n  chunk_player:\n    ros__parameters: {dry_run: true}\n"
    assert not told(tmp_path, text)


@pytest.mark.parametrize("name", ["/**/chunkplayer", "chunk_palyer", "/arm/chunk_players"])
def test_a_misspelt_node_is_refused(name, tmp_path):
    reason = f"no section for /arm/chunk_player, found /{name.strip('/')}; did you mean '/\\*\\*/chunk_player'"
    with pytest.raises(ParameterError, match=reason.replace("/**", "/\\*\\*")):
        told(tmp_path, f"{name}: {{ros__parameters: {{dry_run: true}}}}")


def test_the_same_node_elsewhere_is_a_warning_and_a_file_for_others_is_told(tmp_path):
    ((level, line),) = told(tmp_path, "/left/chunk_player: {ros__parameters: {dry_run: true}}")
    assert level == "warning" and line.endswith("no section for /arm/chunk_player, found /left/chunk_player")
    ((level, line),) = told(tmp_path, "/**/policy_node: {ros__parameters: {rate: 5.0}}")
    assert level == "info" and "found /**/policy_node" in line
    ((level, _),) = told(tmp_path, "/*: {ros__parameters: {dry_run: true}}")  # of no namespace
    assert level == "info"


def test_the_program_ends_with_one_line(tmp_path):
    file = tmp_path / "my.params.yaml"
    file.write_text("/**/chunkplayer:\n  ros__parameters:\n    velocity_scale: 0.2\n")
    command = [sys.executable, "-m", "pi0_ros.ros.chunk_player", "--ros-args", "--params-file", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    found = "no section for /chunk_player, found /**/chunkplayer; did you mean '/**/chunk_player'?"
    assert done.stderr.strip().endswith(f"error: {file}: {found}")
