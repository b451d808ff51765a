"""Open-loop evaluation: its numbers, its baselines, which episodes it takes, and the program."""

from __future__ import annotations

import json

import numpy as np
import pytest
import train_kit as kit

from pi0_ros.policy.policy import Policy
from pi0_ros.robot_file import load_robot
from pi0_ros.training.data import load_units
from pi0_ros.training.dataset import Dataset
from pi0_ros.training.evaluate import (
    Comparison,
    EvaluationError,
    baseline,
    compare,
    errors,
    evaluate,
    jerk,
    main,
    numbers,
    observe,
    pick_episodes,
)
from pi0_ros.training.evaluate import Options as EvaluateOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Recordings, and a run of two steps on them."""
    folder = kit.make_data(tmp_path_factory.mktemp("evaluate"))
    kit.make_run(folder, folder / "run", steps=2).run()
    return folder


def options(data, output, **changes) -> EvaluateOptions:
    chosen = {"chunks": 6, "seeds": 2, "num_steps": 2, "device": "cpu", "jobs": 1} | changes
    return EvaluateOptions(data / "bags", data / "run" / "checkpoint", output, **chosen)


def small() -> Comparison:
    """Two chunks of four actions of one joint; of the second only the first two actions are known."""
    recorded = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 6.0, 6.0]])[..., None]
    predicted = np.stack([recorded + 0.1, recorded - 0.3], axis=1)
    known = np.array([[True] * 4, [True, True, False, False]])
    return Comparison(predicted, recorded, known, np.array([[0.5], [5.0]]), np.array([[1.0], [4.0]]), [(0, 0, 0)] * 2)


def test_errors_are_means_over_seeds_and_over_what_is_known():
    comparison = small()
    found = errors(comparison.predicted, comparison.recorded, comparison.known)
    assert found["per_joint"] == pytest.approx([0.2])
    assert [row[0] for row in found["per_step"]] == pytest.approx([0.2] * 4)
    nobody = errors(comparison.predicted, comparison.recorded, comparison.known & [True, True, True, False])
    assert nobody["per_step"][3] is None


def test_the_baselines_hold_the_position_and_repeat_the_last_action():
    comparison = small()
    held = errors(baseline(comparison, "hold"), comparison.recorded, comparison.known)
    assert [row[0] for row in held["per_step"]] == pytest.approx([0.25, 1.25, 2.5, 3.5])
    repeated = errors(baseline(comparison, "repeat"), comparison.recorded, comparison.known)
    assert [row[0] for row in repeated["per_step"]] == pytest.approx([0.5, 1.5, 2.0, 3.0])
    assert repeated["per_joint"] == pytest.approx([(0 + 1 + 2 + 3 + 1 + 2) / 6])


def test_jerk_is_the_third_difference_over_dt_cubed_where_four_actions_are_known():
    cubic = (np.arange(6.0) ** 3)[None, :, None]  # third difference 6 everywhere
    assert jerk(cubic, 0.5, np.ones((1, 6), bool)) == pytest.approx([48.0])
    broken = np.concatenate([cubic[:, :4], 100 * cubic[:, 4:]], axis=1)
    assert jerk(broken, 0.5, np.arange(6)[None] < 4) == pytest.approx([48.0])
    assert jerk(cubic[:, :3], 0.5, np.ones((1, 3), bool)) == [None]


def test_the_summary_counts_spread_and_share_of_range():
    robot = load_robot_of_one_joint()
    found = numbers(small(), robot)
    assert found["spread_over_seeds"] == pytest.approx([0.2])  # 0.1 and -0.3 lie 0.2 from their mean
    assert found["error"]["policy"]["share_of_range"] == pytest.approx(0.2 / 4.0)
    assert set(found["error"]) == {"policy", "hold", "repeat"}


def load_robot_of_one_joint():
    import bag_kit

    joint = {"name": "shoulder", "position": [-2, 2], "velocity": 1, "acceleration": 1}
    return bag_kit.robot(joints=[joint])


def test_a_policy_sees_recorded_observations_and_its_chunks_stand_beside_the_recorded_ones(data):
    policy = Policy.load(data / "run" / "checkpoint", device="cpu", num_steps=2)
    robot = load_robot(data / "robot.yaml")
    units = load_units(data / "bags", robot, 28, jobs=1)
    dataset = Dataset(units, 5, cameras=("base_0_rgb",))
    sample = dataset.sample(3)
    seen = observe(robot, dataset, 3, sample)
    np.testing.assert_array_equal(seen.images["base_0_rgb"], sample["images"][0])
    assert seen.prompt == sample["prompt"] and list(seen.images) == ["base_0_rgb"]
    found = compare(policy, dataset, chunks=4, seeds=2)
    assert found.predicted.shape == (4, 2, 5, 3) and found.recorded.shape == (4, 5, 3)
    assert found.where[0] == (0, 0, 0) and found.where[-1] == dataset.where(len(dataset) - 1)
    again = compare(policy, dataset, chunks=4, seeds=2)
    np.testing.assert_array_equal(again.predicted, found.predicted)
    assert not np.array_equal(found.predicted[:, 0], found.predicted[:, 1])
    np.testing.assert_array_equal(found.last[0], found.state[0])  # nothing was commanded before the first tick
    unit, episode, tick = found.where[2]
    window = units[unit].episodes[episode]
    np.testing.assert_array_equal(found.last[2], units[unit].arrays["actions"][window["begin"] + tick - 1])


def test_only_episodes_that_were_not_trained_on_are_taken_unless_all_are_asked_for(data, tmp_path):
    assert evaluate(options(data, tmp_path / "out"))["episodes"] == 1
    assert evaluate(options(data, tmp_path / "out", all=True))["episodes"] == 3
    for path in ("evaluation.json", "evaluation.html", "shoulder.png", "elbow.png", "grip.png"):
        assert (tmp_path / "out" / path).stat().st_size > 1000
    assert not list((tmp_path / "out").glob(".*"))
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("data:image/png") == 3 and 'src="http' not in page
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["chunks"] == 6 and len(result["error"]["policy"]["per_step"]) == 5
    assert np.isfinite(result["error"]["policy"]["per_joint"]).all()


def test_what_an_earlier_run_was_trained_on_is_not_new(data):
    units = load_units(data / "bags", load_robot(data / "robot.yaml"), 28, jobs=1)
    record = data / "run" / "episodes.json"
    before = record.read_text()
    content = json.loads(before)
    try:
        record.write_text(json.dumps({name: content[name] for name in ("train", "held_out")}))  # as older runs wrote it
        assert len(pick_episodes(units, data / "run" / "checkpoint", False)[0]) == 1
        record.write_text(json.dumps({**content, "earlier": content["held_out"]}))
        with pytest.raises(EvaluationError, match="trained on every one of these episodes"):
            pick_episodes(units, data / "run" / "checkpoint", False)
    finally:
        record.write_text(before)


def test_a_joint_may_have_any_name(tmp_path, monkeypatch):
    import bag_kit

    odd = "../arm/$\\elbow$"
    monkeypatch.setattr(bag_kit, "ROBOT", bag_kit.ROBOT.replace("name: elbow", f"name: '{odd}'"))
    names = ("shoulder", odd, "grip")
    monkeypatch.setattr(bag_kit.joint_state, "__defaults__", (names, *bag_kit.joint_state.__defaults__[1:]))
    monkeypatch.setattr(bag_kit.trajectory, "__defaults__", (0, names))
    folder = kit.make_data(tmp_path / "data")
    kit.make_run(folder, folder / "run", steps=1).run()
    result = evaluate(options(folder, tmp_path / "out", chunks=2, seeds=1, num_steps=1))
    assert result["joints"] == list(names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json", "evaluation.html", "shoulder.png", ".._arm_$\\elbow$.png", "grip.png"
    }  # fmt: skip
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert f'alt="{odd}"' in page and page.count("data:image/png") == 3


def test_numbers_and_page_are_there_even_if_a_plot_cannot_be_written(data, tmp_path):
    (tmp_path / "out" / "shoulder.png").mkdir(parents=True)
    with pytest.raises(OSError, match="shoulder"):
        evaluate(options(data, tmp_path / "out", chunks=2, seeds=1, num_steps=1))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["chunks"] == 2
    assert "data:image/png" in (tmp_path / "out" / "evaluation.html").read_text()


def test_the_program_prints_a_table_and_one_line_for_what_is_wrong(data, tmp_path, capsys):
    words = ["--bags", str(data / "bags"), "--checkpoint", str(data / "run" / "checkpoint"), "--chunks", "2",
             "--num-steps", "1", "--device", "cpu", "--jobs", "1", "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "shoulder" in said and "hold" in said
    lonely = tmp_path / "moved"
    (data / "run" / "checkpoint").rename(lonely)
    try:
        for change, message in (
            ({"--checkpoint": str(lonely)}, "what this checkpoint was trained on is not known; --all"),
            ({"--checkpoint": str(tmp_path / "none")}, "no such folder"),
            ({"--checkpoint": str(lonely), "--bags": str(tmp_path / "nothing")}, "nothing"),
            ({"--checkpoint": str(lonely), "--chunks": "-1"}, "--chunks must be at least 0, found -1"),
            ({"--checkpoint": str(lonely), "--idle": "nan"}, "--idle must be at least 0, found nan"),
        ):
            changed = dict(zip(words[::2], words[1::2], strict=True)) | change
            assert main([word for pair in changed.items() for word in pair]) == 1
            captured = capsys.readouterr().err.strip().splitlines()[-1]
            assert captured.startswith("error: ") and message in captured
    finally:
        lonely.rename(data / "run" / "checkpoint")
