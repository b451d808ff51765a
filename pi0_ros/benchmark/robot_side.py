"""The robot of the node's benchmark, a process of its own: cameras and joints that publish, an ear for the chunks.

`python -m pi0_ros.benchmark.robot_side TRANSPORT SECONDS OUTPUT`: publishes until SECONDS of chunks were heard, then
writes OUTPUT, JSON: "received": {stamp of the chunk's observation: when it came}, "sent": {stamp of a frame: seconds
that its publish() took}; all stamps ns of this machine's clock.
"""

from __future__ import annotations

import json
import sys
import time

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image, JointState

from pi0_ros.msg import ActionChunk
from pi0_ros.ros.conversions import image_message

HEIGHT, WIDTH, CAMERA_RATE, JOINT_RATE = 480, 640, 30.0, 100.0
JPEG_QUALITY = 95  # what image_transport's compressed topics have by default
CAMERAS = ("base", "wrist")
JOINTS = tuple(f"joint_{i}" for i in range(6))
PICTURES, WARM_UP, PATIENCE = 8, 1.0, 30.0  # pictures a camera goes round; seconds not counted; seconds to be heard


def pictures() -> list[np.ndarray]:
    """uint8 [480, 640, 3]: soft shapes with some noise, which compress about as a camera's frames do."""
    rng, made = np.random.default_rng(0), []
    for _ in range(PICTURES):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        soft = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        made.append(np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8))
    return made


def messages(transport: str) -> list[Image] | list[CompressedImage]:
    """The pictures as messages without stamps."""
    if transport == "raw":
        return [image_message(picture) for picture in pictures()]
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return [
        CompressedImage(format="rgb8; jpeg compressed bgr8", data=cv2.imencode(".jpg", picture, quality)[1].tobytes())
        for picture in pictures()
    ]


def main() -> None:
    transport, seconds, output = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    rclpy.init()
    node, executor = rclpy.create_node("robot_side"), SingleThreadedExecutor()
    executor.add_node(node)
    received: dict[int, int] = {}
    sent: dict[int, float] = {}
    kind, suffix = (Image, "") if transport == "raw" else (CompressedImage, "/compressed")
    publishers = [
        node.create_publisher(kind, f"{camera}/image_raw{suffix}", qos_profile_sensor_data) for camera in CAMERAS
    ]
    joints = node.create_publisher(JointState, "joint_states", 10)

    def heard(chunk: ActionChunk) -> None:
        received[chunk.header.stamp.sec * 10**9 + chunk.header.stamp.nanosec] = time.time_ns()

    node.create_subscription(ActionChunk, "action_chunk", heard, 10)
    frames, made = messages(transport), 0

    def frame(camera: int) -> None:
        nonlocal made
        message, made = frames[made % PICTURES], made + 1
        now = time.time_ns()
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(now, 10**9)
        begin = time.perf_counter()
        publishers[camera].publish(message)
        sent[now] = time.perf_counter() - begin

    def state() -> None:
        message = JointState(name=list(JOINTS), position=[0.1] * len(JOINTS))
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(time.time_ns(), 10**9)
        joints.publish(message)

    # Free-running cameras are not in phase: the second one is half a period behind.
    start = time.monotonic()
    due = [(start, 1 / CAMERA_RATE, lambda: frame(0)), (start + 0.5 / CAMERA_RATE, 1 / CAMERA_RATE, lambda: frame(1))]
    due.append((start, 1 / JOINT_RATE, state))
    end = start + PATIENCE  # until the first chunk
    counting = False
    while time.monotonic() < end:
        for i, (at, period, act) in enumerate(due):
            if time.monotonic() >= at:
                act()
                due[i] = (max(at + period, time.monotonic() - period), period, act)
        if received and not counting:
            counting, end = True, time.monotonic() + WARM_UP + seconds
        executor.spin_once(timeout_sec=max(0.0, min(at for at, _, _ in due) - time.monotonic()))
    first = min(received, default=0) + int(WARM_UP * 1e9)
    counted = {stamp: came for stamp, came in received.items() if stamp > first}
    with open(output, "w", encoding="utf-8") as file:
        json.dump({"received": counted, "sent": sent}, file)
    node.destroy_node()
    rclpy.shutdown()


if __name__ == "__main__":
    main()
