"""The scripted teacher: differential inverse kinematics (mink) along a funnel that ends on the named cube.

At every control tick the fingertip's reference moves through a velocity field: towards the cube at a height that
is a hover height far away and sinks to the cube's top near it, so that it never comes close to another cube. The
field depends on where the arm is, not on when: from the same picture, the same action. Demonstrations differ by their
scenes and start poses, and a little by a slow wobble; a manner drawn for each (speed, height, grip) would be something
that no picture tells.
"""

from __future__ import annotations

import mink
import numpy as np

from pi0_ros.demo.scene import CUBE_HALF, SHOULDER, build_arm
from pi0_ros.demo.simulation import Simulation

TICK = 0.05  # s, the demo robot's control period
SPEED = 0.16  # m/s
HOVER = 0.07  # m over the goal
TILT, GRIP = 0.02, 0.075  # rad; tilt outwards
WOBBLE = 0.04  # of the speed, as it changes from tick to tick
ACCELERATION = 0.9  # m/s^2, of the fingertip's reference
ABOVE = 0.004  # m over the cube's top, where the touch ends
VELOCITY_LIMIT = 2.5  # rad/s, for every joint
FUNNEL = (0.012, 0.06)  # m from the cube, horizontally: below the first all the way down, above the second hovering
TURN_SPEED, TURN_ACCELERATION = 1.2, 6.0  # rad/s, rad/s^2, of the fingertip's orientation and of the grip
REST_TICKS = 8  # ticks that it rests on the cube before it calls the demonstration done


class Teacher:
    """Drives one episode of `simulation`: call `act` once a tick and command what it returns."""

    speed, hover, tilt = SPEED, HOVER, TILT

    def __init__(self, simulation: Simulation) -> None:
        self._goal = simulation.cube_pose(simulation.target)[0] + [0, 0, CUBE_HALF + ABOVE]
        self._wobble, self._random = np.zeros(3), np.random.default_rng([simulation.seed, 1])
        self._velocity, self._turning, self._closing = np.zeros(3), np.zeros(3), np.zeros(1)
        self._resting = 0

        model = build_arm()
        self._configuration = mink.Configuration(model, simulation.positions)
        pose = self._configuration.get_transform_frame_to_world("gripperframe", "site")
        self._reference, self._rotation = pose.translation(), pose.rotation()
        self._tip = mink.FrameTask("gripperframe", "site", position_cost=1.0, orientation_cost=0.05, lm_damping=1e-4)
        self._posture = mink.PostureTask(model, cost=1e-4)
        self._posture.set_target(simulation.positions)
        speeds = {model.joint(index).name: VELOCITY_LIMIT for index in range(model.njnt)}
        self._limits = [mink.ConfigurationLimit(model), mink.VelocityLimit(model, speeds)]
        self._down = _pointing_down(model)

    @property
    def done(self) -> bool:
        """Whether it has touched the cube and rested there for a while."""
        return self._resting >= REST_TICKS

    def act(self) -> np.ndarray:
        """The joint positions [6] to be reached one tick from now, rad."""
        self._reference = self._reference + TICK * self._next_velocity()
        self._resting += int(np.linalg.norm(self._goal - self._reference) < 0.003)
        turn = (self._rotation.inverse() @ self._orientation()).log()
        self._turning = _towards(self._turning, _at_most(4.0 * turn, TURN_SPEED), TURN_ACCELERATION * TICK)
        self._rotation = self._rotation @ mink.SO3.exp(TICK * self._turning)
        self._tip.set_target(mink.SE3.from_rotation_and_translation(self._rotation, self._reference))
        for _ in range(2):
            velocity = mink.solve_ik(
                self._configuration, [self._tip, self._posture], TICK / 2, solver="daqp", limits=self._limits
            )
            velocity[-1] = 0.0
            self._configuration.integrate_inplace(velocity, TICK / 2)
        positions = self._configuration.q.copy()
        gap = _at_most(4.0 * np.array([GRIP - positions[-1]]), TURN_SPEED)
        self._closing = _towards(self._closing, gap, TURN_ACCELERATION * TICK)
        positions[-1] += TICK * self._closing[0]
        self._configuration.update(positions)
        return positions

    def _next_velocity(self) -> np.ndarray:
        aside = self._goal[:2] - self._reference[:2]
        distance = np.linalg.norm(aside)
        near, far = FUNNEL
        x = np.clip((distance - near) / (far - near), 0, 1)
        height = self._goal[2] + self.hover * x * x * (3 - 2 * x)
        lift = height - self._reference[2]
        aside = aside * np.clip(1 - lift / 0.04, 0.1, 1)  # up first, where it is too low
        wanted = _at_most(5.0 * np.array([*aside, lift]), self.speed)
        self._wobble = 0.9 * self._wobble + self._random.normal(0, WOBBLE, 3)
        wanted += self._wobble * self.speed * np.clip(distance / 0.1, 0, 1) ** 2
        self._velocity = _towards(self._velocity, wanted, ACCELERATION * TICK)
        return self._velocity

    def _orientation(self) -> mink.SO3:
        """Pointing down, and outwards the farther and higher it is (the wrist's limit asks for it)."""
        x, y = self._reference[:2] - SHOULDER
        tilt = np.clip(0.15 + 6.0 * (np.hypot(x, y) - 0.2) + 4.0 * (self._reference[2] - 0.03), 0, 1.3) + self.tilt
        return mink.SO3.from_z_radians(np.arctan2(y, x)) @ mink.SO3.from_y_radians(-tilt) @ self._down


def _at_most(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / (np.linalg.norm(vector) + 1e-9))


def _towards(value: np.ndarray, wanted: np.ndarray, most: float) -> np.ndarray:
    return value + _at_most(wanted - value, most)


def _pointing_down(model: object) -> mink.SO3:
    configuration = mink.Configuration(model, np.array([0, -0.6, 0.6, np.pi / 2, 0, 0]))
    return configuration.get_transform_frame_to_world("gripperframe", "site").rotation()
