"""Whose clock the stamps of a recording are of, and which of them can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pi0_ros.policy.alignment import CLOCK_RESET_NS
from pi0_ros.robot import Robot
from pi0_ros.training.clocks import ClockOffset

if TYPE_CHECKING:
    from pi0_ros.training.recording import Recording, Stream

AWAY_NS = 60 * 1_000_000_000  # a stamp this far from where its neighbours put it is wrong
APART_NS = 200_000_000  # more than jitter: stamps of another machine's clock
SOON_NS = 30_000_000  # so long joint states may take to be recorded; beyond, clocks differ
WAY_OUT = "set `clock: bag` in the robot file to align by time of recording"
YEAR_NS = 365 * 86_400 * 1_000_000_000


def set_times(recording: Recording, robot: Robot, offset: ClockOffset) -> None:
    """Fill in the times of all streams by the robot file's clock, without messages whose stamps are wrong; what is odd
    becomes a problem, warning or note of the recording. `offset`: bag time minus header time."""
    for stream in recording.observed:
        what = stream.name if stream.name == stream.topic else f"{stream.name} ({stream.topic})"
        if stream.topic and not len(stream.bag_ns):
            recording.problems.append(f"{what}: no message can be used{recording.reasons(stream.topic)}")
        if robot.clock == "bag":
            stream.time_ns = stream.bag_ns
            continue
        stamped = stream.header_ns != 0
        clocks = offset.at(stream.bag_ns)
        delay = stream.bag_ns - stream.header_ns - clocks
        away = np.abs(delay)
        if len(stamped) and not stamped.any():
            _leave_out(recording, stream, f"{what}: every header stamp is 0")
        elif len(stamped) and (away[stamped] > AWAY_NS).all():
            apart = f"{away[stamped].min() / 1e9:.0f} s"
            _leave_out(recording, stream, f"{what}: header stamps are {apart} away from those of the other streams")
        else:
            wrong = stamped & (away > AWAY_NS)
            recording.faults[stream.topic, "header stamp 0"] += int((~stamped).sum())
            recording.faults[stream.topic, "header stamp far from the time of recording"] += int(wrong.sum())
            sound = stamped & ~wrong
            stream.keep(sound)
            delay, clocks, ages = delay[sound], clocks[sound], _ages(robot, stream)
            _check_apart(recording, what, delay, *ages)
            if not stream.joints and len(delay):
                stream.way_ns = _way(delay, clocks, sum(ages))
        stream.time_ns = stream.header_ns
        back = stream.header_ns[:-1] - stream.header_ns[1:]
        if len(back) and back.max() > CLOCK_RESET_NS:
            recording.problems.append(
                f"{what}: header stamps jump back by {back.max() / 1e9:.1f} s (simulation reset?); split the "
                "recording there or set `clock: bag` in the robot file"
            )
    recording.faults = +recording.faults
    if robot.clock == "header":
        _note_offset(recording, offset)
    _note_clocks(recording, robot)


def command_times(recording: Recording, name: str, topic: str, stamps: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Header stamps where there are any that can be true, elsewhere `now`, the time of recording."""
    stamped, wrong = stamps != 0, (stamps != 0) & (np.abs(now - stamps) > AWAY_NS)
    if stamped.any():
        apart, what = float(np.median((now - stamps)[stamped])), f"{name} ({topic})"
        if (wrong == stamped).all():
            recording.problems.append(
                f"{what}: header stamps are {abs(apart) / 1e9:.0f} s away from those of the joint states; {WAY_OUT}"
            )
        elif abs(apart) > APART_NS:
            recording.notes.append(
                f"{what}: header stamps are {abs(apart) / 1e9:.1f} s {'ahead of' if apart < 0 else 'behind'} the "
                "time of recording, and commands are taken to be meant for their stamps: right only if they are"
            )
    if wrong.any():
        recording.faults[topic, "header stamp far from the time of recording, which counts instead"] += int(wrong.sum())
    return np.where(stamped & ~wrong, stamps, now)


def _leave_out(recording: Recording, stream: Stream, fault: str) -> None:
    """A problem, unless other joint states tell of the same joints: they would always be newer on the robot."""
    others = [other for other in recording.states if other is not stream]
    if stream.joints and set(stream.joints) <= {joint for other in others for joint in other.joints}:
        recording.states = others
        recording.notes.append(f"{fault}; left out, the other joint states have its joints, too")
    else:
        recording.problems.append(f"{fault}; {WAY_OUT}")


def _check_apart(recording: Recording, what: str, delay: np.ndarray, max_age: float, slack: float) -> None:
    """Stamps of another clock than the joint states'. The node takes none that are 1 s ahead, or old at once."""
    ahead = -float(np.median(delay)) if len(delay) else 0.0
    if -ahead > (max_age + slack) * 1e9:
        recording.warnings.append(
            f"{what}: recorded {-ahead / 1e9:.2g} s after the stamps, later than joint states are, and the robot "
            f"takes none older than its max_age of {max_age:g} s: they are long on their way, or of a clock that "
            "is behind, and then show what came later (chrony and PTP let machines agree on the time)"
        )
    if ahead > APART_NS:
        found = recording.problems if ahead > CLOCK_RESET_NS else recording.notes
        found.append(
            f"{what}: header stamps are {ahead / 1e9:.1f} s ahead of those of the joint states; let the machines "
            "agree on the time (chrony, PTP), or set `clock: bag` in the robot file"
        )


def _way(delay: np.ndarray, offset: np.ndarray, longest: float) -> int:
    """How long frames are usually on their way, ns: the median. 0 where it is longer than the robot waits (`longest`,
    s), which `_check_apart` tells of.

    `delay` is what they take longer than joint states do. By one clock `offset` is what joint states take, too; by two
    it is how far these are apart.
    """
    way = delay + (offset if 0 <= float(np.median(offset)) <= SOON_NS else 0)
    usual = int(np.median(way))
    return usual if 0 < usual <= longest * 1e9 else 0


def _note_offset(recording: Recording, offset: ClockOffset) -> None:
    """Where it is open whether clocks differ or joint states are slow. By more it is the clocks, which does no harm."""
    apart = float(np.median(offset.offsets))
    if SOON_NS < abs(apart) < APART_NS:
        recording.notes.append(
            f"joint states are recorded {abs(apart) / 1e9:.2g} s {'after' if apart > 0 else 'before'} their stamps: "
            "taken for two clocks, and frames count from when they come later than that"
        )


def _note_clocks(recording: Recording, robot: Robot) -> None:
    spans = [s for s in recording.observed if len(s.bag_ns) > 1 and s.header_ns.all()]
    for stream in spans:
        delay = (stream.bag_ns - stream.header_ns) / 1e9
        if delay.max() - delay.min() > 0.5:
            recording.notes.append(
                f"{stream.topic}: header and bag clocks drift {delay.max() - delay.min():.2f} s apart; "
                f"aligned by {robot.clock} time"
            )
        if stream.header_ns.max() < YEAR_NS:
            recording.notes.append(f"{stream.topic}: header stamps near 0: simulated or monotonic time")
        duplicates = len(stream.header_ns) - len(np.unique(stream.header_ns))
        if duplicates:
            recording.notes.append(
                f"{stream.topic}: {duplicates} duplicate header stamps; of equals the last recorded counts"
            )


def _ages(robot: Robot, stream: Stream) -> tuple[float, float]:
    """How old a message may be, s, and by how much later than that it may come: the node looks back by the largest
    latency of all streams."""
    own = robot.state if stream.joints else robot.present_cameras[stream.name]
    return own.max_age, robot.latency - own.latency
