"""The robot file: the one description of a robot that node, player and trainer share.

A robot file is YAML with one schema (`Robot`). It says which topics, joints, units, rates and camera slots
are meant, so that what a policy was trained on is what it gets on the robot. Angles are radians, lengths
metres, times seconds, rates hertz (REP-103). `load_robot` is the way in; every error is one line that names
the file, the field, the value found and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from pi0_ros.wording import shown

# The order is the model's: image tokens stand in the prefix in this order, and RoPE makes it matter.
CAMERA_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

LONGEST_AGE, LONGEST_LATENCY = 30.0, 5.0  # s; in milliseconds nearly all are longer
ABSURD = 10  # times what is between its limits is outside them further than any joint gets
TURNS, FASTEST = 30.0, 50.0  # rad and rad/s: no revolute joint goes further or faster, in degrees nearly all do


def _at_most(longest: float) -> AfterValidator:
    def check(seconds: float) -> float:
        if seconds > longest:
            raise ValueError(f"found {seconds:g} s, at most {longest:g} s are allowed; are these milliseconds?")
        return seconds

    return AfterValidator(check)


Age = Annotated[Positive, _at_most(LONGEST_AGE)]
Latency = Annotated[NonNegative, _at_most(LONGEST_LATENCY)]


def _topic(name: str) -> str:
    if not re.fullmatch(r"(~/|/)?[A-Za-z_]\w*(/[A-Za-z_]\w*)*", name, re.ASCII):
        raise ValueError(f"{name!r} is not a topic name (letters, digits and _ in parts that / separates)")
    return name


Topic = Annotated[str, AfterValidator(_topic)]


class RobotFileError(ValueError):
    """A robot file that cannot be used; the message is one line per fault."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Camera(_Section):
    """One camera slot of the model and the topic that fills it."""

    topic: Topic
    transport: Literal["raw", "compressed"] = "raw"  # compressed subscribes to <topic>/compressed
    rotate: Literal[0, 90, 180, 270] = 0  # degrees clockwise, applied before flip
    flip: Literal["none", "horizontal", "vertical"] = "none"
    max_age: Age = 0.2  # an older frame makes the observation invalid
    latency: Latency = 0.0  # how long before its stamp the light was seen; subtracted from the stamp
    reliability: Literal["best_effort", "reliable"] = "best_effort"

    @model_validator(mode="after")
    def _topic_of_images(self) -> Camera:
        if self.topic.endswith("/compressed"):
            raise ValueError(
                f"topic {self.topic!r}: give it without /compressed, and transport: compressed, which subscribes to it"
            )
        return self

    @property
    def subscribed(self) -> str:
        """The topic of its messages."""
        return f"{self.topic}/compressed" if self.transport == "compressed" else self.topic


def _once(found: Sequence[str], names: Sequence[str]) -> str:
    """Which of `names` are missing in `found`, or there several times; "" where each is there once."""
    missing = [name for name in names if name not in found]
    twice = sorted({name for name in found if found.count(name) > 1})
    said = [
        f"{', '.join(missing)} is missing" if missing else "",
        f"{', '.join(twice)} is there twice" if twice else "",
    ]
    return " and ".join(part for part in said if part)


class Joint(_Section):
    """One joint, in model order. Positions in radians, or metres for a prismatic joint.

    A gripper is given to the model as 0 = open to 1 = closed (the pi convention), whatever its own units:
    `open` and `closed` are its positions in message units.
    """

    name: str
    kind: Literal["revolute", "prismatic", "gripper"] = "revolute"
    position: tuple[Finite, Finite]  # lowest, highest
    velocity: Positive  # largest speed
    acceleration: Positive  # largest acceleration
    action: Literal["relative", "absolute"] | None = None  # to the state at the chunk's start; grippers: absolute
    open: Finite | None = None
    closed: Finite | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Joint:
        if self.position[0] >= self.position[1]:
            raise ValueError(f"joint {self.name!r}: position {list(self.position)} must be [lowest, highest]")
        if self.kind == "revolute" and (max(map(abs, self.position)) > TURNS or self.velocity > FASTEST):
            raise ValueError(
                f"joint {self.name!r}: position {list(self.position)} and velocity {self.velocity:g} must be in "
                f"radians, within {TURNS:g} rad and {FASTEST:g} rad/s; are these degrees?"
            )
        if self.kind == "gripper":
            if self.open is None or self.closed is None or self.open == self.closed:
                raise ValueError(
                    f"joint {self.name!r}: a gripper needs 'open' and 'closed', two different positions, "
                    f"found open={self.open}, closed={self.closed}"
                )
            for end, value in (("open", self.open), ("closed", self.closed)):
                if not self.position[0] <= value <= self.position[1]:
                    raise ValueError(
                        f"joint {self.name!r}: {end} {value:g} lies outside position {list(self.position)}"
                    )
        elif self.open is not None or self.closed is not None:
            raise ValueError(f"joint {self.name!r}: 'open' and 'closed' are for kind: gripper, found kind: {self.kind}")
        return self

    @property
    def unit(self) -> str:
        """Of its positions, "rad" or "m"; "" for a gripper, whose driver has one of its own."""
        return {"revolute": "rad", "prismatic": "m", "gripper": ""}[self.kind]

    @property
    def conceivable(self) -> tuple[float, float]:
        """Least and largest number that can be a position at all, however wrong the limits: beyond, it is a glitch, or
        has other units. One such number would spoil the joint's normalisation."""
        low, high = self.position
        return low - ABSURD * (high - low), high + ABSURD * (high - low)

    @property
    def relative(self) -> bool:
        """Whether the model's action for this joint is relative to the state at the start of the chunk."""
        return (self.action or ("absolute" if self.kind == "gripper" else "relative")) == "relative"


class State(_Section):
    """Where proprioception comes from: one or more JointState topics, merged by joint name."""

    topics: tuple[Topic, ...] = ("joint_states",)
    max_age: Age = 0.1
    latency: Latency = 0.0

    @field_validator("topics")
    @classmethod
    def _some(cls, topics: tuple[str, ...]) -> tuple[str, ...]:
        if not topics:
            raise ValueError("needs at least one JointState topic, found none")
        return topics


MessageType = Literal["JointState", "JointTrajectory", "Float64MultiArray"]


class RecordedActions(_Section):
    """Where actions of a recording come from: what was commanded, never what was measured."""

    topic: Topic
    type: MessageType
    latency: Finite = 0.0  # subtracted from the stamp; may be negative
    joints: tuple[str, ...] | None = None  # those to take, in a Float64MultiArray's order; None: all, in model order


class Command(_Section):
    """One controller that takes commands for some of the joints (all of them when `joints` is not given).

    The two last types are actions, of control_msgs, each for one gripper; `topic` is the action's name.
    """

    topic: Topic
    type: Literal["JointTrajectory", "Float64MultiArray", "GripperCommand", "ParallelGripperCommand"]
    joints: tuple[str, ...] | None = None
    max_effort: NonNegative = 0.0  # of a gripper's action, N or Nm; 0: the driver's own

    @property
    def action(self) -> bool:
        """Whether an action server takes it, instead of a topic."""
        return self.type.endswith("GripperCommand")


class Prompt(_Section):
    """The instruction: its default text and the topic (std_msgs/String, transient local) that changes it."""

    default: str = ""
    topic: Topic = "prompt"


class Robot(_Section):
    """A robot as the policy sees it. Field by field the content of a robot file."""

    name: str
    control_rate: Positive  # Hz; 1 / control_rate is the time between two actions of a chunk
    cameras: dict[str, Camera | None]  # slot -> camera; a slot that is null or missing is masked in the model
    joints: tuple[Joint, ...]  # in model order
    state: State = State()
    actions: tuple[RecordedActions, ...] = ()  # in a file one source or a list of them; needed for training only
    commands: tuple[Command, ...]
    max_skew: Age = 0.1  # largest time between the oldest and newest stream of one observation
    clock: Literal["header", "bag"] = "header"  # which stamp of a recorded message counts
    episode_topic: Topic | None = None  # std_msgs/String whose messages begin (text) and end ("") episodes in a bag
    prompt: Prompt = Prompt()
    urdf: str | None = None  # for markers: path, relative to the robot file, or package://...
    tip_link: str | None = None  # the link whose path the markers show

    @field_validator("cameras")
    @classmethod
    def _known_slots(cls, cameras: dict[str, Camera | None]) -> dict[str, Camera | None]:
        for slot in cameras:
            if slot not in CAMERA_SLOTS:
                raise ValueError(f"unknown camera slot {slot!r}, allowed: {', '.join(CAMERA_SLOTS)}")
        present = {slot: cameras[slot] for slot in CAMERA_SLOTS if cameras.get(slot) is not None}
        if not present:
            raise ValueError(f"no camera given, at least one of {', '.join(CAMERA_SLOTS)} is needed")
        topics = [camera.topic for camera in present.values()]
        if len(set(topics)) < len(topics):
            raise ValueError(f"two camera slots share a topic: {', '.join(topics)}")
        return {slot: cameras.get(slot) for slot in CAMERA_SLOTS}

    @field_validator("actions", mode="before")
    @classmethod
    def _one_or_several(cls, actions: Any) -> Any:
        if isinstance(actions, (dict, RecordedActions)):
            return (RecordedActions.model_validate(actions),)
        return () if actions is None else actions

    @field_serializer("actions")
    def _as_in_a_file(self, actions: tuple[RecordedActions, ...]) -> Any:
        return actions[0] if len(actions) == 1 else actions or None

    @model_validator(mode="after")
    def _joints_agree(self) -> Robot:
        names = list(self.joint_names)
        if not names:
            raise ValueError("joints: at least one is needed, found none")
        if len(names) > 32:
            raise ValueError(f"joints: the model has 32 action dimensions, found {len(names)} joints")
        if len(set(names)) < len(names):
            raise ValueError(f"joints: names must differ, found {names}")
        groups = {f"commands[{i}]": command.joints or self.joint_names for i, command in enumerate(self.commands)}
        if not groups:
            raise ValueError("commands: at least one controller is needed, found none")
        recorded = {f"{where}.joints": source.joints or () for where, source in self.action_sources.items()}
        for where, group in {**groups, **recorded}.items():
            unknown = [name for name in group if name not in names]
            if unknown:
                raise ValueError(f"{where}: unknown joints {unknown}, allowed: {names}")
        commanded = [name for group in groups.values() for name in group]
        if fault := _once(commanded, names):
            raise ValueError(f"commands: every joint must be commanded exactly once, but {fault}")
        for (where, group), command in zip(groups.items(), self.commands, strict=True):
            kinds = [self.joints[names.index(name)].kind for name in group]
            if command.action and kinds != ["gripper"]:
                found = ", ".join(f"{name} ({kind})" for name, kind in zip(group, kinds, strict=True))
                raise ValueError(f"{where}: type {command.type} is for one joint of kind: gripper, found {found}")
            if command.max_effort and not command.action:
                raise ValueError(
                    f"{where}: max_effort is for GripperCommand and ParallelGripperCommand, found type: {command.type}"
                )
        topics = [command.topic for command in self.commands]
        if len(set(topics)) < len(topics):
            raise ValueError(f"commands: two controllers share a topic: {', '.join(topics)}")
        return self

    @model_validator(mode="after")
    def _sources_agree(self) -> Robot:
        groups = [s.joints or (self.joint_names if s.type == "Float64MultiArray" else ()) for s in self.actions]
        recorded = [name for group in groups for name in group]
        missing = self.actions and all(groups) and set(recorded) < set(self.joint_names)
        if missing or len(set(recorded)) < len(recorded):
            where = "actions.joints" if len(groups) == 1 else "actions"
            raise ValueError(
                f"{where}: every joint must be there exactly once, but {_once(recorded, self.joint_names)}"
            )
        topics = [source.topic for source in self.actions]
        if len(set(topics)) < len(topics):
            raise ValueError(f"actions: two sources share a topic: {', '.join(topics)}")
        return self

    @property
    def action_sources(self) -> dict[str, RecordedActions]:
        """Where recorded actions come from, by the place in the robot file: actions, or actions[0], actions[1], ..."""
        if len(self.actions) == 1:
            return {"actions": self.actions[0]}
        return {f"actions[{i}]": source for i, source in enumerate(self.actions)}

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Joint names in model order."""
        return tuple(joint.name for joint in self.joints)

    @property
    def present_cameras(self) -> dict[str, Camera]:
        """Slot -> camera for the cameras that exist, in model order."""
        return {slot: camera for slot, camera in self.cameras.items() if camera is not None}

    @property
    def latency(self) -> float:
        """Seconds by which the newest complete observation lags behind now: the largest latency of its streams."""
        return max(self.state.latency, *(camera.latency for camera in self.present_cameras.values()))

    @property
    def dt(self) -> float:
        """Seconds between two actions of a chunk."""
        return 1.0 / self.control_rate

    def to_yaml(self) -> str:
        """The robot file that loads as this robot."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def contradictions(self, other: Robot) -> list[str]:
        """What in `other`, a robot file, would make the model see or mean something else than under `self`, a
        checkpoint's.

        Topics, ages and limits may differ between a recording and a robot; what gives numbers their meaning
        (joints and their order, kinds, gripper ranges, relative or absolute, rate, cameras) may not.
        """
        pairs = [
            ("control_rate", f"{self.control_rate:g} Hz", f"{other.control_rate:g} Hz"),
            ("cameras", list(self.present_cameras), list(other.present_cameras)),
            ("joints", list(self.joint_names), list(other.joint_names)),
        ]
        if self.joint_names == other.joint_names:
            pairs += [
                (f"joint {mine.name!r} {field}", getattr(mine, field), getattr(theirs, field))
                for mine, theirs in zip(self.joints, other.joints, strict=True)
                for field in ("kind", "relative", "open", "closed")
            ]
        return [f"{what}: {a} in the checkpoint, {b} in the robot file" for what, a, b in pairs if a != b]


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


def _section(loc: tuple[int | str, ...]) -> type[_Section] | None:
    sections = {"cameras": Camera, "joints": Joint, "state": State, "actions": RecordedActions}
    sections |= {"commands": Command, "prompt": Prompt}
    return sections.get(str(loc[0])) if loc else Robot
