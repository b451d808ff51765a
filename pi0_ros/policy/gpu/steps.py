"""The denoising steps on a GPU, with every buffer allocated once.

The action expert goes over `step_kernels.py`, or, where it can be, over the one kernel of `layers.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pi0_ros.model.config import Pi0Config
from pi0_ros.policy.fused import Fused
from pi0_ros.policy.gpu import layers
from pi0_ros.policy.gpu import step_kernels as kernels
from pi0_ros.wording import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiles:
    """A kernel's tiles, found by measuring pi0 on an H100; what does not divide a model's width is cut down.

    Compiled for GPUs with 99 KB of shared memory, none takes more than 98.
    """

    columns: int
    inner: int = 128
    splits: int = 1
    stages: int = 4


PROJECT = Tiles(32, inner=64, stages=8)
GEGLU = Tiles(32)
ATTENDED = Tiles(32, splits=4)
DOWN = Tiles(32, splits=4, stages=5)
EMBED = Tiles(32, inner=64)
MOVE = Tiles(32, stages=2)
QUERIES = 32  # rows of attention's tile
KEYS = 64  # of one of its splits
MERGED = 2  # rows that one program merges


@dataclass(frozen=True)
class _Rows:
    """The suffix tokens that a step goes over: `count` from `first` on; the suffix begins at row `at` of the cache."""

    step: int
    first: int
    count: int
    at: int
    with_state: bool


class DenoisingSteps:
    """Euler steps in place over a sampler's buffers.

    Args:
        x: f32 [horizon, action_dim]; free: f32 [horizon, 1], 0 for frozen actions.
        keys, values: [depth, kv_heads, rows, head_dim], [prefix | state | actions].
        rope: complex64 [suffix, 1, head_dim / 2] of the suffix's positions.
        seen: bool [..., rows], False for the prompt's padding.
        early: launch each kernel while the one before ends (Hopper and later).
    """

    def __init__(
        self, config: Pi0Config, weights: Fused, time_bias: Tensor, modulation: Tensor | None, num_steps: int,
        *, x: Tensor, free: Tensor, keys: Tensor, values: Tensor, rope: Tensor, seen: Tensor, early: bool,
    ) -> None:  # fmt: skip
        self.config, self.weights, self.num_steps, self.early = config, weights, num_steps, early
        self.time_bias, self.modulation = time_bias.contiguous(), modulation
        self.x, self.free, self.keys, self.values, self.seen = x, free, keys, values, seen
        self.rope = torch.view_as_real(rope)
        expert, rows, device, dtype = config.expert, config.suffix_len, x.device, keys.dtype
        inner = expert.num_heads * expert.head_dim
        self.lead = 0 if config.pi05 else 1  # the state token
        self.capacity = kernels.ROWS * _blocks(rows)
        self.tokens = torch.zeros(rows, expert.width, dtype=dtype, device=device)  # the residual stream
        self.scaled = self.tokens if modulation is None else torch.zeros_like(self.tokens)
        self.squares = torch.zeros(expert.width // 16, self.capacity, device=device)
        self.q, self.attended = (torch.zeros(rows, inner, dtype=dtype, device=device) for _ in range(2))
        self.lifted = torch.zeros(config.action_horizon, expert.width, device=device)  # f32, inside the action-time MLP
        self.hidden = torch.zeros(rows, expert.mlp_dim, dtype=dtype, device=device)
        self.when = torch.zeros(num_steps, config.action_horizon, dtype=torch.int32, device=device)
        self.clock = torch.arange(num_steps, dtype=torch.int32, device=device)[:, None]
        group = expert.num_heads // expert.num_kv_heads
        self.query_blocks = triton.cdiv(rows * group, QUERIES)
        lanes = expert.num_kv_heads * self.query_blocks * triton.cdiv(keys.shape[2], KEYS) * QUERIES
        self.attended_parts = torch.zeros(lanes, expert.head_dim, dtype=dtype, device=device)
        self.lane_weights = torch.zeros(lanes, 2, device=device)
        self.parts = torch.zeros(max(ATTENDED.splits, DOWN.splits), rows, expert.width, device=device)
        self.arrived = torch.zeros(expert.width // 16 * _blocks(rows), dtype=torch.int32, device=device)
        self.table_stride = 0 if modulation is None else modulation.stride(0)
        self._fold_shifts()
        self.layers = self._all_layers()

    def _all_layers(self) -> layers.ExpertLayers | None:
        """The layers as one kernel over the same buffers, where it can be."""
        try:
            kernel = layers.kernel_for(self.config, self.x.device)
            return None if kernel is None else self._over_buffers(kernel)
        except Exception as error:  # noqa: BLE001 - whatever NVIDIA's libraries raise where they are not as they should be
            _log.warning("the kernel for whole denoising steps is not used, others are: %s", first_line(error))
            return None

    def _over_buffers(self, kernel: layers.Kernel) -> layers.ExpertLayers:
        # pi0 has no tables of time, and they are not read
        modulation = self.out_bias if self.modulation is None else self.modulation.contiguous()
        return layers.ExpertLayers(
            kernel, self.config, self.weights, self.num_steps + 1, tiles=self.config.expert.width // EMBED.columns,
            buffers=dict(
                tokens=self.tokens, scaled=self.scaled, squares=self.squares, q=self.q, keys=self.keys,
                values=self.values, mixed=self.attended, gated=self.hidden, rope=self.rope, seen=self.seen,
                when=self.when, qkv_bias=self.qkv_bias, geglu_bias=self.geglu_bias, modulation=modulation,
            ),
        )  # fmt: skip

    def _fold_shifts(self) -> None:
        """(norm * scale + shift) W = (norm * scale) W + shift W: the second is a bias, a row for every time."""
        expert, out = self.config.expert, self.weights.action_out
        if self.modulation is None:
            self.out_bias = out[1].expand(self.num_steps + 1, -1).contiguous()
            self.qkv_bias = self.geglu_bias = self.out_bias.expand(expert.depth, -1, -1)  # not read
            return
        shift = self.modulation[:, :, 1, 0].float()  # [steps + 1, 2 * depth + 1, width]
        experts = self.weights.expert
        qkv = [shift[:, 2 * i] @ layer.qkv.weight.float().T for i, layer in enumerate(experts)]
        geglu = [shift[:, 2 * i + 1] @ layer.geglu.both.weight.float().T for i, layer in enumerate(experts)]
        self.qkv_bias, self.geglu_bias = torch.stack(qkv), torch.stack(geglu)  # [depth, times, columns]
        self.out_bias = F.linear(shift[:, -1], *out).contiguous()

    def begin(self) -> None:
        """What holds for all steps of a chunk: which time each action is at in each of them."""
        self.when.copy_(torch.where(self.free[:, 0] > 0, self.clock, self.num_steps))

    def step(self, k: int, prefix_rows: int, state: Tensor) -> None:
        """The k-th step. The first one makes the keys and values of pi0's `state`, f32 [1, action_dim], in passing."""
        tiles = self._embed(k, state)
        with_state = self.lead > 0 and k == 0
        rows = _Rows(k, self.lead - with_state, self.config.action_horizon + with_state, prefix_rows, with_state)
        if self.layers is not None:
            self.layers.run(self.when[k], rows.first, rows.count, prefix_rows, with_state=with_state)
            self._move(k, self.layers.kernel.clusters)
            return
        for i, layer in enumerate(self.weights.expert):
            self._project(i, rows, tiles)
            self._attention(i, rows)
            tiles = self._add_product(layer.out.weight, self.attended, ATTENDED, 2 * i, rows)
            self._geglu(i, rows, tiles)
            tiles = self._add_product(layer.down.weight, self.hidden, DOWN, 2 * i + 1, rows)
        self._move(k, tiles)

    def _project(self, i: int, rows: _Rows, tiles: int) -> None:
        expert, k = self.config.expert, rows.step
        dim, tile = expert.head_dim, _fit(PROJECT, expert.head_dim, expert.width)
        width = (expert.num_heads + 2 * expert.num_kv_heads) * dim
        self._launch(
            kernels._project, (width // tile.columns, _blocks(rows.count)), tile,
            self.scaled[rows.first :], self.squares[:, rows.first :], self.weights.expert[i].qkv.weight,
            self.qkv_bias[i], self.when[k], self.rope[rows.first :], self.q, self.keys[i], self.values[i],
            rows.count, rows.at + rows.first, self.keys.shape[2],
            WIDTH=expert.width, HEADS=expert.num_heads, KV=expert.num_kv_heads, DIM=dim, ADAPTIVE=self.config.pi05,
            CAPACITY=self.capacity, TILES=tiles, N=tile.columns, BK=tile.inner,
        )  # fmt: skip

    def _attention(self, i: int, rows: _Rows) -> None:
        expert, kv = self.config.expert, self.config.expert.num_kv_heads
        count = rows.at + self.config.suffix_len
        splits = triton.cdiv(count, KEYS)
        sizes = dict(HEADS=expert.num_heads, KV=kv, DIM=expert.head_dim, SPLITS=splits)
        self._launch(
            kernels._attention, (self.query_blocks, splits, kv), Tiles(KEYS, stages=1),
            self.q, self.keys[i], self.values[i], self.seen, self.attended, self.attended_parts, self.lane_weights,
            rows.count, count, self.keys.shape[2], int(rows.with_state), rows.at + 1,
            **sizes, SPAN=KEYS, M=QUERIES, N=KEYS,
        )  # fmt: skip
        if splits > 1:
            self._launch(
                kernels._merge, (triton.cdiv(rows.count * expert.num_heads // kv, MERGED), kv), Tiles(1),
                self.attended_parts, self.lane_weights, self.attended, rows.count, self.query_blocks,
                **sizes, LANES=QUERIES, M=MERGED,
            )  # fmt: skip

    def _add_product(self, weight: Tensor, a: Tensor, tile: Tiles, norm: int, rows: _Rows) -> int:
        width, inner = weight.shape
        tile = _fit(tile, width, inner)
        self._launch(
            kernels._add_product, (width // tile.columns, tile.splits, _blocks(rows.count)), tile,
            a, weight, self.tokens[rows.first :], self.scaled[rows.first :], self._table(norm, 2),
            self._table(norm + 1, 0), self.when[rows.step], self.squares[:, rows.first :], self.parts, self.arrived,
            rows.count, self.table_stride,
            K=inner, WIDTH=width, ADAPTIVE=self.config.pi05, CAPACITY=self.capacity, SPLITS=tile.splits,
            N=tile.columns, BK=tile.inner,
        )  # fmt: skip
        return width // tile.columns

    def _geglu(self, i: int, rows: _Rows, tiles: int) -> None:
        expert = self.config.expert
        tile = _fit(GEGLU, expert.mlp_dim, expert.width)
        self._launch(
            kernels._geglu, (expert.mlp_dim // tile.columns, _blocks(rows.count)), tile,
            self.scaled[rows.first :], self.squares[:, rows.first :], self.weights.expert[i].geglu.both.weight,
            self.geglu_bias[i], self.when[rows.step], self.hidden, rows.count,
            WIDTH=expert.width, MLP=expert.mlp_dim, ADAPTIVE=self.config.pi05, CAPACITY=self.capacity, TILES=tiles,
            N=tile.columns, BK=tile.inner,
        )  # fmt: skip

    def _embed(self, k: int, state: Tensor) -> int:
        config, width = self.config, self.config.expert.width
        blocks, tile, none = _blocks(config.action_horizon), _fit(EMBED, width, width), (self.out_bias, self.out_bias)
        into = self.x, self.weights.action_in, self.time_bias, self.when[k]
        sizes = dict(ACTION=config.action_dim, PADDED=_padded(config.action_dim), WIDTH=width, N=tile.columns)
        if not config.pi05:
            lift = kernels._lift, (width // tile.columns, blocks), tile
            self._launch(*lift, *into, self.lifted, config.action_horizon, **sizes)
        self._launch(
            kernels._embed, (width // tile.columns, blocks), tile,
            *into, self.lifted, *(self.weights.action_mlp_out or none), state, *(self.weights.state or none),
            self.tokens[self.lead :], self.scaled[self.lead :], self._table(0, 0), self.squares[:, self.lead :],
            config.action_horizon, self.table_stride,
            **sizes, ADAPTIVE=config.pi05, CAPACITY=self.capacity, BK=tile.inner,
        )  # fmt: skip
        return width // tile.columns

    def _move(self, k: int, tiles: int) -> None:
        config, width = self.config, self.config.expert.width
        tile = _fit(MOVE, width, width)
        self._launch(
            kernels._move, (triton.cdiv(config.action_horizon, 16),), tile,
            self.scaled[self.lead :], self.squares[:, self.lead :], self.weights.action_out[0], self.out_bias,
            self.when[k], self.free, self.x, config.action_horizon, 1.0 / self.num_steps,
            ACTION=config.action_dim, PADDED=_padded(config.action_dim), WIDTH=width, CAPACITY=self.capacity,
            TILES=tiles, M=16, BK=tile.inner,
        )  # fmt: skip

    def _table(self, norm: int, part: int) -> Tensor:
        """A norm's scales or gates (part 0, 2) for every time; anything for pi0, where they are not read."""
        return self.out_bias if self.modulation is None else self.modulation[:, norm, part]

    def _launch(self, kernel, grid: tuple[int, ...], tile: Tiles, *arguments, **sizes) -> None:
        sizes.setdefault("M", kernels.ROWS)
        launch = {"launch_pdl": True} if self.early else {}
        kernel[grid](*arguments, **sizes, PDL=self.early, num_warps=4, num_stages=tile.stages, **launch)


def _blocks(rows: int) -> int:
    return triton.cdiv(rows, kernels.ROWS)


def _padded(action_dim: int) -> int:
    return max(16, triton.next_power_of_2(action_dim))  # a matrix unit takes no less


def _fit(tile: Tiles, outer: int, inner: int) -> Tiles:
    """The tile for a matrix [outer, inner], both multiples of 16: sizes that divide it."""
    splits = gcd(tile.splits, inner // 16)
    return replace(tile, columns=gcd(tile.columns, outer), inner=gcd(tile.inner, inner // splits), splits=splits)
