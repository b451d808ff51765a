"""Params files that do not mean the node that they were given to."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")

from pi0_ros.ros.parameters import (  # noqa: E402
    ParameterError,
    refuse_misspelt_sections,
    sections_of_files,
    tell_of_other_sections,
)


def told(tmp_path, text: str, me: str = "/arm/chunk_player") -> list[tuple[str, str]]:
    """What is logged of a file with `text`, as (level, line)."""
    log, file = [], tmp_path / "p.yaml"
    file.write_text(text)
    levels = {level: lambda line, level=level: log.append((level, line)) for level in ("info", "warning")}
    node = SimpleNamespace(get_fully_qualified_name=lambda: me, get_logger=lambda: SimpleNamespace(**levels))
    sections = sections_of_files(["chunk_player", "--ros-args", "--params-file", str(file)])
    refuse_misspelt_sections("chunk_player", sections)
    tell_of_other_sections(node, "chunk_player", sections)
    return log


@pytest.mark.parametrize(
    "name", ["/**", "/arm/chunk_player", "arm/chunk_player", "/*/chunk_player", "/**/chunk_player", "/arm/*"]
)
def test_a_section_for_this_node_says_nothing(name, tmp_path):
    assert not told(tmp_path, f"{name}: {{ros__parameters: {{dry_run: true}}}}")


def test_names_may_be_nested_and_others_sections_stand_beside(tmp_path):
    text = "policy_node: {ros__parameters: {rate: 5.0}}\narm:\n  chunk_player:\n    ros__parameters: {dry_run: true}\n"
    assert not told(tmp_path, text)


@pytest.mark.parametrize("beside", ["", "/**: {ros__parameters: {use_sim_time: false}}\n"])
@pytest.mark.parametrize("name", ["/**/chunkplayer", "chunk_palyer", "/arm/chunk_plyer"])
def test_a_misspelt_node_is_refused_whatever_stands_beside(name, beside, tmp_path):
    with pytest.raises(ParameterError) as error:
        told(tmp_path, f"{beside}{name}: {{ros__parameters: {{dry_run: true}}}}")
    assert "p.yaml: no section for chunk_player, found " in str(error.value)
    assert str(error.value).endswith(f"/{name.strip('/')}; is it misspelt?")


def test_the_same_program_elsewhere_or_under_another_name_is_a_warning_and_a_file_for_others_is_told(tmp_path):
    for other in ("/left/chunk_player", "chunk_player_2", "/**/chunk_player_left"):
        ((level, line),) = told(tmp_path, f"{other}: {{ros__parameters: {{dry_run: true}}}}")
        assert level == "warning" and line.endswith(f"no section for /arm/chunk_player, found /{other.strip('/')}")
    ((level, line),) = told(tmp_path, "/**/policy_node: {ros__parameters: {rate: 5.0}}")
    assert level == "info" and "found /**/policy_node" in line
    ((level, _),) = told(tmp_path, "/*: {ros__parameters: {dry_run: true}}")  # of no namespace
    assert level == "info"


@pytest.mark.parametrize("text", ["", "/**:\n\tx", "a: 1\n---\nb: 2\n", "a: !mine 3\n", "- 1\n"])
def test_what_only_ros_can_read_is_left_to_it(text, tmp_path):
    assert all("found none" in line for _, line in told(tmp_path, text))


@pytest.mark.parametrize("program", ["chunk_player", "visualiser"])
def test_the_program_ends_with_one_line(program, tmp_path):
    file = tmp_path / "my.params.yaml"
    file.write_text(f"/**/{program[:-1]}:\n  ros__parameters:\n    robot_file: x\n")
    command = [sys.executable, "-m", f"pi0_ros.ros.{program}", "--ros-args", "--params-file", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    found = f"no section for {program}, found /**/{program[:-1]}; is it misspelt?"
    assert done.stderr.strip().endswith(f"error: {file}: {found}")
