"""`benchmark sampler|training|node|peers`; without a name, the set that a CPU does in under ten minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pi0_ros.benchmark import report
from pi0_ros.benchmark.inputs import CONFIGS, BenchmarkError
from pi0_ros.benchmark.machine import describe, set_threads
from pi0_ros.benchmark.node import measure_node
from pi0_ros.benchmark.peers import compare_sampling, compare_training, faults
from pi0_ros.benchmark.sampling import measure_sampler
from pi0_ros.benchmark.suite import run_suite
from pi0_ros.benchmark.training import measure_training
from pi0_ros.model.config import ConfigError, Pi0Config
from pi0_ros.model.files import CheckpointError, read_json
from pi0_ros.policy.processor import PolicyError, has_bfloat16, pick_device

Preset = Literal["nano", "nano05", "small", "mid", "pi0", "pi05"]


@dataclass(frozen=True)
class _Model:
    preset: Preset = "nano"
    """Sizes of the model; small and mid are those that docs/benchmarks.md compares."""
    config: Path | None = None
    """A JSON file with sizes instead, such as the config.json of a checkpoint folder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, else float32."""
    device: str = "auto"
    """auto, cpu, cuda."""
    prompt: int = 20
    """Valid tokens of the prompt."""
    horizon: int | None = None
    """Actions of a chunk; None: the model's."""
    runs: int = 20
    """Measured runs of each thing, in turn with the others."""
    threads: int = 0
    """Threads of torch on the CPU; 0: torch's own number."""
    json: Path | None = None
    """Where to write the result, too."""


@dataclass(frozen=True)
class SamplerOptions(_Model):
    """The sampler, stage by stage: time, work and share of the device's own rates, memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """auto: bfloat16 on a GPU, else float32; float8: the VLM's products alone, the rest bfloat16."""
    cameras: int = 3
    """Cameras that the robot has."""
    steps: int = 10
    """Denoising steps."""


@dataclass(frozen=True)
class TrainingOptions(_Model):
    """A training step: time, samples a second, augmentation; and against transformers' PI0."""

    batch: int = 2
    """Samples of a batch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""
    compile: bool = False
    """Compile the layers by torch.compile."""
    peer: bool = True
    """Compare with transformers' PI0 (pi0 in float32 only)."""


@dataclass(frozen=True)
class PeersOptions(_Model):
    """Sampling against transformers' PI0: same weights, same inputs, in turn. Outputs have to agree."""

    preset: Preset = "small"
    """Sizes of the model; a pi0, since transformers has no pi0.5."""
    runs: int = 9
    """Measured runs of each thing, in turn with the others."""
    steps: int = 10
    """Denoising steps."""


@dataclass(frozen=True)
class NodeOptions:
    """What policy_node adds to the model's time, over real topics with a policy that answers at once."""

    transport: Literal["both", "raw", "jpeg"] = "both"
    """How the two cameras send."""
    seconds: float = 10.0
    """How long to listen, each."""
    json: Path | None = None
    """Where to write the result, too."""


@dataclass(frozen=True)
class SuiteOptions:
    """The set for a CPU: peers, sampler, training step and node, into bench_output/ and docs/benchmarks.md."""

    minutes: float = 8.5
    """How long it may take; there are fewer runs of each thing where the machine is slow."""
    threads: int = 2
    """Threads of torch; 0: torch's own number."""
    output: Path = Path("bench_output")
    """Folder for the JSON files."""


Options = (
    Annotated[SuiteOptions, tyro.conf.subcommand("suite")]
    | Annotated[SamplerOptions, tyro.conf.subcommand("sampler")]
    | Annotated[TrainingOptions, tyro.conf.subcommand("training")]
    | Annotated[NodeOptions, tyro.conf.subcommand("node")]
    | Annotated[PeersOptions, tyro.conf.subcommand("peers")]
)


def sampler(options: SamplerOptions) -> list[str]:
    """Measure, print; returns what is wrong with the result, here and below."""
    name, config, device, dtype = _set_up(options)
    result = measure_sampler(
        config,
        dtype,
        device,
        cameras=options.cameras,
        prompt=options.prompt,
        steps=options.steps,
        runs=options.runs,
        name=name,
    )
    return _show(options, device, report.sampler_text(result), result)


def training(options: TrainingOptions) -> list[str]:
    """See `TrainingOptions`."""
    name, config, device, dtype = _set_up(options)
    result = measure_training(
        config,
        dtype,
        device,
        batch=options.batch,
        prompt=options.prompt,
        checkpointing=options.gradient_checkpointing,
        compiled=options.compile,
        runs=options.runs,
        name=name,
    )
    text, rows = report.training_text(result), []
    if options.peer and not config.pi05 and dtype == torch.float32:
        rows = compare_training(
            name, device, config=config, batch=options.batch, prompt=options.prompt, runs=options.runs
        )
        text += f"\n\n{report.peers_text(rows)}"
    return _show(options, device, text, {**result, "peers": rows}, faults(rows))


def peers(options: PeersOptions) -> list[str]:
    """See `PeersOptions`."""
    name, config, device, dtype = _set_up(options)
    rows = compare_sampling(
        name, dtype, device, config=config, steps=options.steps, prompt=options.prompt, runs=options.runs
    )
    return _show(options, device, report.peers_text(rows), rows, faults(rows))


def node(options: NodeOptions) -> list[str]:
    """See `NodeOptions`."""
    transports = ("raw", "jpeg") if options.transport == "both" else (options.transport,)
    results = [measure_node(transport, options.seconds) for transport in transports]
    text = "\n\n".join(report.node_text(result) for result in results)
    return _show(options, torch.device("cpu"), text, results)


def suite(options: SuiteOptions) -> list[str]:
    """See `SuiteOptions`."""
    set_threads(options.threads)
    return run_suite(options.output, 60 * options.minutes, " ".join(["python -m pi0_ros.benchmark.cli", *sys.argv[1:]]))


def _set_up(options: _Model) -> tuple[str, Pi0Config, torch.device, torch.dtype]:
    set_threads(options.threads)
    device, dtype = pick_device(options.device, options.dtype)
    if options.runs < 1:
        raise BenchmarkError(f"--runs: 1 or more, found {options.runs}")
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        print(f"this {device.type} has no bfloat16 arithmetic: it is emulated, and slow", file=sys.stderr)
    name, config = options.preset, CONFIGS[options.preset]
    if options.config is not None:
        data = read_json(options.config)
        name, config = options.config.stem, Pi0Config.from_dict(data.get("model", data))
    if options.horizon is not None:
        config = replace(config, action_horizon=options.horizon)
    return name, config, device, dtype


def _show(options: Any, device: torch.device, text: str, result: Any, wrong: list[str] | None = None) -> list[str]:
    facts = describe(device)
    print(f"{report.machine_text(facts)}\n\n{text}")
    if options.json is not None:
        report.write_json(options.json, {"machine": facts, "result": result})
    return wrong or []


COMMANDS: dict[type, Callable[[Any], list[str]]] = {
    SuiteOptions: suite,
    SamplerOptions: sampler,
    TrainingOptions: training,
    NodeOptions: node,
    PeersOptions: peers,
}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 and one line when something cannot be measured, or when outputs that must agree do not."""
    options = tyro.cli(Options, prog="benchmark", description=__doc__, default=SuiteOptions(), args=arguments)
    try:
        wrong = COMMANDS[type(options)](options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is not enough for this: choose a smaller --preset or --dtype", file=sys.stderr)
        return 1
    except (BenchmarkError, PolicyError, ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
