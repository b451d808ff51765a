"""For tests of the player without ROS: a made-up clock, an arm that does as it is told, and the checks on both."""

import numpy as np

from pi0_ros.robot import Robot
from pi0_ros.ros.judging import SECOND, Offer, Settings
from pi0_ros.ros.player import Player

PERIOD = SECOND // 100
ROBOT = Robot.model_validate(
    {
        "name": "two",
        "control_rate": 20,
        "cameras": {"base_0_rgb": {"topic": "/c"}},
        "joints": [
            {"name": "a", "position": [-1.0, 1.0], "velocity": 2.0, "acceleration": 10.0},
            {"name": "b", "position": [-0.5, 2.0], "velocity": 1.0, "acceleration": 4.0},
            {
                "name": "g",
                "kind": "gripper",
                "position": [0, 1],
                "velocity": 3,
                "acceleration": 20,
                "open": 1,
                "closed": 0,
            },
        ],
        "state": {"max_age": 0.1},
        "commands": [
            {"topic": "/arm", "type": "JointTrajectory", "joints": ["a", "b"]},
            {"topic": "/gripper", "type": "Float64MultiArray", "joints": ["g"]},
        ],
    }
)
NAMES = ROBOT.joint_names


def turning(limits) -> Robot:
    """ROBOT with a continuous joint `a`."""
    first = ROBOT.joints[0].model_dump() | {"kind": "continuous", "position": limits}
    return Robot.model_validate(ROBOT.model_dump() | {"joints": [first, *ROBOT.joints[1:]]})


VELOCITY = np.array([2.0, 1.0, 3.0])
ACCELERATION = np.array([10.0, 4.0, 20.0])
LOW, HIGH = np.array([-1.0, -0.5, 0.0]), np.array([1.0, 2.0, 1.0])


class Bench:
    """A player, a clock and an arm that does as it is told."""

    def __init__(self, streamed=NAMES, start=True, robot=ROBOT, **changes) -> None:
        # Many a test plays one long chunk: the policy's silence does not count in them.
        self.player = Player(robot, Settings(**{"policy_timeout": 3.0, **changes}), streamed)
        self.now = 10 * SECOND
        self.arm = np.zeros(3)  # measured
        self.sag = np.zeros(3)  # by which the arm stays away from what it is told
        self.sensing = True
        self.sequence = -1
        self.trail = []  # positions at every tick that had a command
        self.plans = []  # (now, Plan)
        self.sends = 0
        self._told = np.zeros(3, bool)  # joints whose controllers were told something
        self._streamed = np.array([name in streamed for name in NAMES])
        if start:
            self.player.start()

    def offer(self, actions, age=0.0, dt=0.05, sequence=None, epoch=0, names=NAMES, untrained=False) -> str:
        values = np.asarray(actions, dtype=np.float64)
        self.sequence = self.sequence + 1 if sequence is None else sequence
        return self.player.offer(
            Offer(
                self.now - round(age * SECOND), self.sequence, epoch, names, len(values), dt, values.ravel(), untrained
            ),
            self.now,
        )

    def tick(self, ticks=1, period=PERIOD) -> None:
        for _ in range(ticks):
            self.now += period
            if self.sensing:
                self.player.observe(NAMES, self.arm, self.now, self.now)
            commands = self.player.tick(self.now)
            if commands is None:
                continue
            self.trail.append(self.player.commanded.copy())
            self.sends += commands.stream
            self._told |= (self._streamed & commands.stream) | (~self._streamed & (commands.plan is not None))
            self.arm = np.where(self._told, self.player.commanded + self.sag, self.arm)
            if commands.plan is not None:
                self.plans.append((self.now, commands.plan))

    def lively(self) -> None:
        """A chunk that moves everything to and fro for 2 s."""
        time = np.arange(41) * 0.05
        self.offer(np.stack([0.3 * np.sin(3 * time), 0.2 * np.sin(2 * time), 0.5 + 0 * time], axis=1))

    @property
    def seen(self) -> tuple[int, str]:
        return self.player.state, self.player.reason


def check_limits(trail, period=0.01) -> None:
    """Positions [n, 3], one each period."""
    trail = np.array(trail).reshape(-1, 3)
    assert np.isfinite(trail).all()
    assert (trail >= LOW - 1e-9).all() and (trail <= HIGH + 1e-9).all()
    velocity = np.diff(trail, axis=0) / period
    assert (np.abs(velocity) <= VELOCITY * (1 + 1e-6)).all()
    assert (np.abs(np.diff(velocity, axis=0)) <= ACCELERATION * period * (1 + 1e-6) + 1e-9).all()


def check_plans(plans, joints=(0, 1)) -> None:
    """Each trajectory keeps the limits, begins ahead of now and on the way of the one before, and ends at rest."""
    joints = list(joints)
    velocity, acceleration = VELOCITY[joints], ACCELERATION[joints]
    before = None
    for now, plan in plans:
        steps = np.diff(plan.times)
        assert (steps == PERIOD).all()
        assert plan.times[0] - now >= PERIOD
        assert not plan.velocities[-1].any()
        assert np.isfinite(plan.positions).all()
        assert (plan.positions >= LOW[joints] - 1e-9).all() and (plan.positions <= HIGH[joints] + 1e-9).all()
        assert (np.abs(plan.velocities) <= velocity * (1 + 1e-6)).all()
        assert (np.abs(np.diff(plan.velocities, axis=0)) <= acceleration * 0.01 * (1 + 1e-6) + 1e-9).all()
        mean = (plan.velocities[1:] + plan.velocities[:-1]) * 0.005
        np.testing.assert_allclose(np.diff(plan.positions, axis=0), mean, atol=1e-9)
        if before is not None:
            row = min(int((plan.times[0] - before.times[0]) // PERIOD), len(before.times) - 1)
            np.testing.assert_allclose(plan.positions[0], before.positions[row], atol=1e-9)
            np.testing.assert_allclose(plan.velocities[0], before.velocities[row], atol=1e-9)
        before = plan
