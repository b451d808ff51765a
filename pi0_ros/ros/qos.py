"""The qualities of service that our topics share."""

from __future__ import annotations

import os

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from pi0_ros.robot_file import config_folder

# What a late subscriber must still learn: prompt, status, episode.
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)  # chunks and what is drawn: older ones are void
SENSOR = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)  # hears publishers of either reliability

PROFILES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")  # Fast DDS 3, and 2
FAST_DDS_2 = ("humble", "jazzy")


def room_for_images() -> dict[str, str]:
    """The environment in which Fast DDS carries whole raw frames through shared memory; nothing where the present one
    already says how."""
    if any(os.environ.get(name) for name in (*PROFILES, "FASTDDS_BUILTIN_TRANSPORTS")):
        return {}
    # Humble keeps to this machine by transports of its own, beside which those of a profile would speak to the network.
    if os.environ.get("ROS_DISTRO") == "humble" and os.environ.get("ROS_LOCALHOST_ONLY") == "1":
        return {}
    name = PROFILES[os.environ.get("ROS_DISTRO") in FAST_DDS_2]
    return {name: str(config_folder() / "fastdds_images.xml")}
