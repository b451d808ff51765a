"""The loss of a piece: the clean prefix of real-time chunking, bfloat16, pieces of a batch, recomputed activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import train_kit as kit
from model_cases import TINY, random_chunk, random_model, random_observation
from torch import nn

from pi0_ros.model.config import PRESETS
from pi0_ros.model.flow import Cold, Pink, White, sample_time
from pi0_ros.policy.bundle import load_bundle
from pi0_ros.policy.policy import Policy, RobotObservation
from pi0_ros.training.batches import Batch
from pi0_ros.training.objective import condition_on_prefix, flow_loss, keep_float32
from pi0_ros.training.streams import step_streams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("objective"))


class Velocity(nn.Module):
    """A stand-in for the model that keeps what it was called with and says that every action costs its number."""

    def forward(self, observation, actions, *, noise, time, loss_dims):
        self.noise, self.time, self.loss_dims = noise, time, loss_dims
        return torch.arange(1.0, actions.shape[1] + 1).expand(len(noise), -1)


def batch(config=TINY, size: int = 2) -> Batch:
    return Batch(random_observation(config, batch=size), random_chunk(config, 1, batch=size))


def test_the_first_actions_are_clean_and_the_loss_is_the_mean_of_the_others():
    time, weight = condition_on_prefix(torch.tensor([0.5, 0.8, 0.3]), torch.tensor([0, 1, 3]), 4)
    torch.testing.assert_close(
        time, torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.8, 0.8, 0.8], [0.0, 0.0, 0.0, 0.3]]), atol=0, rtol=0
    )
    third = 1 / 3
    torch.testing.assert_close(
        weight, torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, third, third, third], [0.0, 0.0, 0.0, 1.0]])
    )


def test_delays_are_drawn_from_none_to_the_longest_and_the_rest_of_the_draws_stay():
    model, plain = Velocity(), Velocity()
    many = batch(size=2)
    delays = set()
    for step in range(40):
        flow_loss(model, many, step_streams(0, step), source=White(), max_delay=3)
        flow_loss(plain, many, step_streams(0, step), source=White())
        torch.testing.assert_close(model.noise, plain.noise, atol=0, rtol=0)
        torch.testing.assert_close(model.time[:, -1], plain.time, atol=0, rtol=0)
        delays |= set((model.time == 0).sum(dim=1).tolist())
    assert delays == {0, 1, 2, 3}


def test_the_loss_of_a_conditioned_piece_weighs_every_sample_alike():
    model = Velocity()
    loss = flow_loss(model, batch(), step_streams(0, 0), source=White(), max_delay=7)
    delays = (model.time == 0).sum(dim=1).tolist()
    expected = [sum(range(delay + 1, 9)) / (8 - delay) for delay in delays]  # 8 actions that cost 1 to 8
    assert loss.item() == pytest.approx(sum(expected) / 2)
    assert len(set(delays)) == 2


def test_one_draw_is_the_loss_of_one_noise_and_time_to_the_bit():
    model, piece = random_model(TINY), batch()
    streams = step_streams(0, 0)
    noise = White().start(tuple(piece.actions.shape), generator=streams.noise)
    time = sample_time(2, generator=streams.time)
    expected = model(piece.observation, piece.actions, noise=noise, time=time).mean()
    for options in ({}, {"draws": 1}):
        assert flow_loss(model, piece, step_streams(0, 0), source=White(), **options).item() == expected.item()


@pytest.mark.parametrize("source", [White(), Pink(1.0), Cold("smooth", 0.8)], ids=["white", "pink", "cold"])
@pytest.mark.parametrize("config", [TINY, PRESETS["nano05"]], ids=["pi0", "pi05"])
def test_three_draws_are_the_mean_of_three_losses(config, source):
    model, piece = random_model(config), batch(config)
    streams = step_streams(0, 0)
    actions = piece.actions.repeat_interleave(3, dim=0)
    noise = source.start(tuple(actions.shape), generator=streams.noise, trajectory=actions)
    time = sample_time(6, generator=streams.time)
    losses = [
        model(piece.observation, piece.actions, noise=noise[draw::3], time=time[draw::3]).mean() for draw in range(3)
    ]
    assert len({loss.item() for loss in losses}) == 3
    loss = flow_loss(model, piece, step_streams(0, 0), source=source, draws=3)
    torch.testing.assert_close(loss, sum(losses) / 3, atol=1e-6, rtol=1e-5)


def test_every_draw_of_a_sample_has_a_delay_of_its_own():
    model, delays = Velocity(), set()
    for step in range(20):
        loss = flow_loss(model, batch(size=1), step_streams(0, step), source=White(), draws=2, max_delay=3)
        first, second = (model.time == 0).sum(dim=1).tolist()
        expected = [sum(range(delay + 1, 9)) / (8 - delay) for delay in (first, second)]
        assert loss.item() == pytest.approx(sum(expected) / 2)
        delays.add((first, second))
    assert len(delays) > 4


def test_the_model_sees_clean_actions_where_time_is_zero():
    """Noise in the prefix changes nothing, so the loss of the rest may depend on its true values alone."""
    model, observation, actions = random_model(TINY), random_observation(TINY), random_chunk(TINY, 1)
    noise = random_chunk(TINY, 2)
    time, weight = condition_on_prefix(torch.tensor([0.5, 0.8]), torch.tensor([2, 2]), TINY.action_horizon)
    other = noise.clone()
    other[:, :2] += 5.0
    losses = [(model(observation, actions, noise=n, time=time) * weight).sum() for n in (noise, other)]
    assert losses[0].item() == losses[1].item()


def test_the_checkpoint_records_the_longest_delay_and_the_policy_then_freezes_what_is_committed(data, tmp_path):
    kit.make_run(data, tmp_path / "out", steps=2, rtc_max_delay=2).run()
    assert load_bundle(tmp_path / "out" / "checkpoint").settings.rtc_max_delay == 2
    assert Policy.load(tmp_path / "out" / "checkpoint", device="cpu").settings.rtc_max_delay == 2


def test_muted_padding_stays_muted_in_training_and_does_nothing_in_sampling(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", loss_dims="real", weight_decay=0.1)
    run.run()
    assert run.settings.loss_dims == 3
    assert not run.model.action_in_proj.weight[:, 3:].any() and run.model.action_in_proj.weight[:, :3].any()
    policy = Policy.load(tmp_path / "out" / "checkpoint", device="cpu", num_steps=3)
    observation = RobotObservation(
        0, {"base_0_rgb": np.zeros((28, 28, 3), np.uint8)}, {"base_0_rgb": 0}, np.zeros(3), "a"
    )
    noise = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[:, 3:] *= -7.0
    chunks = [policy.infer(observation, noise=start).actions for start in (noise, other)]
    np.testing.assert_array_equal(chunks[0], chunks[1])


def test_the_loss_covers_the_dimensions_that_a_checkpoint_was_trained_on_or_the_robots_own(data, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", kit.TINY)
    assert kit.make_run(data, tmp_path / "a").settings.loss_dims is None  # the start was made with all
    assert kit.make_run(data, tmp_path / "b", init=None).settings.loss_dims == 3
    assert kit.make_run(data, tmp_path / "c", init=None, loss_dims="all").settings.loss_dims is None
    kit.make_run(data, tmp_path / "b", init=None, steps=1).run()
    again = kit.make_run(data, tmp_path / "d", init=tmp_path / "b" / "checkpoint")
    assert again.settings.loss_dims == 3


def test_a_delay_as_long_as_the_chunk_is_refused(data, tmp_path):
    with pytest.raises(RuntimeError, match="--rtc-max-delay 5 must be below the horizon, 5 actions"):
        kit.make_run(data, tmp_path / "out", rtc_max_delay=5)


def gradients(model: nn.Module, pieces: list[Batch], **options) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for piece in pieces:
        loss = flow_loss(model, piece, step_streams(0, 0), source=Fixed(), **options) / len(pieces)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Fixed:
    """A start of the flow that depends on the actions alone, so that pieces of a batch have what the batch has."""

    def start(self, shape, *, generator, trajectory):
        return trajectory.flip(1) * 2.0


@pytest.fixture
def same_time(monkeypatch):
    monkeypatch.setattr("pi0_ros.training.objective.sample_time", lambda n, generator: torch.full((n,), 0.4))


@pytest.mark.parametrize("config", [TINY, PRESETS["nano05"]], ids=["pi0", "pi05"])
def test_activations_computed_again_give_the_same_loss_and_gradients(config):
    model = random_model(config).train()
    plain = gradients(model, [batch(config)])
    model.set_gradient_checkpointing(True)
    again = gradients(model, [batch(config)])
    assert again[0] == plain[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_two_pieces_of_a_batch_give_the_gradients_of_the_batch(same_time):
    model, whole = random_model(TINY).train(), batch(size=2)
    pieces = [Batch(take(whole.observation, i), whole.actions[i : i + 1]) for i in range(2)]
    one, two = gradients(model, [whole]), gradients(model, pieces)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for name, gradient in one[1].items():
        torch.testing.assert_close(two[1][name], gradient, atol=1e-6, rtol=1e-4)


def take(observation, i: int):
    from dataclasses import fields

    return type(observation)(**{f.name: getattr(observation, f.name)[i : i + 1] for f in fields(observation)})


@pytest.mark.parametrize("config", [TINY, PRESETS["nano05"]], ids=["pi0", "pi05"])
def test_bfloat16_stays_within_two_hundredths_of_float32_and_the_weights_stay_float32(config):
    """Loss within 2 %, the gradient as a whole within 5 % of its length: about what 8 bits of a product leave."""
    model = random_model(config).train()
    keep_float32(model)
    exact, rounded = gradients(model, [batch(config)]), gradients(model, [batch(config)], dtype=torch.bfloat16)
    assert rounded[0] == pytest.approx(exact[0], rel=0.02) and rounded[0] != exact[0]
    a, b = (torch.cat([gradient.flatten() for gradient in found[1].values()]) for found in (exact, rounded))
    assert (a - b).norm() < 0.05 * a.norm()
    assert {gradient.dtype for gradient in rounded[1].values()} == {torch.float32}


def test_small_projections_norms_and_time_are_computed_in_float32_under_autocast():
    model = random_model(PRESETS["nano05"]).train()
    keep_float32(model)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.dtype))
    flow_loss(model, batch(PRESETS["nano05"]), step_streams(0, 0), source=White(), dtype=torch.bfloat16)
    exact = {name for name, dtype in seen.items() if dtype == torch.float32}
    expected = {"action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out"}
    assert exact == expected | {name for name in seen if name.endswith("norm.dense")}
    assert sum(name.endswith("norm.dense") for name in exact) == 7  # two of each of three layers, and the last


def test_products_of_the_same_tokens_share_one_bfloat16_copy_of_them_under_autocast():
    model = random_model(TINY).train()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            module.register_forward_pre_hook(lambda m, inputs, name=name: seen.__setitem__(name, inputs[0]))
    flow_loss(model, batch(TINY), step_streams(0, 0), source=White(), dtype=torch.bfloat16)
    assert {x.dtype for x in seen.values()} == {torch.bfloat16}
    blocks: dict[str, set[int]] = {}
    for name, x in seen.items():
        blocks.setdefault(name.rsplit(".", 1)[0], set()).add(x.data_ptr())
    assert all(len(copies) == 1 for copies in blocks.values())
