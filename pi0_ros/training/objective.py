"""What one piece of a batch costs: flow matching, with a clean prefix where real-time chunking is trained in."""

from __future__ import annotations

import torch
from torch import nn

from pi0_ros.model.flow import NoiseSource, sample_time
from pi0_ros.model.pi0 import Pi0
from pi0_ros.training.batches import Batch
from pi0_ros.training.streams import Streams


def flow_loss(
    model: nn.Module,
    batch: Batch,
    streams: Streams,
    *,
    source: NoiseSource,
    draws: int = 1,
    max_delay: int = 0,
    loss_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The loss of one piece, a float32 scalar: the mean over `draws` noises and times (and delays) of each sample, for
    which the prefix is computed once. All draws are made on the CPU, so every device sees the same ones.

    `model` is called by its forward, `Pi0.compute_loss`, so that a wrapper such as DDP sees the call.
    """
    observation, actions = batch.observation, batch.actions
    trajectory = actions.repeat_interleave(draws, dim=0)  # the draws of a sample next to one another
    noise = source.start(tuple(trajectory.shape), generator=streams.noise, trajectory=trajectory)
    if loss_dims is not None:
        noise = noise.clone()
        noise[..., loss_dims:] = 0.0  # see mute_padding
    time = sample_time(len(trajectory), generator=streams.time)
    weight = None
    if max_delay:
        delay = torch.randint(0, max_delay + 1, (len(trajectory),), generator=streams.time)
        time, weight = condition_on_prefix(time, delay, actions.shape[1])
        weight = weight.to(device)
    observation, actions, noise, time = (x.to(device) for x in (observation, actions, noise, time))
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(observation, actions, noise=noise, time=time, loss_dims=loss_dims)
    loss = loss.float()
    return loss.mean() if weight is None else (loss * weight).sum(dim=1).mean()


def condition_on_prefix(time: torch.Tensor, delay: torch.Tensor, horizon: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training-time real-time chunking (arXiv 2512.05964): time [B], delay int [B] -> time [B, H] and weight [B, H].

    The first `delay` actions of a chunk are those that will have been executed before it arrives: their time is 0, so
    they go in clean, and their loss does not count. A sample's other actions share its weight of 1, so that pieces of a
    batch add up to the batch whatever delays they drew.
    """
    prefix = torch.arange(horizon, device=time.device) < delay[:, None]
    times = torch.where(prefix, 0.0, time[:, None])
    free = (~prefix).float()
    return times, free / free.sum(dim=1, keepdim=True)


@torch.no_grad()
def mute_padding(model: Pi0, dims: int) -> None:
    """Make the model deaf to the action dimensions from `dims` on, whose loss does not count.

    Nobody teaches their velocity, so in sampling they would wander off to where no training sample was, and take the
    others along. With weights of zero, and zeros on them in training, the weights never change: a gradient is the
    product of both.
    """
    model.action_in_proj.weight[:, dims:] = 0.0


def keep_float32(model: nn.Module) -> None:
    """Exempt the projections of state, actions and time, and the adaptive norms, from autocast. They are small, and
    openpi computes them in float32 as well (models/pi0.py; models_pytorch/gemma_pytorch.py)."""
    for name, module in model.named_modules():
        small = name.startswith(("action_", "state_proj", "time_mlp")) or name.endswith("norm.dense")
        if small and isinstance(module, nn.Linear):
            module.forward = _without_autocast(module.forward)


def _without_autocast(forward):  # noqa: ANN001, ANN202 - a method in, a method out
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x)

    return wrapped
