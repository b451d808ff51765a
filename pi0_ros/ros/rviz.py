"""config/pi0.rviz for another robot than the demo's: the same displays with its topics."""

from __future__ import annotations

import yaml

from pi0_ros.robot import Robot

IMAGE = "rviz_default_plugins/Image"  # such a display is named after its camera slot
OURS = ("/visualiser/", "/ghost/")  # topics of nodes that view.launch.py starts


def absolute(topic: str, namespace: str) -> str:
    """A robot file's topic as nodes in `namespace` ("" or "/name") mean it."""
    return topic if topic.startswith("/") else f"{namespace}/{topic}"


def rviz_config(shipped: str, robot: Robot, namespace: str) -> str:
    """The text `shipped` of config/pi0.rviz with the cameras of `robot` and our nodes in `namespace` ("" or "/name").

    RViz takes the image transport from the end of the topic (get_transport_from_topic.cpp), so a compressed camera is
    named with its /compressed.
    """
    config = yaml.safe_load(shipped)
    for display in config["Visualization Manager"]["Displays"]:
        topic = display.get("Topic") or display.get("Description Topic") or {}
        if topic.get("Value", "").startswith(OURS):
            topic["Value"] = namespace + topic["Value"]
        if display["Class"] == IMAGE:
            camera = robot.cameras[display["Name"]]
            display["Enabled"] = display["Value"] = camera is not None
            compressed = "/compressed" if camera and camera.transport == "compressed" else ""
            topic["Value"] = absolute(camera.topic, namespace) + compressed if camera else ""
    return yaml.safe_dump(config, sort_keys=False)
