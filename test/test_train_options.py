"""What a run can be told: what options do to the data, where they come from, and which cannot be."""

from __future__ import annotations

import bag_kit
import pytest
import torch
import train_kit as kit
import yaml

from pi0_ros.model.config import PRESETS
from pi0_ros.model.flow import Pink
from pi0_ros.policy.bundle import BundleSettings, load_bundle, save_bundle
from pi0_ros.training.data import load_units
from pi0_ros.training.evaluate import Options as EvaluateOptions
from pi0_ros.training.evaluate import evaluate
from pi0_ros.training.optimise import make_optimizer
from pi0_ros.training.options import OptionsError, changed_fields, parse, require_same
from pi0_ros.training.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def rested(tmp_path_factory):
    """A recording of three seconds, in the first of which nothing moves."""
    later = bag_kit.episode(bag_kit.START + bag_kit.SECOND, seconds=2.0)
    still = bag_kit.episode(seconds=1.0)
    for item in still:
        if item.topic == "/joint_states":
            item.message.position[:] = [0.0, 0.5, 1.0]
        elif item.topic == "/command":
            item.message.points[0].positions[:] = [0.0, 0.5, 1.0]
    return bag_kit.write_bag(tmp_path_factory.mktemp("rested") / "bags" / "episode", [*still, *later])


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({}, range(9, 30)),  # the shoulder moves from tick 10, less a quarter of a second
        ({"idle": 0.3}, range(18, 23)),  # only the gripper moves as far, at tick 20
        ({"idle": 0.0}, range(30)),
    ],
)
def test_idle_starts_and_ends_are_trimmed_as_told(rested, told, kept):
    (unit,) = load_units(rested, bag_kit.robot(), 28, jobs=1, **told)
    assert unit.arrays["usable"].nonzero()[0].tolist() == list(kept)


def test_training_and_evaluation_take_idle_as_inspect_bags_does(data, rested, tmp_path, capsys):
    words = kit.arguments(data, tmp_path / "run", bags=rested, steps=1, held_out=0)
    assert parse(words).idle == EvaluateOptions(rested, tmp_path).idle == 0.005
    assert main([*words, "--idle", "0.3"]) == 0
    assert "training on 1 episodes, 5 samples" in capsys.readouterr().out
    assert main([*words, "--idle", "0.1"]) == 1  # a resumed run
    assert "--idle (was 0.3, now 0.1)" in capsys.readouterr().err
    asked = EvaluateOptions(rested, tmp_path / "run" / "checkpoint", tmp_path / "out", idle=0.3, all=True, chunks=0,
                            seeds=1, num_steps=1, device="cpu", jobs=1)  # fmt: skip
    assert evaluate(asked)["chunks"] == 5


def test_a_path_may_be_written_otherwise_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = parse(["--bags", "a", "--robot", "b", "--output", "c", "--init", "start"]).to_dict()
    require_same({**now, "init": str(tmp_path / "x" / ".." / "start")}, now)
    with pytest.raises(OptionsError, match=r"--init \(was other, now start\)"):
        require_same({**now, "init": "other"}, now)


def test_what_differs_between_two_robot_files_is_named_and_not_without_end():
    was = "a: 1\nb: {c: [1, 2], d: x}\n"
    assert changed_fields(was, was) == ""
    assert changed_fields(was, "a: 1\nb: {c: [1, 3], d: x}\n") == "b.c.1 (was 2, now 3)"
    assert changed_fields(was, "a: 1\nb: {c: [1, 2], d: x, e: 5}\n") == "b.e (was None, now 5)"
    before, after = ("".join(f"k{i}: {value}\n" for i in range(6)) for value in (1, 2))
    assert changed_fields(before, after).endswith("k3 (was 1, now 2), and 2 more")


def test_a_number_without_end_is_refused():
    with pytest.raises(OptionsError, match="--first-seconds must be at least 0, found inf"):
        parse(["--bags", "a", "--robot", "b", "--output", "c", "--first-seconds", "inf"])


def test_the_weights_file_of_a_checkpoint_means_the_checkpoint(data, tmp_path):
    """With its noise, its prompts and its normalisation, which the weights alone do not tell."""
    kit.make_run(data, tmp_path / "pink", steps=1, noise="pink").run()
    run = kit.make_run(data, tmp_path / "on", steps=1, init=tmp_path / "pink" / "checkpoint" / "model.safetensors")
    assert isinstance(run.source, Pink) and run.options.init == tmp_path / "pink" / "checkpoint"


def test_a_prompt_that_replaced_every_other_is_the_checkpoints_default(data, tmp_path):
    kit.make_run(data, tmp_path / "out", steps=1, prompt="nod").run()
    assert load_bundle(tmp_path / "out" / "checkpoint").robot.prompt.default == "nod"


def test_a_checkpoint_for_long_delays_can_be_given_a_shorter_horizon(data, tmp_path):
    kit.make_run(data, tmp_path / "long", steps=1, rtc_max_delay=4).run()
    words = {"steps": 1, "init": tmp_path / "long" / "checkpoint", "horizon": 3}
    kit.make_run(data, tmp_path / "short", **words, rtc_max_delay=2).run()
    settings = load_bundle(tmp_path / "short" / "checkpoint").settings
    assert (settings.model.action_horizon, settings.rtc_max_delay) == (3, 2)


def test_what_was_left_open_is_written_down_as_it_was_resolved(data, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", kit.TINY)
    words = kit.arguments(data, tmp_path / "nano", init=None, learning_rate=None, steps=20, minutes=1e-9)
    assert main(words) == 0
    written = yaml.safe_load((tmp_path / "nano" / "options.yaml").read_text())
    assert (written["learning_rate"], written["warmup"], written["horizon"]) == (None, 1000, None)
    assert written["resolved"] == {
        "learning_rate": 1e-3,
        "warmup": 2,
        "horizon": 5,
        "loss_dims": "real",
        "noise": {"source": "white"},
        "tokenizer": "bytes",
        "device": "cpu",
    }


def test_what_a_checkpoint_decides_is_written_down(data, tmp_path):
    settings = BundleSettings(kit.TINY, noise_source=Pink(0.5).to_dict())
    save_bundle(tmp_path / "start", kit.random_start(), settings, None, None)
    output = tmp_path / "out"
    assert main(kit.arguments(data, output, init=tmp_path / "start", learning_rate=None, steps=1, horizon=4)) == 0
    resolved = yaml.safe_load((output / "options.yaml").read_text())["resolved"]
    assert (resolved["learning_rate"], resolved["warmup"], resolved["horizon"]) == (2.5e-5, 0, 4)
    assert (resolved["loss_dims"], resolved["noise"]) == ("all", {"source": "pink", "beta": 0.5})
    assert parse(["--config", str(output / "options.yaml")]).learning_rate is None  # so that the run can go on
    assert main(["--config", str(output / "options.yaml")]) == 0


def test_the_defaults_are_those_of_openpi():
    # training/config.py (TrainConfig) and training/optimizer.py (AdamW, CosineDecaySchedule) of openpi
    options = parse(["--bags", "a", "--robot", "b", "--output", "c", "--init", "d"])
    assert (options.steps, options.batch, options.seed) == (30_000, 32, 42)
    assert (options.peak, options.warmup_steps, options.final_learning_rate) == (2.5e-5, 1000, 0.1)
    assert (options.clip, options.ema, options.weight_decay) == (1.0, 0.99, 1e-10)
    assert (options.draws, options.noise, options.loss_dims, options.augment) == (1, None, None, True)
    optimizer = make_optimizer(kit.random_start(), options.weight_decay)
    assert type(optimizer) is torch.optim.AdamW
    chosen = {name: optimizer.defaults[name] for name in ("betas", "eps", "weight_decay", "amsgrad")}
    assert chosen == {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-10, "amsgrad": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "6", "--accumulate", "4"], "--batch 6 must be a multiple"),
        (["--ema", "1.0"], "--ema must be from 0 to below 1, found 1.0"),
        (["--freeze", "vlm", "--lora", "vlm", "--init", "x"], "--freeze and --lora both name vlm"),
        (["--lora", "vlm"], "--lora needs --init"),
        (["--steps", "0"], "--steps must be at least 1, found 0"),
        (["--draws", "0"], "--draws must be at least 1, found 0"),
        (["--jobs", "-3"], "--jobs must be at least 1, found -3"),
        (["--warmup", "-5"], "--warmup must be at least 0, found -5"),
        (["--minutes", "-1"], "--minutes must be at least 0, found -1.0"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0, found -1.0"),
        (["--final-learning-rate", "7"], "--final-learning-rate must be from 0 to 1, found 7.0"),
        (["--noise-beta", "-1"], "--noise-beta must be from 0 to 4, found -1.0"),
        (["--cold-strength", "5"], "--cold-strength must be above 0 and at most 1, found 5.0"),
        (["--cold-strength", "0"], "--cold-strength must be above 0 and at most 1, found 0.0"),
        (["--noise-beta", "2"], "--noise-beta 2.0 is of pink noise: give --noise pink, too"),
        (["--noise-beta", "2", "--noise", "cold"], "--noise-beta 2.0 is of pink noise"),
        (["--cold", "mask"], "--cold mask is of a cold start: give --noise cold, too"),
        (["--cold-strength", "0.5", "--noise", "white"], "--cold-strength 0.5 is of a cold start: give --noise cold"),
        (["--idle", "nan"], "--idle must be at least 0, found nan"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(words, message):
    with pytest.raises(OptionsError, match=message):
        parse(["--bags", "a", "--robot", "b", "--output", "c", *words]).parts()


def test_options_of_a_noise_source_go_with_it():
    words = ["--bags", "a", "--robot", "b", "--output", "c"]
    assert parse([*words, "--noise", "pink", "--noise-beta", "2"]).noise_beta == 2
    assert parse([*words, "--noise", "cold", "--cold", "mask", "--cold-strength", "0.5"]).cold == "mask"
    assert parse([*words, "--noise-beta", "1"]).noise is None  # as options.yaml writes it


def test_shards_of_one_process_are_told_to_be_none(data, tmp_path, capsys):
    assert main(kit.arguments(data, tmp_path / "out", steps=1, shard=True)) == 0
    assert "--shard shares nothing out: this is one process (torchrun starts several)" in capsys.readouterr().out


def test_options_come_from_a_file_and_the_command_line_has_the_last_word(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("bags: a\nrobot: b\noutput: c\nsteps: 7\naugment: false\nfreeze: [vision, vlm]\nhorizon: null\n")
    options = parse(["--config", str(path), "--steps", "9"])
    assert (options.steps, options.augment, options.freeze, options.horizon) == (9, False, ("vision", "vlm"), None)
    assert parse([f"--config={path}", "--augment"]).augment
    for text, message in (("speed: 3", "unknown option speed, allowed: bags"), ("[1, 2]", "must hold a mapping"),
                          ("a: b: c", "not YAML")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(OptionsError, match=message):
            parse(["--config", str(path)])
    with pytest.raises(OptionsError, match="No such file"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps: many", "steps must be a whole number, found 'many'"),
        ("steps: [1, 2]", "steps must be a whole number, found [1, 2]"),
        ("steps: true", "steps must be a whole number, found True"),
        ("jobs: 1.5", "jobs must be a whole number, found 1.5"),
        ("clip: {a: 1}", "clip must be a number, found {'a': 1}"),
        ("augment: 3", "augment must be true or false, found 3"),
        ("init: true", "init must be a path, found True"),
        ("prompt: [wave]", "prompt must be text, found ['wave']"),
        ("preset: huge", "preset must be one of nano, nano05, pi0, pi05, found 'huge'"),
        ("loss_dims: 3", "loss_dims must be one of real, all, found 3"),
        ("freeze: [vision, legs]", "freeze must be one or more of vision, vlm, expert, found ['vision', 'legs']"),
        ("lora: [[vlm]]", "lora must be one or more of vlm, expert, found [['vlm']]"),
    ],
)
def test_a_wrong_value_in_the_file_is_one_line(tmp_path, capsys, line, message):
    path = tmp_path / "options.yaml"
    path.write_text(f"bags: a\nrobot: b\noutput: c\n{line}\n")
    assert main(["--config", str(path)]) == 1
    assert capsys.readouterr().err == f"error: --config {path}: {message}\n"


def test_values_of_the_file_may_be_written_as_yaml_likes_them(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("bags: 7\nrobot: b\noutput: c\nlearning_rate: 1e-3\nclip: 2\nfreeze: vlm\nprompt: --jobs\n")
    options = parse(["--config", str(path)])
    assert (str(options.bags), options.learning_rate, options.clip) == ("7", 1e-3, 2.0)
    assert (options.freeze, options.prompt) == (("vlm",), "--jobs")


def test_a_wrong_value_on_the_command_line_is_told_as_by_every_other_program(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--bags", "a", "--robot", "b", "--output", "c", "--steps", "many"])
    assert stop.value.code == 2 and "--steps" in capsys.readouterr().err
