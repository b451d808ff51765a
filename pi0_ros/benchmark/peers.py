"""Our sampler and training step against transformers' PI0: same weights, same inputs, interleaved, in one run.

transformers has one way to a chunk, everything from scratch, so every chunk of ours is held against that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pi0_ros.benchmark.inputs import CONFIGS, build_model, draw_noise, draw_observation
from pi0_ros.benchmark.peer import peer_inputs, peer_name, to_transformers
from pi0_ros.benchmark.sampling import Feed
from pi0_ros.benchmark.timing import Ratio, interleave, ratio
from pi0_ros.model.config import Pi0Config
from pi0_ros.model.pi0 import drop_padding
from pi0_ros.policy.sampler import Sampler

NEW_CAMERAS = {"chunk": 3, "one camera new": 1, "prefix reused": 0}
TOLERANCE = 1e-4  # in float32

# What we want the ratios to stay below, on two CPU threads.
AIMS = {
    ("small", "float32"): {
        "chunk": 0.60, "step": 0.50, "prefix reused": 0.25, "one camera new": 0.55, "training step": 0.75,
    },
    ("mid", "float32"): {"chunk": 0.85, "step": 0.75, "prefix reused": 0.20, "one camera new": 0.75},
    ("mid", "bfloat16"): {"chunk": 0.85, "step": 0.75, "prefix reused": 0.22, "one camera new": 0.75},
}  # fmt: skip


class Peer:
    """transformers' PI0 with the weights of a model of ours, fed with one observation."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Tensor], noise: Tensor, steps: int) -> None:
        self.model, self.inputs, self.noise, self.steps = model, inputs, noise, steps
        self._cache: Any = None

    def to(self, dtype: torch.dtype) -> Peer:
        """The same in another dtype, the model itself converted."""
        sinusoid = self.model.embed_action_time.sinusoid_embeds
        frequencies = sinusoid.sinusoid_freq.clone()
        self.model.to(dtype)
        sinusoid.sinusoid_freq = frequencies  # rounded, they would be another function
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs.items()}
        return Peer(self.model, inputs, self.noise.to(dtype), self.steps)

    def chunk(self) -> Tensor:
        """[1, horizon, A]."""
        return self.model.sample_actions(**self.inputs, noise=self.noise, num_steps=self.steps)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The first denoising step over a prefix that is there already, as its `sample_actions` takes it."""
        model, mask = self.model, self.inputs["attention_mask"]
        if self._cache is None:
            images = self.inputs["pixel_values"], self.inputs["pixel_attention_mask"]
            embeds = model.model.embed_prefix(self.inputs["input_ids"], *images)
            self._cache = model.model.vlm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=mask.cumsum(-1) - 1,
                token_type_ids=torch.zeros_like(embeds)[:, :, 0],
                use_cache=True,
            ).past_key_values
            self._time, self._length = torch.ones(1, device=self.noise.device), self._cache.get_seq_length()
        velocity = model(
            state=self.inputs["state"],
            noise=self.noise,
            timestep=self._time,
            pixel_attention_mask=self.inputs["pixel_attention_mask"],
            attention_mask=mask,
            past_key_values=self._cache,
        ).logits
        self._cache.crop(self._length - self._cache.get_seq_length())
        return self.noise - velocity / self.steps


def compare_sampling(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    config: Pi0Config | None = None,
    steps: int = 10,
    prompt: int = 20,
    runs: int = 9,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """One row per mode, see `row`. `config` in place of the one called `name`."""
    config = config or CONFIGS[name]
    _exact()
    model = build_model(config, device)
    feed = Feed(Sampler(model, num_steps=steps, dtype=dtype, device=device), prompt)
    observation, _ = draw_observation(config, prompt=prompt)
    inputs = {key: value.to(device) for key, value in peer_inputs(config, observation).items()}
    peer = Peer(to_transformers(model), inputs, draw_noise(config).to(device), steps)
    del model
    reference = _host(peer.chunk()), _host(peer.step())  # in float32, before it is converted
    if dtype != torch.float32:
        peer = peer.to(dtype)
    theirs = _host(peer.chunk()), _host(peer.step())
    ours = _our_outputs(feed)

    taken = interleave(
        {
            "peer chunk": peer.chunk,
            **{mode: lambda new=new: feed.chunk(new) for mode, new in NEW_CAMERAS.items()},
            "peer step": lambda: [peer.step() for _ in range(steps)],  # in a row, as a chunk takes them: the first
            "step": lambda: [feed.step() for _ in range(steps)],  # after something else finds cold caches
        },
        runs,
        device,
        f"peers {name} {label(dtype)}",
        seconds,
    )
    for mode in ("peer step", "step"):
        taken[mode] = taken[mode] / steps
    rows = []
    for mode in ("chunk", "step", "prefix reused", "one camera new"):
        step = mode == "step"
        against = ratio(taken[mode], taken["peer step" if step else "peer chunk"])
        allowed, fault = disagreement(ours[mode], theirs[step], reference[step], dtype)
        difference = _largest(ours[mode] - theirs[step])
        rows.append(row(name, dtype, mode, against, len(taken[mode]), difference, allowed, fault))
    return rows


def _our_outputs(feed: Feed) -> dict[str, Tensor]:
    """What each mode gives, with what it reuses really coming from an earlier chunk."""
    outputs, base, state = {}, feed.sampler.cameras[0], feed.state
    feed.images[base] = 255 - feed.images[base]
    feed.chunk(3)
    feed.images[base] = 255 - feed.images[base]
    outputs["one camera new"] = feed.chunk(1).actions
    outputs["chunk"] = feed.chunk(3).actions
    feed.state = -state
    feed.chunk(0)
    feed.state = state
    reused = feed.chunk(0)
    assert reused.prefix_reused
    outputs["prefix reused"] = reused.actions
    outputs["step"] = _host(feed.step())
    return outputs


def disagreement(ours: Tensor, theirs: Tensor, reference: Tensor, dtype: torch.dtype) -> tuple[float, str]:
    """The largest allowed difference, and what is wrong or "".

    float32: ours may differ from theirs by 1e-4. bfloat16: both are held against `reference`, the float32 result;
    ours may be half as far again from it as theirs, and one rounding more, but by a tenth of its largest number at
    most.
    """
    if dtype == torch.float32:
        allowed, found, what = TOLERANCE, _largest(ours - theirs), "differ"
    else:
        scale, bound = _largest(reference), 1.5 * _largest(theirs - reference)
        allowed = min(bound + 2**-8 * scale, 0.1 * scale)
        found, what = _largest(ours - reference), "differ from the float32 result"
    if found <= allowed:  # a NaN is not
        return allowed, ""
    return allowed, f"outputs {what} by {found:.2e}, allowed {allowed:.2e}"


def compare_training(
    name: str,
    device: torch.device,
    *,
    config: Pi0Config | None = None,
    batch: int = 2,
    prompt: int = 20,
    runs: int = 9,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """The row of a training step in float32: loss and all gradients of a batch, no optimizer.

    On our side the padding that the whole batch shares is dropped before, as the trainer does when it makes a batch.
    """
    config = config or CONFIGS[name]
    _exact()
    model = build_model(config, device).train()
    peer = to_transformers(model).train()
    observation, _ = draw_observation(config, batch, prompt)
    inputs = {key: value.to(device) for key, value in peer_inputs(config, observation).items()}
    seen = drop_padding(observation).to(device)
    actions, noise = (draw_noise(config, batch, seed).to(device) for seed in (1, 2))
    time = torch.rand(batch, generator=torch.Generator().manual_seed(3)).to(device)

    def ours() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model.compute_loss(seen, actions, noise=noise, time=time).mean()
        loss.backward()
        return loss.detach()

    def theirs() -> Tensor:
        peer.zero_grad(set_to_none=True)
        loss = peer(**inputs, noise=noise, timestep=time, actions=actions).loss
        loss.backward()
        return loss.detach()

    differences = [(ours() - theirs()).abs().item()]
    gradients = {key: parameter.grad for key, parameter in peer.named_parameters()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            differences.append(_largest(parameter.grad - gradients[peer_name(key)]))
    difference = max(differences)
    fault = "" if difference <= TOLERANCE else f"loss or gradients differ by {difference:.2e}, allowed {TOLERANCE:.2e}"
    taken = interleave({"theirs": theirs, "ours": ours}, runs, device, f"peers {name} training step", seconds)
    against = ratio(taken["ours"], taken["theirs"])
    return [row(name, torch.float32, "training step", against, len(taken["ours"]), difference, TOLERANCE, fault)]


def row(
    name: str,
    dtype: torch.dtype,
    mode: str,
    against: Ratio,
    runs: int,
    difference: float,
    allowed: float,
    fault: str,
) -> dict[str, Any]:
    """What peers.json holds: ratio is the median of ours / theirs pair by pair, with the least and the largest."""
    return {
        "config": name,
        "dtype": label(dtype),
        "mode": mode,
        "ratio": round(against.ratio, 3),
        "ratio_min": round(against.low, 3),
        "ratio_max": round(against.high, 3),
        "aim": AIMS.get((name, label(dtype)), {}).get(mode),
        "max_abs_diff": float(f"{difference:.2e}"),
        "allowed": float(f"{allowed:.2e}"),
        "fault": fault,
        "ours_ms": round(against.ours * 1e3, 2),
        "peer_ms": round(against.theirs * 1e3, 2),
        "runs": runs,
    }


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each mode whose outputs do not agree."""
    return [f"{r['config']} {r['dtype']}, {r['mode']}: {r['fault']}" for r in rows if r["fault"]]


def label(dtype: torch.dtype) -> str:
    """'float32', 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def _exact() -> None:
    """float32 is float32 on both sides: torch's convolutions on a GPU round to TF32 unless told not to, and the patch
    embedding is a convolution there and a product here."""
    torch.backends.cudnn.allow_tf32 = False


def _host(x: Tensor) -> Tensor:
    """f32 [horizon, A] on the CPU, of its own."""
    return x.reshape(-1, x.shape[-1]).to("cpu", torch.float32, copy=True)


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
