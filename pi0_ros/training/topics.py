"""Which recorded topic a name of the robot file means, and why none does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pi0_ros.training.bags import CDR, Topic


def find_topic(topics: dict[str, Topic], names: Sequence[str], types: Sequence[str]) -> str | None:
    """The first recorded topic with messages that can be read, by the names in their order; None: see `absence`."""
    for name in names:
        for topic in _matching(name, topics):
            if topics[topic].type in types and topics[topic].count and topics[topic].encoding == CDR:
                return topic
    return None


def absence(topics: dict[str, Topic], names: Sequence[str], types: Sequence[str]) -> tuple[str, bool]:
    """Why `find_topic` found none, and whether a topic of such a name is there at all."""
    allowed = " or ".join(kind.split("/")[-1] for kind in types)
    for name in names:
        for topic in _matching(name, topics):
            if topics[topic].type not in types:
                return f"topic {topic} is a {topics[topic].type}, expected {allowed}", True
            if topics[topic].encoding != CDR:
                return f"topic {topic} is encoded as {topics[topic].encoding!r}, expected {CDR}", True
            return f"topic {topic} has no message", True
    there = [topic.name for topic in topics.values() if topic.type in types and topic.count]
    hint = f"topics of that type: {', '.join(there)}" if there else f"no topic has {allowed}"
    return f"topic {names[0]} is not in the recording; {hint}", False


def image_names(topic: str, transport: str) -> list[str]:
    """Where frames of a camera may have been recorded, first in the robot file's transport."""
    compressed = f"{topic}/compressed"
    return [compressed, topic] if transport == "compressed" else [topic, compressed]


def _matching(name: str, topics: Iterable[str]) -> list[str]:
    """Recorded topics for a name of the robot file; a relative name also matches below one namespace."""
    exact = "/" + name.lstrip("/")
    if exact in topics:
        return [exact]
    if name.startswith("/"):
        return []
    below = [topic for topic in topics if topic.endswith(exact)]
    return below if len(below) == 1 else []
