"""Vision tower and prefix pass on a GPU: cuBLAS for the products, `prefix_kernels.py` for all that stands between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.gemma import RMS_EPS
from pi0_ros.model.siglip import LAYER_NORM_EPS
from pi0_ros.policy.fused import Fused, Linear
from pi0_ros.policy.gpu.prefix_kernels import Quantised, add_norm, attend, gated, spread


class Float8Linear:
    """y = x W^T in float8 (e4m3): weights scaled by output row, x by row, sums in bfloat16. Takes what is quantised."""

    def __init__(self, linear: Linear) -> None:
        weight = linear.weight.float()
        largest = torch.finfo(torch.float8_e4m3fn).max
        self.scale = (weight.abs().amax(1, keepdim=True) / largest).clamp(min=1e-12).T.contiguous()  # [1, out]
        self.weight = (weight / self.scale.T).to(torch.float8_e4m3fn)

    def __call__(self, x: Quantised) -> Tensor:
        return torch._scaled_mm(
            x.values, self.weight.t(), scale_a=x.scale, scale_b=self.scale, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip


class PrefixPass:
    """See `encode` and `run`.

    Args:
        weights: their VLM layers are replaced by float8 ones if `float8`.
        keys, values: [depth, kv_heads, rows, head_dim]; rope: complex64 [rows, 1, head_dim / 2].
        seen: bool [..., rows], False for the prompt's padding.
    """

    def __init__(
        self, config: Pi0Config, weights: Fused, *, keys: Tensor, values: Tensor, rope: Tensor, seen: Tensor,
        float8: bool,
    ) -> None:  # fmt: skip
        self.config, self.weights, self.float8 = config, weights, float8
        self.keys, self.values, self.rope, self.seen = keys, values, rope, seen
        if float8:
            for layer in weights.vlm:
                layer.qkv = Float8Linear(layer.qkv)
                if layer.out is not None:
                    layer.out, layer.down = Float8Linear(layer.out), Float8Linear(layer.down)
                    layer.geglu.both = Float8Linear(layer.geglu.both)

    def encode(self, x: Tensor, cameras: int) -> Tensor:
        """Embedded patches [cameras * tokens, width] -> features [cameras * tokens, VLM width]."""
        vision, config, branch = self.weights.vision, self.config.vision, None
        shape = (cameras, -1, 3, config.num_heads, config.width // config.num_heads)
        for layer in vision.layers:
            x, norm = add_norm(x, branch, LAYER_NORM_EPS, centred=True)
            q, k, v = layer.qkv(norm).view(shape).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x, norm = add_norm(x, layer.out(attended), LAYER_NORM_EPS, centred=True)
            branch = layer.fc2(layer.fc1.gelu(norm))
        return vision.head(add_norm(x, branch, LAYER_NORM_EPS, centred=True)[1])

    def run(self, x: Tensor) -> None:
        """Prefix tokens [rows, width] -> keys and values of every layer. Of the last layer nothing else is needed."""
        branch, float8 = None, self.float8
        for i, layer in enumerate(self.weights.vlm):
            x, norm = add_norm(x, branch, RMS_EPS, float8=float8)
            q = spread(layer.qkv(norm), self.rope[: len(x)], self.keys[i], self.values[i])
            if layer.out is None:
                break
            attended = attend(q, self.keys[i], self.values[i], self.seen)
            if float8:
                _, attended = add_norm(attended, None, 0.0, norm=False, float8=True)
            x, norm = add_norm(x, layer.out(attended), RMS_EPS, float8=float8)
            branch = layer.down(gated(layer.geglu.both(norm), float8=float8))
