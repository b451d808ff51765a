"""What is on the ROS graph."""

from __future__ import annotations

from rclpy.node import Node


def type_name(kind: type) -> str:
    """A message class's name in the ROS graph: sensor_msgs/msg/Image."""
    return f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}"


def misfit(node: Node, topic: str, kind: type) -> str:
    """Of what other type a topic is published, or "" where it is published as `kind` or not at all."""
    types = sorted({offer.topic_type for offer in node.get_publishers_info_by_topic(topic)})
    if not types or type_name(kind) in types:
        return ""
    return f"it is published as {', '.join(types)}, not {type_name(kind)}"


def whereabouts(node: Node, topic: str, kind: type) -> str:
    """What speaks for another topic than the one that is listened to, to go on from "no message on TOPIC"."""
    if wrong := misfit(node, topic, kind):
        return f", {wrong}"
    if node.get_publishers_info_by_topic(topic):  # remapped as subscriptions are; counting is not
        return ", though it is published: is its quality of service right?"
    there = sorted(name for name, types in node.get_topic_names_and_types() if type_name(kind) in types)
    others = [name for name in there if node.count_publishers(name)]
    return f", nobody publishes it; {type_name(kind)} is on {', '.join(others) or 'no topic'}"
