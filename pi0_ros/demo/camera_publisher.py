"""The demo robot's cameras on the ROS graph: a thread that renders and publishes what somebody subscribes to."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import cv2
import mujoco
import numpy as np
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from pi0_ros.demo.cameras import Cameras
from pi0_ros.demo.scene import CAMERAS
from pi0_ros.ros.conversions import image_message, to_stamp
from pi0_ros.wording import first_line


@dataclass(frozen=True)
class _Snapshot:
    stamp: int  # ns
    qpos: np.ndarray


class CameraPublisher:
    """Publishes `<camera>/image_raw`, `/image_raw/compressed` and `/camera_info` for each camera of the scene.

    Its thread owns the OpenGL context and a state of its own. `offer` hands it the newest state: one that it had no
    time for is dropped, as a camera drops frames. `scene` must be held by whoever changes the model (lights, colours).

    Raises:
        RuntimeError: nothing can be rendered on this machine.
    """

    def __init__(self, node: Node, model: mujoco.MjModel, scene: threading.Lock, size: tuple[int, int]) -> None:
        self._model, self._scene, self._size = model, scene, size
        self._context, self._logger = node.context, node.get_logger()
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._busy, self._closing = False, False
        self._failure = ""
        self._publishers = {
            slot: (
                node.create_publisher(Image, f"{name}/image_raw", qos_profile_sensor_data),
                node.create_publisher(CompressedImage, f"{name}/image_raw/compressed", qos_profile_sensor_data),
                node.create_publisher(CameraInfo, f"{name}/camera_info", qos_profile_sensor_data),
            )
            for slot, name in CAMERAS.items()
        }
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cameras", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure:
            raise RuntimeError(f"cannot render ({self._failure}): on Debian, apt install libegl1 libgl1-mesa-dri")

    @property
    def wanted(self) -> bool:
        """Whether anybody listens to any camera."""
        return any(p.get_subscription_count() for group in self._publishers.values() for p in group)

    def offer(self, stamp: int, qpos: np.ndarray) -> None:
        """Publish what the cameras see in this state, stamped `stamp` (ns)."""
        with self._changed:
            self._waiting = _Snapshot(stamp, qpos.copy())
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until everything offered is published."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not (self._busy or self._waiting))

    def close(self) -> None:
        """Stop the thread and free its context."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        data, cameras = mujoco.MjData(self._model), Cameras(self._model)
        try:
            try:
                mujoco.mj_forward(self._model, data)
                cameras.render(data, next(iter(CAMERAS)), self._size)
            except Exception as error:  # every OpenGL library has its own kind
                self._failure = str(error).strip() or type(error).__name__
                return
            finally:
                self._ready.set()
            while (snapshot := self._next()) is not None:
                self._publish(snapshot, data, cameras)
        except Exception as error:  # noqa: BLE001 - whatever it is, a robot without sight says so
            if self._context.ok():  # else: told to end in the middle of a frame
                self._logger.error(f"the cameras stopped: {type(error).__name__}: {first_line(error)}")
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            cameras.close()

    def _next(self) -> _Snapshot | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or self._waiting)
            snapshot, self._waiting = self._waiting, None
            self._busy = True
            return None if self._closing else snapshot

    def _publish(self, snapshot: _Snapshot, data: mujoco.MjData, cameras: Cameras) -> None:
        data.qpos[:] = snapshot.qpos
        with self._scene:
            mujoco.mj_forward(self._model, data)
        for slot, (raw, compressed, info) in self._publishers.items():
            image = None
            if raw.get_subscription_count() or compressed.get_subscription_count():
                with self._scene:
                    image = cameras.render(data, slot, self._size)
            # Asked again for each: what nobody listens to is not encoded.
            if image is not None and raw.get_subscription_count():
                self._send(raw, image_message(image), slot, snapshot.stamp)
            if image is not None and compressed.get_subscription_count():
                jpeg = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
                message = CompressedImage(format="rgb8; jpeg compressed bgr8", data=jpeg)
                self._send(compressed, message, slot, snapshot.stamp)
            if info.get_subscription_count():
                self._send(info, self._camera_info(cameras.focal_length(slot, self._size[1])), slot, snapshot.stamp)

    def _send(self, publisher: object, message: Image | CompressedImage | CameraInfo, slot: str, stamp: int) -> None:
        message.header.stamp = to_stamp(stamp)
        message.header.frame_id = CAMERAS[slot]
        publisher.publish(message)

    def _camera_info(self, focal: float) -> CameraInfo:
        width, height = self._size
        k = [focal, 0.0, width / 2, 0.0, focal, height / 2, 0.0, 0.0, 1.0]
        return CameraInfo(
            width=width, height=height, distortion_model="plumb_bob", d=[0.0] * 5, k=k,
            r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], p=[*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0],
        )  # fmt: skip
