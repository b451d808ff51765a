"""Several processes that train one model: who this process is, and what it agrees on with the others.

Started by torchrun, which sets the environment; without it there is one process and nothing to agree on. Weights are
copied to every device and gradients averaged (DDP), or every process keeps a slice of everything (FSDP2, sharding.py).
"""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pi0_ros.policy.processor import pick_device

PATIENCE = timedelta(hours=6)  # others wait as long while the first one decodes recordings


class OthersFailed(RuntimeError):
    """Another process cannot go on, and says why."""


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_rank` counts on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that a `--device` means for this process. PolicyError for what there is not."""
        chosen = pick_device(name, "auto")[0]
        if chosen.type == "cuda" and chosen.index is None and self.size > 1:
            return torch.device("cuda", self.local_rank)
        return chosen

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as the training loop calls it. One that is spread takes care of itself."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return model
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def quiet(self, forward: nn.Module) -> Iterator[None]:
        """Gradients of the block stay in this process; those after it carry them along."""
        if isinstance(forward, FSDPModule):
            forward.set_requires_gradient_sync(False)
            yield
            forward.set_requires_gradient_sync(True)
        elif isinstance(forward, DistributedDataParallel):
            with forward.no_sync():
                yield
        else:
            yield

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over processes, on the CPU."""
        values = values.detach().cpu()
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agreed(self, flag: bool) -> bool:
        """What the first process says."""
        if self.size == 1:
            return flag
        said = torch.tensor(int(flag))
        dist.broadcast(said, src=0)
        return bool(said)

    def same(self, number: int) -> bool:
        """Whether every process has this number."""
        if self.size == 1:
            return True
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """On each machine one process goes through the block first, then the others. OthersFailed where one failed."""
        if self.local_rank > 0:
            self._hear(fine=True)
            yield
        else:
            with self._telling():
                yield

    @contextlib.contextmanager
    def by_first(self, context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """`context` around the block in the first process. OthersFailed in the others where it cannot be entered."""
        with contextlib.ExitStack() as stack:
            with self._telling():
                if self.first:
                    stack.enter_context(context)
            yield

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Let the others know whether the block ended well."""
        fine = False
        try:
            yield
            fine = True
        finally:
            self._hear(fine)

    def _hear(self, fine: bool) -> None:
        """Every process says whether it is fine; one that is learns that another is not."""
        if self.size == 1:
            return
        failed = torch.tensor(float(not fine))
        dist.all_reduce(failed)
        if fine and failed:
            raise OthersFailed("another process cannot go on; its own error says why")


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's environment describes, for the time of the block.

    When it ends, the threads that carried messages have ended too: one that still holds a tensor then would abort
    Python's own end. They live as long as anything refers to the process group, and a spread model does, in a cycle.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size, local)
    except BaseException as error:
        while error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the model
            error = error.__context__
        raise
    finally:
        dist.destroy_process_group()
        gc.collect()
