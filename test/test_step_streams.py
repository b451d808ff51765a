"""Every step and rank has its own three streams of randomness, and they do not influence one another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pi0_ros.training.streams import step_streams

NAMES = ("augmentation", "noise", "time")
key = st.tuples(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(0, 63))


def draws(streams):
    return {name: torch.rand(4, generator=getattr(streams, name)).tolist() for name in NAMES}


@given(key)
def test_the_same_seed_step_and_rank_draw_the_same(at):
    assert draws(step_streams(*at)) == draws(step_streams(*at))


@given(key, key)
def test_any_other_seed_step_or_rank_draws_otherwise(one, other):
    if one != other:
        first, second = draws(step_streams(*one)), draws(step_streams(*other))
        assert all(first[name] != second[name] for name in NAMES)


def test_neighbouring_steps_ranks_and_seeds_have_nothing_in_common():
    seen = set()
    for seed in range(3):
        for step in range(200):
            for rank in range(3):
                for values in draws(step_streams(seed, step, rank)).values():
                    seen.add(tuple(values))
    assert len(seen) == 3 * 200 * 3 * 3


def test_a_run_that_a_later_version_resumes_draws_what_it_would_have_drawn():
    streams = step_streams(7, 3, 1)
    seeds = [getattr(streams, name).initial_seed() for name in NAMES]
    assert seeds == [7809597630996498814, 1773217950992128252, 2848353482691532567]


def test_leaving_augmentation_out_changes_neither_noise_nor_time():
    with_it, without = step_streams(7, 3), step_streams(7, 3)
    torch.rand(1000, generator=with_it.augmentation)
    noise = torch.randn(5, generator=with_it.noise)
    assert torch.equal(noise, torch.randn(5, generator=without.noise))
    assert torch.equal(torch.rand(5, generator=with_it.time), torch.rand(5, generator=without.time))


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    draws(step_streams(1, 2, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_negative_keys_are_refused():
    with pytest.raises(ValueError, match="must not be negative, found 0, -1, 0"):
        step_streams(0, -1)
    with pytest.raises(ValueError, match="must not be negative, found -1, 0, 0"):
        step_streams(-1, 0)
