"""What a viewer shows of policy and player, as plain numbers: fingertip paths with colours, a text, the ghost's pose.

`View` gathers what was heard and says what to draw; the node `visualiser` turns that into messages, the demo's renderer
into a picture. Positions in metres in the URDF's root frame, times in nanoseconds of the node's clock.
"""

from __future__ import annotations

import textwrap
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pi0_ros.ros.judging import SECOND
from pi0_ros.ros.kinematics import Kinematics
from pi0_ros.ros.player import DRY_RUN, HOLDING, PLAYING, STATES, STOPPED

NOW, LATER = np.array([1.0, 0.92, 0.24, 1.0]), np.array([1.0, 0.24, 0.63, 1.0])  # rgba
HELD, REFUSED = np.array([0.55, 0.55, 0.6, 0.8]), np.array([1.0, 0.08, 0.05, 1.0])
EXECUTED, TEXT = np.array([0.15, 0.75, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0])
STEP = 5e-4  # m; the executed path gets a new point when the tip has moved so far
WRAP = 60  # characters of a line of the text
SILENCE = SECOND  # ns; an active player says something ten times a second

Look = Literal["coming", "held", "refused"]


@dataclass(frozen=True)
class Shape:
    """One thing to draw. Nothing to draw is a shape without points, so that what was there before goes away."""

    name: str  # a marker namespace: chunk, actions, executed, status
    kind: Literal["line", "dots", "text"]
    points: np.ndarray  # float64 [N, 3]
    colours: np.ndarray  # float64 [N, 4] rgba
    text: str = ""


@dataclass(frozen=True)
class Heard:
    """A chunk with its fingertip path; `fault` says why there is none."""

    stamp: int
    dt: float
    sequence: int
    actions: np.ndarray  # [H, J]
    path: np.ndarray  # [H, 3]
    prompt: str
    epoch: int
    fault: str = ""

    @property
    def times(self) -> np.ndarray:
        """[H] seconds since `stamp`."""
        return self.dt * np.arange(len(self.actions))


@dataclass(frozen=True)
class Player:
    """What the player said last; the fields of PlayerStatus."""

    stamp: int
    state: int
    reason: str
    sequence: int
    seconds_left: float
    refused_sequence: int | None = None  # of the newest chunk, where that was refused


def fade(ahead: np.ndarray, span: float) -> np.ndarray:
    """[N, 4] colours for points that are `ahead` seconds away, NOW for 0 and LATER for `span` seconds."""
    share = np.clip(ahead / span if span > 0 else np.zeros_like(ahead), 0.0, 1.0)[:, None]
    return (1 - share) * NOW + share * LATER


def still_ahead(heard: Heard, now: int) -> tuple[np.ndarray, np.ndarray]:
    """The path from `now` on, [n, 3] and how many seconds ahead each point is, [n]; its first point is for `now`."""
    times, at = heard.times, (now - heard.stamp) / SECOND
    if not len(times) or at > times[-1]:
        return np.empty((0, 3)), np.empty(0)
    later = times > at
    first = np.array([[np.interp(at, times, heard.path[:, axis]) for axis in range(3)]])
    return np.vstack([first, heard.path[later]]), np.concatenate([[0.0], times[later] - max(at, 0.0)])


def look_of(heard: Heard, player: Player | None) -> Look:
    """Whether the arm is to follow this chunk, has been held, or the player refused it."""
    if heard.fault:
        return "refused"
    if player is None:
        return "coming"
    if player.refused_sequence == heard.sequence:
        return "refused"
    return "held" if player.state in (STOPPED, HOLDING) else "coming"


class View:
    """What was heard, and what to draw of it. One thread uses it.

    Args:
        joint_names: model order, the columns of positions.

    Attributes: trail, how many seconds of the executed path are kept.
    """

    def __init__(self, kinematics: Kinematics, joint_names: Sequence[str]) -> None:
        self.trail, self._kinematics, self._names = 10.0, kinematics, tuple(joint_names)
        self.problems: dict[str, str] = {}  # diagnostic status -> what it complains about
        self.clear()

    def clear(self) -> None:
        """Forget everything: nobody looked for a while."""
        self.set_back()
        self._player: Player | None = None
        self._joints: dict[str, float] = {}  # all joints ever heard, also those that the policy does not know
        self.problems.clear()

    def set_back(self) -> None:
        """Forget what has a time: the clock was set back (bag loop, simulator reset)."""
        self._chunk: Heard | None = None
        self._trail: deque[tuple[int, np.ndarray]] = deque()  # stamp, tip pose [4, 4]

    def hear_chunk(
        self,
        stamp: int,
        dt: float,
        sequence: int,
        names: Sequence[str],
        actions: np.ndarray,
        prompt: str,
        epoch: int = 0,
    ) -> None:
        """A new chunk, actions [H, J]; one without actions says which epoch counts."""
        if not len(actions):
            if self._chunk is not None and self._chunk.epoch != epoch:
                self._chunk = None
            return
        fault = ""
        if tuple(names) != self._names:
            fault = f"chunk {sequence} is for other joints: {', '.join(names)}"
        elif not np.isfinite(actions).all() or not dt > 0:
            fault = f"chunk {sequence} has actions or times that are not finite"
        usable = actions[:0] if fault else actions
        path = self._kinematics.tip_poses(usable, self._joints)[:, :3, 3]
        self._chunk = Heard(stamp, dt, sequence, usable, path, prompt, epoch, fault)

    def hear_player(self, player: Player) -> None:
        """The player's newest status. A start begins a new executed path."""
        if self._player and self._player.state == STOPPED and player.state != STOPPED:
            self._trail.clear()
        self._player = player

    def hear_joints(self, positions: Mapping[str, float]) -> None:
        """Measured positions by joint name; several messages complement one another."""
        self._joints.update(positions)

    def move(self, now: int) -> bool:
        """Take the measured fingertip into the executed path; whether the path changed."""
        before = len(self._trail)
        while self._trail and self._trail[0][0] < now - self.trail * SECOND:
            self._trail.popleft()
        measured = self.measured
        if measured is None:
            return before != len(self._trail)
        pose = self._kinematics.tip_poses(measured[None], self._joints)[0]
        if self._trail and np.linalg.norm(pose[:3, 3] - self._trail[-1][1][:3, 3]) < STEP:
            return before != len(self._trail)
        self._trail.append((now, pose))
        return True

    @property
    def measured(self) -> np.ndarray | None:
        """[J] measured positions, None until every joint of the URDF's was heard."""
        if not all(name in self._joints for name in self._names):
            return None
        return np.array([self._joints[name] for name in self._names])

    def executed(self) -> list[tuple[int, np.ndarray]]:
        """The executed path: time and tip pose [4, 4], oldest first."""
        return list(self._trail)

    def ghost(self, now: int, lead: float) -> dict[str, float]:
        """Positions by joint name of a robot that is `lead` seconds ahead on the chunk; else of the real one."""
        chunk = self._chunk
        if chunk is None or chunk.fault or look_of(chunk, self._player) != "coming":
            return dict(self._joints)
        at = (now - chunk.stamp) / SECOND + lead
        ahead = {name: float(np.interp(at, chunk.times, chunk.actions[:, j])) for j, name in enumerate(self._names)}
        return {**self._joints, **ahead}

    def shapes(self, now: int) -> list[Shape]:
        """All that is to be drawn, always the same names."""
        lines = np.array([pose[:3, 3] for _, pose in self._trail]).reshape(-1, 3)
        age = np.array([(now - stamp) / SECOND for stamp, _ in self._trail])
        colours = np.tile(EXECUTED, (len(lines), 1))
        # RViz blends a line only if its last point is not opaque.
        colours[:, 3] = np.clip(0.95 - 0.75 * age / max(self.trail, 1e-9), 0.2, 0.95)
        return [*self._chunk_shapes(now), Shape("executed", "line", lines, colours), self._text(now)]

    def _chunk_shapes(self, now: int) -> list[Shape]:
        chunk, points, colours, dots = self._chunk, np.empty((0, 3)), np.empty((0, 4)), 0
        if chunk is not None:
            look = look_of(chunk, self._player)
            if look == "coming":
                points, ahead = still_ahead(chunk, now)
                colours, dots = fade(ahead, chunk.times[-1] if len(chunk.times) else 0.0), 1
            else:  # all of it: what was asked for is worth seeing when it is not done
                points = chunk.path
                colours = np.tile(HELD if look == "held" else REFUSED, (len(points), 1))
        return [Shape("chunk", "line", points, colours), Shape("actions", "dots", points[dots:], colours[dots:])]

    def _text(self, now: int) -> Shape:
        lines, player, chunk = [], self._player, self._chunk
        if player is None:
            lines.append("nothing heard from chunk_player")
        elif player.state != STOPPED and now - player.stamp > SILENCE:
            lines.append("chunk_player is silent")
        else:
            name = "DRY RUN" if player.state == DRY_RUN else STATES[player.state]
            if player.state == PLAYING:
                name += f" chunk {player.sequence}, {player.seconds_left:.1f} s left"
            lines.append(f"{name}: {player.reason}" if player.reason else name)
        if chunk is None:
            lines.append("no chunk")
        else:
            lines += [text for text in (chunk.prompt, chunk.fault) if text]
        lines += self.problems.values()
        text = "\n".join(textwrap.fill(line, WRAP) for line in lines)  # RViz does not wrap
        return Shape("status", "text", np.zeros((1, 3)), TEXT[None], text)
