"""What a recording holds, for a person who is about to write its robot file: topics, joints, ranges, image sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pi0_ros.policy.images import ImageError, decode_image
from pi0_ros.training.bags import Bag, BagError, BagFiles, Topic, decode
from pi0_ros.training.plausibility import is_a_turn
from pi0_ros.training.recording import ACTION_TYPES, COMPRESSED, IMAGE, JOINT_STATE, STRING

ORDER = (JOINT_STATE, IMAGE, COMPRESSED, *ACTION_TYPES.values(), STRING)  # what a robot file may name comes first
MOST_TEXTS = 3

Ranges = dict[str, tuple[float, float]]  # joint, or place in an array -> least and largest


def contents(files: BagFiles) -> list[str]:
    """The recording in lines. BagError when it cannot be read."""
    with Bag(files) as bag:
        topics = {name: topic for name, topic in sorted(bag.topics.items(), key=_place) if topic.count}
        known = [name for name, topic in topics.items() if topic.type in ORDER]
        images = {name for name in known if topics[name].type in (IMAGE, COMPRESSED)}
        said = {name: [_picture(bag, name)] for name in images}
        numbers, spans = _numbers(bag, topics, set(known) - images)
        said |= numbers
        lines = [f"{files.path}: {bag.seconds:.1f} s"]
        for name, topic in topics.items():
            rate = f", {(topic.count - 1) / spans[name]:.1f} Hz" if spans.get(name, 0.0) > 0.1 else ""
            lines.append(f"  {name}  {topic.type}, {topic.count} messages{rate}")
            lines += [f"      {line}" for line in said.get(name, [])]
    return [*lines, *(f"  note: {note}" for note in bag.notes)]


def _place(item: tuple[str, Topic]) -> tuple[int, str]:
    name, topic = item
    return (ORDER.index(topic.type) if topic.type in ORDER else len(ORDER), name)


def _picture(bag: Bag, name: str) -> str:
    for _, _, raw in bag.messages({name}):
        try:
            message = decode(raw, bag.topics[name].type)
            height, width, _ = decode_image(message).shape
        except (BagError, ImageError) as error:
            return str(error)
        return f"{width}x{height}, {message.format if hasattr(message, 'format') else message.encoding}"
    return "cannot be read"


def _numbers(bag: Bag, topics: dict[str, Topic], names: set[str]) -> tuple[dict[str, list[str]], dict[str, float]]:
    """What the messages of `names`, joints and texts, say: a line for each joint, or the first texts; and the seconds
    from each topic's first message to its last."""
    ranges: dict[str, Ranges] = {name: {} for name in names}
    texts: dict[str, list[str]] = {name: [] for name in names}
    spans: dict[str, tuple[int, int]] = {}
    before: dict[tuple[str, str], float] = {}
    wraps: set[tuple[str, str]] = set()
    for name, at, raw in bag.messages(topics):
        first, last = spans.get(name, (at, at))
        spans[name] = min(first, at), max(last, at)
        if name not in names:
            continue
        try:
            message = decode(raw, topics[name].type)
        except BagError:
            continue
        if topics[name].type == STRING:
            if message.data not in texts[name]:
                texts[name].append(message.data)
        else:
            for joint, value in _positions(message):
                step = abs(value - before.get((name, joint), value))
                if topics[name].type == JOINT_STATE and is_a_turn(step):
                    wraps.add((name, joint))
                before[name, joint] = value
                low, high = ranges[name].get(joint, (value, value))
                ranges[name][joint] = min(low, value), max(high, value)
    said = {}
    for name in names:
        width = max(map(len, ranges[name]), default=0)
        said[name] = [
            f"{joint:{width}}  {low:.4g} to {high:.4g}"
            + (", wraps around: kind: continuous" if (name, joint) in wraps else "")
            for joint, (low, high) in ranges[name].items()
        ]
        said[name] += [repr(text) for text in texts[name][:MOST_TEXTS]]
        said[name] += [f"and {len(texts[name]) - MOST_TEXTS} more"] if len(texts[name]) > MOST_TEXTS else []
    return said, {name: (last - first) / 1e9 for name, (first, last) in spans.items()}


def _positions(message: Any) -> Iterable[tuple[str, float]]:
    """(joint, position) of a JointState, a JointTrajectory's last point, or (place, number) of an array."""
    if hasattr(message, "joint_names"):
        return zip(message.joint_names, message.points[-1].positions if message.points else (), strict=False)
    if hasattr(message, "data"):
        return ((f"[{place}]", value) for place, value in enumerate(message.data))
    return zip(message.name, message.position, strict=False)
