"""Whether the kernels run on this very device and give what torch's operators give: asked whenever a sampler is made.

A card, driver or Triton that nobody tried must not move an arm with other numbers than those that were tested.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pi0_ros.policy.gpu.layers import SWITCH
from pi0_ros.policy.graphs import Graphs
from pi0_ros.policy.processor import gpu_fault
from pi0_ros.wording import first_line

if TYPE_CHECKING:
    from pi0_ros.policy.sampler import Sampler

_log = logging.getLogger(__name__)
ALLOWED = 0.1  # of the actions' rms; roundings in bfloat16 make about 0.02
REPLAYS = 5


def fault(sampler: Sampler) -> str:
    """Why `sampler` must not use its kernels, or nothing. Leaves it reset.

    Draws an observation, and compares the chunk with that of torch's operators on the same weights; where graphs are
    captured, what they give is compared too, a few times. Products in float8 have no counterpart there, so their prefix
    is taken as it is and the steps alone are compared.

    Raises:
        RuntimeError: the kernels failed in a way after which this process cannot use the GPU any more.
    """
    try:
        chunks = [_chunk(sampler) for _ in range(1 + REPLAYS * sampler.graphs.enabled)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the compiler, its compiler or the driver may raise
        first = first_line(error)
        if lost := gpu_fault():
            way_out = (
                f"; {SWITCH}=0 in the environment does without the one for whole steps" if sampler.steps.layers else ""
            )
            raise RuntimeError(f"the kernels failed, and the GPU is lost to this process: {lost}{way_out}") from error
        return f"{type(error).__name__}: {first} (they are compiled with a C compiler and Python's headers)"
    used = sampler.prefix_pass, sampler.steps, sampler.graphs
    sampler.steps, sampler.graphs = None, Graphs(False)
    if not sampler.prefix_pass.float8:
        sampler.prefix_pass = None
    try:
        plain = _chunk(sampler)
    except torch.OutOfMemoryError:  # they need more than the kernels
        _log.warning("the GPU's memory is not enough to compare the kernels' actions with torch's")
        return ""
    finally:
        sampler.prefix_pass, sampler.steps, sampler.graphs = used
    errors = (torch.stack(chunks) - plain).square().mean((1, 2)).sqrt()
    difference = float(errors.amax() / plain.square().mean().sqrt())  # not a number if any is not
    if difference <= ALLOWED:
        return ""
    return f"their actions differ from torch's by {difference:.2g} of the actions' rms, {ALLOWED} is allowed"


def _chunk(sampler: Sampler) -> Tensor:
    config, generator = sampler.config, torch.Generator().manual_seed(0)
    size = (config.vision.image_size, config.vision.image_size, 3)
    images = {slot: torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for slot in sampler.cameras}
    tokens = torch.randint(1, config.vocab_size, (min(20, config.max_token_len),), generator=generator)
    state = torch.randn(config.action_dim, generator=generator)
    noise = torch.randn(config.action_horizon, config.action_dim, generator=generator)
    try:
        return sampler.sample(images, tokens, state, noise).actions
    finally:
        sampler.reset()
