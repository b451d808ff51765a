"""What a user can get wrong with data: one clear line, exit code 1, and nothing half-written taken for whole."""

from __future__ import annotations

import errno
from pathlib import Path

import bag_kit
import numpy as np
import pytest
import torch
import train_kit as kit
import yaml

from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.training import cache as cache_module
from pi0_ros.training.bags import BagError
from pi0_ros.training.data import load_units, require_plausible
from pi0_ros.training.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kit.make_data(tmp_path_factory.mktemp("bad"))


def refusal(capsys, words: list[str]) -> str:
    """The one line that the program says before it exits with 1."""
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    line = captured.err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    assert line.startswith("error: ")
    return line


def bag_with(folder: Path, change) -> Path:
    """A folder with one recording, whose messages `change` has seen."""
    items = [item for item in map(change, bag_kit.episode(seconds=2.0)) if item is not None]
    bag_kit.write_bag(folder / "bags" / "episode", items)
    return folder / "bags"


def test_a_folder_without_recordings_is_named(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", bags=tmp_path / "empty"))
    assert str(tmp_path / "empty") in line
    assert str(tmp_path / "none") in refusal(capsys, kit.arguments(data, tmp_path / "out", bags=tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_a_missing_camera_is_named(data, tmp_path, capsys):
    bags = bag_with(tmp_path, lambda item: None if item.topic.startswith("/cam") else item)
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", bags=bags))
    assert "none of 1 recordings fits 'bench': camera base_0_rgb" in line and "/cam/image_raw" in line
    assert not (tmp_path / "out").exists()


def renamed(item):
    if item.topic == "/joint_states":
        item.message.name[:] = ["shoulder", "ellbow", "grip"]
    return item


def test_wrong_joint_names_are_told_with_those_found(data, tmp_path, capsys):
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", bags=bag_with(tmp_path, renamed)))
    assert "state: no message names joint elbow; names found: ellbow, grip, shoulder" in line


def not_a_number(item):
    if item.topic == "/joint_states":
        item.message.position[1] = np.nan
    return item


def test_joints_that_are_not_numbers_are_told(data, tmp_path, capsys):
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", bags=bag_with(tmp_path, not_a_number)))
    assert "is NaN or infinite in 100.0% of the messages" in line and "elbow" in line


def test_one_bad_recording_costs_only_itself(tmp_path, capsys):
    data = kit.make_data(tmp_path)
    bag_kit.write_bag(data / "bags" / "bad", [renamed(item) for item in bag_kit.episode(seconds=2.0)])
    assert main(kit.arguments(data, tmp_path / "out", steps=1)) == 0
    said = capsys.readouterr().out
    assert f"left out {data / 'bags' / 'bad'}: state: no message names joint elbow" in said
    assert "training on 2 episodes" in said


def test_text_that_is_no_robot_file_is_refused(data, tmp_path, capsys):
    for text, message in (("Dear trainer, please use my robot.", "expected a mapping"), ("a: [b", "not YAML")):
        (tmp_path / "robot.yaml").write_text(text)
        line = refusal(capsys, kit.arguments(data, tmp_path / "out", robot=tmp_path / "robot.yaml"))
        assert str(tmp_path / "robot.yaml") in line and message in line
    (tmp_path / "options.yaml").write_text("Dear trainer")
    assert "must hold a mapping of options" in refusal(capsys, ["--config", str(tmp_path / "options.yaml")])


def test_a_disk_that_fills_while_frames_are_cached_leaves_nothing_half_written(tmp_path, capsys, monkeypatch):
    data = kit.make_data(tmp_path)
    opened = cache_module._frames_file

    def full(path: Path):
        stream = opened(path)

        class Full:
            def __init__(self) -> None:
                self.written = 0

            def write(self, content) -> int:
                self.written += 1
                if self.written > 3:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return stream.write(content)

            def __getattr__(self, name):
                return getattr(stream, name)

        return Full()

    monkeypatch.setattr(cache_module, "_frames_file", full)
    line = refusal(capsys, kit.arguments(data, tmp_path / "out"))
    assert "the cache cannot be written: No space left on device" in line and "--cache" in line
    assert list((data / "bags" / ".pi0_cache").iterdir()) == []
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(kit.arguments(data, tmp_path / "out", steps=1)) == 0


def test_a_disk_that_fills_while_a_state_is_saved_leaves_the_state_before(tmp_path, capsys, monkeypatch):
    data = kit.make_data(tmp_path)
    whole = torch.save

    def full(content, stream):
        if content["step"] > 2:
            stream.write(b"half of a state")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(content, stream)

    monkeypatch.setattr("pi0_ros.training.state.torch.save", full)
    assert "No space left on device" in refusal(capsys, kit.arguments(data, tmp_path / "out", steps=4, save_every=1))
    assert sorted(p.name for p in (tmp_path / "out" / "state").iterdir()) == ["step_00000001", "step_00000002"]
    monkeypatch.undo()
    assert main(kit.arguments(data, tmp_path / "out", steps=4, save_every=1)) == 0
    assert "going on from step 2" in capsys.readouterr().out


def test_a_robot_that_the_model_has_no_place_for_is_refused(data, tmp_path, capsys):
    from dataclasses import replace

    narrow = replace(kit.TINY, cameras=("left_wrist_0_rgb",))
    save_bundle(tmp_path / "narrow", kit.random_start(narrow), BundleSettings(narrow), None, None)
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", init=tmp_path / "narrow"))
    assert "camera base_0_rgb of robot 'bench' has no slot in the model, which has left_wrist_0_rgb" in line
    thin = replace(kit.TINY, action_dim=2)
    save_bundle(tmp_path / "thin", kit.random_start(thin), BundleSettings(thin), None, None)
    assert "'bench' has 3 joints, the model 2 action dimensions" in refusal(
        capsys, kit.arguments(data, tmp_path / "out", init=tmp_path / "thin")
    )


def test_a_model_of_words_without_its_tokenizer_is_refused(data, tmp_path, capsys):
    from dataclasses import replace

    wordy = replace(kit.TINY, vocab_size=300)
    save_bundle(tmp_path / "wordy", kit.random_start(wordy), BundleSettings(wordy), None, None)
    line = refusal(capsys, kit.arguments(data, tmp_path / "out", init=tmp_path / "wordy"))
    assert "a model of 300 tokens needs the tokenizer it was made for: give --tokenizer" in line


def test_a_prompt_that_pushes_the_state_out_is_refused(data, tmp_path, capsys):
    from dataclasses import replace

    # "Task: wave, State: 255 255 255" of bytes and the beginning are 31 tokens, and 10 follow
    for room, told in ((30, "error"), (31, "warning"), (40, "warning"), (41, None)):
        config = replace(kit.TINY, pi05=True, max_token_len=room)
        save_bundle(tmp_path / f"{room}", kit.random_start(config), BundleSettings(config), None, None)
        words = kit.arguments(data, tmp_path / f"out{room}", init=tmp_path / f"{room}", prompt="wave", steps=1)
        if told == "error":
            line = refusal(capsys, words)
            assert "prompt 'wave' has 41 tokens with the state, the model reads 30: some of the state would be" in line
            assert "give a shorter --prompt" in line
            assert not (tmp_path / f"out{room}").exists()
            continue
        assert main(words) == 0
        warning = f"warning: prompt 'wave' has 41 tokens with the state, the model reads the first {room} alone"
        assert (warning in capsys.readouterr().out) == (told == "warning")


def test_a_prompt_whose_end_is_not_read_is_told(data, tmp_path, capsys):
    assert main(kit.arguments(data, tmp_path / "out", prompt="point at it", steps=1)) == 0
    told = "warning: prompt 'point at it' has 13 tokens, the model reads the first 12 alone\n"
    assert told in capsys.readouterr().out


def held(folder: Path, rate: int, kind: str = "Float64MultiArray", lead: float = 0.0) -> tuple[Path, Path]:
    """Commands, `rate` a second, each due after `lead` s, and a robot file of 10 Hz that reads them."""
    items = [item for item in bag_kit.episode(seconds=4.0) if item.topic != "/command"]
    for i in range(rate * 4):
        ns, target = bag_kit.START + i * bag_kit.SECOND // rate, [i / rate / 4, 0.5, 1.0]
        items.append(bag_kit.floats(ns, target) if kind[0] == "F" else bag_kit.trajectory(ns, [(lead, target)]))
    bag_kit.write_bag(folder / "bags" / "episode", items)
    robot = yaml.safe_load(bag_kit.ROBOT) | {"actions": {"topic": "/command", "type": kind}}
    (folder / "robot.yaml").write_text(yaml.safe_dump(robot))
    return folder / "bags", folder / "robot.yaml"


@pytest.mark.parametrize(
    ("rate", "kind", "lead", "fine"),
    [
        (4, "Float64MultiArray", 0.0, False),
        (10, "Float64MultiArray", 0.0, True),
        (30, "Float64MultiArray", 0.0, True),
        (3, "JointTrajectory", 0.0, False),  # each is due at once, and held
        (3, "JointTrajectory", 0.33, True),  # each leads to the next in a straight line
    ],
)
def test_actions_recorded_at_half_the_control_rate_are_refused(data, tmp_path, capsys, rate, kind, lead, fine):
    bags, robot = held(tmp_path, rate, kind, lead)
    words = kit.arguments(data, tmp_path / "out", bags=bags, robot=robot, steps=1)
    if fine:
        assert main(words) == 0
        return
    line = refusal(capsys, words)
    assert "control_rate is 10 Hz" in line and "times a second" in line


def test_a_rate_is_judged_by_the_changes_of_commands_not_by_a_resting_arm(tmp_path):
    bags, robot_file = held(tmp_path, 10)
    from pi0_ros.robot_file import load_robot

    robot = load_robot(robot_file)
    units = load_units(bags, robot, 28, jobs=1)
    require_plausible(units, robot)
    unit = units[0]
    slow = np.repeat(np.arange(20.0), 2)[: len(unit.arrays["actions"])] / 20
    unit.arrays["actions"] = np.stack([slow, slow, slow], axis=1)
    with pytest.raises(BagError, match="change 5 times a second"):
        require_plausible(units, robot)
    unit.arrays["actions"] = np.where(np.arange(len(slow)) < 8, slow, 0.2)[:, None].repeat(3, axis=1)
    require_plausible(units, robot)  # too few changes to say


def test_a_device_that_is_not_there_is_told(data, tmp_path, capsys):
    assert "'warp'" in refusal(capsys, kit.arguments(data, tmp_path / "out", device="warp"))
    if not torch.cuda.is_available():
        assert "'cuda:7'" in refusal(capsys, kit.arguments(data, tmp_path / "out", device="cuda:7"))


def test_an_output_that_cannot_be_written_is_told(data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(capsys, kit.arguments(data, tmp_path / "file" / "out"))
