"""The losses of a run: read now and then, since reading waits for the device, and shown."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pi0_ros.training.distributed import World

LOGGED = 10  # steps between two looks at the loss


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what may help."""


class Progress:
    """Losses of every step and of the held-out samples, (step, loss) each, and where they are shown.

    Args:
        world: whose losses are averaged; its first process shows them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.losses: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self._unread: list[tuple[torch.Tensor, torch.Tensor]] = []  # loss and gradient norm of steps not yet looked at
        self._board: SummaryWriter | None = None

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Of the step that was just taken, still on the device."""
        self._unread.append((loss, norm))

    def read(self, step: int) -> None:
        """Wait for the losses of all steps up to `step`. TrainingError where one is not finite."""
        if not self._unread:
            return
        losses, norms = (torch.stack(column) for column in zip(*self._unread, strict=True))
        first = step - len(self._unread) + 1
        self._unread.clear()
        for i, (loss, norm) in enumerate(zip(self._world.mean(losses).tolist(), norms.tolist(), strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"loss {loss} with gradient norm {norm} at step {first + i}: try a smaller --learning-rate; states "
                    f"saved before are whole"
                )
            self.losses.append((first + i, loss))

    def open(self, folder: Path, step: int) -> None:
        """Show in TensorBoard's files in `folder`, from after `step` on."""
        self._board = SummaryWriter(str(folder), purge_step=step + 1) if self._world.first else None

    def show(self, bar: tqdm, step: int, rate: float, speed: float) -> None:
        """What was read, learning rate and samples a second."""
        if self._board is None:
            return
        recent = [value for _, value in self.losses[-20 * LOGGED :]]
        self._board.add_scalar("loss/train", sum(recent[-LOGGED:]) / len(recent[-LOGGED:]), step)
        self._board.add_scalar("learning_rate", rate, step)
        self._board.add_scalar("samples_per_second", speed, step)
        held = f" held out {self.held_out[-1][1]:.4f}" if self.held_out else ""
        bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}{held} lr {rate:.1e} {speed:.0f} samples/s")

    def looked(self, step: int, loss: float) -> None:
        """The loss of the held-out samples."""
        self.held_out.append((step, loss))
        if self._board is not None:
            self._board.add_scalar("loss/held_out", loss, step)

    def close(self) -> None:
        """Write down what is shown."""
        if self._board is not None:
            self._board.close()
