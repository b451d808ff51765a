"""pi0 and pi0.5: one forward pass for training, prefix once and suffix steps for sampling.

    prefix = image tokens of every camera, prompt tokens          -> the VLM's stack
    suffix = state token (pi0 only), action tokens                -> the action expert's stack

B batch, N cameras, L prompt tokens, P prefix tokens, S suffix tokens, H horizon, A action dimensions. t = 1 is noise
and t = 0 the actions. Parameter names are those of openpi's PyTorch checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pi0_ros.model.config import Pi0Config
from pi0_ros.model.flow import interpolate
from pi0_ros.model.gemma import Gemma, KeysValues, rope_table
from pi0_ros.model.linear import Linear
from pi0_ros.model.siglip import Siglip

POSITION_STD = 0.35  # of the position embeddings of a new vision tower
Cache = list[KeysValues]  # the prefix's keys and values, layer by layer, each [B, kv heads, P, head_dim]


@dataclass(frozen=True)
class Observation:
    """What the model sees. N and L may be smaller than the config's numbers: see `drop_padding`."""

    images: torch.Tensor  # float [B, N, 3, S, S] in [-1, 1], cameras in the config's order
    image_masks: torch.Tensor  # bool [B, N]
    tokens: torch.Tensor  # int64 [B, L], padded on the right
    token_masks: torch.Tensor  # bool [B, L]
    state: torch.Tensor  # float32 [B, A], normalised and padded with zeros; pi0.5 does not read it

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Observation:
        fields = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in dataclasses.fields(self)}
        return Observation(**fields)


class Pi0(nn.Module):
    """The whole network. `generator` draws the initial weights (None: torch's own)."""

    def __init__(self, config: Pi0Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        vision, vlm, width = config.vision, config.vlm, config.expert.width
        paligemma = nn.ModuleDict(
            {
                "vision_tower": nn.ModuleDict({"vision_model": Siglip(vision)}),
                "multi_modal_projector": nn.ModuleDict({"linear": Linear(vision.width, vlm.width)}),
                "language_model": Gemma(vlm, vocab_size=config.vocab_size),
            }
        )
        expert = Gemma(config.expert, adaptive=config.pi05)
        self.paligemma_with_expert = nn.ModuleDict(
            {"paligemma": nn.ModuleDict({"model": paligemma}), "gemma_expert": nn.ModuleDict({"model": expert})}
        )
        self.action_in_proj = Linear(config.action_dim, width)
        self.action_out_proj = Linear(width, config.action_dim)
        if config.pi05:
            self.time_mlp_in = Linear(width, width)
            self.time_mlp_out = Linear(width, width)
        else:
            self.state_proj = Linear(config.action_dim, width)
            self.action_time_mlp_in = Linear(2 * width, width)
            self.action_time_mlp_out = Linear(width, width)
        self.gradient_checkpointing = False
        self.init_weights(generator)
        for parameter in self.unread_parameters():
            parameter.requires_grad_(False)

    @property
    def siglip(self) -> Siglip:
        return self.paligemma_with_expert["paligemma"]["model"]["vision_tower"]["vision_model"]

    @property
    def projector(self) -> nn.Linear:
        return self.paligemma_with_expert["paligemma"]["model"]["multi_modal_projector"]["linear"]

    @property
    def vlm(self) -> Gemma:
        return self.paligemma_with_expert["paligemma"]["model"]["language_model"]

    @property
    def expert(self) -> Gemma:
        return self.paligemma_with_expert["gemma_expert"]["model"]

    @property
    def device(self) -> torch.device:
        return self.action_out_proj.weight.device

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that checkpoints hold and no output depends on: what the last VLM layer does after its keys and
        values, and the norm behind it. They are never trained."""
        last = self.vlm.layers[-1]
        modules = (last.self_attn.q_proj, last.self_attn.o_proj, last.post_attention_layernorm, last.mlp, self.vlm.norm)
        return [parameter for module in modules for parameter in module.parameters()]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Linear weights N(0, 1/inputs), biases and norms neutral, embeddings of unit variance once scaled. Adaptive
        norms start at zero, so that a layer of the pi0.5 expert starts as the identity (openpi: RMSNorm's Dense).

        A patch's position is as loud as its content: fainter ones, as SigLIP's, are found much later."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight.normal_(0.0, module.weight[0].numel() ** -0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, module.embedding_dim**-0.5, generator=generator)
        position = self.siglip.embeddings["position_embedding"]
        position.weight.mul_(POSITION_STD * position.embedding_dim**0.5)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.dense.weight"):
                parameter.zero_()

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Keep one activation per layer in training and compute the rest again in the backward pass."""
        self.gradient_checkpointing = self.siglip.gradient_checkpointing = enabled

    def compile_layers(self) -> None:
        """Compile the layers by torch.compile as they are first used, every kind of layer once."""
        torch._dynamo.config.recompile_limit = 64  # kinds x training or not x lengths of the prompt; 8 by default
        for layers in (self.siglip.encoder["layers"], self.vlm.layers, self.expert.layers):
            for layer in layers:
                layer.compile()

    # --- tokens -------------------------------------------------------------------------------------------------------

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, N, 3, S, S] -> [B, N * T, vlm width], T tokens a camera. Not scaled."""
        batch, cameras, _, height, width = images.shape
        size = self.config.vision.image_size
        if (height, width) != (size, size):
            raise ValueError(f"the model takes images of {size}x{size} pixels, found {height}x{width}")
        if cameras == 0:
            return self.projector.weight.new_zeros(batch, 0, self.config.vlm.width)
        return self.projector(self.siglip(images.flatten(0, 1))).unflatten(0, (batch, cameras)).flatten(1, 2)

    def embed_language(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, L] -> [B, L, vlm width], scaled by sqrt(width): language alone is (openpi: gemma.py, Embedder)."""
        return self.vlm.embed_tokens(tokens) * math.sqrt(self.config.vlm.width)

    def embed_prefix(self, observation: Observation) -> tuple[torch.Tensor, torch.Tensor]:
        """-> prefix tokens [B, P, vlm width] and their validity, bool [B, P]."""
        images = self.embed_images(observation.images)
        language = self.embed_language(observation.tokens)
        image_valid = observation.image_masks.repeat_interleave(self.config.vision.num_tokens, dim=1)
        valid = torch.cat([image_valid, observation.token_masks], dim=1)
        return torch.cat([images.to(language.dtype), language], dim=1), valid

    def embed_time(self, time: torch.Tensor) -> torch.Tensor:
        """time [B] or [B, H] -> sinusoid [B, 1 or H, expert width], float32."""
        time = time[:, None] if time.dim() == 1 else time
        return sinusoid(time, self.config.expert.width, self.config.min_period, self.config.max_period)

    def embed_suffix(
        self, state: torch.Tensor, x_t: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """state [B, A], x_t [B, H, A], time [B] or [B, H] -> suffix tokens [B, S, expert width] and, for the adaptive
        norms of pi0.5, cond [B, 1 or H, expert width] (openpi: pi0.py, embed_suffix)."""
        emb = self.embed_time(time)
        action = _linear(self.action_in_proj, x_t)  # [B, H, W]
        if self.config.pi05:
            cond = F.silu(_linear(self.time_mlp_out, F.silu(_linear(self.time_mlp_in, emb))))
            return action.to(self.expert.dtype), cond
        emb = emb.to(action.dtype).expand(-1, action.shape[1], -1)
        action = _linear(self.action_time_mlp_in, torch.cat([action, emb], dim=-1))  # actions first, then time
        action = _linear(self.action_time_mlp_out, F.silu(action))
        state_token = _linear(self.state_proj, state)[:, None]  # [B, 1, W]
        return torch.cat([state_token, action], dim=1).to(self.expert.dtype), None

    def suffix_ar(self, device: torch.device) -> torch.Tensor:
        """bool [S]: where a new attention block begins: at the state token and at the first action."""
        ar = torch.zeros(self.config.suffix_len, dtype=torch.bool, device=device)
        ar[: self.config.suffix_len - self.config.action_horizon + 1] = True
        return ar

    # --- the network: the prefix once, then the suffix over its keys and values ---------------------------------------
    #
    # The prefix never sees the suffix, so this is also the whole of training: one prefix pass and one suffix pass give
    # what a single attention over prefix and suffix would, without its masked corner.

    def prefix_kv(self, prefix: torch.Tensor, valid: torch.Tensor) -> Cache:
        """Prefix tokens [B, P, vlm width] and validity [B, P] -> keys and values of every VLM layer.

        Every row looks at all valid tokens, rows of padding too: nothing reads those, but they stay finite. With
        nothing valid at all the tokens see one another, for the same reason.
        """
        mask = (valid | ~valid.any(dim=1, keepdim=True))[:, None]  # [B, 1, P]
        rope = rope_table(valid.cumsum(dim=1) - 1, self.config.vlm.head_dim)  # padding and absent cameras count nothing
        cache, last = [], len(self.vlm.layers) - 1
        for i, layer in enumerate(self.vlm.layers):
            prefix, keys_values = self._run(layer, prefix, mask, rope, keys_only=i == last)  # nothing reads further
            cache.append(keys_values)
        return cache

    def suffix_velocity(
        self, cache: Cache, valid: torch.Tensor, state: torch.Tensor, x_t: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at x_t [B, H, A] and time [B] or [B, H], over the prefix's keys, values and validity [B, P]
        -> v_t [B, H, A] float32."""
        suffix, cond = self.embed_suffix(state, x_t, time)
        suffix_valid = valid.new_ones(suffix.shape[:2])
        own = make_attn_mask(suffix_valid, self.suffix_ar(valid.device))  # [B, S, S]
        mask = torch.cat([valid[:, None].expand(-1, suffix.shape[1], -1), own], dim=2)  # [B, S, P + S]
        positions = valid.sum(dim=1, keepdim=True) + suffix_valid.cumsum(dim=1) - 1
        rope = rope_table(positions, self.config.expert.head_dim)
        for layer, past in zip(self.expert.layers, cache, strict=True):
            suffix, _ = self._run(layer, suffix, mask, rope, cond, past)
        suffix, _ = self.expert.norm(suffix[:, -self.config.action_horizon :], cond)
        return _linear(self.action_out_proj, suffix).float()

    def velocity(self, observation: Observation, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x_t [D * B, H, A], time [D * B] or [D * B, H] -> v_t [D * B, H, A] float32: D draws of each of the B
        observations, next to one another. The prefix, which is most of the work, is computed once for all D."""
        prefix, valid = self.embed_prefix(observation)
        cache, state = self.prefix_kv(prefix, valid), observation.state
        draws = len(x_t) // len(valid)
        if draws > 1:
            cache = [tuple(part.repeat_interleave(draws, dim=0) for part in layer) for layer in cache]
            valid, state = valid.repeat_interleave(draws, dim=0), state.repeat_interleave(draws, dim=0)
        return self.suffix_velocity(cache, valid, state, x_t, time)

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)

    def compute_loss(
        self,
        observation: Observation,
        actions: torch.Tensor,
        *,
        noise: torch.Tensor,
        time: torch.Tensor,
        loss_dims: int | None = None,
    ) -> torch.Tensor:
        """Flow-matching loss per action step: actions, noise [B, H, A], time [B] or [B, H] -> float32 [B, H].
        With D * B noises and times, D draws of each sample next to one another, the loss is [D * B, H].

        The mean over all A dimensions, padding included, as openpi does (pi0.py, compute_loss), or over the first
        `loss_dims`, as lerobot does.
        """
        actions = actions.repeat_interleave(len(noise) // len(actions), dim=0)
        x_t, u_t = interpolate(actions, noise, time)
        error = (self.velocity(observation, x_t, time) - u_t).square()
        return error[..., :loss_dims].mean(dim=-1)

    forward = compute_loss  # what DDP and FSDP wrap

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        num_steps: int = 10,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Integrate the flow from noise [B, H, A] (given, or white from `generator`) to actions [B, H, A], float32.

        Euler steps of -1/num_steps from t = 1 (openpi: pi0.py, sample_actions). The same noise or the same generator
        state gives the same bits. A camera that no sample has is not encoded: `drop_padding` reads the masks once,
        before anything else; from there on nothing waits for the device. ValueError for a bad num_steps, or a noise of
        the wrong shape.
        """
        observation = drop_padding(observation)
        shape = (len(observation.state), self.config.action_horizon, self.config.action_dim)
        if noise is None:
            device = self.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {list(shape)}, found {list(noise.shape)}")
        times = denoising_times(num_steps)
        x_t = noise.to(self.device, torch.float32)
        prefix, valid = self.embed_prefix(observation)
        cache = self.prefix_kv(prefix, valid)
        for t in times:
            time = torch.full(shape[:1], t, device=self.device)
            x_t = x_t - (1.0 / num_steps) * self.suffix_velocity(cache, valid, observation.state, x_t, time)
        return x_t


def make_attn_mask(valid: torch.Tensor, ar: torch.Tensor) -> torch.Tensor:
    """valid bool [B, N], ar bool [N] (True: a new block begins here) -> bool [B, N, N], True where q may look at k.

    A token sees the valid tokens of its own block and of all blocks before (openpi: pi0.py, make_attn_mask, which also
    empties the rows of padding; here they look like any other, and nobody looks at them).
    """
    block = ar.cumsum(dim=0)
    return (block[None, :] <= block[:, None]) & valid[:, None, :]


def sinusoid(time: torch.Tensor, width: int, min_period: float, max_period: float) -> torch.Tensor:
    """time [...] -> sines, then cosines, of time over width/2 periods spaced geometrically: float32 [..., width].

    In float64: the shortest period is 4e-3, so a float32 angle alone moves the velocity by 1e-4 (openpi:
    pi0_pytorch.py, create_sinusoidal_pos_embedding).
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = (1.0 / period * 2 * math.pi) * time[..., None].double()
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def denoising_times(num_steps: int) -> list[float]:
    """The times at which the velocity is asked for: 1, 1 - 1/n, ..., 1/n, summed in float32 as openpi does."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, found {num_steps!r}")
    times, step = [np.float32(1.0)], np.float32(-1.0 / num_steps)
    while len(times) < num_steps:
        times.append(times[-1] + step)
    return [float(t) for t in times]


def drop_padding(observation: Observation) -> Observation:
    """Leave out cameras and prompt columns that no sample of the batch has. The result is the same, with less work:
    positions count valid tokens only. Reads the masks on the host, so a trainer calls it before the copy to the GPU."""
    present = observation.image_masks.any(dim=0).tolist()
    keep = [i for i, there in enumerate(present) if there]
    used = observation.token_masks.any(dim=0).tolist()
    length = max([i + 1 for i, there in enumerate(used) if there], default=1)  # a prefix is never empty
    return Observation(
        images=observation.images if all(present) else observation.images[:, keep],
        image_masks=observation.image_masks[:, keep],
        tokens=observation.tokens[:, :length],
        token_masks=observation.token_masks[:, :length],
        state=observation.state,
    )


def preprocess_observation(
    images: torch.Tensor | np.ndarray,
    image_masks: torch.Tensor | np.ndarray,
    tokens: torch.Tensor | np.ndarray,
    token_masks: torch.Tensor | np.ndarray,
    state: torch.Tensor | np.ndarray,
    device: torch.device | str | None = None,
) -> Observation:
    """images uint8, or float in [-1, 1], [B, N, S, S, 3] -> an `Observation` on `device`; uint8 x becomes x/255*2 - 1.

    Images have the model's size already: `policy.images.resize_with_pad` sees to that.
    """
    images = torch.as_tensor(images).to(device)
    if images.dim() != 5 or images.shape[-1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [batch, cameras, size, size, 3], found {list(images.shape)}")
    scaled = images.float() / 255.0 * 2.0 - 1.0 if images.dtype == torch.uint8 else images.float()
    return Observation(
        images=scaled.permute(0, 1, 4, 2, 3),
        image_masks=torch.as_tensor(image_masks).to(device, torch.bool),
        tokens=torch.as_tensor(tokens).to(device, torch.int64),
        token_masks=torch.as_tensor(token_masks).to(device, torch.bool),
        state=torch.as_tensor(state).to(device, torch.float32),
    )


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return module(x.to(module.weight.dtype))
