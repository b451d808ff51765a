"""Everything that a CPU can measure in ten minutes, one thing after another, within a budget of time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pi0_ros.benchmark import report
from pi0_ros.benchmark.inputs import CONFIGS, BenchmarkError
from pi0_ros.benchmark.machine import describe, measure_rates
from pi0_ros.benchmark.node import measure_node
from pi0_ros.benchmark.peers import compare_sampling, compare_training, faults
from pi0_ros.benchmark.sampling import measure_sampler
from pi0_ros.benchmark.training import measure_training
from pi0_ros.policy.processor import has_bfloat16

DOCUMENT = Path("docs/benchmarks.md")
CPU = torch.device("cpu")


@dataclass
class Results:
    """What was measured, in the order of the document."""

    peers: list[dict[str, Any]] = field(default_factory=list)
    sampler: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    node: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One measurement: `measure(results, seconds)`, and its share of the time."""

    title: str
    weight: float
    measure: Callable[[Results, float], None]


def parts() -> list[Part]:
    """The set. Long parts come late, so that a slow machine shortens them and not the others."""
    rates = functools.cache(lambda: measure_rates(CPU, torch.float32))

    def sampler(name: str) -> Callable[[Results, float], None]:
        def measure(results: Results, seconds: float) -> None:
            results.sampler.append(
                measure_sampler(CONFIGS[name], torch.float32, CPU, seconds=seconds, rates=rates(), name=name)
            )

        return measure

    def training(results: Results, seconds: float) -> None:
        result = measure_training(CONFIGS["small"], torch.float32, CPU, seconds=seconds, rates=rates(), name="small")
        results.training.append(result)

    def sampling_peers(name: str, dtype: torch.dtype) -> Callable[[Results, float], None]:
        def measure(results: Results, seconds: float) -> None:
            if dtype == torch.bfloat16 and not has_bfloat16(CPU):
                raise BenchmarkError(f"peers {name} bfloat16: this processor has no bfloat16 arithmetic")
            results.peers += compare_sampling(name, dtype, CPU, seconds=seconds, runs=15)

        return measure

    def training_peers(results: Results, seconds: float) -> None:
        results.peers += compare_training("small", CPU, seconds=seconds, runs=15)

    def node(transport: str) -> Callable[[Results, float], None]:
        return lambda results, seconds: results.node.append(measure_node(transport, 10.0))

    return [
        Part("sampler nano", 3, sampler("nano")),
        Part("sampler small", 6, sampler("small")),
        Part("node raw", 4, node("raw")),
        Part("node jpeg", 4, node("jpeg")),
        Part("training small", 8, training),
        Part("peers small float32", 12, sampling_peers("small", torch.float32)),
        Part("peers small training step", 10, training_peers),
        Part("peers mid bfloat16", 30, sampling_peers("mid", torch.bfloat16)),
        Part("peers mid float32", 40, sampling_peers("mid", torch.float32)),
    ]


def run_suite(output: Path, seconds: float, command: str, chosen: list[Part] | None = None) -> list[str]:
    """Run the parts within `seconds`, print and write as they come; returns the modes whose outputs disagree.

    Each part may take its share of the time that is left, by weight, and has at least one run. What cannot be measured
    here (no bfloat16, no ROS, no transformers, no time) is said and left out. In a source tree the document's table is
    rewritten.
    """
    chosen = parts() if chosen is None else chosen
    facts, results, end = describe(CPU), Results(), time.monotonic() + seconds
    print(report.machine_text(facts))
    for i, part in enumerate(chosen):
        share, left = part.weight / sum(p.weight for p in chosen[i:]), end - time.monotonic()
        print(f"{part.title} ...", flush=True)
        try:
            if left <= 0:
                raise BenchmarkError(f"{part.title}: no time was left, give more with --minutes")
            part.measure(results, left * share)
        except BenchmarkError as error:
            print(f"left out: {error}")
            results.skipped.append(str(error))
        for kind in ("peers", "sampler", "training", "node"):
            if getattr(results, kind):
                report.write_json(output / f"{kind}.json", getattr(results, kind))
    report.write_json(output / "machine.json", {**facts, "command": command, "date": date.today().isoformat()})
    text = document_text(results, facts, command)
    print(f"\n{text}")
    if Path("package.xml").is_file() and report.rewrite(DOCUMENT, text):
        print(f"\nwritten: {output}/*.json and the table in {DOCUMENT}")
    return faults(results.peers)


def document_text(results: Results, facts: dict[str, Any], command: str) -> str:
    """What stands between the document's markers."""
    sections = [f"Taken on {date.today().isoformat()} with `{command}`. {report.machine_text(facts)}"]
    sections += [f"Left out: {reason}." for reason in results.skipped]
    for heading, texts in (
        ("Against transformers' PI0", [report.peers_text(results.peers)] if results.peers else []),
        ("The sampler alone", [report.sampler_text(result) for result in results.sampler]),
        ("A training step", [report.training_text(result) for result in results.training]),
        ("The node without a model", [report.node_text(result) for result in results.node]),
    ):
        if texts:
            sections += [f"### {heading}", *texts]
    return "\n\n".join(sections)
