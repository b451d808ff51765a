"""Weights spread over processes (FSDP2): each keeps a slice of every tensor, and has a layer whole while it needs it.

A spread tensor is a DTensor, an ordinary one is whole. What is written to disk and read from it is whole, so a run may
go on with another number of processes, spread or not.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pi0_ros.model.pi0 import Pi0


def shard(model: Pi0, device: torch.device, processes: int) -> None:
    """Spread the model over all processes, layer by layer; what stands outside the layers makes one more piece."""
    # A layer hands its input on where only keys and values are asked of it; nothing writes into it.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (processes,))
    # DTensor's caches keep the mesh until Python ends. With it they would keep the process group, whose threads then
    # run on while Python ends, and abort it if one gives back a tensor. Only torch.compile looks for the group here.
    getattr(mesh, "_pg_registry", {}).clear()
    for layers in (model.siglip.encoder["layers"], model.vlm.layers, model.expert.layers):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    # Sliced again after each use: what stayed whole after a look at the average would be the average's weights.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's slice; the tensor itself if it is not spread. Writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """Every tensor in dicts and lists whole and on the CPU. All processes must call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().cpu()
    return tree.detach() if isinstance(tree, torch.Tensor) else tree


def like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread and placed as `target` is. Every process brings the same one, nothing is sent."""
    if not isinstance(target, DTensor):
        return tensor
    tensor = tensor.to(target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be spread."""
    local(target).copy_(local(like(tensor, target)))
