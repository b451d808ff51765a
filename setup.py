"""`pip install .` on a host without ROS: robot files, model, policy and training, and the programs' names.

With ROS the package is built by colcon from CMakeLists.txt, which has the messages as well.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def shared(folder: str) -> list[tuple[str, list[str]]]:
    """`folder` and those in it, as data_files for share/pi0_ros/."""
    found: dict[str, list[str]] = {}
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob(f"{folder}/**/*.*") if path.is_file()):
        found.setdefault(f"share/pi0_ros/{path.parent.as_posix()}", []).append(str(path))
    return list(found.items())


setup(
    name="pi0_ros",
    version=re.search("<version>(.*)</version>", (ROOT / "package.xml").read_text(encoding="utf-8"))[1],
    description="Runs a pi0 or pi0.5 policy on a real arm over ROS 2, and trains it from the robot's bags",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["pi0_ros", "pi0_ros.*"], exclude=["pi0_ros.msg*", "pi0_ros.srv*"]),
    package_data={"pi0_ros": ["policy/gpu/hopper/*"]},
    data_files=shared("config"),
    install_requires=lines("requirements/run.txt"),
    extras_require={"orbax": ["tensorstore"]},  # reads openpi's JAX checkpoints as they are
    # What speaks ROS needs the messages, which colcon builds.
    entry_points={
        "console_scripts": [line for line in lines("programs.txt") if not re.search(r"\.(ros|demo)\.", line)]
    },
)
