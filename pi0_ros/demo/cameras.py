"""Renders the scene's cameras, headless."""

from __future__ import annotations

import atexit

import mujoco
import numpy as np

from pi0_ros.demo.scene import CAMERAS

MAX_GEOMS = 200


class Cameras:
    """The cameras of a model. OpenGL contexts belong to one thread: make, use and close it in the same one."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}

    def render(self, data: mujoco.MjData, slot: str, size: tuple[int, int]) -> np.ndarray:
        """What the camera of `slot` sees: uint8 [height, width, 3] RGB, for size = (width, height)."""
        if size not in self._renderers:
            # The off-screen buffer has the model's size, whatever the picture's: larger would only cost time.
            self._model.vis.global_.offwidth, self._model.vis.global_.offheight = size
            self._renderers[size] = mujoco.Renderer(self._model, size[1], size[0], max_geom=MAX_GEOMS)
            if len(self._renderers) == 1:
                atexit.register(self.close)  # after mujoco's own: contexts left open must go before EGL does
        renderer = self._renderers[size]
        renderer.update_scene(data, CAMERAS[slot])
        return renderer.render()

    def focal_length(self, slot: str, height: int) -> float:
        """Pixels, the same for both axes; the principal point is the picture's centre."""
        return height / 2 / np.tan(np.radians(self._model.camera(CAMERAS[slot]).fovy[0]) / 2)

    def close(self) -> None:
        """Free the OpenGL contexts."""
        atexit.unregister(self.close)
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
