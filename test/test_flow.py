"""Time, interpolation and the noise sources."""

import colorednoise
import numpy as np
import pytest
import torch
from scipy import stats

from pi0_ros.model import flow
from pi0_ros.model.flow import Cold, NoiseSourceError, Pink, White

SOURCES = [White(), Pink(0.5), Pink(2.0), *(Cold(kind, 0.4) for kind in flow.DEGRADATIONS)]
name_of = str


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_time_is_beta_distributed_and_stays_above_zero():
    time = flow.sample_time(20_000, generator=generator())
    assert time.dtype == torch.float32 and time.min() >= 0.001 and time.max() <= 1.0
    assert stats.kstest((time.double() - 0.001) / 0.999, stats.beta(1.5, 1).cdf).pvalue > 0.01
    assert abs(time.mean().item() - (0.6 * 0.999 + 0.001)) < 0.005  # mean of Beta(1.5, 1) is 0.6


def test_time_goes_from_a_thousandth_to_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([0.0, 0.125, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(flow.sample_time(3, generator=generator()), [0.001, 0.25075, 1.0], rtol=1e-6)


def test_time_repeats_with_its_generator():
    assert torch.equal(flow.sample_time(5, generator=generator(3)), flow.sample_time(5, generator=generator(3)))
    assert not torch.equal(flow.sample_time(5, generator=generator(3)), flow.sample_time(5, generator=generator(4)))


def test_interpolation_goes_from_actions_at_0_to_noise_at_1():
    actions, noise = torch.tensor([[[2.0], [4.0]]]), torch.tensor([[[10.0], [0.0]]])
    x_t, u_t = flow.interpolate(actions, noise, torch.tensor([0.25]))
    assert x_t.tolist() == [[[4.0], [3.0]]] and u_t.tolist() == [[[8.0], [-4.0]]]
    x_t, _ = flow.interpolate(actions, noise, torch.tensor([[0.0, 1.0]]))  # a time per step
    assert x_t.tolist() == [[[2.0], [0.0]]]


@pytest.mark.parametrize("source", [White(), Pink(0.0), Pink(1.0), Pink(2.0), Pink(4.0)], ids=name_of)
def test_random_sources_have_unit_variance_at_every_step(source):
    start = source.start((4000, 24, 2), generator=generator())
    assert start.dtype == torch.float32
    variance = start.var(dim=(0, 2))  # 8000 numbers a step: standard error 0.016
    assert (variance - 1).abs().max() < 0.08
    assert start.mean(dim=(0, 2)).abs().max() < 0.06
    assert np.corrcoef(start[..., 0].flatten(), start[..., 1].flatten())[0, 1] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_pink_spectrum_falls_as_one_over_f_to_beta_like_the_colorednoise_package(beta):
    horizon, count = 50, 6000

    def spectrum(x):  # [count, H] -> mean power per frequency, total 1
        power = (np.abs(np.fft.rfft(x * np.hanning(horizon), axis=1)) ** 2).mean(axis=0)[2:-1]
        return power / power.sum()

    ours = spectrum(Pink(beta).start((count, horizon, 1), generator=generator())[..., 0].double().numpy())
    series = colorednoise.powerlaw_psd_gaussian(beta, (count, 2 * horizon), random_state=1)[:, :horizon]
    np.testing.assert_allclose(ours, spectrum(series), rtol=0.15)
    f = np.fft.rfftfreq(horizon)[2:-1]
    slope = np.polyfit(np.log(f[:15]), np.log(ours[:15]), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.2)


def test_pink_of_beta_zero_is_white():
    shape = (3, 10, 2)
    torch.testing.assert_close(
        Pink(0.0).start(shape, generator=generator()), White().start(shape, generator=generator()), atol=1e-6, rtol=0
    )


def test_cold_starts_are_the_degradations_written_out():
    ramp = torch.arange(10.0).view(1, 10, 1)

    def degrade(kind, strength):
        return Cold(kind, strength).start((1, 10, 1), generator=None, trajectory=ramp).flatten().tolist()

    assert degrade("downsample", 2 / 9) == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert degrade("downsample", 1.0) == [0] * 10
    assert degrade("mask", 0.3) == degrade("mask", 0.27) == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert Cold("mask", 1.0).start((1, 10, 1), trajectory=ramp + 5).flatten().tolist() == [5] + [0] * 9
    smooth = torch.tensor(degrade("smooth", 0.5))
    assert (smooth.diff() > 0).all() and 0 < smooth[0] < smooth[-1] < 9  # still rising, less steep, same middle
    assert smooth.mean().item() == pytest.approx(4.5, abs=1e-5)


def test_smoothing_leaves_a_constant_and_takes_the_fast_part():
    t = torch.arange(50.0)
    trajectory = torch.stack([torch.full((50,), 3.0), torch.sin(t * 1.5)], dim=-1)[None]
    start = Cold("smooth", 0.2).start((1, 50, 2), trajectory=trajectory)
    torch.testing.assert_close(start[..., 0], trajectory[..., 0])
    assert start[0, 10:-10, 1].abs().max() < 0.01


def test_a_cold_start_draws_nothing_and_needs_its_trajectory():
    state = generator()
    before = state.get_state()
    Cold().start((1, 4, 2), generator=state, trajectory=torch.ones(1, 4, 2))
    assert torch.equal(state.get_state(), before)
    with pytest.raises(NoiseSourceError, match=r"trajectory of shape \[1, 4, 2\]"):
        Cold().start((1, 4, 2), generator=state, trajectory=None)
    with pytest.raises(NoiseSourceError, match=r"shape \[1, 4, 2\] to degrade, found \[1, 4, 3\]"):
        Cold().start((1, 4, 2), generator=state, trajectory=torch.ones(1, 4, 3))


def integrate(velocity, start, num_steps):
    x = start
    for i in range(num_steps):
        x = x - velocity(x, 1 - i / num_steps) / num_steps
    return x


@pytest.mark.parametrize("source", [White(), Pink(1.0), Pink(2.0)], ids=name_of)
def test_flow_from_a_random_source_reaches_a_gaussian_target(source):
    mean, std = 2.0, 0.5  # target: mean + std * noise of the same colour, so every step and lag follows one formula

    def velocity(x, t):  # E[noise - actions | x_t = x]
        variance = t**2 + (1 - t) ** 2 * std**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    start = source.start((3000, 20, 1), generator=generator())
    reached = integrate(velocity, start, 400)
    torch.testing.assert_close(reached, mean + std * start, atol=0.02, rtol=0)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_flow_from_every_source_reaches_a_single_target(source):
    target = torch.sin(torch.arange(12.0) / 3).view(1, 12, 1)
    start = source.start((1, 12, 1), generator=generator(), trajectory=target)
    assert (start - target).abs().max() > 0.05
    reached = integrate(lambda x, t: (x - target) / t, start, 10)
    torch.testing.assert_close(reached, target, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", flow.DEGRADATIONS)
def test_flow_from_a_cold_start_tells_trajectories_apart(kind):
    pattern = 1 + torch.sin(torch.arange(12.0))  # the data: scale * pattern, so that x_t tells the scale
    scale = torch.tensor([-2.0, 0.5, 3.0])
    actions = (scale[:, None] * pattern)[..., None]
    start = Cold(kind, 0.4).start((3, 12, 1), trajectory=actions)
    degraded = Cold(kind, 0.4).start((1, 12, 1), trajectory=pattern.view(1, 12, 1)).view(1, 12, 1)
    clean = pattern.view(1, 12, 1)

    def velocity(x, t):
        path = t * degraded + (1 - t) * clean
        found = (x * path).sum(dim=1, keepdim=True) / path.square().sum(dim=1, keepdim=True)
        return found * (degraded - clean)

    torch.testing.assert_close(integrate(velocity, start, 10), actions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_sources_come_back_from_their_dict(source):
    assert flow.noise_source_from_dict(source.to_dict()) == source


def test_what_a_source_s_dict_leaves_out_is_filled_in():
    assert flow.noise_source_from_dict({"source": "pink"}) == Pink(1.0)
    assert flow.noise_source_from_dict({"source": "cold"}) == Cold("smooth", 0.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "blue"}, "one of white, pink, cold, found .*'blue'"),
        ({}, "found {}"),
        ("white", "found 'white'"),
        ({"source": ["white"]}, "found"),
        ({"source": "white", "beta": 1.0}, "unknown beta, allowed: nothing"),
        ({"source": "pink", "beta": -1}, "beta must be between 0 and 4, found -1"),
        ({"source": "pink", "beta": "1"}, "found '1'"),
        ({"source": "cold", "kind": "blur"}, "one of smooth, downsample, mask, found 'blur'"),
        ({"source": "cold", "strength": 0}, "strength must be above 0"),
    ],
)
def test_a_bad_source_is_one_clear_error(data, message):
    with pytest.raises(NoiseSourceError, match=message):
        flow.noise_source_from_dict(data)


def test_another_source_than_the_recorded_one_is_refused_unless_forced():
    assert flow.require_same_source(Pink(1.0), None) == Pink(1.0)
    assert flow.require_same_source(Pink(1.0), Pink(1.0)) == Pink(1.0)
    with pytest.raises(NoiseSourceError, match="trained with noise source .*pink.*asked for .*white"):
        flow.require_same_source(Pink(1.0), White())
    assert flow.require_same_source(Pink(1.0), White(), force=True) == White()
