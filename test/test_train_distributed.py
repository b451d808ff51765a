"""Two processes train what one process trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_kit as kit

from pi0_ros.policy.bundle import load_bundle
from pi0_ros.training.distributed import World
from pi0_ros.training.options import OptionsError
from pi0_ros.training.state import alone
from pi0_ros.training.streams import step_streams

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


def start_two(words: list[str], what: tuple[str, ...] = ("-m", "pi0_ros.training.train")) -> list[subprocess.Popen]:
    """Both processes of a training run, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *what, *words]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


def state(output: Path) -> dict:
    return torch.load(sorted((output / "state").glob("step_*"))[-1] / "state.pt", weights_only=True)


@pytest.mark.parametrize("shard", [False, True], ids=["copied", "sharded"])
def test_two_processes_give_the_weights_of_one_with_the_same_batch(tmp_path, shard):
    data = kit.make_data(tmp_path)
    options = {"steps": 3, "batch": 8, "evaluate_every": 2, "rtc_max_delay": 2, "learning_rate": 1e-3}
    alone = kit.make_run(data, tmp_path / "alone", **options, accumulate=4)
    alone.run()
    ends = finish(start_two(kit.arguments(data, tmp_path / "together", **options, accumulate=2, shard=shard)))
    assert [code for code, _, _ in ends] == [0, 0], ends
    one, two = state(tmp_path / "alone"), state(tmp_path / "together")
    moved = 0.0
    fresh = kit.random_start().state_dict()
    for name, weight in one["weights"].items():
        if name.endswith("vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"):
            continue  # a softmax does not see it: its gradient is rounding, of which AdamW makes a step
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(two["average"][name], one["average"][name], atol=1e-6, rtol=0)
        moved = max(moved, (weight - fresh[name]).abs().max().item())
    assert moved > 1e-3
    assert [step for step, _ in two["losses"]] == [1, 2, 3]
    for (_, a), (_, b) in zip(one["losses"], two["losses"], strict=True):
        assert b == pytest.approx(a, abs=1e-6)
    assert two["held_out_losses"][0][1] == pytest.approx(one["held_out_losses"][0][1], abs=1e-6)
    # Only the first process spoke and wrote; the pair goes on as one process with as many pieces would.
    assert "memory forecast" in ends[0][1] and ends[1][1] == ""
    assert two["pieces"] == 4
    again = kit.make_run(data, tmp_path / "together", **options, accumulate=4)
    assert again.step == 3
    if not shard:
        return
    ends = finish(start_two(kit.arguments(data, tmp_path / "together", **options, accumulate=2, shard=shard)))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "going on from step 3" in ends[0][1]
    after = state(tmp_path / "together")
    assert not [name for name, weight in after["weights"].items() if not torch.equal(weight, two["weights"][name])]
    moments = after["optimizer"]["state"], two["optimizer"]["state"]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[1])


ENDS = """
import contextlib, sys
from pathlib import Path
import torch, train_kit
from pi0_ros.training.distributed import joined
from pi0_ros.training.sharding import shard, whole

def work(world):
    model = train_kit.random_start()
    shard(model, torch.device("cpu"), world.size)
    whole(model.state_dict())
    if sys.argv[1] == "error":
        raise ValueError("of the work")

try:
    with joined() as world:
        work(world)
except ValueError as error:
    print(error)
names = []
for file in Path("/proc/self/task").glob("*/comm"):
    with contextlib.suppress(OSError):  # a thread of another kind that ends just now
        names.append(file.read_text().strip())
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for threads where Linux lists them")
@pytest.mark.parametrize("end", ["work done", "error"])
def test_no_thread_of_the_group_outlives_it(monkeypatch, end):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    expected = "of the work\n[]\n" if end == "error" else "[]\n"
    ends = finish(start_two([end], ("-c", ENDS)))
    assert [(code, said) for code, said, _ in ends] == [(0, expected)] * 2, ends


def test_torchrun_trains_one_whole_checkpoint(tmp_path):
    data = kit.make_data(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "pi0_ros.training.train", *kit.arguments(data, tmp_path / "out", steps=2, batch=4)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(tmp_path / "out" / "checkpoint")
    assert done.stdout.count(f"checkpoint {bundle.digest} after 2 steps") == done.stdout.count(" steps: ") == 1
    assert bundle.settings.trained_steps == 2
    assert all(weight.isfinite().all() for weight in bundle.model().state_dict().values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint", "episodes.json", "loss.png", "options.yaml", "state", "tensorboard"
    ]  # fmt: skip
    assert state(tmp_path / "out")["pieces"] == 2
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1


def test_what_stops_the_first_of_two_processes_is_told_once_and_stops_both(tmp_path):
    data = kit.make_data(tmp_path)
    ends = finish(start_two(kit.arguments(data, tmp_path / "out", bags=data / "nothing")))
    assert [code for code, _, _ in ends] == [1, 1]
    errors = [[line for line in said.splitlines() if line.startswith("error: ")] for _, _, said in ends]
    assert str(data / "nothing") in errors[0][0]
    assert errors[1] == ["error: another process cannot go on; its own error says why"]
    with alone(tmp_path / "out"):
        ends = finish(start_two(kit.arguments(data, tmp_path / "out")))
    assert [code for code, _, _ in ends] == [1, 1]
    assert "another trainer is at work in this folder" in ends[0][2] and "another process" in ends[1][2]
    assert not any("Traceback" in said for _, _, said in ends)


def test_every_piece_of_every_process_draws_for_itself(tmp_path, monkeypatch):
    run = kit.make_run(kit.make_data(tmp_path), tmp_path / "out", batch=8, accumulate=2, augment=False)
    drawn = []

    def recorded(seed, step, part=0):
        drawn.append((seed, step, part))
        return step_streams(seed, step, part)

    monkeypatch.setattr("pi0_ros.training.train.step_streams", recorded)
    run.train_step(run.batches(0))
    run.world = World(rank=1, size=1)  # the second of two, as far as its pieces go
    run.train_step(run.batches(1))
    assert drawn == [(42, 0, 0), (42, 0, 1), (42, 1, 2), (42, 1, 3)]


def test_a_process_among_several_takes_its_own_pieces(tmp_path):
    data = kit.make_data(tmp_path)
    from pi0_ros.training.options import parse
    from pi0_ros.training.train import Run

    options = parse(kit.arguments(data, tmp_path / "out", batch=8, accumulate=2, augment=False))
    alone = Run(options)
    assert [len(piece.actions) for piece in alone.batches(0)] == [4, 4]
    with pytest.raises(OptionsError, match=r"--batch 8 must be a multiple of processes x --accumulate, 3 x 2"):
        options.parts(3)
    assert World().first and World().mean(torch.tensor(2.0)).item() == 2.0 and World().agreed(True)
