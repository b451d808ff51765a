"""A training run from bags to a checkpoint folder, interrupted and resumed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import train_kit as kit
import yaml
from safetensors.torch import save_file

from pi0_ros.model.config import PRESETS
from pi0_ros.model.flow import Pink
from pi0_ros.policy.bundle import BundleSettings, load_bundle, save_bundle
from pi0_ros.policy.policy import Policy, RobotObservation
from pi0_ros.robot_file import load_robot
from pi0_ros.training import train as train_module
from pi0_ros.training.batches import prefetch
from pi0_ros.training.dataset import statistics
from pi0_ros.training.objective import flow_loss
from pi0_ros.training.optimise import Average, learning_rate
from pi0_ros.training.options import parse
from pi0_ros.training.start import start
from pi0_ros.training.state import StateError, alone, newest_state, remove_leftovers, save_state, saved_states
from pi0_ros.training.train import Run, main

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("train"))


def infer(policy: Policy) -> np.ndarray:
    images = {"base_0_rgb": np.full((12, 16, 3), 20, np.uint8)}
    observation = RobotObservation(0, images, {"base_0_rgb": 0}, np.array([0.2, 0.5, 1.0]), "wave")
    return policy.infer(observation).actions


def test_a_run_learns_and_leaves_a_checkpoint_that_acts(data, tmp_path, capsys):
    assert (
        main(kit.arguments(data, tmp_path / "out", steps=120, batch=8, learning_rate=3e-3, ema=0.9, loss_dims="real"))
        == 0
    )
    policy = Policy.load(tmp_path / "out" / "checkpoint", device="cpu")
    actions = infer(policy)
    assert actions.shape == (5, 3) and np.isfinite(actions).all()
    assert policy.settings.trained_steps == 120 and policy.settings.loss_dims == 3
    assert policy.robot.name == "bench"
    losses = [loss for _, loss in torch.load(newest(tmp_path / "out"), weights_only=True)["losses"]]
    assert len(losses) == 120
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    said = capsys.readouterr().out
    assert "statistics are taken from these recordings anew" in said
    assert "2 episodes" in said and "held out 1 episodes" in said


def last_line(capsys) -> str:
    """The last line on stderr, without the progress bars before it."""
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]


def newest(output: Path) -> Path:
    return sorted((output / "state").glob("step_*"))[-1] / "state.pt"


def test_a_run_leaves_its_options_episodes_curve_and_tensorboard_log(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", evaluate_every=2)
    run.run()
    options = yaml.safe_load((tmp_path / "out" / "options.yaml").read_text())
    assert options["steps"] == 6 and options["seed"] == 42 and options["init"] == str(data / "start")
    episodes = json.loads((tmp_path / "out" / "episodes.json").read_text())
    assert len(episodes["train"]) == 2 and len(episodes["held_out"]) == 1
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    assert [step for step, _ in run.progress.held_out] == [2, 4, 6]


def test_the_saved_options_begin_the_same_run_anew(data, tmp_path):
    first = kit.make_run(data, tmp_path / "first", steps=2)
    first.run()
    again = parse(["--config", str(tmp_path / "first" / "options.yaml"), "--output", str(tmp_path / "second")])
    second = train_module.Run(again)
    second.run()
    assert second.progress.losses == first.progress.losses
    same(kit.weights(second), kit.weights(first))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pi0_ros.training import state
from pi0_ros.training.start import start
from pi0_ros.training.train import main

whole = torch.save

def save(content, stream):
    if content["step"] < 4:
        return whole(content, stream)
    stream.write(b"half of a state")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)

state.torch.save = save
torch.set_num_threads(1)
main(sys.argv[1:])
"""


def test_a_run_killed_while_it_saves_goes_on_to_the_same_bits(data, tmp_path):
    options = {"steps": 6, "save_every": 2, "evaluate_every": 3, "accumulate": 2, "rtc_max_delay": 2}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, *kit.arguments(data, tmp_path / "killed", **options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    states = tmp_path / "killed" / "state"
    assert [path.name for path in states.glob("step_*")] == ["step_00000002"]
    assert list(states.glob(".step_00000004.*.part"))
    assert not (tmp_path / "killed" / "checkpoint").exists()
    (tmp_path / "killed" / ".checkpoint.0123abcd.part").mkdir()  # as one that is killed while it exports leaves it

    resumed = kit.make_run(data, tmp_path / "killed", **options)
    resumed.run()
    whole = kit.make_run(data, tmp_path / "whole", **options)
    whole.run()
    assert [step for step, _ in resumed.progress.losses] == [1, 2, 3, 4, 5, 6]
    assert resumed.progress.losses == whole.progress.losses
    assert resumed.progress.held_out == whole.progress.held_out
    same(kit.weights(resumed), kit.weights(whole))
    same(resumed.average.weights, whole.average.weights)
    assert not list(states.glob(".*")) and not list((tmp_path / "killed").glob(".checkpoint.*"))
    digests = [load_bundle(tmp_path / name / "checkpoint").digest for name in ("killed", "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_saves_the_step_at_work_and_goes_on_to_the_same_bits(
    data, tmp_path, capsys, monkeypatch, number
):
    options = {"steps": 5, "save_every": 100}
    step = Run.train_step

    def told(run, pieces):
        if run.step == 2:
            os.kill(os.getpid(), number)
        return step(run, pieces)

    monkeypatch.setattr(Run, "train_step", told)
    before = signal.getsignal(number)
    assert main(kit.arguments(data, tmp_path / "out", **options)) == 130
    err = capsys.readouterr().err
    assert "stopping after this step" in err
    assert err.rstrip().endswith("stopped; the same command goes on from step_00000003")
    assert signal.getsignal(number) is before
    monkeypatch.setattr(Run, "train_step", step)
    resumed, whole = (kit.make_run(data, tmp_path / name, **options) for name in ("out", "whole"))
    resumed.run(), whole.run()
    assert resumed.progress.losses == whole.progress.losses
    same(kit.weights(resumed), kit.weights(whole))


def test_told_to_end_twice_a_run_ends_at_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Run, "train_step", lambda run, pieces: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert main(kit.arguments(data, tmp_path / "out", steps=3)) == 130
    assert "begins anew, nothing was saved yet" in capsys.readouterr().err


def test_a_second_trainer_in_a_folder_is_refused_while_the_first_is_at_work(data, tmp_path, capsys):
    """Its checkpoint would stand beside the other's list of episodes."""
    words = kit.arguments(data, tmp_path / "out", steps=1)
    with alone(tmp_path / "out"):
        assert main(words) == 1
        assert last_line(capsys) == (
            f"error: {tmp_path / 'out'}: another trainer is at work in this folder; wait for its end, or use another "
            "--output"
        )
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_is_held_by_one_even_if_the_lock_was_opened_before_its_holder_left(tmp_path, monkeypatch):
    """The file that the second one waits at is removed; a third makes another."""
    usual, third = fcntl.flock, contextlib.ExitStack()

    def slow(stream, how):
        monkeypatch.setattr(fcntl, "flock", usual)
        first.close()
        third.enter_context(alone(tmp_path / "out"))
        usual(stream, how)

    first = contextlib.ExitStack()
    first.enter_context(alone(tmp_path / "out"))
    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(StateError, match="another trainer is at work"), alone(tmp_path / "out"):
        pass
    third.close()
    (tmp_path / "mine").mkdir()
    with alone(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "out").exists()


def test_what_an_export_was_killed_in_is_removed_once_a_checkpoint_stands(data, tmp_path):
    output = tmp_path / "out"
    old = output / ".checkpoint.0123abcd.old"  # killed between two renames: this is the only one
    old.mkdir(parents=True)
    remove_leftovers(output)
    assert old.exists()
    kit.make_run(data, output, steps=1).run()
    remove_leftovers(output)
    assert not old.exists()


def test_the_newest_two_states_are_kept_and_only_whole_ones_count(tmp_path):
    assert newest_state(tmp_path / "nowhere") is None and newest_state(tmp_path) is None
    for step in (8, 9, 10):
        save_state(tmp_path, step, {"step": step})
    (tmp_path / "step_00000011").write_text("no folder")
    (tmp_path / "step_12").mkdir()
    (tmp_path / ".step_00000013.0123abcd.part").mkdir()
    assert [path.name for path in saved_states(tmp_path)] == ["step_00000009", "step_00000010"]
    assert not (tmp_path / "step_00000008").exists() and newest_state(tmp_path) == {"step": 10}


def test_ctrl_c_says_what_the_same_command_will_do(data, tmp_path, capsys, monkeypatch):
    words = kit.arguments(data, tmp_path / "out", steps=4, save_every=2)
    usual = train_module.Run.train_step

    def interrupted(at):
        def step(run, pieces):
            if run.step == at:
                raise KeyboardInterrupt
            return usual(run, pieces)

        return step

    for at, ends in ((1, "the same command begins anew, nothing was saved yet (--save-every)"),
                     (3, "the same command goes on from step_00000002")):  # fmt: skip
        monkeypatch.setattr(train_module.Run, "train_step", interrupted(at))
        assert main(words) == 130
        assert last_line(capsys).endswith(ends)


def test_a_resumed_run_is_held_to_its_options(data, tmp_path, capsys):
    kit.make_run(data, tmp_path / "out", steps=2).run()
    changes = {"--batch": {"batch": 8}, "--steps": {"steps": 4}, "--seed": {"seed": 7}, "--lora": {"lora": ("vlm",)},
               "--rtc-max-delay": {"rtc_max_delay": 1}, "--dtype": {"dtype": "bfloat16"},
               "--draws": {"draws": 2}}  # fmt: skip
    for flag, change in changes.items():
        assert main(kit.arguments(data, tmp_path / "out", **{"steps": 2, **change})) == 1
        error = last_line(capsys)
        assert error.startswith("error: ") and flag in error
    assert main(kit.arguments(data, tmp_path / "out", steps=2, accumulate=2)) == 1
    assert "processes x --accumulate" in capsys.readouterr().err
    assert main(kit.arguments(data, tmp_path / "out", steps=2, save_every=1, minutes=5.0, jobs=None)) == 0


def test_more_steps_point_to_the_checkpoint_where_there_is_one(data, tmp_path, capsys):
    kit.make_run(data, tmp_path / "out", steps=2).run()
    assert main(kit.arguments(data, tmp_path / "out", steps=4)) == 1
    assert f"Use another --output and --init {tmp_path}/out/checkpoint to go on" in last_line(capsys)
    (tmp_path / "out/checkpoint").rename(tmp_path / "gone")
    assert main(kit.arguments(data, tmp_path / "out", steps=4)) == 1
    assert last_line(capsys).endswith("Use another --output")


def test_an_output_that_cannot_be_is_named_without_the_systems_number(data, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert main(kit.arguments(data, tmp_path / "out", steps=2)) == 1
    assert last_line(capsys) == f"error: {tmp_path}/out: File exists"


def test_a_resumed_run_is_held_to_its_recordings_and_robot_file(tmp_path, capsys):
    data = kit.make_data(tmp_path)
    kit.make_run(data, tmp_path / "out", steps=2).run()
    (data / "robot.yaml").write_text((data / "robot.yaml").read_text().replace("velocity: 1.0", "velocity: 2.0"))
    assert main(kit.arguments(data, tmp_path / "out", steps=2)) == 1
    assert "not the one that this run began with: joints.0.velocity (was 1.0, now 2.0)" in capsys.readouterr().err
    kit.make_data(tmp_path / "more")
    (tmp_path / "more" / "bags" / "episode_2").rename(tmp_path / "gone")
    assert main(kit.arguments(tmp_path / "more", tmp_path / "out", steps=2, init=data / "start")) == 1
    assert "the recordings are not those" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["lora", "freeze"])
def test_a_resumed_run_is_held_to_the_weights_that_it_does_not_train(tmp_path, capsys, part):
    data, options = kit.make_data(tmp_path), {"steps": 2, "save_every": 1, part: ("vlm",)}
    kit.make_run(data, tmp_path / "out", **options).run()
    shutil.rmtree(data / "start")
    save_bundle(data / "start", kit.random_start(seed=9), BundleSettings(kit.TINY), None, None)
    assert main(kit.arguments(data, tmp_path / "out", **options)) == 1
    assert "the weights of --init are not those" in last_line(capsys)


def test_what_earlier_runs_were_trained_on_is_handed_on(data, tmp_path, capsys):
    kit.make_run(data, tmp_path / "first", steps=1).run()
    first = json.loads((tmp_path / "first" / "episodes.json").read_text())
    assert first["earlier"] == []
    options = {"steps": 1, "seed": 0, "init": tmp_path / "first" / "checkpoint"}
    while True:  # another seed holds out another episode
        options["seed"] += 1
        capsys.readouterr()
        kit.make_run(data, tmp_path / f"second{options['seed']}", **options).run()
        second = json.loads((tmp_path / f"second{options['seed']}" / "episodes.json").read_text())
        told = "warning: 1 of 1 held-out episodes were trained on before" in capsys.readouterr().out
        assert second["earlier"] == sorted(first["train"])
        assert told == (second["held_out"] != first["held_out"])
        if told:
            break
    last = options | {"init": tmp_path / f"second{options['seed']}" / "checkpoint"}
    kit.make_run(data, tmp_path / "third", **last).run()
    third = json.loads((tmp_path / "third" / "episodes.json").read_text())
    assert len(third["earlier"]) == 3  # of both runs


def test_a_damaged_state_is_named_with_the_way_out(data, tmp_path, capsys):
    kit.make_run(data, tmp_path / "out", steps=2, save_every=1).run()
    path = newest(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:1000])
    assert main(kit.arguments(data, tmp_path / "out", steps=2, save_every=1)) == 1
    assert f"remove {path.parent}" in capsys.readouterr().err
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert main(kit.arguments(data, tmp_path / "out", steps=2, save_every=1)) == 0


def test_a_preset_of_random_weights_trains_and_large_ones_are_warned_about(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", kit.TINY)
    monkeypatch.setitem(PRESETS, "pi0", kit.TINY)
    assert main(kit.arguments(data, tmp_path / "nano", init=None, steps=2)) == 0
    said = capsys.readouterr().out
    assert "--preset" not in said
    assert "warning: hardly changes: state of elbow (std " in said and "prompts: " in said
    assert main(kit.arguments(data, tmp_path / "pi0", init=None, preset="pi0", steps=2)) == 0
    assert "warning: --preset pi0 without --init" in capsys.readouterr().out
    assert load_bundle(tmp_path / "nano" / "checkpoint").settings.noise_source == {"source": "white"}


def test_a_checkpoint_to_start_from_hands_on_tokenizer_prompt_format_and_noise_source(data, tmp_path, capsys):
    tokenizer = tmp_path / "words"
    tokenizer.mkdir()
    make_tokenizer(tokenizer)
    settings = BundleSettings(kit.TINY, noise_source=Pink(0.5).to_dict(), normalisation="quantile")
    save_bundle(tmp_path / "start", kit.random_start(), settings, None, None, tokenizer)
    assert main(kit.arguments(data, tmp_path / "out", init=tmp_path / "start", steps=2, horizon=7)) == 0
    bundle = load_bundle(tmp_path / "out" / "checkpoint")
    assert bundle.settings.noise_source == {"source": "pink", "beta": 0.5}
    assert bundle.settings.normalisation == "quantile" and bundle.settings.model.action_horizon == 7
    assert (bundle.tokenizer / "tokenizer.json").read_text() == (tokenizer / "tokenizer.json").read_text()
    assert Policy.load(bundle.folder, device="cpu").config.action_horizon == 7
    capsys.readouterr()
    assert main(kit.arguments(data, tmp_path / "white", init=tmp_path / "start", steps=2, noise="white")) == 0
    assert "was trained with noise source {'source': 'pink', 'beta': 0.5}" in capsys.readouterr().out
    assert load_bundle(tmp_path / "white" / "checkpoint").settings.noise_source == {"source": "white"}


def test_what_was_assumed_about_a_foreign_checkpoint_is_told_before_training(data, tmp_path):
    (tmp_path / "foreign").mkdir()
    save_file(kit.random_start(PRESETS["nano"]).state_dict(), tmp_path / "foreign" / "model.safetensors")
    options = parse(kit.arguments(data, tmp_path / "out", init=tmp_path / "foreign"))
    notes = start(options, load_robot(data / "robot.yaml")).notes
    assert "horizon of 50 actions assumed, no config.json says it" in notes


def test_a_foreign_normalisation_does_not_stand_in_the_way_of_training(data, tmp_path):
    (tmp_path / "foreign").mkdir()
    save_file(kit.random_start(PRESETS["nano"]).state_dict(), tmp_path / "foreign" / "model.safetensors")
    mapping = {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}
    config = {"type": "pi0", "chunk_size": 5, "normalization_mapping": mapping}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    begin = start(
        parse(kit.arguments(data, tmp_path / "out", init=tmp_path / "foreign")), load_robot(data / "robot.yaml")
    )
    assert begin.settings.normalisation == "quantile"
    assert any("normalisation is not known here, quantile is used instead" in note for note in begin.notes)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "wave", "point", "\n"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_weights_that_are_no_longer_numbers_end_the_run_and_are_never_saved(data, tmp_path, capsys):
    assert main(kit.arguments(data, tmp_path / "out", steps=6, learning_rate=1e30, clip=1e30, save_every=1)) == 1
    error = last_line(capsys)
    assert error.startswith("error: loss") and "--learning-rate" in error
    for path in (tmp_path / "out" / "state").glob("step_*/state.pt"):
        assert all(torch.isfinite(w).all() for w in torch.load(path, weights_only=True)["weights"].values())
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_compiled_layers_give_the_same_weights(data, tmp_path, monkeypatch):
    compiled = []

    def compile_whole(function, **_):  # as torch.compile does it, without minutes of a C++ compiler
        compiled.append(function)
        return real(function, backend="aot_eager", fullgraph=True)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_whole)
    runs = {}
    for name, options in (("plain", {}), ("compiled", {"compile": True, "gradient_checkpointing": True})):
        runs[name] = kit.make_run(data, tmp_path / name, steps=2, evaluate_every=1, **options)
        runs[name].run()
    assert len(compiled) == kit.TINY.vision.depth + kit.TINY.vlm.depth + kit.TINY.expert.depth
    begin, plain, same = (
        torch.cat([weight.flatten() for weight in model.state_dict().values()])
        for model in (kit.random_start(), runs["plain"].model, runs["compiled"].model)
    )
    assert (plain - same).norm() < 0.01 * (plain - begin).norm()  # a gradient near 0 may round to either side of it
    losses = [[loss for _, loss in run.progress.losses + run.progress.held_out] for run in runs.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert Policy.load(tmp_path / "compiled" / "checkpoint", device="cpu").settings.trained_steps == 2


def test_a_compiler_that_is_missing_is_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert main(kit.arguments(data, tmp_path / "out", compile=True)) == 1
    error = last_line(capsys)
    assert error.startswith("error: --compile: ") and "/nowhere/g++" in error
    assert error.endswith("the same command without --compile goes on")


def test_a_run_with_a_time_limit_stops_and_exports(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", steps=10_000, minutes=1e-9)
    run.run()
    assert run.step == 1 and load_bundle(tmp_path / "out" / "checkpoint").settings.trained_steps == 1
    saved = torch.load(newest(tmp_path / "out"), weights_only=True)
    assert [step for step, _ in saved["held_out_losses"]] == [1]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [learning_rate(step, steps=12, warmup=4, peak=1.0, final=0.1) for step in (0, 2, 4, 8, 12, 20)]
    assert rates == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1, 0.1])


def test_the_average_follows_the_weights_and_lends_them_out():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = Average(model, 0.9)
        model.weight.fill_(2.0)
        average.update()
        assert average.weights["weight"].item() == pytest.approx(1.1)
        with average.in_place():
            assert model.weight.item() == pytest.approx(1.1)
        assert model.weight.item() == 2.0
        without = Average(model, 0.0)
        model.weight.fill_(3.0)
        without.update()
        assert without.swapped(model.state_dict())["weight"].item() == 3.0


def test_samples_may_begin_in_the_first_seconds_alone_and_normalise_as_those_of_whole_episodes(
    data, tmp_path, monkeypatch
):
    of = []
    monkeypatch.setattr(train_module, "statistics", lambda *given: of.append(given[0].episodes) or statistics(*given))
    early, run = (kit.make_run(data, tmp_path / f"{s}", first_seconds=s) for s in (0.4, 0))
    assert of == [run.train_set.episodes] * 2 and len(of[0]) == 2  # nothing of those that are held out
    ticks = lambda run: [run.train_set.where(i)[2] for i in range(len(run.train_set))]  # noqa: E731
    assert ticks(run) == [*range(20)] * 2
    assert ticks(early) == [*range(4)] * 2 and len(early.held_out) == 4
    assert early.stats == run.stats
    assert len(kit.make_run(data, tmp_path / "one", first_seconds=0.01).train_set) == 2  # one of each at least


def test_what_is_trained_on_is_augmented_anew_at_each_step_in_its_pictures_alone(data, tmp_path):
    run, plain = (kit.make_run(data, tmp_path / f"{on}", augment=on) for on in (True, False))
    (first,), (again,), (other,), (bare,) = run.batches(0), run.batches(0), run.batches(1), plain.batches(0)
    images = first.observation.images
    assert torch.equal(images, again.observation.images)
    assert not torch.equal(images, bare.observation.images) and not torch.equal(images, other.observation.images)
    for name in ("state", "tokens", "token_masks", "image_masks"):
        assert torch.equal(getattr(first.observation, name), getattr(bare.observation, name))
    assert torch.equal(first.actions, bare.actions)


def test_what_is_asked_for_reaches_the_loss(data, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        train_module, "flow_loss", lambda *given, **more: asked.update(more) or flow_loss(*given, **more)
    )
    options = {"rtc_max_delay": 2, "draws": 3, "dtype": "bfloat16", "loss_dims": "real", "noise": "pink"}
    run = kit.make_run(data, tmp_path / "out", **options)
    run.train_step(run.batches(0))
    assert asked == {
        "source": Pink(1.0),
        "draws": 3,
        "max_delay": 2,
        "loss_dims": 3,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }


def test_the_held_out_loss_is_that_of_the_averaged_weights_with_the_same_noise_at_every_look(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", ema=0.9, learning_rate=0.1)
    before = run.evaluate()
    assert run.evaluate() == before
    for step in range(2):
        run.train_step(run.batches(step))
    live, loss = kit.weights(run), run.evaluate()
    same(kit.weights(run), live)
    run.model.load_state_dict(run.average.swapped(live))
    run.average.weights.clear()
    assert run.evaluate() == loss
    run.model.load_state_dict(live)
    assert run.evaluate() != loss != before


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(data, tmp_path):
    run = kit.make_run(data, tmp_path / "out", clip=1e-4)
    run.train_step(run.batches(0))
    moments = [state["exp_avg"] for state in run.optimizer.state_dict()["state"].values()]  # a tenth of the gradient
    assert torch.cat([moment.flatten() for moment in moments]).norm().item() == pytest.approx(1e-5, rel=1e-3)


def test_what_preparing_a_batch_raises_is_raised_where_the_batch_is_asked_for():
    def make(step: int) -> list:
        if step == 2:
            raise ValueError("step 2 is bad")
        return [step]

    batches = prefetch(make, 0, 5)
    assert [next(batches), next(batches)] == [[0], [1]]
    with pytest.raises(ValueError, match="step 2 is bad"):
        next(batches)


def test_batches_are_those_of_the_steps_that_a_run_still_has_before_it():
    assert list(prefetch(lambda step: [step], 3, 6)) == [[3], [4], [5]]


def test_no_thread_is_left_of_a_run_that_ends_early():
    batches = prefetch(lambda step: [step], 0, 100)
    assert next(batches) == [0]
    batches.close()
    assert "batches" not in {thread.name for thread in threading.enumerate()}
