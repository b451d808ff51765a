"""A model's weights rearranged once for sampling: fused, folded, packed. The numbers stay those of `Pi0`.

What changes nothing but the time it takes:
- scales of RMS norms and LayerNorms move into the linear layer that follows (exact up to rounding);
- q, k and v are one matrix; so are gate and up where the kernels cannot fuse the product themselves;
- q carries attention's 1/sqrt(head_dim); q and k rows are interleaved so that RoPE is one complex multiplication
  (their product does not mind the order);
- pixels enter as uint8: x / 255 * 2 - 1 is folded into the patch embedding;
- on a CPU, weights are packed for oneDNN, whose epilogue takes GELU along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.model.config import GemmaConfig, Pi0Config
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.processor import has_onednn, is_intel

SMALL_PRODUCT = 25_000_000  # multiplications, 0.15 ms of two cores

_VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_VLM = "paligemma_with_expert.paligemma.model.language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."


class Linear:
    """y = x W^T + b for x [rows, in], with the epilogues that a transformer block wants.

    Packed for oneDNN where the device is a CPU; `plain` keeps the unpacked weight too, for `differentiable` use.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int, *, plain: bool = True):
        self.transposed: Tensor | None = weight.to(dtype).contiguous().t()  # [in, out]
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.packed = None
        if weight.device.type != "cpu" or not has_onednn(dtype):
            return
        if is_intel() and dtype == torch.float32 and rows * weight.numel() < SMALL_PRODUCT:
            # each call of oneDNN takes some 20 us more than MKL, which likes [in, out] best
            self.transposed = self.transposed.contiguous()
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        self.transposed = self.transposed if plain else None

    @property
    def weight(self) -> Tensor:
        """[out, in], where it is kept."""
        return self.transposed.t()

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return self.differentiable(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(x W^T + b), the tanh form that SigLIP and Gemma use."""
        if self.packed is None:
            if x.is_cuda:  # in the product's epilogue, where cuBLAS means the tanh form
                return torch._addmm_activation(self.bias, x, self.transposed, use_gelu=True)
            return F.gelu(self(x), approximate="tanh")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "gelu", [], "tanh")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """(x W^T + b) * factor."""
        return self._with("mul", x, factor) if self._fuses() else self(x).mul_(factor)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x W^T + b + residual."""
        if self.packed is None and self.bias is None:
            return torch.addmm(residual, x, self.transposed)
        return self._with("add", x, residual) if self._fuses() else self(x).add_(residual)

    def _fuses(self) -> bool:
        # oneDNN's epilogue takes longer on AMD's processors, and up to an eighth less on Intel's
        return self.packed is not None and is_intel()

    def _with(self, operation: str, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, operation)

    def differentiable(self, x: Tensor) -> Tensor:
        """The same function through operators that autograd knows."""
        return torch.mm(x, self.transposed) if self.bias is None else torch.addmm(self.bias, x, self.transposed)


class GeGLU:
    """gelu(x Wg^T) * (x Wu^T): two matrices where oneDNN fuses the product, two at once where MKL takes it, so that
    GELU finds whole rows, and one double matrix elsewhere."""

    def __init__(self, gate: Tensor, up: Tensor, dtype: torch.dtype, rows: int, *, plain: bool):
        self.width = gate.shape[0]
        self.gate: Linear | None = Linear(gate, None, dtype, rows, plain=plain)
        self.up: Linear | None = Linear(up, None, dtype, rows, plain=plain)
        self.both: Linear | None = None
        self.pair: Tensor | None = None  # [2, in, width]
        if self.gate.packed is not None:
            return
        if self.gate.transposed.is_contiguous():
            self.pair = torch.stack([self.gate.transposed, self.up.transposed])
        else:
            self.both = Linear(torch.cat([self.gate.weight, self.up.weight]), None, dtype, rows)
        self.gate = self.up = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.up.times(x, self.gate.gelu(x))
        gate, up = self._products(x)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def differentiable(self, x: Tensor) -> Tensor:
        """The same function through operators that autograd knows."""
        gate, up = self._products(x)
        return F.gelu(gate, approximate="tanh") * up

    def _products(self, x: Tensor) -> Sequence[Tensor]:
        if self.both is not None:
            return self.both(x).split(self.width, dim=-1)
        if self.pair is not None:
            return torch.bmm(x.expand(2, -1, -1), self.pair).unbind()
        return self.gate.differentiable(x), self.up.differentiable(x)


@dataclass
class VisionLayer:
    """One SigLIP block; LayerNorm scales and shifts are in `qkv` and `fc1`."""

    qkv: Linear
    out: Linear
    fc1: Linear
    fc2: Linear


@dataclass
class Vision:
    """The vision tower and its projection to the width of the VLM."""

    patch: Linear  # f32 [14*14*3 -> width], for pixels 0..255 in (row, column, channel) order
    position: Tensor  # f32 [tokens, width], the patch embedding's bias included
    layers: list[VisionLayer]
    head: Linear


@dataclass
class GemmaLayer:
    """One Gemma block; the scales of plain RMS norms are in `qkv` and `geglu`. The last VLM layer has only `qkv`."""

    qkv: Linear  # [width -> (heads + 2 kv_heads) * head_dim]; only k and v in the last VLM layer
    out: Linear | None = None
    geglu: GeGLU | None = None
    down: Linear | None = None


@dataclass
class Fused:
    """Everything that sampling reads. Embeddings and the small action, state and time projections stay float32."""

    vision: Vision
    embedding: Tensor  # [vocabulary, width], scaled by sqrt(width) when it is looked up
    vlm: list[GemmaLayer]
    expert: list[GemmaLayer]
    action_in: Tensor  # [width, action_dim]: pi0: action_in_proj folded into action_time_mlp_in
    action_mlp_out: tuple[Tensor, Tensor] | None  # pi0 only
    action_out: tuple[Tensor, Tensor]  # pi0: the final norm's scale folded in
    state: tuple[Tensor, Tensor] | None  # pi0 only
    time: dict[str, Tensor]  # what the time tables are made of, see tables.time_tables


@torch.no_grad()
def fuse(model: Pi0, dtype: torch.dtype, device: torch.device, prefix_rows: int) -> Fused:
    """The weights of `model` rearranged for sampling in `dtype` on `device`. `prefix_rows`: usual prefix length."""
    config = model.config
    weights = {key: value.detach() for key, value in model.state_dict().items()}

    def get(key: str) -> Tensor:
        return weights[key].to(device=device, dtype=torch.float32)

    def linear(key: str, rows: int, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Linear:
        weight, bias = get(key + ".weight"), get(key + ".bias") if key + ".bias" in weights else None
        return Linear(*_fold(weight, bias, scale, shift), dtype, rows, plain=False)

    fused = Fused(
        vision=_vision(config, get, linear, dtype),
        embedding=weights[_VLM + "embed_tokens.weight"].to(device=device),
        vlm=_gemma(config.vlm, _VLM, get, dtype, prefix_rows, adaptive=False, only_kv_last=True),
        expert=_gemma(config.expert, _EXPERT, get, dtype, config.action_horizon, adaptive=config.pi05),
        action_in=get("action_in_proj.weight"),
        action_mlp_out=None,
        action_out=(get("action_out_proj.weight"), get("action_out_proj.bias")),
        state=None,
        time={},
    )
    if config.pi05:
        for name in ("time_mlp_in.weight", "time_mlp_in.bias", "time_mlp_out.weight", "time_mlp_out.bias"):
            fused.time[name] = get(name)
        norms = [
            f"layers.{i}.{norm}"
            for i in range(config.expert.depth)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ] + ["norm"]
        fused.time["modulation.weight"] = torch.stack([get(f"{_EXPERT}{norm}.dense.weight") for norm in norms])
        fused.time["modulation.bias"] = torch.stack([get(f"{_EXPERT}{norm}.dense.bias") for norm in norms])
        fused.time["action_in.bias"] = get("action_in_proj.bias")
    else:
        # mlp_in [action | time] splits into two matrices; the first meets action_in_proj, which is linear too.
        width = config.expert.width
        of_action, of_time = get("action_time_mlp_in.weight").split(width, dim=1)
        fused.action_in = of_action @ fused.action_in
        fused.time["mlp_in.weight"] = of_time
        fused.time["mlp_in.bias"] = get("action_time_mlp_in.bias") + of_action @ get("action_in_proj.bias")
        fused.action_mlp_out = (get("action_time_mlp_out.weight"), get("action_time_mlp_out.bias"))
        fused.state = (get("state_proj.weight"), get("state_proj.bias"))
        weight, bias = fused.action_out
        fused.action_out = (weight * (1 + get(_EXPERT + "norm.weight")), bias)
    return fused


def _fold(weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None):
    # W (n * scale + shift) + b = (W * scale) n + (W shift + b)
    if shift is not None:
        bias = bias + weight @ shift  # whatever has a shift before it has a bias
    return (weight if scale is None else weight * scale), bias


def _vision(config: Pi0Config, get, linear, dtype: torch.dtype) -> Vision:
    vision, rows = config.vision, len(config.cameras) * config.vision.num_tokens
    patch = get(_VISION + "embeddings.patch_embedding.weight")  # [width, 3, p, p]
    patch = patch.permute(0, 2, 3, 1).reshape(vision.width, -1)  # [width, p*p*3]
    bias = get(_VISION + "embeddings.patch_embedding.bias") - patch.sum(1)
    layers = []
    for i in range(vision.depth):
        at = f"{_VISION}encoder.layers.{i}."
        scale, shift = get(at + "layer_norm1.weight"), get(at + "layer_norm1.bias")
        weight = torch.cat([get(f"{at}self_attn.{part}_proj.weight") for part in "qkv"])
        qkv_bias = torch.cat([get(f"{at}self_attn.{part}_proj.bias") for part in "qkv"])
        layers.append(
            VisionLayer(
                qkv=Linear(*_fold(weight, qkv_bias, scale, shift), dtype, rows, plain=False),
                out=linear(at + "self_attn.out_proj", rows),
                fc1=linear(
                    at + "mlp.fc1", rows, scale=get(at + "layer_norm2.weight"), shift=get(at + "layer_norm2.bias")
                ),
                fc2=linear(at + "mlp.fc2", rows),
            )
        )
    norm = _VISION + "post_layernorm"
    return Vision(
        patch=Linear(patch * (2 / 255), None, torch.float32, rows, plain=False),
        position=get(_VISION + "embeddings.position_embedding.weight") + bias,
        layers=layers,
        head=linear(_PROJECTOR, rows, scale=get(norm + ".weight"), shift=get(norm + ".bias")),
    )


def _gemma(
    gemma: GemmaConfig, prefix: str, get, dtype: torch.dtype, rows: int, *, adaptive: bool, only_kv_last: bool = False
) -> list[GemmaLayer]:
    layers = []
    for i in range(gemma.depth):
        at, last = f"{prefix}layers.{i}.", only_kv_last and i == gemma.depth - 1
        scale = None if adaptive else 1 + get(at + "input_layernorm.weight")
        q, k, v = (get(f"{at}self_attn.{part}_proj.weight") for part in "qkv")
        k = _interleave(k, gemma.head_dim)
        parts = [k, v] if last else [_interleave(q, gemma.head_dim) * gemma.head_dim**-0.5, k, v]
        # only the expert's weights are kept unpacked: guided real-time chunking differentiates through it alone
        keep = not only_kv_last
        qkv = Linear(*_fold(torch.cat(parts), None, scale, None), dtype, rows, plain=keep)
        if last:
            layers.append(GemmaLayer(qkv))
            continue
        scale = 1.0 if adaptive else 1 + get(at + "post_attention_layernorm.weight")
        gate, up = (get(f"{at}mlp.{part}_proj.weight") * scale for part in ("gate", "up"))
        out = Linear(get(at + "self_attn.o_proj.weight"), None, dtype, rows, plain=keep)
        down = Linear(get(at + "mlp.down_proj.weight"), None, dtype, rows, plain=keep)
        layers.append(GemmaLayer(qkv, out, GeGLU(gate, up, dtype, rows, plain=keep), down))
    return layers


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    # RoPE pairs row i with row i + head_dim/2 of each head; side by side they are one complex number
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))  # [heads, 2, D/2, in]
    return heads.transpose(1, 2).reshape(weight.shape)
