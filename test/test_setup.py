"""What `make setup` says, in one line and before anything long, on a machine that lacks something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the set-up script in a tree without environment, and a bin folder with what any system has."""
    (tmp_path / "tree/scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "tree/scripts")
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "dirname", "cat", "id", "uname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def setup(bare: Path, **environment: str) -> str:
    done = subprocess.run(
        [bare / "tree/scripts/setup.sh"],
        env={"PATH": str(bare / "bin")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert not (bare / "tree/.venv").exists()
    assert done.stderr.count("\n") == 1
    return done.stderr.strip().replace("sudo ", "")


def python(bare: Path, answer: str) -> str:
    """A stand-in for an interpreter: a shell script that does what `answer` says."""
    path = bare / "bin/python-stand-in"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def test_all_missing_system_packages_are_named_at_once_with_the_command_that_installs_them(bare):
    line = setup(bare, PYTHON=sys.executable)
    assert line == "error: missing: a C/C++ compiler, make; install with: apt-get install -y g++ make"


def test_an_interpreter_that_is_not_there_is_named(bare):
    assert setup(bare, PYTHON="python9") == "error: PYTHON=python9: no such program"


def test_an_interpreter_of_another_version_is_named_with_what_is_needed(bare):
    old = python(bare, '[ "$1" = --version ] && echo "Python 3.8.10"; exit 1')
    assert setup(bare, PYTHON=old) == f"error: PYTHON={old} is Python 3.8.10, Python 3.10 to 3.13 is needed"


def test_without_any_python_the_command_that_installs_one_is_given(bare):
    line = setup(bare)
    assert line.startswith("error: no Python 3.10 to 3.13 found")
    assert "apt-get install -y python3 python3-venv python3-dev" in line


def test_a_sourced_distribution_that_is_too_old_is_refused(bare):
    (bare / "ros").mkdir()
    (bare / "ros/rclpy.py").touch()
    sourced = {"ROS_DISTRO": "iron", "AMENT_PREFIX_PATH": "/opt/ros/iron", "PYTHONPATH": str(bare / "ros")}
    line = setup(bare, PYTHON=sys.executable, **sourced)
    assert line == "error: ROS 2 iron is sourced, Humble, Jazzy or newer is needed"


def test_a_sourced_distribution_for_another_python_is_told_with_the_ways_out(bare):
    sourced = {"ROS_DISTRO": "jazzy", "AMENT_PREFIX_PATH": "/opt/ros/jazzy"}
    line = setup(bare, PYTHON=python(bare, "case $2 in *rclpy*) exit 1 ;; *realpath*) echo $0 ;; esac"), **sourced)
    assert (
        line.startswith("error: ROS 2 jazzy is sourced, but ") and " cannot import its rclpy: name the Python" in line
    )


def test_another_kind_of_machine_is_told_to_bring_its_own_ros(bare):
    (bare / "bin/uname").unlink()
    (bare / "bin/uname").write_text("#!/bin/sh\necho Linux aarch64\n")
    (bare / "bin/uname").chmod(0o755)
    line = setup(bare, PYTHON=sys.executable)
    assert "Linux on x86_64 only, this is Linux aarch64" in line
    assert "install ROS 2 (Humble, Jazzy or newer) and source its setup.bash" in line


def test_the_environment_file_says_what_to_do_before_set_up(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/env.sh", tmp_path / "scripts")
    done = subprocess.run(
        ["bash", "-c", f"source {tmp_path}/scripts/env.sh"], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "error: pi0_ros is not set up yet, run: make setup\n"


def test_the_environment_file_does_not_mix_ros_from_wheels_with_a_sourced_distribution():
    if not (ROOT / ".venv/share/ament_index").exists():
        pytest.skip("ROS 2 does not come from wheels here")
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/scripts/env.sh"],
        env=os.environ | {"ROS_DISTRO": "jazzy"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is set up with ROS 2 from wheels, and ROS 2 jazzy is sourced: run make setup again" in done.stderr


def test_set_up_after_set_up_has_nothing_to_do():
    if not (ROOT / "install/.stamp").exists():
        pytest.skip("not set up (make setup)")
    for _ in range(2):  # the first may have to catch up with files that were added since
        done = subprocess.run([ROOT / "scripts/setup.sh"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_the_environment_can_be_sourced_by_a_strict_shell_as_make_does():
    if not (ROOT / "install/setup.bash").exists():
        pytest.skip("the package is not built by make setup here")
    script = f"source {ROOT}/scripts/env.sh && echo options $- && python -c 'import pi0_ros.msg'"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "u" in done.stdout.split()[1]  # still strict afterwards


def test_with_ros_from_wheels_ros2_runs_the_programs_and_says_what_it_cannot():
    if not (ROOT / "install/setup.bash").exists() or not (ROOT / ".venv/share/ament_index").exists():
        pytest.skip("the package is not built here with ROS 2 from wheels")
    wrapper = f"source {ROOT}/scripts/env.sh && {ROOT}/scripts/wheels/ros2"
    done = subprocess.run(
        ["bash", "-c", f"{wrapper} run pi0_ros convert --help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Turn a checkpoint of any known layout" in done.stdout, done.stderr
    done = subprocess.run(
        ["bash", "-c", f"{wrapper} launch pi0_ros x.launch.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "come with a ROS 2 distribution" in done.stderr and "train, " in done.stderr
