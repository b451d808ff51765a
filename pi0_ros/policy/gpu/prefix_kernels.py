"""Triton kernels for the hundreds of rows of the prefix, between products that cuBLAS does well.

Residual, norm and, for float8, quantisation are one pass over a row; so are RoPE and the way into the cache, and GeGLU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pi0_ros.policy.gpu.step_kernels import _angles, _attention, _gelu, _merge, _place

LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)


@dataclass(frozen=True)
class Quantised:
    """float8 [rows, width] and what each row is to be multiplied with, f32 [rows, 1]."""

    values: Tensor
    scale: Tensor


@triton.jit
def _keep(y, out, scale, row, at, inside, FLOAT8: tl.constexpr):
    """A row into `out`, in float8 with the row's scale."""
    if FLOAT8:
        factor = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-12) / LARGEST
        tl.store(scale + row, factor)
        y /= factor
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(
    x, branch, summed, out, scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = column < WIDTH, row * WIDTH + column
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = (y + tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + at, total, mask=inside)
        y = total.to(tl.float32)
    if CENTRED:
        y = tl.where(inside, y - tl.sum(y, axis=0) / WIDTH, 0.0)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, axis=0) / WIDTH + eps)
    _keep(y, out, scale, row, at, inside, FLOAT8)


@triton.jit(do_not_specialize=["rows", "capacity"])
def _spread(
    qkv, rope, q, keys, values, rows, capacity,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * DIM
    row = tl.program_id(1) * M + tl.arange(0, M)
    live = row < rows
    cell = row[:, None] * ((HEADS + 2 * KV) * DIM) + first + tl.arange(0, DIM)[None, :]
    y = tl.load(qkv + cell, mask=live[:, None], other=0.0).to(tl.float32)
    cosine, sine = _angles(rope, row, live, 0, DIM, DIM)
    _place(y, cosine, sine, q, keys, values, row, live, first, 0, capacity, HEADS, KV, DIM, M, DIM)


@triton.jit
def _gated(both, out, scale, MLP: tl.constexpr, N: tl.constexpr, FLOAT8: tl.constexpr):
    row, column = tl.program_id(1), tl.program_id(0) * N + tl.arange(0, N)
    inside, at = column < MLP, both + row * (2 * MLP) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + MLP, mask=inside, other=0.0).to(tl.float32)
    _keep(_gelu(gate) * up, out, scale, row, row * MLP + column, inside, FLOAT8)


def add_norm(
    x: Tensor, branch: Tensor | None, eps: float, *, norm: bool = True, centred: bool = False, float8: bool = False
) -> tuple[Tensor, Tensor | Quantised]:
    """[rows, width]: x + branch (x where that is None), and its RMS norm, or LayerNorm if `centred`, without scale."""
    rows, width = x.shape
    summed = x if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn) if float8 else torch.empty_like(x)
    scale = torch.empty(rows if float8 else 0, 1, dtype=torch.float32, device=x.device)
    _add_norm[(rows,)](
        x, branch, summed, out, scale, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width),
        ADD=branch is not None, NORM=norm, CENTRED=centred, FLOAT8=float8,
    )  # fmt: skip
    return summed, Quantised(out, scale) if float8 else out


def spread(qkv: Tensor, rope: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """RoPE of qkv [rows, (heads + 2 kv) * dim]; keys and values into the first rows of a layer's cache; returns q.

    keys, values: [kv, capacity, dim]; rope: complex64 [rows, 1, dim / 2]; q: [rows, heads * dim], heads may be 0.
    """
    (kv, capacity, dim), rows = keys.shape, len(qkv)
    heads = qkv.shape[1] // dim - 2 * kv
    q = qkv.new_empty(rows, heads * dim)
    m = 2  # rows of a program: more of them take longer
    _spread[(heads + 2 * kv, triton.cdiv(rows, m))](
        qkv, torch.view_as_real(rope), q, keys, values, rows, capacity, HEADS=heads, KV=kv, DIM=dim, M=m
    )
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T) v over as many rows of a layer's cache as q has, of which `seen` says which are valid.

    q [rows, heads * dim], already scaled; keys, values [kv, capacity, dim]. Returns [rows, heads * dim].
    """
    (kv, capacity, dim), rows, splits = keys.shape, len(q), 2  # two programs on each of an H100's multiprocessors
    heads, out = q.shape[1] // dim, torch.empty_like(q)
    queries = rows * (heads // kv)
    blocks = triton.cdiv(queries, 64)
    partial = q.new_empty(kv * blocks * splits * 64, dim)
    weight = torch.empty(len(partial), 2, dtype=torch.float32, device=q.device)
    sizes = dict(HEADS=heads, KV=kv, DIM=dim, SPLITS=splits, PDL=False)
    _attention[(blocks, splits, kv)](
        q, keys, values, seen, out, partial, weight, rows, rows, capacity, 0, 0,
        **sizes, SPAN=triton.cdiv(rows, 32 * splits) * 32, M=64, N=32, num_stages=2,
    )  # fmt: skip
    _merge[(triton.cdiv(queries, 8), kv)](partial, weight, out, rows, blocks, **sizes, LANES=64, M=8)
    return out


def gated(both: Tensor, *, float8: bool = False) -> Tensor | Quantised:
    """gelu(gate) * up of [gate | up], [rows, 2 * mlp] -> [rows, mlp]."""
    rows, mlp = both.shape[0], both.shape[1] // 2
    scale = both.new_empty(rows if float8 else 0, 1, dtype=torch.float32)
    out = both.new_empty(rows, mlp, dtype=torch.float8_e4m3fn if float8 else both.dtype)
    if float8:  # the scale needs a whole row
        _gated[(1, rows)](both, out, scale, MLP=mlp, N=triton.next_power_of_2(mlp), FLOAT8=True, num_warps=16)
        return Quantised(out, scale)
    _gated[(triton.cdiv(mlp, 1024), rows)](both, out, scale, MLP=mlp, N=1024, FLOAT8=False)
    return out
