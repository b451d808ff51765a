"""What the demo's cameras saw, with the visualiser's markers drawn in: a contact sheet and a film."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import imageio_ffmpeg
import mujoco
import numpy as np

from pi0_ros.demo.cameras import Cameras
from pi0_ros.demo.scene import CAMERAS, JOINTS, build_model
from pi0_ros.model.files import write_bytes

COLUMNS = 6  # moments of an episode on the contact sheet


@dataclass(frozen=True)
class Line:
    """A LINE_STRIP marker: points [N, 3] in the world, m, and a colour for each, rgba in 0..1 [N, 4]."""

    points: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Moment:
    """One instant of one episode as messages brought it."""

    seconds: float  # since the episode began
    images: dict[str, bytes]  # slot -> jpeg
    joints: np.ndarray  # [J] measured positions
    lines: tuple[Line, ...]  # what RViz would draw


@dataclass
class Reel:
    """The moments of one episode and what came of it."""

    title: str
    moments: list[Moment]
    ending: str = ""


class Painter:
    """Draws markers into camera images by the cameras' geometry."""

    def __init__(self) -> None:
        self._model = build_model()
        self._data = mujoco.MjData(self._model)
        self._cameras = Cameras(self._model)  # for their geometry alone: nothing is rendered
        self._qpos = [self._model.joint(name).qposadr[0] for name in JOINTS]

    def paint(self, moment: Moment, slot: str) -> np.ndarray:
        """The image of `slot`, RGB uint8, with the moment's lines drawn in."""
        image = cv2.cvtColor(
            cv2.imdecode(np.frombuffer(moment.images[slot], np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
        self._pose(moment.joints)  # the wrist camera rides on the arm
        for line in moment.lines:
            points, drawn = self._project(line.points, slot, image.shape), image.copy()
            for i in range(len(points) - 1):
                if np.isfinite(points[i : i + 2]).all():
                    colour = 255 * line.colours[i : i + 2, :3].mean(axis=0)
                    a, b = (tuple(int(round(8 * v)) for v in point) for point in points[i : i + 2])
                    cv2.line(drawn, a, b, colour.tolist(), 2, cv2.LINE_AA, shift=3)
            opacity = float(line.colours[:, 3].mean())
            image = cv2.addWeighted(drawn, opacity, image, 1 - opacity, 0)
        return image

    def _pose(self, joints: np.ndarray) -> None:
        self._data.qpos[self._qpos] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _project(self, points: np.ndarray, slot: str, shape: tuple[int, ...]) -> np.ndarray:
        """World points [N, 3] -> pixels [N, 2]; NaN behind the camera or far outside the picture."""
        camera = self._data.cam(CAMERAS[slot])
        height, width = shape[:2]
        focal = self._cameras.focal_length(slot, height)
        local = (points - camera.xpos) @ camera.xmat.reshape(3, 3)  # x right, y up, looking along -z
        depth = np.where(local[:, 2] < -1e-3, -local[:, 2], np.nan)
        pixels = np.stack([width / 2 + focal * local[:, 0] / depth, height / 2 - focal * local[:, 1] / depth], axis=1)
        return np.where(np.abs(pixels) < 4 * max(width, height), pixels, np.nan)


def contact_sheet(reels: list[Reel], path: Path) -> None:
    """A picture with one row an episode: base view above wrist view at evenly spaced moments."""
    painter, rows = Painter(), []
    for reel in reels:
        chosen = [reel.moments[i] for i in np.linspace(0, len(reel.moments) - 1, COLUMNS).round().astype(int)]
        cells = [_cell(painter, moment) for moment in chosen]
        rows.append(_caption(np.hstack(cells), f"{reel.title}: {reel.ending}"))
    write_bytes(path, cv2.imencode(".png", cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))[1].tobytes())


def film(reels: list[Reel], path: Path, rate: float) -> None:
    """An H.264 film (yuv420p, which browsers play) of the episodes, base and wrist view side by side."""
    painter, writer = Painter(), None
    partial = path.with_name(path.stem + ".partial.mp4")
    for reel in reels:
        for moment in reel.moments:
            views = [painter.paint(moment, slot) for slot in CAMERAS]
            frame = _caption(np.hstack(views), f"{reel.title}  {moment.seconds:4.1f} s")
            frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
            if writer is None:
                size = (frame.shape[1], frame.shape[0])
                writer = imageio_ffmpeg.write_frames(
                    str(partial), size, fps=rate, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2
                )
                writer.send(None)
            writer.send(frame)
    if writer is not None:
        writer.close()
        partial.replace(path)


def _cell(painter: Painter, moment: Moment) -> np.ndarray:
    views = [painter.paint(moment, slot) for slot in CAMERAS]
    cv2.putText(
        views[0], f"{moment.seconds:.1f} s", (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (255,) * 3, 1, cv2.LINE_AA
    )
    return np.pad(np.vstack(views), ((0, 0), (0, 4), (0, 0)), constant_values=255)


def _caption(image: np.ndarray, text: str) -> np.ndarray:
    band = np.full((26, image.shape[1], 3), 24, np.uint8)
    cv2.putText(band, text, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (240,) * 3, 1, cv2.LINE_AA)
    return np.vstack([band, image])
