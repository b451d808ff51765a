"""`pip install .` on a machine without ROS, and the folder that colcon installs, both give a package that works."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_structure import IMPORT_BELOW_ROS, PROGRAMS

ROOT = Path(__file__).parents[1]
# What is not there without ROS: a finder that comes first and knows nothing of these.
BLOCKED = ("rclpy", "rosidl_parser", "std_msgs", "sensor_msgs", "ament_index_python", "launch")
WITHOUT_ROS = f"""
import sys
class WithoutRos:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, WithoutRos())
"""


def run(*command: object, cwd: Path, **extra: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment | extra, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with pi0_ros pip-installed; other packages come from this one by path, ROS is blocked."""
    folder = tmp_path_factory.mktemp("plain")
    source = folder / "source"
    source.mkdir()
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith("test/"):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\nimport without_ros\n")
    (packages / "without_ros.py").write_text(WITHOUT_ROS)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", source, cwd=folder)
    return folder / "venv"


def test_rooms_without_ros_import_after_a_plain_pip_install(plain, tmp_path):
    code = f"{IMPORT_BELOW_ROS}\nprint(pi0_ros.__file__)"
    assert run(plain / "bin/python", "-c", code, cwd=tmp_path).split()[-1].startswith(str(plain))


def test_console_scripts_are_those_of_the_list(plain):
    ours = {name for name, where in PROGRAMS.items() if not where.startswith(("pi0_ros.ros.", "pi0_ros.demo."))}
    assert {name for name in PROGRAMS if (plain / "bin" / name).exists()} == ours
    assert "train" in ours


def test_programs_that_need_no_ros_show_their_help_after_a_plain_pip_install(plain, tmp_path):
    for name in ("train", "evaluate", "inspect_bags", "convert"):
        assert "usage" in run(plain / "bin" / name, "--help", cwd=tmp_path).lower(), name


def test_robot_files_are_reachable_after_a_plain_pip_install(plain, tmp_path):
    code = (
        "from pi0_ros.robot_file import config_folder, load_robot\n"
        "print(config_folder()); print(load_robot(config_folder() / 'so101_demo.yaml').name)"
    )
    folder, name = run(plain / "bin/python", "-c", code, cwd=tmp_path).splitlines()
    assert folder == str(plain / "share/pi0_ros/config")
    assert name == "so101_demo"


def test_sources_that_are_compiled_on_the_robot_are_reachable_after_both_installs(plain, tmp_path):
    sources = {path.name for path in (ROOT / "pi0_ros/policy/gpu/hopper").iterdir()}
    code = "import pi0_ros.policy.gpu.layers as layers\nprint(*(path.name for path in layers.SOURCES.iterdir()))"
    assert set(run(plain / "bin/python", "-c", code, cwd=tmp_path).split()) == sources
    (colcon,) = installed().glob("lib/python3*/site-packages/pi0_ros/policy/gpu/hopper")
    assert {path.name for path in colcon.iterdir()} == sources


def installed() -> Path:
    """The folder that colcon installed into; the test environment has it on its path."""
    prefix = ROOT / "install/pi0_ros"
    if not prefix.exists():
        pytest.skip("not built with colcon (make setup builds it)")
    return prefix


def test_messages_and_rooms_import_from_one_colcon_install(tmp_path):
    (packages,) = installed().glob("lib/python3*/site-packages")
    code = (
        "import pi0_ros.model, pi0_ros.robot_file\n"
        "from pi0_ros.msg import ActionChunk, PlayerStatus\n"
        "from pi0_ros.srv import SetPrompt\n"
        "print(pi0_ros.__file__, pi0_ros.robot_file.config_folder())"
    )
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    where, config = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=path).split()
    assert where == str(packages / "pi0_ros/__init__.py")
    assert Path(config, "bimanual.yaml").is_file()


def test_what_ros2_run_looks_for_is_there_and_executable():
    folder = installed() / "lib/pi0_ros"
    assert {path.name for path in folder.iterdir() if os.access(path, os.X_OK)} >= set(PROGRAMS)


def test_launch_and_robot_files_are_in_the_share_folder_of_the_colcon_install():
    share = installed() / "share/pi0_ros"
    for folder in ("config", "launch"):
        shipped = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        assert shipped <= {path.name for path in (share / folder).iterdir()}
