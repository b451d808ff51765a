"""Where a robot's fingertip is: forward kinematics of a URDF by `yourdfpy`, with errors that name what is missing."""

from __future__ import annotations

import importlib.util
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ament_index_python.packages import get_package_share_path
from yourdfpy import URDF

PACKAGE = "package://"
_NOTHING: Mapping[str, float] = {}


class KinematicsError(ValueError):
    """A URDF that cannot be used; the message is one line."""


def find_urdf(name: str, beside: Path) -> Path:
    """The file that a robot file's `urdf` means: a path relative to the folder `beside`, or package://PACKAGE/PATH.

    A package is one of the ROS index, whose share folder counts, or a Python package.

    Raises:
        KinematicsError: nothing is named, there is no such package, or no such file.
    """
    if not name:
        raise KinematicsError("no URDF is named: set urdf in the robot file, or the parameter urdf")
    path = _resolve(name) if name.startswith(PACKAGE) else beside / Path(name).expanduser()
    if not path.is_file():
        raise KinematicsError(f"URDF {name!r}: no file {path}; correct urdf in the robot file or the parameter urdf")
    return path


def robot_description(urdf: Path) -> str:
    """The URDF's text as robot_state_publisher and RViz need it, wherever they run on this machine.

    RViz resolves package:// by the ROS index alone and relative paths not at all: the mesh files that it would not
    find get file:// paths.

    Raises:
        KinematicsError: the file is not a URDF.
    """
    root = _read(urdf)
    for mesh in root.iter("mesh"):
        name = mesh.get("filename", "")
        if "://" not in name:
            mesh.set("filename", (urdf.parent / name).resolve().as_uri())
        elif name.startswith(PACKAGE) and _ros_share(_split(name)[0]) is None:
            mesh.set("filename", _resolve(name).resolve().as_uri())
    return ET.tostring(root, encoding="unicode")


class Kinematics:
    """Forward kinematics from the root link to one tip link.

    Args:
        joint_names: columns of the positions that `tip_poses` takes; all but grippers that do not move the tip must
            be in the URDF.
        grippers: those of `joint_names` that a URDF may lack, since many describe the bare arm.

    Attributes:
        root: the URDF's root link, the frame of all poses.
        others: joints that move the tip too but are not in `joint_names` (a lift, say), for `tip_poses`.

    Raises:
        KinematicsError: not a URDF, or it lacks a joint or the tip link.
    """

    def __init__(self, urdf: Path, joint_names: Sequence[str], tip_link: str, grippers: Sequence[str] = ()) -> None:
        _read(urdf)
        logging.getLogger("yourdfpy").setLevel(logging.ERROR)
        try:
            self._urdf = URDF.load(str(urdf), load_meshes=False)
        except Exception as error:  # noqa: BLE001 - the parser raises what it happens to meet
            raise KinematicsError(f"{urdf}: not a usable URDF: {' '.join(str(error).split())}") from None
        joints, links = self._urdf.joint_map, self._urdf.link_map
        if missing := [name for name in joint_names if name not in joints and name not in grippers]:
            raise KinematicsError(
                f"{urdf}: has no joint {', '.join(map(repr, missing))} of the robot file; its joints: {_few(joints)}"
            )
        if not tip_link:
            raise KinematicsError(
                f"no tip link is named: set tip_link in the robot file; links of {urdf}: {_few(links)}"
            )
        if tip_link not in links:
            raise KinematicsError(f"{urdf}: has no link {tip_link!r} (tip_link); its links: {_few(links)}")
        self.root: str = self._urdf.base_link
        self._tip = tip_link
        chain = self._chain()
        self._moving = [(name, column) for column, name in enumerate(joint_names) if name in chain]
        self.others = tuple(name for name in chain if name not in joint_names)

    def tip_poses(self, positions: np.ndarray, others: Mapping[str, float] = _NOTHING) -> np.ndarray:
        """float64 [N, 4, 4]: the tip link in the root link's frame, metres, for joint positions [N, J].

        Args:
            others: positions of the joints in `self.others`; a missing one counts as 0.
        """
        fixed = {name: others.get(name, 0.0) for name in self.others}
        poses = np.empty((len(positions), 4, 4))
        for pose, row in zip(poses, np.asarray(positions, dtype=np.float64), strict=True):
            self._urdf.update_cfg({**fixed, **{name: row[column] for name, column in self._moving}})
            pose[:] = self._urdf.get_transform(self._tip, self.root)
        return poses

    def _chain(self) -> list[str]:
        """Movable joints from root to tip; one that mimics another counts as that other."""
        above, chain, link = {joint.child: joint for joint in self._urdf.robot.joints}, [], self._tip
        while link in above and len(chain) <= len(above):
            joint = above[link]
            if joint.type != "fixed":
                chain.append(joint.mimic.joint if joint.mimic else joint.name)
            link = joint.parent
        return list(dict.fromkeys(reversed(chain)))


def _read(urdf: Path) -> ET.Element:
    try:
        text = urdf.read_bytes()
    except OSError as error:
        raise KinematicsError(f"{urdf}: cannot be read: {error.strerror}") from None
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise KinematicsError(f"{urdf}: not XML: {error}") from None
    if root.tag != "robot":
        raise KinematicsError(f"{urdf}: not a URDF: its first element is <{root.tag}>, must be <robot>")
    if any("xacro" in element.tag for element in root.iter()):
        raise KinematicsError(f"{urdf}: a xacro file, not a URDF; make one: xacro {urdf.name} > my_robot.urdf")
    return root


def _split(name: str) -> tuple[str, str]:
    package, _, rest = name.removeprefix(PACKAGE).partition("/")
    return package, rest


def _ros_share(package: str) -> Path | None:
    try:
        return get_package_share_path(package)
    except (LookupError, ValueError, OSError):  # not found; not a name; no ROS sourced
        return None


def _resolve(name: str) -> Path:
    package, rest = _split(name)
    if share := _ros_share(package):
        return share / rest
    module = importlib.util.find_spec(package) if package.isidentifier() else None
    if module is None or not module.submodule_search_locations:
        raise KinematicsError(f"{name}: no ROS package {package!r} (is its setup.bash sourced?) and no Python package")
    return Path(next(iter(module.submodule_search_locations))) / rest


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
