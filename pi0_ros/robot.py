"""What a robot file says: the one description of a robot that node, player and trainer share.

A robot file is YAML with one schema (`Robot`). It says which topics, joints, units, rates and camera slots
are meant, so that what a policy was trained on is what it gets on the robot. Angles are radians, lengths
metres, times seconds, rates hertz (REP-103). `robot_file.py` reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

# The order is the model's: image tokens stand in the prefix in this order, and RoPE makes it matter.
CAMERA_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

LONGEST_AGE, LONGEST_LATENCY = 30.0, 5.0  # s; in milliseconds nearly all are longer
ABSURD = 10  # times what is between its limits is outside them further than any joint gets
FARTHEST, FASTEST = 30.0, 50.0  # rad and rad/s: no revolute joint goes further or faster, in degrees nearly all do
TURN = 2 * math.pi
GAP = 0.5  # rad at least between the limits of a continuous joint, half a turn from their middle: room to overshoot
TURNS_OF_A_DRIVER = 1000  # that counts them


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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Camera(Section):
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


def _bare(topic: str) -> str:
    return topic.lstrip("/")  # most robots have no namespace


def _unequal(pairs: Sequence[tuple[str, Any, Any]]) -> list[str]:
    return [f"{what}: {a} in the checkpoint, {b} in the robot file" for what, a, b in pairs if a != b]


def _once(found: Sequence[str], names: Sequence[str]) -> str:
    """Which of `names` are missing in `found`, or there several times; "" where each is there once."""
    missing = [name for name in names if name not in found]
    twice = sorted({name for name in found if found.count(name) > 1})
    said = [
        f"{', '.join(missing)} is missing" if missing else "",
        f"{', '.join(twice)} is there twice" if twice else "",
    ]
    return " and ".join(part for part in said if part)


class Joint(Section):
    """One joint, in model order. Positions in radians, or metres for a prismatic joint.

    A gripper is given to the model as 0 = open to 1 = closed (the pi convention), whatever its own units:
    `open` and `closed` are its positions in message units. A continuous joint turns on and on, and its driver may tell
    its angle in any turn: what is meant is the angle in the turn around the middle of its limits (`Turns`).
    """

    name: str
    kind: Literal["revolute", "continuous", "prismatic", "gripper"] = "revolute"
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
        if self.angle and (max(map(abs, self.position)) > FARTHEST or self.velocity > FASTEST):
            raise ValueError(
                f"joint {self.name!r}: position {list(self.position)} and velocity {self.velocity:g} must be in "
                f"radians, within {FARTHEST:g} rad and {FASTEST:g} rad/s; are these degrees?"
            )
        if self.kind == "continuous" and self.position[1] - self.position[0] > TURN - GAP:
            raise ValueError(
                f"joint {self.name!r}: position {list(self.position)} of a continuous joint must leave {GAP:g} rad of "
                "a turn free: limits around where it works"
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
        return {"prismatic": "m", "gripper": ""}.get(self.kind, "rad")

    @property
    def middle(self) -> float:
        """Of its limits."""
        return sum(self.position) / 2

    def means_the_same(self, other: Joint) -> bool:
        """Of continuous joints: whether each angle within the other's limits is the same number for both."""
        return max(abs(end - self.middle) for end in other.position) < TURN / 2

    @property
    def angle(self) -> bool:
        """Whether its positions are angles."""
        return self.kind in ("revolute", "continuous")

    @property
    def conceivable(self) -> tuple[float, float]:
        """Least and largest number that can be a position at all, however wrong the limits: beyond, it is a glitch, or
        has other units. One such number would spoil the joint's normalisation."""
        low, high = self.position
        if self.kind == "continuous":
            return -TURNS_OF_A_DRIVER * TURN, TURNS_OF_A_DRIVER * TURN
        return low - ABSURD * (high - low), high + ABSURD * (high - low)

    @property
    def relative(self) -> bool:
        """Whether the model's action for this joint is relative to the state at the start of the chunk."""
        return (self.action or ("absolute" if self.kind == "gripper" else "relative")) == "relative"


class Turns:
    """By how many whole turns positions are away from where a robot file means them.

    Drivers tell the angle of a joint that turns on and on within a turn of their own, from -pi to pi mostly, or count
    turns. Here it is always in the turn around the middle of the joint's limits, whose ends it does not reach.
    """

    def __init__(self, joints: Sequence[Joint]) -> None:
        self._middle = np.array([joint.middle for joint in joints])
        self._continuous = np.array([joint.kind == "continuous" for joint in joints])

    def __call__(self, positions: np.ndarray, joints: np.ndarray | Sequence[int] | slice = slice(None)) -> np.ndarray:
        """rad, to be subtracted from positions [n] of `joints` (indices); 0 for joints of other kinds."""
        return self.between(positions, self._middle[joints], joints)

    def between(
        self, positions: np.ndarray, others: np.ndarray, joints: np.ndarray | Sequence[int] | slice = slice(None)
    ) -> np.ndarray:
        """rad, whole turns by which positions [n] of `joints` are from others; 0 for joints of other kinds."""
        continuous = self._continuous[joints]
        if not continuous.any():  # most robots have none, and some tell joint states at 1 kHz
            return np.zeros(len(continuous))
        known = continuous & np.isfinite(positions) & np.isfinite(others)
        return TURN * np.rint(np.where(known, positions - others, 0.0) / TURN)


class State(Section):
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


class RecordedActions(Section):
    """Where actions of a recording come from: what was commanded, never what was measured."""

    topic: Topic
    type: MessageType
    latency: Finite = 0.0  # subtracted from the stamp; may be negative
    joints: tuple[str, ...] | None = None  # those to take, in a Float64MultiArray's order; None: all, in model order


class Command(Section):
    """One controller that takes commands for some of the joints (all of them when `joints` is not given).

    The two last types are actions, of control_msgs, each for one gripper; `topic` is the action's name.
    """

    topic: Topic
    type: Literal["JointTrajectory", "Float64MultiArray", "JointState", "GripperCommand", "ParallelGripperCommand"]
    joints: tuple[str, ...] | None = None
    max_effort: NonNegative = 0.0  # of a gripper's action, N or Nm; 0: the driver's own

    @property
    def action(self) -> bool:
        """Whether an action server takes it, instead of a topic."""
        return self.type.endswith("GripperCommand")


class Prompt(Section):
    """The instruction: its default text and the topic (std_msgs/String, transient local) that changes it."""

    default: str = ""
    topic: Topic = "prompt"


class Robot(Section):
    """A robot as the policy sees it. Field by field the content of a robot file."""

    name: str
    control_rate: Positive  # Hz; 1 / control_rate is the time between two actions of a chunk
    cameras: dict[str, Camera | None]  # slot -> camera; a slot that is null or missing is masked in the model
    joints: tuple[Joint, ...]  # in model order
    state: State = State()
    actions: tuple[RecordedActions, ...] = ()  # in a file one source or a list of them; needed for training only
    commands: tuple[Command, ...]
    max_skew: Age = 0.2  # largest time between the oldest and newest stream of one observation
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
            if command.type == "JointState" and _bare(command.topic) in map(_bare, self.state.topics):
                raise ValueError(
                    f"{where}: {command.topic} is where the driver tells joint states, its commands have another topic"
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
        for where, source in self.action_sources.items():
            for i, command in enumerate(self.commands):
                if _bare(source.topic) != _bare(command.topic) or {source.type, command.type} != {"Float64MultiArray"}:
                    continue
                recorded, commanded = (list(entry.joints or self.joint_names) for entry in (source, command))
                if recorded != commanded:  # its messages have no names: one of the two would be another joint's
                    raise ValueError(
                        f"{where}.joints and commands[{i}].joints must be the same, both are the order of "
                        f"{source.topic}: found {recorded} and {commanded}"
                    )
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
        (joints and their order, kinds, gripper ranges, the turn of a continuous joint, relative or absolute, rate,
        cameras) may not.
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
            pairs += [
                (f"joint {mine.name!r} position, which says what its angles mean", mine.position, theirs.position)
                for mine, theirs in zip(self.joints, other.joints, strict=True)
                if mine.kind == theirs.kind == "continuous" and not mine.means_the_same(theirs)
            ]
        return _unequal(pairs)

    def differences(self, other: Robot) -> list[str]:
        """What in `other`, a robot file, makes the model see something else than under `self`, a checkpoint's, unless
        the robot itself is another by that: how cameras lie, which is which, and how late things come."""
        mine, theirs = self.present_cameras, other.present_cameras
        topics = {_bare(camera.topic) for camera in mine.values()}
        pairs = [("state.latency", self.state.latency, other.state.latency)]
        for slot in mine.keys() & theirs.keys():
            fields = ["rotate", "flip", "latency", *["topic"] * (_bare(theirs[slot].topic) in topics)]
            pairs += [(f"{slot}.{field}", getattr(mine[slot], field), getattr(theirs[slot], field)) for field in fields]
        return sorted(_unequal(pairs))
