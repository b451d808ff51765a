"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pi0_ros.model.files import write_bytes


def plot_losses(path: Path, train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> None:
    """Write a PNG with the training loss, raw and smoothed, and the held-out loss, over steps."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = np.array(train).T
        width = max(1, len(losses) // 50)
        smooth = np.convolve(np.pad(losses, width // 2, mode="edge"), np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8)
        axes.plot(steps, smooth[: len(steps)], color="#1f4e9c", label="training")
    if held_out:
        axes.plot(*np.array(held_out).T, color="#c8501e", marker="o", markersize=3, label="held out, averaged weights")
    axes.set(xlabel="optimizer step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if train or held_out:
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_bytes(path, png.getvalue())
