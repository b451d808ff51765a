"""The demo robot without ROS: physics, cameras and the judgement of an episode, deterministic by seed.

    simulation = Simulation(seed=3)
    while not simulation.outcome().done:
        observation = simulation.observe(size=(96, 96))
        simulation.command(positions)          # reached one control period from now
        simulation.step(0.05)

An episode succeeds when the fingertip comes within `TOUCH` of the named cube's surface before it does so of any
other cube's, within `TIME_LIMIT` of simulated time. The fingertip is the model's `gripperframe`, the end of the
fixed jaw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from pi0_ros.demo.cameras import Cameras
from pi0_ros.demo.controller import Point, TrajectoryController
from pi0_ros.demo.scene import (
    CAMERAS,
    CUBE_HALF,
    CUBES,
    JOINTS,
    TIMESTEP,
    apply_layout,
    build_model,
    draw_layout,
    named_cube,
)

TOUCH = 0.02  # m, from the fingertip to a cube's surface
TIME_LIMIT = 8.0  # s of simulated time
SUBSTEPS = 5
GONE = (0.25, 0.0, -1.0)  # m: under the table, where no camera looks
PERIOD = SUBSTEPS * TIMESTEP  # s between two updates of the controller
PERIOD_NS = round(PERIOD * 1e9)


class TaskError(ValueError):
    """An instruction that names no cube, or several."""


@dataclass(frozen=True)
class Outcome:
    """How an episode stands; the fields of srv/EpisodeOutcome."""

    done: bool
    success: bool
    reason: str
    seed: int
    prompt: str
    seconds: float  # simulated, since the reset
    closest: float  # m, smallest distance so far from the fingertip to the named cube's surface


@dataclass(frozen=True)
class Observation:
    """What the robot's sensors say at one instant. Images: slot -> uint8 [H, W, 3]; state [6], JOINTS order, rad."""

    stamp: int  # ns of the simulation's clock
    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str


class Simulation:
    """One demo robot. `now` is its clock in nanoseconds; only `step` moves it on."""

    def __init__(self, seed: int = 0, prompt: str = "") -> None:
        self.model = build_model()
        self.data = mujoco.MjData(self.model)
        self.now = 0
        self._cameras: Cameras | None = None
        self._qpos = np.array([self.model.joint(name).qposadr[0] for name in JOINTS])
        self._dof = np.array([self.model.joint(name).dofadr[0] for name in JOINTS])
        self._ctrl = np.array([self.model.actuator(name).id for name in JOINTS])
        self._cube_ids = np.array([self.model.body(name).id for name in CUBES])
        self._tip = self.model.site("gripperframe").id
        self.reset(seed, prompt)

    def reset(self, seed: int, prompt: str = "", cubes: Sequence[str] = CUBES) -> None:
        """Begin the episode of `seed`; an empty prompt is drawn from the seed. The clock goes on.

        Only `cubes` are on the table.

        Raises:
            TaskError: the prompt does not name exactly one cube; the running episode goes on.
        """
        if seed < 0:
            raise TaskError(f"the seed must be 0 or more, found {seed}")
        layout = draw_layout(seed, self.model)
        prompt = prompt or layout.prompt
        target = named_cube(prompt)
        if target is None:
            raise TaskError(f"the prompt must name one cube ({', '.join(CUBES)}), found {prompt!r}")
        apply_layout(layout, self.model, self.data)
        for name in set(CUBES) - set(cubes):
            self.data.joint(name).qpos[:3] = GONE
        self.seed, self.prompt, self.target = seed, prompt, target
        self.controller = TrajectoryController(JOINTS, layout.start)
        self._start, self._closest = self.now, np.inf
        self._touched, self._touched_at = "", None  # the first cube touched, and when
        self._judge()

    def step(self, seconds: float = PERIOD) -> None:
        """Let `seconds` pass, rounded to whole controller periods."""
        for _ in range(round(seconds / PERIOD)):
            self.data.ctrl[self._ctrl] = self.controller.sample(self.now)[0]
            mujoco.mj_step(self.model, self.data, SUBSTEPS)
            self.now += PERIOD_NS
            self._judge()

    def skip(self, nanoseconds: int) -> None:
        """Move the clock without letting time pass in the world: nothing moves, and the last command is held."""
        self.controller.hold(self.controller.sample(self.now)[0])
        self.now += nanoseconds
        self._start += nanoseconds
        if self._touched_at is not None:
            self._touched_at += nanoseconds

    def command(self, positions: Sequence[float], seconds: float = 0.05) -> None:
        """Move to `positions` [6] in `seconds`, in a straight line in joint space from the last command.

        Raises:
            CommandError: not one finite number per joint.
        """
        self.controller.accept(JOINTS, [Point(round(seconds * 1e9), positions)], 0, self.now)

    def observe(self, slots: Sequence[str] = tuple(CAMERAS), size: tuple[int, int] = (320, 240)) -> Observation:
        """Camera images of `slots` at `size` = (width, height), and joint positions, as they are now."""
        if self._cameras is None:
            self._cameras = Cameras(self.model)
        if slots:
            mujoco.mj_forward(self.model, self.data)
        images = {slot: self._cameras.render(self.data, slot, size) for slot in slots}
        return Observation(self.now, images, self.positions, self.prompt)

    @property
    def positions(self) -> np.ndarray:
        """Measured joint positions [6], rad."""
        return self.data.qpos[self._qpos]

    @property
    def velocities(self) -> np.ndarray:
        """Measured joint velocities [6], rad/s."""
        return self.data.qvel[self._dof]

    @property
    def fingertip(self) -> np.ndarray:
        """Position [3] in the world, m."""
        return self.data.site_xpos[self._tip].copy()

    def cube_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Centre [3] and rotation matrix [3, 3] of a cube."""
        body = self.data.body(name)
        return body.xpos.copy(), body.xmat.reshape(3, 3).copy()

    def distances(self) -> np.ndarray:
        """From the fingertip to the surface of each cube [3], CUBES order, m; 0 inside."""
        offset = self.data.site_xpos[self._tip] - self.data.xpos[self._cube_ids]  # [3, xyz]
        local = np.einsum("nij,ni->nj", self.data.xmat[self._cube_ids].reshape(-1, 3, 3), offset)
        return np.linalg.norm(np.maximum(np.abs(local) - CUBE_HALF, 0), axis=1)

    def outcome(self) -> Outcome:
        """How the episode stands. Once done it stays as it is."""
        seconds = ((self.now if self._touched_at is None else self._touched_at) - self._start) / 1e9
        late = seconds >= TIME_LIMIT
        success = self._touched == self.target
        if success:
            reason = f"touched {self._touched}"
        elif self._touched:
            reason = f"touched {self._touched} first"
        else:
            reason = "time is up" if late else "running"
        done = bool(self._touched) or late
        seconds = min(seconds, TIME_LIMIT)
        return Outcome(done, success, reason, self.seed, self.prompt, seconds, float(self._closest))

    def close(self) -> None:
        """Free the renderer."""
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def _judge(self) -> None:
        if self._touched or self.now - self._start > TIME_LIMIT * 1e9:
            return
        distances = self.distances()
        self._closest = min(self._closest, distances[CUBES.index(self.target)])
        nearest = int(distances.argmin())
        if distances[nearest] <= TOUCH:
            self._touched, self._touched_at = CUBES[nearest], self.now
