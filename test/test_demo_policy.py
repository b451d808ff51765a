"""The policy that ships: it loads as it is, is small, does the task and listens. Simulated time, no ROS: repeatable."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

from pi0_ros.demo.scene import CAMERAS, CUBES, prompt_for
from pi0_ros.demo.simulation import Outcome, Simulation
from pi0_ros.policy.bundle import load_bundle
from pi0_ros.policy.policy import Policy, RobotObservation
from pi0_ros.robot_file import load_robot

CONFIG = Path(__file__).parents[1] / "config"
LATENCY, PERIOD, TICK = 0.1, 0.2, 0.05  # s: from a picture to its chunk, between chunks, between actions


@pytest.fixture(scope="module")
def policy():
    return Policy.load(CONFIG / "demo_policy", device="cpu")


@pytest.fixture(scope="module")
def simulation():
    simulation = Simulation()
    yield simulation
    simulation.close()


def drive(simulation: Simulation, policy: Policy, told: str) -> Outcome:
    """The rest of the episode: a chunk five times a second, played 100 ms after its pictures were taken."""
    policy.reset()
    generator = torch.Generator().manual_seed(simulation.seed)
    chunk, coming, due = None, None, simulation.now
    while not simulation.outcome().done:
        if simulation.now >= due:
            seen = simulation.observe(tuple(CAMERAS))
            stamps = dict.fromkeys(seen.images, seen.stamp)
            observation = RobotObservation(seen.stamp, seen.images, stamps, seen.state, told)
            coming = (seen.stamp, policy.infer(observation, generator=generator).actions)
            due += round(PERIOD * 1e9)
        if coming and simulation.now - coming[0] >= LATENCY * 1e9:
            chunk, coming = coming, None
        if chunk:
            ahead = (simulation.now - chunk[0]) / 1e9 / TICK + 1
            steps = np.arange(len(chunk[1]))
            simulation.command([np.interp(ahead, steps, column) for column in chunk[1].T], TICK)
        simulation.step(TICK)
    return simulation.outcome()


def test_it_is_the_demo_robots_and_at_most_twelve_megabytes(policy):
    assert sum(path.stat().st_size for path in (CONFIG / "demo_policy").iterdir()) <= 12e6
    assert load_bundle(CONFIG / "demo_policy").robot == load_robot(CONFIG / "so101_demo.yaml")
    assert policy.settings.trained_steps > 0


def test_it_touches_the_named_cube(simulation, policy):
    endings = []
    for seed in range(1000, 1003):
        for cube in CUBES:
            simulation.reset(seed, prompt_for(cube))
            endings.append(drive(simulation, policy, simulation.prompt).success)
    assert sum(endings) >= 8, endings  # of 9


def test_it_listens(simulation, policy):
    endings = []
    for seed in range(1003, 1006):
        simulation.reset(seed, "touch the red cube")
        endings.append(drive(simulation, policy, "touch the blue cube").reason)
    assert endings.count("touched blue first") >= 2, endings
