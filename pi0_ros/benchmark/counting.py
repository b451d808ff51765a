"""FLOPs and bytes of sampling and training, from the sizes alone.

A product of [m, k] and [k, n] is 2 m k n FLOPs; norms, activations and RoPE are left out, as everywhere. Bytes are
those that cannot be avoided: each weight once a pass, each key and value written once and read once a pass, pixels and
features. Activations are not counted, since they can stay in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from pi0_ros.model.config import GemmaConfig, Pi0Config


@dataclass(frozen=True)
class Work:
    """What one pass costs."""

    flops: int = 0
    weights: int = 0  # bytes of weights that are read
    data: int = 0  # bytes of keys, values, pixels and features that are read and written

    @property
    def bytes(self) -> int:
        return self.weights + self.data

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.weights + other.weights, self.data + other.data)

    def __mul__(self, times: int) -> Work:
        return Work(self.flops * times, self.weights * times, self.data * times)


def vision_work(config: Pi0Config, cameras: int, itemsize: int) -> Work:
    """The vision tower and projector over `cameras` new frames; `itemsize`: bytes of a weight or activation."""
    if cameras == 0:
        return Work()
    vision, width, tokens = config.vision, config.vision.width, config.vision.num_tokens
    rows, pixels = cameras * tokens, 3 * vision.patch_size**2
    layer = 4 * width**2 + 2 * width * vision.mlp_dim
    biases = 5 * width + vision.mlp_dim
    head = width * config.vlm.width
    attention = 4 * tokens * width  # scores and values of one row
    return Work(
        flops=rows * (2 * (pixels * width + vision.depth * layer + head) + vision.depth * attention),
        weights=4 * (pixels + tokens) * width + itemsize * (vision.depth * (layer + biases) + head + config.vlm.width),
        data=rows * pixels + itemsize * rows * config.vlm.width,
    )


def prefix_work(config: Pi0Config, rows: int, itemsize: int) -> Work:
    """The prefix pass over `rows` image and prompt tokens; of the last layer keys and values alone."""
    vlm, full = config.vlm, config.vlm.depth - 1
    parameters = full * _layer(vlm) + vlm.width * _kv(vlm)
    return Work(
        flops=2 * rows * parameters + full * _attention(vlm, rows, rows),
        weights=itemsize * parameters,
        data=itemsize * rows * (vlm.width + (vlm.depth + full) * _kv(vlm)),
    )


def state_work(config: Pi0Config, prefix: int, itemsize: int) -> Work:
    """The state token's keys and values (pi0 only), once a chunk."""
    if config.pi05:
        return Work()
    expert, full = config.expert, config.expert.depth - 1
    parameters = full * _layer(expert) + _qkv(expert)
    embedding = (config.action_dim + 1) * expert.width
    return Work(
        flops=2 * (config.action_dim * expert.width + parameters) + full * _attention(expert, 1, prefix + 1),
        weights=itemsize * parameters + 4 * embedding,
        data=itemsize * _kv(expert) * (expert.depth + full * (prefix + 1)),
    )


def step_work(config: Pi0Config, prefix: int, itemsize: int) -> Work:
    """One denoising step over a prefix of `prefix` rows."""
    expert, horizon, dims = config.expert, config.action_horizon, config.action_dim
    keys = prefix + config.suffix_len  # with pi0's state token
    mlp = 0 if config.pi05 else expert.width**2
    small = 2 * dims * expert.width + mlp
    biases = dims + expert.width + (0 if config.pi05 else expert.width)
    modulation = 3 * (2 * expert.depth + 1) * expert.width if config.pi05 else 0
    return Work(
        flops=2 * horizon * (expert.depth * _layer(expert) + small) + expert.depth * _attention(expert, horizon, keys),
        weights=4 * (small + biases) + itemsize * (expert.depth * _layer(expert) + modulation),
        data=itemsize * expert.depth * _kv(expert) * (keys + horizon) + 4 * 2 * horizon * dims,
    )


def sampling_work(
    config: Pi0Config, *, cameras: int, encoded: int, prompt: int, steps: int, itemsize: int
) -> dict[str, Work]:
    """The stages of a chunk: vision, prefix, denoise, their total; and one step.

    Args:
        cameras: that the robot has.
        encoded: how many of them have a new frame; with 0 the prefix is reused.
        prompt: valid tokens.
    """
    rows = cameras * config.vision.num_tokens + prompt
    step = step_work(config, rows, itemsize)
    stages = {
        "vision": vision_work(config, encoded, itemsize),
        "prefix": prefix_work(config, rows, itemsize) if encoded else Work(),
        "denoise": state_work(config, rows, itemsize) + step * steps,
    }
    return {**stages, "total": sum(stages.values(), Work()), "one step": step}


def training_flops(config: Pi0Config, *, batch: int, cameras: int, prompt: int) -> int:
    """Loss and all gradients of a batch: the forward pass, and twice as much backwards."""
    rows, expert, dims = cameras * config.vision.num_tokens + prompt, config.expert, config.action_dim
    horizon, suffix, width = config.action_horizon, config.suffix_len, config.expert.width
    small = 2 * horizon * dims * width
    if config.pi05:  # the time MLP and the norms' modulations run once a sample
        small += 2 * width**2 + 3 * (2 * expert.depth + 1) * width**2
    else:  # the action-time MLP runs on every action: [action | time] -> width -> width
        small += 3 * horizon * width**2 + dims * width
    forward = (
        vision_work(config, cameras, 4).flops
        + prefix_work(config, rows, 4).flops
        + 2 * (suffix * expert.depth * _layer(expert) + small)
        + expert.depth * _attention(expert, suffix, rows + suffix)
    )
    return 3 * batch * forward


def _kv(gemma: GemmaConfig) -> int:
    return 2 * gemma.num_kv_heads * gemma.head_dim


def _qkv(gemma: GemmaConfig) -> int:
    return gemma.width * (gemma.num_heads * gemma.head_dim + _kv(gemma))


def _layer(gemma: GemmaConfig) -> int:
    """Weights of the linear layers of one block."""
    return _qkv(gemma) + gemma.num_heads * gemma.head_dim * gemma.width + 3 * gemma.width * gemma.mlp_dim


def _attention(gemma: GemmaConfig, rows: int, keys: int) -> int:
    """FLOPs of scores and weighted values of one layer."""
    return 4 * rows * keys * gemma.num_heads * gemma.head_dim
