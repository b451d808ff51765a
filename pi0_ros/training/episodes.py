"""From a recording to episodes on the action grid: what was observed and commanded at every tick, and what was dropped.

Ticks lie `1 / control_rate` apart, from the first moment at which every camera and joint has spoken to the last message
of any. Which message belongs to a tick is decided by `policy.alignment`, as on the robot; and as there, a joint is read
from the newest message that has it, and only those that are read must be fresh and together. Commands do not gate the
start: before the first one the action is marked unknown, and again from where nothing at all was recorded (a split file
is missing, the recorder stalled) to the next command.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from pi0_ros.policy.alignment import FAR_NS, AlignedTicks, StreamTimes, align_ticks, newest_indices
from pi0_ros.robot import Robot
from pi0_ros.training.bags import BagError
from pi0_ros.training.commands import Commands, commanded
from pi0_ros.training.recording import Recording

LONGEST_NS = 48 * 3600 * 1_000_000_000
PROMPT_DELAY_NS = 1_000_000_000  # by which an episode's prompt may come after its mark
IDLE_MARGIN = 0.25  # seconds kept before the first and after the last movement


@dataclass(frozen=True)
class Selection:
    """What to take from recordings.

    `idle`: start and end of an episode are trimmed while no joint's state or command is further than this share of its
    position range from where it began (ended); 0 keeps everything. `prompt` replaces every recorded one.
    """

    idle: float = 0.005
    prompt: str | None = None


@dataclass
class Episode:
    """One demonstration on its action grid of T ticks.

    ticks_ns int64 [T]; state, actions float64 [T, J] in robot units; known bool [T], False while a joint had no command
    yet, and from a hole of the recording to its next command; frames: slot -> int64 [T], ordinal of the image message
    on its topic, -1 without; usable bool [T]: observation complete and not trimmed; a sample may begin where it is
    known, too; prompts: one text per tick; skew_ns int64 [T];
    dropped: reason -> ticks.
    """

    label: str
    ticks_ns: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    known: np.ndarray
    frames: dict[str, np.ndarray]
    usable: np.ndarray
    prompts: list[str]
    skew_ns: np.ndarray
    dropped: Counter[str] = field(default_factory=Counter)
    idle_start: float = 0.0  # seconds
    idle_end: float = 0.0
    waited: float = 0.0  # seconds from its beginning until every camera and joint had spoken


@dataclass(frozen=True)
class _Sorted:
    """An observation stream in order of time: `times` less latency, `order` back to the order of recording; `joints`
    that it tells of, none of a camera; a message counts only `held_ns` after its time: before, it had not come."""

    name: str
    times: np.ndarray
    order: np.ndarray
    max_age_ns: int
    joints: tuple[int, ...]
    held_ns: int

    def newest(self, ticks: np.ndarray) -> np.ndarray:
        """int64 [T], which message belongs to each tick; -1 before the first."""
        return newest_indices(self.times, ticks - self.held_ns)

    def within(self, begin: int, end: int) -> _Sorted:
        low, high = np.searchsorted(self.times, [begin, end + 1])
        return replace(self, times=self.times[low:high], order=self.order[low:high])


def cut_episodes(recording: Recording, robot: Robot, selection: Selection = Selection()) -> list[Episode]:  # noqa: B008
    """The episodes of a recording without problems.

    Of a marked episode only what was said within it counts: observations and commands from before a reset mean another
    scene. One in which a camera or joint is silent is left out and noted.

    Raises:
        BagError: the stamps span more than two days.
    """
    streams = sorted_streams(recording, robot)
    if recording.problems or None in _spoken(streams, robot).values():
        return []
    times = np.concatenate([stream.times for stream in streams])
    first, last = int(times.min()), int(times.max())
    episodes = []
    for begin, end, label in _spans(recording.marks, first, last):
        here = [stream.within(begin, end) for stream in streams]
        spoken = _spoken(here, robot)
        if silent := [name for name, time in spoken.items() if time is None]:
            recording.notes.append(f"episode {label!r}: left out, no message of {', '.join(silent)} in it")
            continue
        since = begin if recording.marks else -np.inf
        commands = [commands.within(since, end) for commands in recording.commands]
        here = [stream for stream in here if len(stream.times)]
        # Where frames take time, between two arrivals: else a frame that comes a little sooner or later than usual was
        # there or not there for the robot, at every tick of a camera as fast as the ticks.
        half = round(0.5e9 / robot.control_rate) if any(stream.held_ns for stream in here) else 0
        start, stop = max(spoken.values()) + half, max(int(stream.times[-1]) for stream in here)
        if start > stop:
            recording.notes.append(f"episode {label!r}: left out, it was over before every camera and joint had come")
            continue
        episodes.append(_episode(recording, robot, selection, here, commands, (begin, start, stop), label))
    return episodes


def _spoken(streams: list[_Sorted], robot: Robot) -> dict[str, int | None]:
    """From when on each camera and joint is known, None for never."""
    told: dict[str, list[_Sorted]] = {slot: [s for s in streams if s.name == slot] for slot in robot.present_cameras}
    for number, joint in enumerate(robot.joint_names):
        told[f"joint {joint}"] = [stream for stream in streams if number in stream.joints]
    return {
        name: min((int(stream.times[0]) + stream.held_ns for stream in by if len(stream.times)), default=None)
        for name, by in told.items()
    }


def _spans(marks: list[tuple[int, str]], first: int, last: int) -> list[tuple[int, int, str]]:
    """(begin, end, label) in ns. Without marks all of it is one episode; a mark that begins ends the one before."""
    if not any(text for _, text in marks):
        return [(first, last, "")]
    spans, begun = [], None
    for time, text in [*marks, (last + 1, "")]:
        if begun is not None:
            spans.append((begun[0], min(time - 1, last), begun[1]))
        begun = (time, text) if text else None
    return [span for span in spans if span[0] < span[1]]


def _episode(
    recording: Recording,
    robot: Robot,
    selection: Selection,
    streams: list[_Sorted],
    commands: list[Commands],
    span: tuple[int, int, int],
    label: str,
) -> Episode:
    """`span`: where it begins, where every camera and joint has spoken, and its last message."""
    begin, start, stop = span
    if stop - start > LONGEST_NS:
        raise BagError(f"{recording.source}: stamps span {(stop - start) / 3.6e12:.0f} hours; some must be wrong")
    count = int((stop - start) * robot.control_rate // 1e9) + 1
    ticks = start + np.round(np.arange(count) * (1e9 / robot.control_rate)).astype(np.int64)
    aligned, state, frames = _observe(recording, robot, streams, ticks)
    dropped = Counter({f"{name}: {kind}": count for (name, kind), count in aligned.dropped().items()})
    holes = _holes(streams, commands, robot.control_rate)
    if holes:
        longest = max(end - begin for begin, end in holes) / 1e9
        often = f", and {len(holes) - 1} times for less" if len(holes) > 1 else ""
        where = f"episode {label!r}: " if label else ""
        recording.notes.append(f"{where}nothing was recorded for {longest:.1f} s{often}: no chunk reaches into that")
    actions, known = _commanded(commands, ticks, holes, len(robot.joints))
    usable = aligned.ok.copy()
    head, tail = _active(state, actions, robot, selection.idle)
    trimmed = np.zeros(len(ticks), bool)
    trimmed[:head], trimmed[tail:] = True, True
    dropped["idle"] += int((usable & trimmed).sum())
    usable &= ~trimmed
    return Episode(
        label=label,
        ticks_ns=ticks,
        state=state,
        actions=actions,
        known=known.all(axis=1),
        frames=frames,
        usable=usable,
        prompts=_prompts(recording, robot, selection, ticks, begin if recording.marks else start),
        skew_ns=aligned.skew_ns,
        dropped=+dropped,
        idle_start=head / robot.control_rate,
        idle_end=(len(ticks) - tail) / robot.control_rate,
        waited=(start - begin) / 1e9,
    )


def _holes(streams: list[_Sorted], commands: list[Commands], control_rate: float) -> list[tuple[int, int]]:
    """(begin, end) in ns: where nothing was seen and nothing commanded for longer than any stream may be old, and for
    more than three ticks."""
    longest = max(3e9 / control_rate, *(stream.max_age_ns for stream in streams))
    first = min(stream.times[0] for stream in streams)
    told = [lane.begin_ns[lane.begin_ns > first] for lane in commands]
    times = np.sort(np.concatenate([*(stream.times for stream in streams), *told]))
    at = np.flatnonzero(np.diff(times) > longest)
    return list(zip(times[at].tolist(), times[at + 1].tolist(), strict=True))


def _commanded(
    commands: list[Commands], ticks: np.ndarray, holes: list[tuple[int, int]], joints: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `commanded`, but what was told before a hole is not known in it nor after: something else may have been."""
    actions, known = np.full((len(ticks), joints), np.nan), np.zeros((len(ticks), joints), bool)
    ends = [-np.inf, *(end for _, end in holes)]
    for begin, end in zip(ends, [*(begin for begin, _ in holes), np.inf], strict=True):
        here = (ticks >= begin) & (ticks <= end)
        actions[here], known[here] = commanded([lane.within(begin, end) for lane in commands], ticks[here], joints)
    return actions, known


def observe_at(
    recording: Recording, robot: Robot, ticks_ns: np.ndarray
) -> tuple[AlignedTicks, np.ndarray, dict[str, np.ndarray], list[str]]:
    """What was seen and told at any instants, int64 [T], episodes or not, by the rule that makes training samples.

    Returns the verdict on each; state, frames and prompts as in `Episode`.
    """
    observed = _observe(recording, robot, sorted_streams(recording, robot), ticks_ns)
    return *observed, _prompts(recording, robot, Selection(), ticks_ns)


def _observe(
    recording: Recording, robot: Robot, streams: list[_Sorted], ticks: np.ndarray
) -> tuple[AlignedTicks, np.ndarray, dict[str, np.ndarray]]:
    times = [StreamTimes(s.name, s.times, s.max_age_ns, held_ns=s.held_ns) for s in streams]
    sources = _sources(streams, ticks, len(robot.joints))
    used = {
        stream.name: np.isin(sources[:, stream.joints], (i, -1)).any(axis=1)  # -1: the joint is missing
        for i, stream in enumerate(streams)
        if stream.joints
    }
    aligned = align_ticks(times, ticks, round(robot.max_skew * 1e9), used)
    messages = {s.name: np.where(aligned.indices[s.name] >= 0, s.order[aligned.indices[s.name]], -1) for s in streams}
    frames = {
        slot: np.where(messages[slot] >= 0, stream.ordinal[messages[slot]], -1)
        for slot, stream in recording.cameras.items()
    }
    by_name = {stream.name: stream for stream in recording.states}
    state = np.full(sources.shape, np.nan)
    for i, stream in enumerate(streams):
        for column, joint in enumerate(stream.joints):
            here = sources[:, joint] == i
            state[here, joint] = by_name[stream.name].positions[messages[stream.name][here], column]
    return aligned, state, frames


def _sources(streams: list[_Sorted], ticks: np.ndarray, joints: int) -> np.ndarray:
    """int64 [T, J], the stream from which each joint is read at each tick: the one with the newest message that has it.
    -1 where none has one yet."""
    sources, newest = np.full((len(ticks), joints), -1), np.full((len(ticks), joints), -FAR_NS)
    for i, stream in enumerate(streams):
        times = np.append(stream.times, -FAR_NS)[stream.newest(ticks)]  # -1, before the first: the last
        for joint in stream.joints:
            better = times > newest[:, joint]
            sources[better, joint], newest[better, joint] = i, times[better]
    return sources


def sorted_streams(recording: Recording, robot: Robot) -> list[_Sorted]:
    """All state streams and cameras in order of time, but those without any sound stamp."""
    limits = {stream.name: (robot.state.max_age, robot.state.latency) for stream in recording.states}
    limits |= {slot: (camera.max_age, camera.latency) for slot, camera in robot.present_cameras.items()}
    streams = []
    for stream in recording.observed:
        if stream.joints and not len(stream.time_ns):
            continue  # all its stamps are wrong, and it tells nothing
        max_age, latency = limits[stream.name]
        order = np.argsort(stream.time_ns, kind="stable")  # of equal stamps the last recorded stays last, and wins
        times = stream.time_ns[order] - round(latency * 1e9)
        # The node looks back by the largest latency: what takes no longer has come by then.
        held = max(0, stream.way_ns - round((robot.latency - latency) * 1e9))
        streams.append(_Sorted(stream.name, times, order, round(max_age * 1e9), stream.joints, held))
    return streams


def _active(state: np.ndarray, actions: np.ndarray, robot: Robot, idle: float) -> tuple[int, int]:
    """[head, tail) of ticks around the movement, with a margin; (T, T) when nothing ever moves."""
    if idle <= 0:
        return 0, len(state)
    spans = np.array([joint.position[1] - joint.position[0] for joint in robot.joints])
    both = np.concatenate([state, actions], axis=1) / np.concatenate([spans, spans])  # [T, 2J]
    moved = np.flatnonzero((np.abs(both - both[0]) > idle).any(axis=1))
    resting = np.flatnonzero((np.abs(both - both[-1]) > idle).any(axis=1))
    if not len(moved):
        return len(state), len(state)
    margin = round(IDLE_MARGIN * robot.control_rate)
    return max(moved[0] - margin, 0), min((resting[-1] if len(resting) else moved[-1]) + 1 + margin, len(state))


def _prompts(
    recording: Recording, robot: Robot, selection: Selection, ticks: np.ndarray, begin: int | None = None
) -> list[str]:
    """Command line, else the newest on the topic at or before the tick, else the bag's metadata, else the default.

    One spoken a moment after the mark that begins an episode counts from the mark on, as does the first of a recording
    without marks that is heard a moment after its start. Later ones were not known yet. `begin`: of the episode, ns;
    None: of none, and each counts from when it was heard, as on the robot.
    """
    fixed = selection.prompt or recording.prompt or robot.prompt.default
    spoken = [(time, text) for time, text in recording.prompts if text]
    if selection.prompt or not spoken or not len(ticks):
        return [fixed] * len(ticks)
    times = np.array([time for time, _ in spoken])
    at = np.searchsorted(times, ticks, side="right") - 1
    if begin is not None:
        late = np.flatnonzero((times > begin) & (times <= min(begin + PROMPT_DELAY_NS, ticks[-1])))
        if len(late) and (recording.marks or late[0] == 0):
            at = np.maximum(at, late[0])
    return [spoken[i][1] if i >= 0 else fixed for i in at]
