"""Reads robot files. Every error is one line that names the file, the field, the value found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pi0_ros.robot import Camera, Command, Joint, Prompt, RecordedActions, Robot, Section, State
from pi0_ros.wording import shown


class RobotFileError(ValueError):
    """A robot file that cannot be used; the message is one line per fault."""


def parse_robot(text: str, source: str = "robot file") -> Robot:
    """A `Robot` from YAML text; `source` names it in errors.

    Raises:
        RobotFileError: not YAML, not a mapping, or against the schema; names field, value found and allowed.
    """
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise RobotFileError(f"{source}: not YAML{where}: {problem}") from None
    if not isinstance(data, dict):
        fields = "a mapping of fields (name, joints, cameras, ...)"
        raise RobotFileError(f"{source}: expected {fields}, found {shown(data)}")
    try:
        return Robot.model_validate(data)
    except ValidationError as error:
        raise RobotFileError("\n".join(_line(source, fault) for fault in error.errors())) from None


def robot_path(path: str | Path) -> Path:
    """The robot file that is meant: `path`, ~ resolved, or robot.yaml of the checkpoint folder there."""
    path = Path(path).expanduser()
    return path / "robot.yaml" if path.is_dir() else path


def load_robot(path: str | Path) -> Robot:
    """The robot described by the file at `path`, or by the one in a checkpoint folder.

    Raises:
        RobotFileError: the file cannot be read, is not YAML, or breaks a rule of the schema.
    """
    path = robot_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RobotFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_robot(text, str(path))


def config_folder() -> Path:
    """The folder of the robot files that ship with the package, in the source tree or where it was installed."""
    here = Path(__file__).resolve()
    candidates = [here.parents[1] / "config", *(parent / "share/pi0_ros/config" for parent in here.parents)]
    for folder in candidates:
        if (folder / "so101_demo.yaml").is_file():
            return folder
    raise RobotFileError(f"the robot files of the package are not installed: no share/pi0_ros/config above {here}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML loaders silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _line(source: str, fault: Any) -> str:
    field = ".".join(str(part) for part in fault["loc"])
    kind, message, found = fault["type"], fault["msg"], fault.get("input")
    if kind == "extra_forbidden":
        owner = _section(fault["loc"][:-1])
        allowed = f", allowed: {', '.join(owner.model_fields)}" if owner else ""
        return f"{source}: {field}: unknown field{allowed}"
    if kind == "missing":
        return f"{source}: {field}: missing, this field is required"
    if kind == "value_error":
        return f"{source}: {field + ': ' if field else ''}{message.removeprefix('Value error, ')}"
    message = message.replace("a valid tuple", "a list")
    return f"{source}: {field}: found {shown(found)}; {message[0].lower() + message[1:]}"


def _section(loc: tuple[int | str, ...]) -> type[Section] | None:
    sections = {"cameras": Camera, "joints": Joint, "state": State, "actions": RecordedActions}
    sections |= {"commands": Command, "prompt": Prompt}
    return sections.get(str(loc[0])) if loc else Robot
