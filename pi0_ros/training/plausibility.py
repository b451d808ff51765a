"""Whether the numbers of recordings can mean what the robot file says they mean.

A wrong order of joints, other units or a second publisher leave no trace in types and names, and a policy trained on
them moves an arm. What is found here becomes a warning, or a problem where nothing but a mistake looks like that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pi0_ros.robot import TURN, Joint, Robot

if TYPE_CHECKING:
    from pi0_ros.training.recording import Recording

NEAR_CONSTANT = 1e-3  # standard deviation as a share of the joint's position range
FEWEST_CHANGES = 10  # changes of a command from which its rate is judged
OUTSIDE_WARNING, OUTSIDE_FAULT = 0.05, 0.5  # share of positions outside the limits
FOLLOWS_WITHIN = 0.5  # s in which an arm is where it was told
APART = 0.25  # mean distance of command and state, as a share of the state's own spread
LEAST_SPREAD = 0.02  # of the position range: an arm that rests may stand a little off its command
MOST_ROWS = 20_000  # by which command and state are compared, at every delay
TOLD_APART = 0.05  # median distance of two topics that tell of one joint, as a share of its position range
TURN_SLACK = 0.5  # rad
TOO_FAST, TOO_OFTEN = 10.0, 0.01  # times the velocity limit, in a share of the messages
FEWEST_MESSAGES = 20
SHORTEST = 1e-3  # s between two joint states; stamps may be the same

Motion = tuple[np.ndarray, np.ndarray, np.ndarray]  # state, actions float64 [T, J], known bool [T] of an episode


def counted(by_recording: Sequence[Sequence[str]]) -> list[str]:
    """The lines said of any recording, every one once, with the number of recordings."""
    counts = Counter(text for lines in by_recording for text in lines)
    return [f"{text} ({count} recordings)" for text, count in counts.items()]


# --- of what a policy learns ------------------------------------------------------------------------------------------


def judge(
    state: np.ndarray, actions: np.ndarray, motions: Sequence[Motion], robot: Robot
) -> tuple[str | None, list[str]]:
    """Why recordings are refused, or None, and what is to be said of them: of all that a policy sees and learns,
    float64 [T, J] each, and of every episode's motion."""
    columns = [
        (what, joint, values)
        for what, rows in (("state", state), ("actions", actions))
        for joint, values in zip(robot.joints, rows.T, strict=True)
    ]
    outside = [(what, joint.name, joint.position, outside_limits(v, joint.position)) for what, joint, v in columns]
    fault = rate_fault([change_gaps(told[known]) for _, told, known in motions], robot) or limits_fault(outside)
    warnings = [line for found in outside for line in limits_warning(*found)]
    warnings += rests(columns)
    return fault, warnings + commands_apart(motions, robot)


def near_constant(values: np.ndarray, limits: Sequence[float]) -> bool:
    """Whether float64 [T] positions hardly change, for a joint of these limits."""
    return bool(len(values) and values.std() < NEAR_CONSTANT * (limits[1] - limits[0]))


def least_spread(joint: Joint) -> float:
    """The standard deviation that normalisation assumes at least, in model space (a gripper's is 0 to 1). A joint that
    rested in every recording would else have one of nearly nothing, and a hair's breadth off be ten thousand of it."""
    return NEAR_CONSTANT * (1.0 if joint.kind == "gripper" else joint.position[1] - joint.position[0])


def rests(columns: Sequence[tuple[str, Joint, np.ndarray]]) -> list[str]:
    """What is to be said of joints whose positions, float64 [T], hardly change: one line, or none."""
    still = [
        f"{what} of {joint.name} (std {values.std():.2g})"
        for what, joint, values in columns
        if near_constant(values, joint.position)
    ]
    if not still:
        return []
    return [
        f"hardly changes: {', '.join(still)}; normalised as if it varied by {NEAR_CONSTANT:.1%} of its range, and the "
        "policy does not learn to use it"
    ]


def outside_limits(values: np.ndarray, limits: Sequence[float]) -> float:
    """The share of float64 [T] positions outside a joint's limits, with some slack for what sensors say there."""
    low, high = limits
    slack = 1e-3 * (high - low)
    return float(((values < low - slack) | (values > high + slack)).mean()) if len(values) else 0.0


def limits_warning(what: str, joint: str, limits: Sequence[float], share: float) -> list[str]:
    """What is to be said of a `share` of positions outside a joint's limits: one line, or none."""
    if share <= OUTSIDE_WARNING:
        return []
    why = "other units (degrees?), another order of joints, or wrong limits"
    return [f"{what} of {joint}: {share:.0%} outside its limits {list(limits)}: {why}"]


def limits_fault(lines: Sequence[tuple[str, str, Sequence[float], float]]) -> str | None:
    """Why recordings are refused most of whose positions are outside the limits; `lines` as `limits_warning` has it."""
    worst = max(lines, key=lambda line: line[3], default=None)
    if worst is None or worst[3] <= OUTSIDE_FAULT:
        return None
    (said,) = limits_warning(*worst)
    return f"{said}; joint states and commands must be in radians or metres (a small node can convert them)"


def measured_state(robot: Robot) -> list[str]:
    """What is to be said where recorded actions are the state itself: one line, or none."""
    states = {topic.lstrip("/") for topic in robot.state.topics}
    sources = [source for source in robot.actions if source.topic.lstrip("/") in states and source.latency <= 0]
    if not sources:
        return []
    topics, named = [s.topic for s in sources], [name for s in sources for name in s.joints or robot.joint_names]
    whose = "" if set(named) == set(robot.joint_names) else f" of {', '.join(named)}"
    return [
        f"actions{whose} are the measured state ({', '.join(topics)}): a policy trained on them learns to "
        "stand still; record the commands, or set actions.latency to the time by which the state follows them, s"
    ]


def change_gaps(actions: np.ndarray) -> np.ndarray:
    """Ticks from one change of any joint's action to the next, int64: of float64 [T, J] of an episode."""
    return np.diff(np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1)))


def rate_fault(gaps: Sequence[np.ndarray], robot: Robot) -> str | None:
    """What is wrong if commands came at half the control rate or less: every other action of a chunk would repeat the
    one before, and the policy would learn to move in jerks. `gaps`: `change_gaps` of all episodes. Trajectories that
    lead from one to the next change at every tick, however seldom they come."""
    joined = np.concatenate([*gaps, np.empty(0)])
    if len(joined) < FEWEST_CHANGES or (median := float(np.median(joined))) < 2:
        return None
    topics = ", ".join(source.topic for source in robot.actions)
    return (
        f"actions on {topics} change {robot.control_rate / median:.3g} times a second, but the robot file's "
        f"control_rate is {robot.control_rate:g} Hz; set control_rate to the rate that commands were recorded at"
    )


def commands_apart(episodes: Sequence[Motion], robot: Robot) -> list[str]:
    """What is to be said of joints that do not go where they are told: a line for each.

    An arm follows its commands within a moment. At the delay, up to half a second, by which it does so best, the mean
    distance from command to state is held against how far the joint moves at all.
    """
    lags = range(round(FOLLOWS_WITHIN * robot.control_rate) + 1)
    stride = 1 + sum(len(state) for state, _, _ in episodes) // MOST_ROWS
    rows: list[list[np.ndarray]] = [[] for _ in lags]
    for state, actions, known in episodes:
        at = np.flatnonzero(known[: max(len(state) - lags[-1], 0)])[::stride]
        for lag in lags:
            rows[lag].append(np.abs(actions[at] - state[at + lag]))
    if not sum(map(len, rows[0])):
        return []
    states = np.concatenate([state[::stride] for state, _, _ in episodes])
    distance = np.array([np.concatenate(row) for row in rows])  # [lags, T, J]
    revolute = np.array([joint.kind == "revolute" for joint in robot.joints])
    turned = is_a_turn(distance) & revolute
    usual = np.where(turned, 0.0, np.nan_to_num(distance)).mean(axis=1).min(axis=0)
    low, high = np.nanquantile(states, [0.01, 0.99], axis=0)
    found = []
    for i, joint in enumerate(robot.joints):
        least = LEAST_SPREAD * (joint.position[1] - joint.position[0])
        if usual[i] > APART * max(high[i] - low[i], least):
            found.append(_apart(joint, usual[i], high[i] - low[i]))
        elif share := float(turned[0, :, i].mean()):
            found.append(
                f"actions of {joint.name} are a turn away from its state in {share:.1%} of the samples: an angle that "
                f"wraps around? {UNWRAP}"
            )
    return found


def _apart(joint: Joint, usual: float, spread: float) -> str:
    unit = f" {joint.unit}" if joint.unit else ""
    grips = ", or does it hold something most of the time" if joint.kind == "gripper" else ""
    return (
        f"{joint.name} does not go where it is told: its state is {usual:.3g}{unit} from the action on average, and "
        f"moves over {spread:.3g}{unit} in all; are the commands in another order of joints, in other units, or no "
        f"positions{grips}?"
    )


UNWRAP = "Give it kind: continuous, with limits of less than a turn around where it works (docs/robot.md)"


def is_a_turn(step: np.ndarray) -> np.ndarray:
    """Which distances between two angles, rad, are about a turn."""
    return np.abs(step - TURN) < TURN_SLACK


# --- of one recording -------------------------------------------------------------------------------------------------


def check_states(recording: Recording, robot: Robot) -> None:
    """Joint states that jump, and topics that contradict one another, become problems and warnings of the recording."""
    for number, joint in enumerate(robot.joints):
        told = [
            (stream.topic, stream.time_ns, stream.positions[:, stream.joints.index(number)])
            for stream in recording.states
            if number in stream.joints and len(stream.time_ns) == len(stream.positions)
        ]
        for topic, times, positions in told:
            _check_jumps(recording, joint, topic, times, positions)
        _check_told(recording, joint, told)


def check_commands(recording: Recording, robot: Robot) -> None:
    """Commands that lead a continuous joint away from its turn become problems of the recording."""
    for lane in recording.commands:
        for place, number in enumerate(lane.joints):
            joint, positions = robot.joints[number], lane.positions[:, place]
            if joint.kind == "continuous":
                _check_turns(recording, joint, "commands", np.abs(np.diff(positions[np.isfinite(positions)])))


def _check_jumps(recording: Recording, joint: Joint, topic: str, times: np.ndarray, positions: np.ndarray) -> None:
    if len(times) < FEWEST_MESSAGES or joint.kind == "gripper":
        return
    order = np.argsort(times, kind="stable")
    seconds, steps = np.diff(times[order]) / 1e9, np.abs(np.diff(positions[order]))
    near = seconds < FOLLOWS_WITHIN
    if _check_turns(recording, joint, topic, steps[near]):
        return
    fast = steps / np.maximum(seconds, max(float(np.median(seconds)), SHORTEST)) > TOO_FAST * joint.velocity
    if fast.mean() > TOO_OFTEN:
        worst = int(np.argmax(steps))
        before, after = positions[order][worst : worst + 2]
        recording.warnings.append(
            f"{topic}: joint {joint.name!r} moves faster than {TOO_FAST:g} times its velocity limit in "
            f"{fast.mean():.0%} of the messages, from {before:.3g} to {after:.3g} at most: do two programs publish it "
            "(joint_state_publisher?), or is the limit too low?"
        )


def _check_turns(recording: Recording, joint: Joint, where: str, steps: np.ndarray) -> bool:
    """Whether an angle jumps by a turn, which is a problem."""
    wraps = int(is_a_turn(steps).sum()) if joint.angle else 0
    if wraps:
        across = (
            f"it goes across {joint.middle + math.pi:.3g} rad, half a turn from the middle of its limits "
            f"{list(joint.position)}. Limits must be around where it works"
        )
        recording.problems.append(
            f"{where}: joint {joint.name!r} jumps by a turn from one message to the next, {wraps} times: "
            + (across if joint.kind == "continuous" else f"an angle that wraps around. {UNWRAP}")
        )
    return wraps > 0


def _check_told(recording: Recording, joint: Joint, told: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    span = joint.position[1] - joint.position[0]
    told = [entry for entry in told if len(entry[1]) >= FEWEST_MESSAGES]
    for i, (one, times, positions) in enumerate(told):
        for other, others_times, others_positions in told[i + 1 :]:
            if one == other:
                continue
            order, both = np.argsort(times), (others_times >= times.min()) & (others_times <= times.max())
            here = np.interp(others_times[both], times[order], positions[order])
            apart = float(np.median(np.abs(here - others_positions[both]))) if both.sum() >= FEWEST_MESSAGES else 0.0
            if apart > TOLD_APART * span:
                recording.problems.append(
                    f"state: joint {joint.name!r} is told by {one} and {other}, which are usually {apart:.3g} apart: "
                    "two arms with the same names? Name one of the topics in the robot file"
                )
