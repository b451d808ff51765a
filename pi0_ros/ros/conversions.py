"""Between messages and the policy's own types."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image

from pi0_ros.msg import ActionChunk

if TYPE_CHECKING:
    from pi0_ros.policy.policy import Chunk
    from pi0_ros.robot import Robot

SECOND = 1_000_000_000  # ns


def stamp_ns(stamp: Time) -> int:
    """A stamp in nanoseconds."""
    return stamp.sec * SECOND + stamp.nanosec


def image_message(rgb: np.ndarray) -> Image:
    """uint8 [H, W, 3] as a raw image, its stamp left to the caller.

    Not by cv_bridge: that of a distribution is built for another numpy than the one that torch and OpenCV want.
    """
    height, width = rgb.shape[:2]
    return Image(height=height, width=width, encoding="rgb8", step=3 * width, data=rgb.tobytes())


def to_stamp(nanoseconds: int) -> Time:
    """Nanoseconds as a stamp."""
    seconds, rest = divmod(int(nanoseconds), SECOND)
    return Time(sec=seconds, nanosec=rest)


def chunk_message(
    chunk: Chunk,
    robot: Robot,
    *,
    observed: int,
    begin: int,
    end: int,
    sequence: int,
    epoch: int,
    prompt: str,
    checkpoint: str,
) -> ActionChunk:
    """An ActionChunk message from the policy's `chunk`.

    Args:
        observed: time of the observation, ns; action k is meant for `observed + k * robot.dt`.
        begin, end: node's clock when the observation was taken up and when the actions were ready, ns.
    """
    message = ActionChunk(
        sequence=sequence,
        epoch=epoch,
        joint_names=list(robot.joint_names),
        horizon=len(chunk.actions),
        dt=robot.dt,
        actions=array("d", np.ascontiguousarray(chunk.actions, dtype=np.float64).tobytes()),
        prompt=prompt,
        inference_begin=to_stamp(begin),
        inference_end=to_stamp(end),
        prefix_reused=chunk.prefix_reused,
        cameras_encoded=chunk.cameras_encoded,
        num_steps=chunk.num_steps,
        frozen=chunk.frozen,
        checkpoint=checkpoint,
    )
    message.header.stamp = to_stamp(observed)
    message.header.frame_id = robot.name
    return message


def void_message(robot: Robot, *, now: int, sequence: int, epoch: int, prompt: str, checkpoint: str) -> ActionChunk:
    """A chunk without actions: tells the player at once that chunks of older epochs are void."""
    message = ActionChunk(
        sequence=sequence,
        epoch=epoch,
        joint_names=list(robot.joint_names),
        dt=robot.dt,
        prompt=prompt,
        inference_begin=to_stamp(now),
        inference_end=to_stamp(now),
        checkpoint=checkpoint,
    )
    message.header.stamp = to_stamp(now)
    message.header.frame_id = robot.name
    return message


def chunk_actions(message: ActionChunk) -> np.ndarray:
    """float64 [horizon, joints] of a chunk message.

    Raises:
        ValueError: the number of values is not horizon times joints.
    """
    values = np.asarray(message.actions, dtype=np.float64)
    if values.size != message.horizon * len(message.joint_names):
        raise ValueError(
            f"chunk {message.sequence}: {values.size} values are not horizon {message.horizon} "
            f"times {len(message.joint_names)} joints"
        )
    return values.reshape(message.horizon, len(message.joint_names))


def actions_from(actions: np.ndarray, began: int, dt: float, at: int, count: int) -> np.ndarray:
    """float64 [n <= count, J]: what a chunk commands at `at`, `at + dt`, ..., linear between its actions.

    Args:
        actions: float64 [H, J], action k for the time `began + k * dt` (ns, s).
        at: time of the first row, ns. Rows past the chunk's last action are left out; none before its first.
    """
    first, grid = (at - began) / SECOND / dt, np.arange(len(actions))
    steps = first + np.arange(count if first >= 0 else 0)
    steps = steps[steps <= grid[-1]]
    columns = [np.interp(steps, grid, actions[:, joint]) for joint in range(actions.shape[1])]
    return np.stack(columns, axis=1)
