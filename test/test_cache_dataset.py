"""Samples, split, shuffle and statistics over the cache."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace

import bag_kit as kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0_ros.model.config import PRESETS
from pi0_ros.policy.bundle import BundleSettings
from pi0_ros.policy.prompt import PromptEncoder
from pi0_ros.policy.tokenizer import ByteTokenizer
from pi0_ros.policy.transforms import build_transforms, limit_statistics
from pi0_ros.training.bags import find_bags
from pi0_ros.training.batches import collate
from pi0_ros.training.build import build_cache
from pi0_ros.training.dataset import Dataset, _stats, all_episodes, batch_indices, split, statistics
from pi0_ros.training.episodes import Selection

SIZE = 16


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """Two bags of one second, ten ticks each; the second has its first command after half of it."""
    folder = tmp_path_factory.mktemp("dataset")
    kit.write_bag(folder / "a", [*kit.episode(seconds=1.0), kit.text(kit.START, "open")])
    late = [
        i for i in kit.episode(seconds=1.0, shift=100) if i.topic != "/command" or i.time >= kit.START + kit.SECOND // 2
    ]
    kit.write_bag(folder / "b", [*late, kit.text(kit.START, "close")])
    selection = Selection(idle=0)
    return build_cache(
        find_bags(folder), kit.robot(), SIZE, folder / ".cache", selection=selection, jobs=1, progress=False
    ).units


def test_a_sample_holds_observation_and_chunk_of_its_tick(units):
    dataset = Dataset(units, horizon=4)
    sample = dataset.sample(3)
    assert sample["images"].shape == (3, SIZE, SIZE, 3) and sample["images"].dtype == np.uint8
    assert sample["image_masks"].tolist() == [True, False, False]
    assert sample["images"][0, 8, 8].tolist() == [16, 16, 16] and not sample["images"][1:].any()
    np.testing.assert_allclose(sample["state"], [0.3, 0.5, 1.0])
    np.testing.assert_allclose(sample["actions"][:, 0], [0.3, 0.4, 0.5, 0.6])
    assert sample["action_mask"].tolist() == [True] * 4
    assert sample["prompt"] == "open" and dataset.where(3) == (0, 0, 3)


def test_past_the_end_the_last_action_repeats_and_is_masked(units):
    sample = Dataset(units, horizon=4).sample(8)
    np.testing.assert_allclose(sample["actions"][:, 0], [0.8, 0.9, 0.9, 0.9])
    assert sample["action_mask"].tolist() == [True, True, False, False]


def test_a_sample_begins_only_where_its_first_action_is_known(units):
    dataset = Dataset(units, horizon=4)
    assert [dataset.where(i)[2] for i in range(10, len(dataset))] == [5, 6, 7, 8, 9]
    sample = dataset.sample(10)
    assert sample["action_mask"].tolist() == [True] * 4 and sample["prompt"] == "close"
    np.testing.assert_allclose(sample["actions"][:, 0], [0.6, 0.6, 0.7, 0.8])  # commanded 0.1 s ahead from 0.5 s on
    assert sample["images"][0, 8, 8, 0] == 120


def test_cameras_come_in_the_order_asked_for(units):
    sample = Dataset(units, 4, cameras=("left_wrist_0_rgb", "base_0_rgb")).sample(0)
    assert sample["image_masks"].tolist() == [False, True]
    assert Dataset(units, 4, cameras=("left_wrist_0_rgb",)).sample(0)["image_masks"].tolist() == [False]


def test_the_prompts_of_a_dataset_are_those_of_its_samples(units):
    assert Dataset(units, horizon=4).prompts() == {"open", "close"}
    assert Dataset(units, horizon=4, episodes=[(1, 0)]).prompts() == {"close"}


def test_a_chunk_stays_in_its_episode_where_a_bag_has_several(tmp_path):
    marks = [(0.0, "first"), (1.0, "second"), (1.8, "")]
    words = [kit.text(kit.START + round(s * kit.SECOND), word, "/episode") for s, word in marks]
    kit.write_bag(tmp_path / "bag", [*kit.episode(seconds=2.0), *words])
    robot, selection = kit.robot(episode_topic="/episode"), Selection(idle=0)
    built = build_cache(
        find_bags(tmp_path), robot, SIZE, tmp_path / ".cache", selection=selection, jobs=1, progress=False
    )
    dataset = Dataset(built.units, horizon=4)
    assert [dataset.where(i) for i in (0, 9, 10, 17)] == [(0, 0, 0), (0, 0, 9), (0, 1, 0), (0, 1, 7)]
    assert len(dataset) == 18
    last, first, second = (dataset.sample(i) for i in (9, 10, 11))
    np.testing.assert_allclose(last["actions"][:, 0], [0.45] * 4)
    assert last["action_mask"].tolist() == [True, False, False, False]
    np.testing.assert_allclose([last["state"][0], first["state"][0]], [0.45, 0.5])
    np.testing.assert_allclose(second["actions"][:, 0], [0.55, 0.6, 0.65, 0.7])


@pytest.mark.parametrize("prompt_format", ["pi0", "pi05"])
def test_a_batch_is_encoded_as_the_policy_will_encode_it(units, prompt_format):
    robot, settings = kit.robot(), BundleSettings(PRESETS["nano"])
    group = build_transforms(robot, limit_statistics(robot, settings), settings)
    dataset, encoder = Dataset(units, horizon=4), PromptEncoder(ByteTokenizer(), prompt_format, 60)
    batch = collate(dataset, np.array([3, 12]), group, encoder)
    observation = batch.observation
    assert observation.images.shape == (2, 1, 3, SIZE, SIZE) and observation.image_masks.all()
    for row, sample in enumerate((dataset.sample(3), dataset.sample(12))):
        data = group.encode(sample["state"], sample["actions"])
        tokens = encoder.encode(sample["prompt"], data["state"][:3])
        assert observation.tokens[row][observation.token_masks[row]].tolist() == tokens.tolist()
        np.testing.assert_allclose(observation.state[row], data["state"], atol=1e-6)
        np.testing.assert_allclose(batch.actions[row], data["actions"], atol=1e-6)
        np.testing.assert_allclose(
            observation.images[row, 0, :, 8, 8], sample["images"][0, 8, 8] / 127.5 - 1, atol=1e-6
        )


def test_each_sample_of_a_batch_keeps_the_cameras_that_it_has(units):
    robot, settings = kit.robot(), BundleSettings(PRESETS["nano"])
    group = build_transforms(robot, limit_statistics(robot, settings), settings)
    dataset, encoder = Dataset(units, horizon=4), PromptEncoder(ByteTokenizer(), "pi0", 60)
    masks = np.array([[True, False, False], [True, True, False], [False, True, False]])
    mixed = SimpleNamespace(sample=lambda i: dataset.sample(i) | {"image_masks": masks[i]})
    batch = collate(mixed, np.array([2, 0, 1]), group, encoder)
    assert batch.observation.image_masks.tolist() == [[False, True], [True, False], [True, True]]


def test_blocks_hold_the_same_chunks_as_samples(units):
    dataset = Dataset(units, horizon=6)
    blocks = [np.concatenate(parts) for parts in zip(*dataset.chunks(), strict=True)]
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        for name, block in zip(("state", "actions", "action_mask"), blocks, strict=True):
            np.testing.assert_array_equal(sample[name], block[i])


def test_a_dataset_travels_to_worker_processes_without_its_pixels(units):
    dataset = Dataset(units, horizon=4)
    dataset.sample(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 20_000
    np.testing.assert_array_equal(pickle.loads(packed).sample(5)["images"], dataset.sample(5)["images"])


def test_no_file_stays_open_however_many_bags_there_are(units):
    fresh = [pickle.loads(pickle.dumps(unit)) for unit in units]
    before = os.listdir("/proc/self/fd")
    sample = Dataset(fresh, horizon=4).sample(3)
    assert sample["images"].any()
    assert os.listdir("/proc/self/fd") == before


def test_the_first_ticks_of_each_episode_can_be_taken_alone(units):
    dataset = Dataset(units, horizon=4, first=3)
    assert [dataset.where(i) for i in range(len(dataset))] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (1, 0, 5),
        (1, 0, 6),
        (1, 0, 7),
    ]


def test_the_split_is_by_episode_and_repeats(units):
    train, held = split(units, 0.2, seed=1)
    assert len(train) == len(held) == 1 and sorted(train + held) == all_episodes(units)
    assert split(units, 0.2, seed=1) == (train, held)
    assert split(units, 0.0) == ([(0, 0), (1, 0)], [])
    assert {tuple(split(units, 0.5, seed=s)[1]) for s in range(20)} == {((0, 0),), ((1, 0),)}
    assert len(Dataset(units, 4, episodes=held)) in (8, 10)


def test_a_share_of_the_episodes_is_held_out_at_least_one_and_never_all():
    unit = lambda i: SimpleNamespace(  # noqa: E731
        index={"digest": str(i)},
        episodes=[{"begin": 0, "end": 2}],
        arrays={"known": np.ones(2, bool), "usable": np.ones(2, bool)},
    )
    ten = [unit(i) for i in range(10)]
    assert [len(split(ten, share)[1]) for share in (0.0, 0.01, 0.2, 0.26, 0.99, 1.0)] == [0, 1, 2, 3, 9, 9]


def test_a_recording_and_its_copy_are_never_on_both_sides_of_the_split(units):
    copied = [*units, units[0], units[1], units[0]]
    for seed in range(20):
        train, held = split(copied, 0.5, seed=seed)
        assert sorted(train + held) == all_episodes(copied)
        assert {tuple(unit for unit, _ in side) for side in (train, held)} == {(0, 2, 4), (1, 3)}
    assert split([units[0], units[0]], 0.5) == ([(0, 0), (1, 0)], [])  # nothing else is there to train on


@given(
    samples=st.integers(1, 50),
    batch=st.integers(1, 20),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_every_epoch_draws_each_sample_once_whatever_the_ranks(samples, batch, ranks, seed):
    steps = -(-3 * samples // (batch * ranks))
    drawn = np.concatenate(
        [batch_indices(samples, s, batch, seed=seed, rank=r, ranks=ranks) for s in range(steps) for r in range(ranks)]
    )
    for epoch in range(3):
        assert sorted(drawn[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    whole = np.concatenate([batch_indices(samples, s, batch * ranks, seed=seed) for s in range(steps)])
    np.testing.assert_array_equal(drawn, whole)


def test_the_shuffle_depends_on_seed_and_epoch_alone():
    first = batch_indices(1000, 3, 32, seed=5)
    np.testing.assert_array_equal(first, batch_indices(1000, 3, 32, seed=5))
    assert not np.array_equal(first, batch_indices(1000, 3, 32, seed=6))
    assert not np.array_equal(batch_indices(32, 0, 32, seed=5), batch_indices(32, 1, 32, seed=5))
    with pytest.raises(ValueError, match="no samples"):
        batch_indices(0, 0, 4, seed=0)


def test_statistics_are_of_model_space_and_leave_padding_out(units, monkeypatch):
    dataset = Dataset(units, horizon=4, episodes=[(0, 0)])
    stats = statistics(dataset, kit.robot(), BundleSettings(model=PRESETS["nano"]))
    np.testing.assert_allclose(stats.state.mean, [0.45, 0.5, 0.5], atol=1e-12)  # the gripper: 5 ticks open, 5 closed
    np.testing.assert_allclose(stats.state.std[:2], [np.std(np.arange(10) / 10), 0.004], atol=1e-12)  # a resting joint
    np.testing.assert_allclose([stats.state.q01[1], stats.state.q99[1]], [0.5 - 0.0093, 0.5 + 0.0093], atol=1e-4)
    with pytest.raises(ValueError, match="no samples to take statistics of"):
        statistics(Dataset(units, horizon=4, episodes=[]), kit.robot(), BundleSettings(model=PRESETS["nano"]))
    relative = []
    action = [0.1, *(k / 10 for k in range(1, 10))]
    for tick in range(10):
        relative += [action[tick + k] - tick / 10 for k in range(4) if tick + k < 10]
    assert stats.actions.mean[0] == pytest.approx(np.mean(relative))
    assert stats.actions.std[0] == pytest.approx(np.std(relative))
    assert stats.actions.q01[0] == pytest.approx(np.quantile(relative, 0.01))
    assert stats.actions.q99[0] == pytest.approx(np.quantile(relative, 0.99))
    monkeypatch.setattr("pi0_ros.training.dataset.MOST_ROWS", 20)  # of 40: every third sample, of ticks 0, 3, 6, 9
    fewer = statistics(dataset, kit.robot(), BundleSettings(model=PRESETS["nano"]))
    assert fewer.state.std[0] == pytest.approx(np.std([0.0, 0.3, 0.6, 0.9]))
    assert 0 <= stats.actions.q01[2] <= stats.actions.q99[2] <= 1  # the gripper is absolute, 0 open to 1 closed


def test_a_spread_that_is_less_than_the_least_is_widened_about_its_middle():
    rows = np.linspace([0.0, 0.0], [1.0, 100.0], 101)
    stats = _stats(rows, np.array([1.0, 1.0]))
    # the first joint: 0.01 to 0.99, where 2.33 to either side of the middle are the least
    np.testing.assert_allclose(stats.q01, [0.5 - 2.33, 1.0])
    np.testing.assert_allclose(stats.q99, [0.5 + 2.33, 99.0])
    np.testing.assert_allclose(stats.std, [1.0, np.std(np.arange(101))])
