"""How far a policy's chunks are from what was recorded, open loop: the robot is not asked.

The policy sees every observation as policy_node would build it, through `Policy.infer`. Two baselines say what a number
is worth: holding the current position, and repeating the last action. Written to the output folder: evaluation.json,
evaluation.html (which needs no other file), and a plot of each joint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pi0_ros.model.files import CheckpointError, write_bytes, write_json, write_text
from pi0_ros.model.flow import NoiseSourceError
from pi0_ros.policy.policy import ObservationError, Policy, PolicyError, RobotObservation
from pi0_ros.policy.tokenizer import TokenizerError
from pi0_ros.robot import Robot
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.training.bags import BagError
from pi0_ros.training.cache import CacheError, Unit
from pi0_ros.training.data import EPISODES, Episodes, load_units, names, trained_on
from pi0_ros.training.dataset import Dataset, all_episodes
from pi0_ros.training.options import OptionsError, require_at_least
from pi0_ros.wording import told

BASELINES = ("hold", "repeat")


class EvaluationError(RuntimeError):
    """Nothing to evaluate on; the message says what was looked for and the way out."""


@dataclass(frozen=True)
class Options:
    """Compare a policy's chunks with recordings, open loop."""

    bags: Path
    """A recording, or a folder of recordings."""
    checkpoint: Path
    """The checkpoint folder of a policy."""
    output: Path = Path("evaluation")
    """Folder for evaluation.json, evaluation.html and plots."""
    robot: Path | None = None
    """The robot file that the recordings were made with; None: the checkpoint's."""
    all: bool = False
    """Every episode. Otherwise those that the run beside the checkpoint was not trained on."""
    chunks: int = 200
    """Observations to infer at, spread evenly over the episodes; 0: every one."""
    seeds: int = 3
    """Draws of the flow's start for each observation, from which the spread is taken."""
    num_steps: int = 10
    """Denoising steps."""
    device: str = "auto"
    """torch device: auto, cpu, cuda."""
    prompt: str | None = None
    """The instruction of every episode, instead of the recorded one."""
    idle: float = 0.005
    """Start and end of an episode are trimmed until a joint moves by this share of its range; 0: not at all."""
    cache: Path | None = None
    """Folder for decoded frames; None: .pi0_cache beside the bags."""
    jobs: Annotated[int | None, tyro.conf.arg(help_behavior_hint="(None: one a core)")] = None
    """Processes that decode."""

    def __post_init__(self) -> None:
        require_at_least(self, chunks=0, seeds=1, num_steps=1, idle=0, jobs=1)


@dataclass(frozen=True)
class Comparison:
    """n observations: predicted float64 [n, S, H, J] of S seeds, recorded [n, H, J], known bool [n, H]; state and
    last action [n, J]; where: (unit, episode, tick) of each. Robot units."""

    predicted: np.ndarray
    recorded: np.ndarray
    known: np.ndarray
    state: np.ndarray
    last: np.ndarray
    where: list[tuple[int, int, int]]


def compare(policy: Policy, dataset: Dataset, *, chunks: int = 200, seeds: int = 3) -> Comparison:
    """The policy's chunks at `chunks` observations (0: all) of the data set, each with `seeds` starts of the flow."""
    policy.reset()
    count = min(chunks, len(dataset)) if chunks else len(dataset)
    picked = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(np.int64))
    columns: dict[str, list[Any]] = {name: [] for name in ("predicted", "recorded", "known", "state", "last", "where")}
    for index in tqdm(picked, desc="evaluate", unit="chunk", disable=None):
        sample, where = dataset.sample(int(index)), dataset.where(int(index))
        observation = observe(policy.robot, dataset, int(index), sample)
        columns["predicted"].append([_draw(policy, observation, int(index), seed) for seed in range(seeds)])
        columns["recorded"].append(sample["actions"])
        columns["known"].append(sample["action_mask"])
        columns["state"].append(sample["state"])
        columns["last"].append(_last_action(dataset.units[where[0]], where, sample["state"]))
        columns["where"].append(where)
    arrays = {name: np.array(column) for name, column in columns.items() if name != "where"}
    return Comparison(**arrays, where=columns["where"])


def observe(robot: Robot, dataset: Dataset, index: int, sample: dict[str, Any]) -> RobotObservation:
    """A sample of the data set as the policy takes it. Its frames have the model's size, and are left as they are."""
    present = [slot for slot in robot.present_cameras if slot in dataset.cameras]
    images = {slot: sample["images"][dataset.cameras.index(slot)] for slot in present}
    return RobotObservation(index, images, dict.fromkeys(present, index), sample["state"], sample["prompt"])


def _draw(policy: Policy, observation: RobotObservation, index: int, seed: int) -> np.ndarray:
    policy.forget_chunk()  # every draw stands for itself: a cold start must not begin from the one before
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    return policy.infer(observation, generator=generator).actions


def _last_action(unit: Unit, where: tuple[int, int, int], state: np.ndarray) -> np.ndarray:
    """What was commanded one tick before; the state where nothing was."""
    tick = unit.episodes[where[1]]["begin"] + where[2] - 1
    return np.array(unit.arrays["actions"][tick]) if where[2] > 0 and unit.arrays["known"][tick] else state


# --- numbers ----------------------------------------------------------------------------------------------------------


def baseline(comparison: Comparison, name: str) -> np.ndarray:
    """The chunks of a baseline, [n, H, J]: `hold` the current position, `repeat` the last action."""
    held = comparison.state if name == "hold" else comparison.last
    return np.broadcast_to(held[:, None], comparison.recorded.shape)


def errors(predicted: np.ndarray, recorded: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Mean absolute error, robot units, over what is known: per joint [J], and per step and joint [H][J] (None where
    no chunk reaches). predicted [n, H, J] or [n, S, H, J] of S seeds."""
    predicted = predicted if predicted.ndim == 4 else predicted[:, None]
    distance = np.abs(predicted - recorded[:, None]).mean(axis=1) * known[..., None]  # [n, H, J]
    reached = known.sum(axis=0)  # [H]
    steps = [(row / n).tolist() if n else None for row, n in zip(distance.sum(axis=0), reached, strict=True)]
    return {"per_joint": (distance.sum(axis=(0, 1)) / known.sum()).tolist(), "per_step": steps}


def jerk(chunks: np.ndarray, dt: float, known: np.ndarray) -> list[float | None]:
    """Root mean square of the third difference over dt^3 along chunks [..., H, J], per joint, in units / s^3, where all
    four actions are known, bool [..., H]. None where no four are."""
    third = np.diff(chunks, n=3, axis=-2) / dt**3
    whole = known[..., 3:] & known[..., :-3]  # what is known of a chunk is one stretch
    if not whole.any():
        return [None] * chunks.shape[-1]
    square = np.square(third) * whole[..., None]
    return np.sqrt(square.sum(axis=tuple(range(third.ndim - 1))) / whole.sum()).tolist()


def numbers(comparison: Comparison, robot: Robot) -> dict[str, Any]:
    """Everything of evaluation.json but its heading."""
    predicted, recorded, known = comparison.predicted, comparison.recorded, comparison.known
    spans = np.array([joint.position[1] - joint.position[0] for joint in robot.joints])
    found = {"policy": errors(predicted, recorded, known)}
    found |= {name: errors(baseline(comparison, name), recorded, known) for name in BASELINES}
    for values in found.values():
        values["share_of_range"] = float(np.mean(np.array(values["per_joint"]) / spans))
    seeds_known = np.broadcast_to(known[:, None], predicted.shape[:3])
    spread = (predicted.std(axis=1) * known[..., None]).sum(axis=(0, 1)) / known.sum()
    return {
        "joints": list(robot.joint_names),
        "units": [joint.unit for joint in robot.joints],
        "error": found,
        "spread_over_seeds": spread.tolist(),
        "jerk": {"policy": jerk(predicted, robot.dt, seeds_known), "recorded": jerk(recorded, robot.dt, known)},
    }


# --- the program ------------------------------------------------------------------------------------------------------


def pick_episodes(units: Sequence[Unit], checkpoint: Path, everything: bool) -> tuple[Episodes, str]:
    """The episodes to evaluate on, and what they are in words.

    Raises:
        EvaluationError: it is not known what the checkpoint was trained on, or it was trained on all of these.
    """
    episodes = all_episodes(units)
    if everything:
        return episodes, "episodes, whether trained on or not"
    seen = trained_on(checkpoint)
    if seen is None:
        raise EvaluationError(
            f"{checkpoint.resolve().parent / EPISODES}: what this checkpoint was trained on is not known; --all "
            "evaluates on every episode"
        )
    fresh = [pair for pair, name in zip(episodes, names(units, episodes), strict=True) if tuple(name) not in seen]
    if not fresh:
        raise EvaluationError("the checkpoint was trained on every one of these episodes; --all evaluates on them")
    return fresh, "episodes that were not trained on"


def evaluate(options: Options) -> dict[str, Any]:
    """Evaluate and write the output folder; returns what evaluation.json holds.

    Raises:
        EvaluationError, CheckpointError, PolicyError, RobotFileError, BagError, CacheError, OSError: one line each.
    """
    robot = load_robot(options.robot) if options.robot else None
    policy = Policy.load(options.checkpoint, robot=robot, device=options.device, num_steps=options.num_steps)
    if policy.threads:
        torch.set_num_threads(policy.threads)
    config = policy.config
    units = load_units(
        options.bags,
        policy.robot,
        config.vision.image_size,
        cache=options.cache,
        prompt=options.prompt,
        idle=options.idle,
        jobs=options.jobs,
    )
    episodes, which = pick_episodes(units, options.checkpoint, options.all)
    cameras = tuple(slot for slot in config.cameras if slot in policy.robot.present_cameras)
    dataset = Dataset(units, config.action_horizon, episodes=episodes, cameras=cameras)
    if not len(dataset):
        raise EvaluationError(f"{options.bags}: no usable sample in {len(episodes)} episodes; inspect_bags says why")
    comparison = compare(policy, dataset, chunks=options.chunks, seeds=options.seeds)
    result = {
        "checkpoint": str(options.checkpoint),
        "digest": policy.digest,
        "episodes": len(episodes),
        "which": which,
        "chunks": len(comparison.where),
        "seeds": options.seeds,
        "num_steps": options.num_steps,
        "horizon": config.action_horizon,
        "dt": policy.robot.dt,
        **numbers(comparison, policy.robot),
    }
    from pi0_ros.training.evaluation_page import joint_plots, page  # matplotlib takes a second to import

    options.output.mkdir(parents=True, exist_ok=True)
    plots = joint_plots(comparison, dataset, result)
    write_text(options.output / "evaluation.html", page(result, verdict(result), plots))
    write_json(options.output / "evaluation.json", result)
    for joint, png in plots.items():
        write_bytes(options.output / f"{joint.replace('/', '_')}.png", png)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    error, jerks = result["error"], result["jerk"]
    head = f"{result['chunks']} chunks of {result['horizon']} actions from {result['episodes']} {result['which']}"
    width = max(map(len, result["joints"]))
    lines = [
        head,
        "mean absolute error in each joint's unit, jerk in unit/s³",
        "(hold: the position at the chunk's start, repeat: the last action before it, spread: of chunks over seeds)",
    ]
    columns = f"{'policy':>10}{'hold':>10}{'repeat':>10}{'spread':>10}{'jerk':>10}{'recorded jerk':>15}"
    lines.append(f"  {'joint':{width}}{'unit':>5}{columns}")
    for i, (name, unit) in enumerate(zip(result["joints"], result["units"], strict=True)):
        values = [error[kind]["per_joint"][i] for kind in ("policy", *BASELINES)] + [result["spread_over_seeds"][i]]
        row = "".join(f"{value:10.4f}" for value in values)
        lines.append(
            f"  {name:{width}}{unit:>5}{row}{_shown(jerks['policy'][i]):>10}{_shown(jerks['recorded'][i]):>15}"
        )
    share = "".join(f"{error[kind]['share_of_range']:10.3%}" for kind in ("policy", *BASELINES))
    lines.append(f"  {'of range':{width}}{'':5}{share}")
    return "\n".join([*lines, verdict(result)])


def verdict(result: dict[str, Any]) -> str:
    """In one line, in which joints the policy is nearer to what was recorded than an arm that holds still."""
    policy, hold = (result["error"][kind]["per_joint"] for kind in ("policy", "hold"))
    worse = [name for name, a, b in zip(result["joints"], policy, hold, strict=True) if a >= b]
    better = f"nearer to what was recorded than holding still in {len(policy) - len(worse)} of {len(policy)} joints"
    return better + (f"; not in {', '.join(worse)}" if worse else "")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 and one line when there is nothing to evaluate or something cannot be read."""
    try:
        options = tyro.cli(Options, prog="evaluate", args=arguments)
        print(table(evaluate(options)))
        print(f"{options.output}: evaluation.json, evaluation.html, a plot of each joint")
    except KeyboardInterrupt:
        return 130
    except (
        EvaluationError, OptionsError, CheckpointError, PolicyError, TokenizerError, NoiseSourceError, RobotFileError,
        BagError, CacheError, ObservationError, OSError,
    ) as error:  # fmt: skip
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
