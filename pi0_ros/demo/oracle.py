"""policy_node with the scripted teacher in the network's place: chunks that know where the cubes are.

For measuring what happens around a policy before one is trained. Each chunk is drawn anew (height of the approach,
speed, tilt, where on the cube), as a policy with several ways to do its task would, from the arm's state at its
observation. Told what will have been executed, it goes on from there in the way it had begun: what real-time chunking
asks of a network, done perfectly.

The instruction must name the scene: "touch the red cube, scene 17".
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pi0_ros.demo.scene import CUBE_HALF, build_model, draw_layout, named_cube
from pi0_ros.demo.teacher import TICK, Teacher
from pi0_ros.policy.policy import Chunk, ObservationError, RobotObservation
from pi0_ros.robot import Robot, load_robot
from pi0_ros.ros.parameters import Parameters
from pi0_ros.ros.policy_node import main as node_main

HORIZON = 30  # actions of a chunk: 1.5 s


@dataclass(frozen=True)
class _Scene:
    """What the teacher looks at."""

    seed: int  # of its own draws
    target: str
    positions: np.ndarray
    cubes: dict[str, tuple[float, float, float]]

    def cube_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        x, y, yaw = self.cubes[name]
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        return np.array([x, y, CUBE_HALF]), turn


class _Planner(Teacher):
    def __init__(self, scene: _Scene) -> None:
        super().__init__(scene)
        random = np.random.default_rng([scene.seed, 2])
        self.speed, self.hover = random.uniform(0.12, 0.20), random.uniform(0.055, 0.085)
        self.tilt = random.uniform(-0.08, 0.12)
        self._goal = self._goal + [*random.uniform(-0.006, 0.006, 2), 0.0]

    def under_way(self) -> None:
        """Begin as if moving already: a trained policy's chunks do, they know positions and no speeds."""
        for _ in range(8):
            self._next_velocity()

    def go_on(self, before: np.ndarray, now: np.ndarray) -> None:
        """Move already as from positions [6] `before` to `now`, a tick apart."""
        tips = []
        for positions in (before, now):
            self._configuration.update(positions)
            tips.append(self._configuration.get_transform_frame_to_world("gripperframe", "site"))
        self._velocity = (tips[1].translation() - tips[0].translation()) / TICK
        self._turning = (tips[0].rotation().inverse() @ tips[1].rotation()).log() / TICK
        self._closing = (now[-1:] - before[-1:]) / TICK


class Oracle:
    """What policy_node asks of a `Policy`."""

    digest, num_steps = "oracle", 1

    def __init__(self, robot: Robot) -> None:
        self.robot, self._model = robot, build_model()
        self._scenes: dict[int, dict[str, tuple[float, float, float]]] = {}
        self._drawn = 0

    def infer(self, observation: RobotObservation, *, executed: np.ndarray | None = None, **_: Any) -> Chunk:
        """The chunk for the state alone. ObservationError when the prompt names no cube or no scene."""
        begin = time.perf_counter()
        number, target = re.search(r"scene (\d+)$", observation.prompt), named_cube(observation.prompt)
        if number is None or target is None:
            raise ObservationError(
                f"the prompt must be like 'touch the red cube, scene 17', found {observation.prompt!r}"
            )
        seed = int(number[1])
        if seed not in self._scenes:
            self._scenes[seed] = draw_layout(seed, self._model).cubes
        kept = 0 if executed is None else len(executed)
        self._drawn += not kept
        rows = list(executed) if kept else [observation.state]
        planner = _Planner(_Scene(1000 * seed + self._drawn, target, rows[-1].copy(), self._scenes[seed]))
        if kept > 1:
            planner.go_on(*rows[-2:])
        else:
            planner.under_way()
        while len(rows) < HORIZON:
            rows.append(planner.act())
        took = time.perf_counter() - begin
        return Chunk(np.array(rows), False, 0, self.num_steps, kept, {"denoise": took, "total": took})

    def warm_up(self) -> None:
        """Nothing to warm up."""

    reset = close = warm_up


def load(parameters: Parameters) -> Oracle:
    """The oracle for the robot of the parameters."""
    return Oracle(load_robot(parameters["robot_file"]))


if __name__ == "__main__":
    sys.exit(node_main(load=load))
