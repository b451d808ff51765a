"""The hot path: newest frames, prompt and state to an action chunk, batch 1, fixed shapes, the same weights for hours.

    frames -> vision tower -> features ─┐
    prompt -> embedding ────────────────┴─> prefix pass -> keys and values ─┐
    state  -> state token (pi0) -> its keys and values ─────────────────────┤
    noise  -> num_steps x action expert <───────────────────────────────────┘ -> actions

Each arrow runs only when what stands left of it is new. Cameras the robot lacks and the prompt's padding are left
out altogether, with positions counted as if they had been masked; graphs keep some of the padding, masked, to be of few
shapes. All prefix tokens see one another and the suffix sees everything that is valid, so attention needs no other
mask. Keys and values are written into buffers allocated once: [prefix | state | actions], so that no step concatenates
or copies the prefix.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pi0_ros.model.pi0 import Pi0, denoising_times
from pi0_ros.model.siglip import LAYER_NORM_EPS
from pi0_ros.policy import gpu
from pi0_ros.policy.fused import fuse
from pi0_ros.policy.graphs import Graphs
from pi0_ros.policy.guided import Guidance, denoise_guided
from pi0_ros.policy.images import resize_on_device
from pi0_ros.policy.spans import Memory, Span
from pi0_ros.policy.stages import Stages
from pi0_ros.policy.tables import rope_table, time_tables

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One chunk in model space, f32 [horizon, action_dim] on the CPU, and how it came about (latency in seconds)."""

    actions: Tensor
    prefix_reused: bool
    cameras_encoded: int
    latency: dict[str, float]


class Sampler:
    """Samples action chunks from a `Pi0` with everything that stays the same computed once.

    Args:
        model: its weights are copied, rearranged; it may be deleted afterwards.
        cameras: the slots the robot has, a subset of `model.config.cameras`.
        num_steps: Euler steps.
        dtype: of weights and activations; x_t, norms, RoPE and the small projections stay float32. float8_e4m3fn: the
            VLM's products in that, all else in bfloat16, on GPUs that have it.
        graphs: capture CUDA graphs (default: on a CUDA device).

    Raises:
        ValueError: a camera that the model lacks, or float8 where it cannot be.
    """

    def __init__(
        self,
        model: Pi0,
        *,
        cameras: Sequence[str] | None = None,
        num_steps: int = 10,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        graphs: bool | None = None,
    ) -> None:
        config = self.config = model.config
        self.cameras = tuple(slot for slot in config.cameras if cameras is None or slot in cameras)
        if not self.cameras or (cameras is not None and set(cameras) - set(config.cameras)):
            raise ValueError(f"cameras {list(cameras or ())} must be some of the model's: {list(config.cameras)}")
        float8 = dtype == torch.float8_e4m3fn
        dtype = torch.bfloat16 if float8 else dtype
        self.num_steps, self.dtype, self.device = num_steps, dtype, torch.device(device)
        self.image_rows = len(self.cameras) * config.vision.num_tokens
        max_prefix = self.image_rows + config.max_token_len
        self.weights = fuse(model, dtype, self.device, max_prefix)
        self.times = denoising_times(num_steps)
        self.time_bias, self.modulation = time_tables(self.weights, model.config, self.times, dtype)
        self.weights.time.clear()  # the adaptive norms' maps alone are half a GB in pi0.5, and the tables replace them
        self.graphs = Graphs(self.device.type == "cuda" if graphs is None else graphs)
        # Graphs are of one shape each, so the prompt is padded to a few lengths: pi0's to its 48 tokens.
        self.prompt_multiple = 48 if self.graphs.enabled else 1

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        size, suffix = config.vision.image_size, config.suffix_len
        vlm = config.vlm
        self.pixels = buffer(len(self.cameras), size, size, 3, dtype=torch.uint8)
        self._pinned: dict[int, Tensor] = {}  # camera -> frames on their way to a GPU
        self.prefix = buffer(max_prefix, vlm.width, dtype=dtype)  # [features of each camera | prompt]
        self.memory = Memory.allocate(config, max_prefix, dtype, self.device)
        self.keys, self.values = self.memory.keys, self.memory.values
        horizon, dims = config.action_horizon, config.action_dim
        self.inputs = buffer(horizon * dims + dims + horizon)  # what comes with every chunk, in one copy
        cuda = self.device.type == "cuda"
        self._host = torch.zeros_like(self.inputs, device="cpu", pin_memory=True) if cuda else self.inputs
        self._ids = torch.zeros(config.max_token_len, dtype=torch.int64, pin_memory=cuda)  # of the prompt's tokens
        self.x, self.state, self.free = self._split_inputs(self.inputs)
        self.rope = rope_table(max_prefix + suffix, vlm.head_dim, self.device)
        self.suffix_rope = self.rope[:suffix].clone()
        self.valid = buffer(1, 1, 1, max_prefix + suffix, dtype=torch.bool)
        self.prefix_pass = self.steps = None
        kernels = gpu.usable(config, self.device, dtype)
        if float8 and not (kernels and gpu.has_float8(self.device)):
            raise ValueError(f"float8 is for GPUs that have it, and for sizes like pi0's; this is {self.device}")
        self.reset()
        if kernels:
            self._take_kernels(float8)

    def _take_kernels(self, float8: bool) -> None:
        from pi0_ros.policy.gpu.prefix import PrefixPass  # Triton comes with torch for CUDA only
        from pi0_ros.policy.gpu.proof import fault
        from pi0_ros.policy.gpu.steps import DenoisingSteps

        cache = {"keys": self.keys, "values": self.values, "seen": self.valid}
        self.prefix_pass = PrefixPass(self.config, self.weights, **cache, rope=self.rope, float8=float8)
        self.steps = DenoisingSteps(
            self.config, self.weights, self.time_bias, self.modulation, self.num_steps,
            **cache, rope=self.suffix_rope, x=self.x, free=self.free, early=gpu.launches_early(self.device),
        )  # fmt: skip
        reason = fault(self)
        if reason and self.steps.layers is not None:
            _log.warning("the kernel for whole denoising steps is not used, others are: %s", reason)
            self.steps.layers, self.graphs = None, Graphs(self.graphs.enabled)
            reason = fault(self)
        if reason:
            if float8:
                raise ValueError(f"float8 cannot be, its kernels fail here: {reason}")
            _log.warning("the GPU's kernels are not used, so a chunk takes about twice as long: %s", reason)
            self.prefix_pass = self.steps = None
            self.graphs = Graphs(self.graphs.enabled)

    def capture(self, *, frozen: bool = False) -> None:
        """Capture every graph that a chunk may need: sets of new cameras, lengths of the prompt, `frozen` actions."""
        size, longest = self.config.vision.image_size, self.config.max_token_len
        images = dict.fromkeys(self.cameras, np.zeros((size, size, 3), np.uint8))
        tokens, frames = np.ones(longest, np.int64), dict.fromkeys(self.cameras, -1)
        state, start = torch.zeros(self.config.action_dim), torch.zeros(self.x.shape)
        self.reset()
        sets = [new for n in range(len(frames), 0, -1) for new in itertools.combinations(self.cameras, n)]
        for number, new in enumerate(sets):
            frames |= dict.fromkeys(new, number)
            self.sample(images, tokens, state, start, frames=frames)
        for length in range(self.prompt_multiple, longest + self.prompt_multiple, self.prompt_multiple):
            for actions in (None, start[:1])[: 1 + frozen]:
                self.sample(images, tokens[:length], state, start, frames=frames, frozen=actions)
        self.reset()

    def reset(self) -> None:
        """Forget frames, prompt and prefix; the next chunk is computed from scratch."""
        self._frames: dict[str, Hashable] = {}
        self._tokens: bytes | None = None
        self.prefix_rows = self._prompt_rows = 0

    @torch.no_grad()
    def sample(
        self,
        images: Mapping[str, np.ndarray | Tensor],
        tokens: np.ndarray | Tensor,
        state: np.ndarray | Tensor,
        noise: Tensor,
        *,
        frames: Mapping[str, Hashable] | None = None,
        frozen: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Sample:
        """One action chunk.

        Args:
            images: slot -> uint8 RGB for each of `cameras`, [S, S, 3] at the model's size; of another size, [H, W, 3],
                they are resized with padding on the device.
            tokens: the prompt's token ids without padding, int [L].
            state: [action_dim] in model space (normalised, padded); not used by pi0.5.
            noise: f32 [horizon, action_dim], the start of the flow at t = 1.
            frames: slot -> identity of the frame; one seen at the last call is not encoded again.
            frozen: f32 [d, action_dim], model-space actions that the chunk begins with (trained-in conditioning).
            guidance: guided in-painting towards the previous chunk.
        """
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # streams, events and graphs are those of the thread's current device
        try:
            return self._sample(images, tokens, state, noise, frames, frozen, guidance)
        except BaseException:
            self.reset()  # what the buffers hold may be half of this chunk
            raise

    def _sample(self, images, tokens, state, noise, frames, frozen, guidance) -> Sample:
        clock = Stages(self.device)
        guidance = guidance and guidance.beside(self.x)  # before anything that its copies would wait for
        self._load_inputs(noise, state, frozen)
        new = self._load_images(images, frames)
        if new:
            self.graphs.run(("vision", new), lambda: self._encode(new))
        clock.mark("vision")
        reused = not self._load_prompt(tokens) and not new
        if not reused:
            self.graphs.run(("prefix", self._prompt_rows), self._run_prefix)
        clock.mark("prefix")
        if guidance is None:
            key = ("denoise", self._prompt_rows, frozen is not None and self.steps is None)
            self.graphs.run(key, lambda: self._denoise(frozen is not None))
        else:
            denoise_guided(self, guidance, frozen is not None)
        actions = self.x.to("cpu", copy=True)
        clock.mark("denoise")
        return Sample(actions, reused, len(new), clock.seconds())

    def _split_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise and then actions f32 [horizon, action_dim], state [1, action_dim], and [horizon, 1]: 0 for frozen."""
        horizon, dims = self.config.action_horizon, self.config.action_dim
        x, state, free = inputs.split([horizon * dims, dims, horizon])
        return x.view(horizon, dims), state[None], free[:, None]

    def _load_inputs(self, noise: Tensor, state: np.ndarray | Tensor, frozen: Tensor | None) -> None:
        x, into, free = self._split_inputs(self._host)
        x.copy_(noise)
        into.copy_(torch.as_tensor(state).reshape(into.shape))
        free.fill_(1.0)
        if frozen is not None:
            x[: len(frozen)] = frozen
            free[: len(frozen)] = 0.0
        if self._host is not self.inputs:
            self.inputs.copy_(self._host, non_blocking=True)

    # --- prefix -----------------------------------------------------------------------------------------------------

    def _load_images(self, images, frames) -> tuple[int, ...]:
        new = []
        for i, slot in enumerate(self.cameras):
            if frames is not None and slot in self._frames and self._frames[slot] == frames[slot]:
                continue
            self._upload(i, torch.as_tensor(images[slot]))
            new.append(i)
        self._frames = dict(frames or {})
        return tuple(new)

    def _upload(self, i: int, image: Tensor) -> None:
        if self.device.type == "cuda" and not image.is_cuda:
            # from pinned memory the copy is asynchronous; the last one ended with its chunk
            if i not in self._pinned or self._pinned[i].shape != image.shape:
                self._pinned[i] = torch.empty(image.shape, dtype=torch.uint8, pin_memory=True)
            np.copyto(self._pinned[i].numpy(), image.numpy())  # torch's own copy wakes threads and waits for them
            image = self._pinned[i].to(self.device, non_blocking=True)
        if image.shape == self.pixels[i].shape:
            self.pixels[i].copy_(image)
        else:
            resize_on_device(self.pixels[i], image)

    def _load_prompt(self, tokens) -> bool:
        ids = np.ascontiguousarray(tokens, dtype=np.int64)
        if ids.tobytes() == self._tokens:
            return False
        if not 0 < len(ids) <= self.config.max_token_len:
            raise ValueError(f"prompt: 1 to {self.config.max_token_len} tokens are allowed, found {len(ids)}")
        self._tokens, rows = ids.tobytes(), self.image_rows
        self._prompt_rows = -(-len(ids) // self.prompt_multiple) * self.prompt_multiple
        self._prompt_rows = min(self._prompt_rows, self.config.max_token_len)
        self._ids[: len(ids)] = torch.from_numpy(ids)
        found = self.weights.embedding[self._ids[: len(ids)].to(self.device, non_blocking=True)]
        self.prefix[rows : rows + len(ids)] = (found.float() * self.config.vlm.width**0.5).to(self.dtype)
        valid = rows + len(ids)
        if self.prefix_rows != rows + self._prompt_rows:
            self._lay_out(rows + self._prompt_rows)
        self.suffix_rope.copy_(self.rope[valid : valid + len(self.suffix_rope)])
        self.valid.fill_(True)[..., valid : self.prefix_rows] = False
        return True

    def _lay_out(self, prefix_rows: int) -> None:
        """[prefix | state | actions] in the cache, for a prefix of so many rows."""
        self.prefix_rows, actions = prefix_rows, prefix_rows + (not self.config.pi05)
        vlm, expert = self.config.vlm, self.config.expert

        def span(start: int, rope: Tensor, width: int) -> Span:
            mask = self.mask(start + len(rope))
            return Span(self.memory, rope, start, heads=vlm.num_heads, width=width, mask=mask)

        self._prefix = span(0, self.rope[:prefix_rows], vlm.width)
        self._state = None if self.config.pi05 else span(prefix_rows, self.suffix_rope[:1], expert.width)
        self._actions = span(actions, self.suffix_rope[-self.config.action_horizon :], expert.width)

    def mask(self, keys: int) -> Tensor | None:
        return None if self.prompt_multiple == 1 else self.valid[..., :keys]

    def _encode(self, which: tuple[int, ...]) -> None:
        """Pixels of the cameras `which` -> their rows of the prefix."""
        vision, config = self.weights.vision, self.config.vision
        n, grid, patch = len(which), config.image_size // config.patch_size, config.patch_size
        x = torch.stack([self.pixels[i] for i in which]).float()  # [n, S, S, 3]
        x = x.view(n, grid, patch, grid, patch, 3).transpose(2, 3).reshape(n * grid * grid, -1)
        x = (vision.patch(x).view(n, -1, config.width) + vision.position).to(self.dtype)
        x = x.view(-1, config.width)  # [n*tokens, width]
        x = self._tower(x, n) if self.prefix_pass is None else self.prefix_pass.encode(x, n)
        for features, i in zip(x.view(n, config.num_tokens, -1), which, strict=True):
            self.prefix[i * config.num_tokens : (i + 1) * config.num_tokens] = features

    def _tower(self, x: Tensor, n: int) -> Tensor:
        vision, config = self.weights.vision, self.config.vision
        for layer in vision.layers:
            qkv = layer.qkv(F.layer_norm(x, (config.width,), eps=LAYER_NORM_EPS))
            q, k, v = qkv.view(n, -1, 3, config.num_heads, config.width // config.num_heads).permute(2, 0, 3, 1, 4)
            x = layer.out.plus(_merge(F.scaled_dot_product_attention(q, k, v)), x)
            x = layer.fc2.plus(layer.fc1.gelu(F.layer_norm(x, (config.width,), eps=LAYER_NORM_EPS)), x)
        return vision.head(F.layer_norm(x, (config.width,), eps=LAYER_NORM_EPS))

    def _run_prefix(self) -> None:
        """Keys and values of every layer for the prefix. Of the last layer nothing else is needed."""
        x, span = self.prefix[: self.prefix_rows], self._prefix
        if self.prefix_pass is not None:
            self.prefix_pass.run(x)
            return
        for i, layer in enumerate(self.weights.vlm):
            span.write(i, layer.qkv(span.rms_norm(x)))
            if layer.out is None:
                break
            x = layer.out.plus(span.attend(i), x)
            x = layer.down.plus(layer.geglu(span.rms_norm(x)), x)

    # --- suffix -----------------------------------------------------------------------------------------------------

    def run_state(self) -> None:
        """The state token sees the prefix and itself only: its keys and values hold for every denoising step."""
        x, span = F.linear(self.state, *self.weights.state).to(self.dtype), self._state  # [1, width]
        for i, layer in enumerate(self.weights.expert):
            span.write(i, layer.qkv(span.rms_norm(x)))
            if i == len(self.weights.expert) - 1:
                break
            x = layer.out.plus(span.attend(i), x)
            x = layer.down.plus(layer.geglu(span.rms_norm(x)), x)

    def _denoise(self, frozen: bool) -> None:
        """The whole flow from x at t = 1 to the actions at t = 0, in place."""
        if self.steps is not None:
            self.steps.begin()
        elif not self.config.pi05:
            self.run_state()
        for k in range(self.num_steps):
            self.step(k, frozen)

    def step(self, k: int, frozen: bool = False) -> None:
        """The k-th Euler step: velocity of x, and x moved along it in place. What `sample` loaded stays in force."""
        if self.steps is not None:
            self.steps.step(k, self.prefix_rows, self.state)
            return
        v = self.velocity(self.x, k, frozen)
        self.x.add_(v.mul_(self.free) if frozen else v, alpha=-1.0 / self.num_steps)

    def velocity(self, x_t: Tensor, k: int, frozen: bool) -> Tensor:
        """v_t of x_t f32 [horizon, action_dim] at the k-th time of the schedule."""
        x, span = self.embed_actions(x_t, k, frozen), self._actions
        for i, layer in enumerate(self.weights.expert):
            norm, gate = self.norm(x, k, 2 * i, frozen)
            span.write(i, layer.qkv(norm))
            attended = span.attend(i)
            x = layer.out.plus(attended, x) if gate is None else torch.addcmul(x, layer.out(attended), gate)
            norm, gate = self.norm(x, k, 2 * i + 1, frozen)
            hidden = layer.geglu(norm)
            x = layer.down.plus(hidden, x) if gate is None else torch.addcmul(x, layer.down(hidden), gate)
        norm, _ = self.norm(x, k, -1, frozen)
        return F.linear(norm.float(), *self.weights.action_out)

    def embed_actions(self, x_t: Tensor, k: int, frozen: bool) -> Tensor:
        bias = self._at_time(self.time_bias, k, frozen)
        x = torch.addmm(bias, x_t, self.weights.action_in.t())
        if self.weights.action_mlp_out is not None:
            x = F.linear(F.silu(x), *self.weights.action_mlp_out)
        return x.to(self.dtype)

    def norm(self, x: Tensor, k: int, which: int, frozen: bool) -> tuple[Tensor, Tensor | None]:
        """RMS norm number `which` (two a layer, then the final one) and, in pi0.5, the gate of its branch."""
        if self.modulation is None:
            return self._actions.rms_norm(x), None
        scale, shift, gate = self._at_time(self.modulation[:, which], k, frozen)  # each [1 or horizon, width]
        return torch.addcmul(shift, self._actions.rms_norm(x), scale), gate

    def _at_time(self, table: Tensor, k: int, frozen: bool) -> Tensor:
        """Entry k of a time table; frozen actions are clean, so their rows take the last entry, which is t = 0."""
        return torch.where(self.free > 0, table[k], table[-1]) if frozen else table[k]


def _merge(x: Tensor) -> Tensor:
    # [n, heads, rows, dim] -> [n*rows, heads*dim]
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
