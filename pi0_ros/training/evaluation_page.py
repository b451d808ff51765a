"""An evaluation as pictures: predicted against recorded motion of each joint, and one HTML page with all of it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from pi0_ros.training.dataset import Dataset
from pi0_ros.training.html import document, drawn, picture, table

if TYPE_CHECKING:
    from pi0_ros.training.evaluate import Comparison

EPISODES = 3  # that the plots show
COLOURS = {"policy": "#1f4e9c", "hold": "#c8501e", "repeat": "#8a8a8a"}


def joint_plots(comparison: Comparison, dataset: Dataset, result: dict[str, Any]) -> dict[str, bytes]:
    """A PNG for each joint: on the left chunks over the recorded actions, episode after episode, on the right the
    error of every step of the chunk."""
    return {name: _joint(i, name, comparison, dataset, result) for i, name in enumerate(result["joints"])}


def _joint(i: int, name: str, comparison: Comparison, dataset: Dataset, result: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    motion, error = figure.subplots(1, 2, width_ratios=(3, 1))
    begin, dt = 0.0, result["dt"]
    for unit, episode in dataset.episodes[:EPISODES]:
        span = dataset.units[unit].episodes[episode]
        actions = dataset.units[unit].arrays["actions"][span["begin"] : span["end"], i]
        first = begin == 0.0
        times = begin + np.arange(len(actions)) * dt
        motion.plot(times, actions, color="#222", linewidth=1.4, label="recorded" if first else None)
        for n, (u, e, tick) in enumerate(comparison.where):
            if (u, e) == (unit, episode):
                length = min(result["horizon"], len(actions) - tick)
                chunk = comparison.predicted[n, 0, :length, i]
                label = "predicted" if first else None
                motion.plot(times[tick : tick + length], chunk, color="#1f4e9c", alpha=0.45, linewidth=0.8, label=label)
                first = False
        begin = times[-1] + 5 * dt if len(times) else begin
    unit = result["units"][i]
    motion.set_title(name, parse_math=False)
    motion.set(xlabel="time, s", ylabel=unit)
    handles, labels = motion.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    motion.legend(unique.values(), unique.keys(), fontsize=7)
    for kind, colour in COLOURS.items():
        steps = [np.nan if row is None else row[i] for row in result["error"][kind]["per_step"]]
        style = "--" if kind == "repeat" else "-"  # it often lies upon hold
        error.plot(np.arange(len(steps)), steps, style, color=colour, label=kind)
    error.set(xlabel="step of the chunk", ylabel=unit, title="mean absolute error")
    error.set_ylim(bottom=0)
    error.legend(fontsize=7)
    return drawn(figure)


def page(result: dict[str, Any], judgement: str, plots: dict[str, bytes]) -> str:
    """The whole page; it needs no other file."""
    head = (
        f"{result['chunks']} chunks of {result['horizon']} actions, {result['seeds']} seeds, {result['num_steps']} "
        f"denoising steps, from {result['episodes']} {result['which']}. "
        "Mean absolute error in each joint's unit, jerk in unit/s³; hold: the position at the chunk's start, repeat: "
        "the last action before it, spread: of the chunks over seeds."
    )
    rows = []
    for i, name in enumerate(result["joints"]):
        cells = [f"{result['error'][kind]['per_joint'][i]:.4f}" for kind in COLOURS]
        cells += [f"{result['spread_over_seeds'][i]:.4f}"]
        cells += [
            "-" if (jerk := result["jerk"][kind][i]) is None else f"{jerk:.1f}" for kind in ("policy", "recorded")
        ]
        rows.append([name, result["units"][i], *cells])
    shares = [f"{result['error'][kind]['share_of_range']:.3%}" for kind in COLOURS]
    rows.append(["share of the joints' ranges", "", *shares, "", "", ""])
    columns = ["joint", "unit", "policy", "hold", "repeat last", "spread over seeds", "jerk", "recorded jerk"]
    parts = [
        f"<p>{escape(head)}</p>",
        f"<p><b>{escape(judgement)}</b></p>",
        table(columns, rows),
        *(picture(png, name) for name, png in plots.items()),
    ]
    return document(f"Evaluation of {result['checkpoint']} ({result['digest']})", parts)
