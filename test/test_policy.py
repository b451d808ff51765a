"""From a robot's observation to its actions: the model's own numbers, nothing computed twice, clear refusals."""

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from pi0_ros.model.config import GemmaConfig, Pi0Config, VisionConfig
from pi0_ros.model.flow import Cold, NoiseSourceError, Pink, White
from pi0_ros.model.pi0 import Pi0, preprocess_observation
from pi0_ros.policy import policy as policy_module
from pi0_ros.policy import processor
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.policy.images import resize_with_pad
from pi0_ros.policy.policy import ObservationError, Policy, PolicyError, RobotObservation
from pi0_ros.policy.processor import pick_device
from pi0_ros.policy.realtime import GuidanceSettings, guidance_weights
from pi0_ros.policy.tokenizer import ByteTokenizer
from pi0_ros.policy.transforms import limit_statistics
from pi0_ros.robot_file import load_robot
from pi0_ros.training.objective import mute_padding

ROBOT = load_robot(Path(__file__).parent.parent / "config" / "so101_demo.yaml")  # base and left wrist camera
STACK = GemmaConfig(width=32, depth=2, mlp_dim=48, num_heads=2, num_kv_heads=1, head_dim=16)
TINY = Pi0Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=14, image_size=28),
    vlm=STACK,
    expert=STACK,
    vocab_size=260,
    action_dim=8,
    action_horizon=10,
    max_token_len=120,
)
TINY05 = dataclasses.replace(TINY, pi05=True)
STATE = np.array([0.1, -0.2, 0.3, -0.4, 0.5, 0.2])
STEP = 50_000_000  # ns between two actions at 20 Hz
NOW = 1_700_000_000_000_000_000  # ns


def observation(seed=0, stamp=NOW, frame=None, state=STATE, prompt="touch the red cube"):
    rng = np.random.default_rng(seed)
    images = {slot: rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for slot in ROBOT.present_cameras}
    frames = dict.fromkeys(images, seed if frame is None else frame)
    return RobotObservation(stamp, images, frames, state, prompt)


def start(seed=0, config=TINY):
    return torch.randn(config.action_horizon, config.action_dim, generator=torch.Generator().manual_seed(seed))


def tiny(config=TINY, **settings):
    settings = BundleSettings(config, **settings)
    model = Pi0(config, generator=torch.Generator().manual_seed(0))
    return Policy(
        model, ROBOT, limit_statistics(ROBOT, settings), settings, ByteTokenizer(), digest="tiny", num_steps=4
    )


@pytest.mark.parametrize("config", [TINY, TINY05], ids=["pi0", "pi05"])
def test_the_actions_are_those_of_the_plain_model_in_robot_units(config):
    policy, seen = tiny(config), observation()
    chunk = policy.infer(seen, noise=start())
    images = np.zeros((1, 3, 28, 28, 3), np.uint8)
    for i, slot in enumerate(config.cameras[:2]):
        images[0, i] = resize_with_pad(seen.images[slot], 28)
    normalised = policy.transforms.encode(STATE)["state"]
    tokens, mask = policy.encoder.encode_padded(seen.prompt, normalised[:6])
    plain = preprocess_observation(images, [[True, True, False]], tokens[None], mask[None], normalised[None])
    model = Pi0(config, generator=torch.Generator().manual_seed(0))
    sampled = model.sample_actions(plain, num_steps=4, noise=start()[None])[0].double().numpy()
    expected = policy.transforms.decode(normalised, sampled)
    assert chunk.actions.shape == (10, 6)
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-4)
    # The first joint by hand: relative to the state, z-score pi0 and quantile pi0.5, limits -1.91 .. 1.91.
    by_hand = STATE[0] + (sampled[:, 0] * 0.955 if config is TINY else ((sampled[:, 0] + 1) / 2) * 3.82 - 1.91)
    np.testing.assert_allclose(chunk.actions[:, 0], by_hand, atol=1e-4)


def test_frames_and_prompt_are_used_once(monkeypatch):
    resized = []
    monkeypatch.setattr(policy_module, "resize_with_pad", lambda *a: resized.append(1) or resize_with_pad(*a))
    policy = tiny()
    first = policy.infer(observation(), noise=start())
    assert (first.prefix_reused, first.cameras_encoded, len(resized)) == (False, 2, 2)
    again = policy.infer(observation(state=STATE + 0.1), noise=start())
    assert (again.prefix_reused, again.cameras_encoded, len(resized)) == (True, 0, 2)
    seen = observation()
    one_new = dataclasses.replace(
        seen,
        images={**seen.images, "base_0_rgb": 255 - seen.images["base_0_rgb"]},
        frames={**seen.frames, "base_0_rgb": 9},
    )
    third = policy.infer(one_new, noise=start())
    assert (third.prefix_reused, third.cameras_encoded, len(resized)) == (False, 1, 3)
    other_prompt = policy.infer(dataclasses.replace(one_new, prompt="touch the blue cube"), noise=start())
    assert (other_prompt.prefix_reused, other_prompt.cameras_encoded) == (False, 0)
    policy.reset()
    assert policy.infer(one_new, noise=start()).cameras_encoded == 2
    # What was reused gives what would have been computed.
    np.testing.assert_array_equal(tiny().infer(one_new, noise=start()).actions, third.actions)


def test_where_the_state_is_in_the_prompt_a_new_state_is_a_new_prefix():
    policy = tiny(TINY05)
    policy.infer(observation(), noise=start())
    same, moved = (policy.infer(observation(state=state), noise=start()) for state in (STATE, STATE + 0.1))
    assert same.prefix_reused
    assert (moved.prefix_reused, moved.cameras_encoded) == (False, 0)


def test_pi05_can_do_without_any_state():
    policy = tiny(TINY05, prompt_format="pi0")
    first = policy.infer(observation(), noise=start())
    moved = policy.infer(observation(state=STATE + 0.1), noise=start())
    assert moved.prefix_reused
    expected = first.actions + [0.1, 0.1, 0.1, 0.1, 0.1, 0.0]  # the same relative actions; the gripper's is absolute
    np.testing.assert_allclose(moved.actions, expected, atol=1e-9)


def test_an_error_while_sampling_leaves_nothing_half_done(monkeypatch):
    policy = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(policy._sampler, "_denoise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            policy.infer(observation(), noise=start())
    chunk = policy.infer(observation(), noise=start())
    assert chunk.cameras_encoded == 2
    np.testing.assert_array_equal(chunk.actions, tiny().infer(observation(), noise=start()).actions)


def test_a_random_policy_is_the_same_for_the_same_seed():
    one, same, other = (Policy.random(ROBOT, TINY, seed=seed, num_steps=2) for seed in (3, 3, 4))
    assert one.digest == "random"
    first = one.infer(observation()).actions
    np.testing.assert_array_equal(first, same.infer(observation()).actions)
    assert not np.array_equal(first, other.infer(observation()).actions)
    assert not np.array_equal(first, one.infer(observation()).actions)  # the next draw


def test_a_generator_or_a_noise_decides_the_chunk():
    policy = tiny()
    draws = [policy.infer(observation(), generator=torch.Generator().manual_seed(5)).actions for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    given = [policy.infer(observation(), noise=start(2)).actions for _ in range(2)]
    np.testing.assert_array_equal(*given)
    assert not np.array_equal(draws[0], given[0])


def test_limits_become_statistics_in_model_space():
    stats = limit_statistics(ROBOT, BundleSettings(TINY))
    assert stats.state.q01.tolist()[0] == -1.91
    assert stats.state.q99[5] == pytest.approx(1.0)  # the gripper's limits are its ends: 0 open, 1 closed
    assert stats.state.mean[5] == pytest.approx(0.5)
    assert stats.state.mean[4] == pytest.approx(0.05) and stats.actions.mean[4] == 0.0  # relative
    assert stats.actions.std[0] == pytest.approx(3.82 / 4)
    assert stats.actions.q99[5] == pytest.approx(1.0)
    assert [stats.actions.q01[4], stats.actions.q99[4]] == pytest.approx([-2.79, 2.79])  # half of -2.74..2.84 each way


def test_warming_up_leaves_no_trace():
    policy = tiny()
    policy.warm_up()
    seen = observation(frame=1)  # the warm-up's own
    chunk = policy.infer(seen, generator=torch.Generator().manual_seed(0))
    assert chunk.cameras_encoded == 2
    fresh = tiny().infer(seen, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(chunk.actions, fresh.actions)


class Recorder:
    """Stands for CUDA graphs: keeps the key of each that would be captured."""

    enabled = True

    def __init__(self):
        self.keys = set()

    def run(self, key, function):
        self.keys.add(key)
        function()


def test_every_graph_that_a_tick_may_need_is_captured_in_the_warm_up():
    policy, recorder = tiny(rtc_max_delay=3), Recorder()
    policy._sampler.graphs = recorder
    policy.warm_up()
    assert {key[1] for key in recorder.keys if key[0] == "vision"} == {(0,), (1,), (0, 1)}
    captured = set(recorder.keys)
    both, one = dict.fromkeys(ROBOT.present_cameras, 1), dict.fromkeys(ROBOT.present_cameras, 1)
    one["left_wrist_0_rgb"] = 2
    for frames, executed in ((both, None), (one, None), (one, np.tile(STATE, (2, 1)))):
        seen = dataclasses.replace(observation(prompt=ROBOT.prompt.default), frames=frames)
        policy.infer(seen, executed=executed)
    assert recorder.keys == captured


def test_every_length_of_the_prompt_with_the_state_in_it_is_captured_in_the_warm_up():
    policy, recorder = tiny(TINY05, rtc_max_delay=3), Recorder()
    policy._sampler.graphs, policy._sampler.prompt_multiple = recorder, 8
    policy.warm_up()
    captured, lengths = set(recorder.keys), set()
    low, high = (np.array(ends) for ends in zip(*(joint.position for joint in ROBOT.joints), strict=True))
    for seed in range(30):
        share = np.random.default_rng(seed).uniform(0, (0.02, 0.2, 1.0)[seed % 3], size=len(low))
        seen = observation(seed=seed, state=low + share * (high - low), prompt=ROBOT.prompt.default)
        policy.infer(seen, executed=None if seed % 2 else STATE[None])
        lengths.add(policy._sampler._prompt_rows)
    assert recorder.keys == captured
    assert len(lengths) > 1


def test_latency_names_its_stages():
    latency = tiny().infer(observation()).latency
    assert set(latency) == {"preprocess", "vision", "prefix", "denoise", "total"}
    assert sum(latency.values()) - latency["total"] <= latency["total"]


def changed(**changes):
    return dataclasses.replace(observation(), **changes)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (changed(state=np.zeros(5)), "state must have 6 positions, .*, found shape \\[5\\]"),
        (changed(state=np.array([0, np.nan, 0, 0, np.inf, 0])), "state of shoulder_lift, wrist_roll is not finite"),
        (
            changed(images={"base_0_rgb": np.zeros((4, 4, 3), np.uint8)}),
            "camera 'left_wrist_0_rgb' is missing, found \\['base_0_rgb'\\]",
        ),
        (
            changed(images=dict.fromkeys(ROBOT.present_cameras, np.zeros((4, 4, 3)))),
            "camera 'base_0_rgb': expected a uint8 image \\[height, width, 3\\], found float64 \\[4, 4, 3\\]",
        ),
    ],
)
def test_a_bad_observation_is_one_clear_error(bad, error):
    policy = tiny()
    with pytest.raises(ObservationError, match=error):
        policy.infer(bad)
    assert policy.infer(observation()).cameras_encoded == 2


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise must have shape \[10, 8\], found \[3, 8\]"):
        tiny().infer(observation(), noise=torch.zeros(3, 8))


def test_a_closed_policy_says_so():
    policy = tiny()
    policy.close()
    with pytest.raises(RuntimeError, match="this policy is closed"):
        policy.infer(observation())


# --- noise sources ----------------------------------------------------------------------------------------------------


def test_the_recorded_noise_source_is_sampled_from():
    pink = tiny(noise_source=Pink(2.0).to_dict())
    draw = Pink(2.0).start((1, 10, 8), generator=torch.Generator().manual_seed(1))[0]
    np.testing.assert_array_equal(
        pink.infer(observation(), generator=torch.Generator().manual_seed(1)).actions,
        pink.infer(observation(), noise=draw).actions,
    )


def test_a_cold_start_holds_the_state_and_then_what_is_left_of_the_last_chunk():
    source = Cold("downsample", 0.2)
    policy = tiny(noise_source=source.to_dict())

    def from_trajectory(seen, trajectory):
        data = policy.transforms.encode(seen.state, trajectory)["actions"]
        return source.start((1, 10, 8), trajectory=torch.from_numpy(data).float()[None])[0]

    first = observation()
    chunk = policy.infer(first)
    start = from_trajectory(first, np.tile(STATE, (10, 1)))
    np.testing.assert_array_equal(chunk.actions, tiny().infer(first, noise=start).actions)

    left = chunk.actions[[3, 4, 5, 6, 7, 8, 9, 9, 9, 9]]
    chunk.actions[:] = 0.0  # its new owner's business
    later = observation(seed=1, stamp=NOW + 3 * STEP, state=STATE + 0.05)
    second = policy.infer(later)
    np.testing.assert_array_equal(second.actions, tiny().infer(later, noise=from_trajectory(later, left)).actions)


# --- real-time chunking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TINY05], ids=["pi0", "pi05"])
def test_trained_in_conditioning_keeps_the_committed_actions(config):
    policy = tiny(config, rtc_max_delay=4)
    free = policy.infer(observation(), noise=start())
    committed = free.actions[2:5] + 0.03
    kept = policy.infer(observation(seed=1, stamp=NOW + 2 * STEP), noise=start(), executed=committed)
    np.testing.assert_array_equal(kept.actions[:3], committed)
    assert kept.frozen == 3
    frozen = torch.from_numpy(policy.transforms.encode(STATE, committed)["actions"]).float()
    plain = tiny(config)._sampler.sample(
        {s: resize_with_pad(i, 28) for s, i in observation(seed=1).images.items()},
        policy.encoder.encode("touch the red cube", policy.transforms.encode(STATE)["state"][:6]),
        policy.transforms.encode(STATE)["state"],
        start(),
        frozen=frozen,
    )
    expected = policy.transforms.decode(policy.transforms.encode(STATE)["state"], plain.actions.double().numpy())
    np.testing.assert_allclose(kept.actions[3:], expected[3:], atol=1e-5)


@pytest.mark.parametrize("jacobian", [True, False])
def test_without_it_the_chunk_is_guided_towards_the_last_one(jacobian):
    policy = tiny()
    policy._guidance = GuidanceSettings(jacobian=jacobian)
    old = policy.infer(observation(), noise=start(1))
    later = observation(seed=1, stamp=NOW + 2 * STEP)
    apart = policy.infer(later, noise=start(2)).actions
    policy.reset()
    policy.infer(observation(), noise=start(1))
    guided = policy.infer(later, noise=start(2), executed=old.actions[2:5])
    assert guided.frozen == 3
    np.testing.assert_array_equal(guided.actions[:3], old.actions[2:5])
    before, after = (np.abs(a[3:6] - old.actions[5:8]).mean() for a in (apart, guided.actions))
    assert after < 0.7 * before


def test_padding_that_was_never_learnt_does_not_pull_at_the_joints():
    settings, model = BundleSettings(TINY, loss_dims=6), Pi0(TINY, generator=torch.Generator().manual_seed(0))
    mute_padding(model, 6)

    def guided(noise):
        policy = Policy(
            model, ROBOT, limit_statistics(ROBOT, settings), settings, ByteTokenizer(), digest="tiny", num_steps=4
        )
        old = policy.infer(observation(), noise=start(1))
        return policy.infer(observation(seed=1, stamp=NOW + 2 * STEP), noise=noise, executed=old.actions[2:5]).actions

    other = start(2)
    other[:, 6:] *= -5.0
    np.testing.assert_array_equal(guided(start(2)), guided(other))


def test_a_new_prompt_forgets_the_last_chunk():
    policy = tiny()
    policy.infer(observation(), noise=start())
    assert len(policy._left_of_last(observation())) == 10
    assert len(policy._left_of_last(observation(stamp=NOW + 2 * STEP))) == 8
    assert len(policy._left_of_last(observation(stamp=NOW + 2 * STEP, prompt="stop"))) == 0
    assert len(policy._left_of_last(observation(stamp=NOW + 99 * STEP))) == 0
    assert len(policy._left_of_last(observation(stamp=NOW - STEP))) == 0


@pytest.mark.parametrize("executed", [np.zeros((10, 6)), np.zeros((2, 5)), np.full((2, 6), np.nan), np.zeros(6)])
def test_impossible_committed_actions_are_refused(executed):
    with pytest.raises(ObservationError, match="executed actions"):
        tiny().infer(observation(), executed=executed)


def test_no_committed_actions_is_a_free_chunk():
    policy = tiny()
    free, none = (policy.infer(observation(), noise=start(), executed=e) for e in (None, np.empty((0, 6))))
    np.testing.assert_array_equal(free.actions, none.actions)
    assert none.frozen == 0


def test_guidance_falls_over_what_is_known():
    linear = guidance_weights(2, 6, 10, "linear")
    np.testing.assert_allclose(linear, [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])
    exp = guidance_weights(2, 6, 10, "exp")
    np.testing.assert_allclose(exp[:4], [1, 1, 0.8 * np.expm1(0.8) / (np.e - 1), 0.6 * np.expm1(0.6) / (np.e - 1)])
    assert guidance_weights(2, 6, 10, "ones").tolist() == [1.0] * 6 + [0.0] * 4
    assert guidance_weights(2, 6, 10, "zeros").tolist() == [1.0] * 2 + [0.0] * 8
    assert guidance_weights(3, 20, 10, "ones").tolist() == [1.0] * 10
    with pytest.raises(ValueError, match="schedule must be one of exp, linear, ones, zeros, found 'cubic'"):
        GuidanceSettings(schedule="cubic")


# --- the checkpoint folder --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    settings = BundleSettings(TINY)
    model = Pi0(TINY, generator=torch.Generator().manual_seed(0))
    save_bundle(tmp_path / "checkpoint", model, settings, ROBOT, limit_statistics(ROBOT, settings))
    return tmp_path / "checkpoint"


def test_a_checkpoint_folder_gives_the_policy_that_was_saved(folder):
    loaded = Policy.load(folder, num_steps=4)
    assert loaded.robot == ROBOT
    assert len(loaded.digest) == 12
    actions = loaded.infer(observation(), noise=start()).actions
    np.testing.assert_array_equal(actions, tiny().infer(observation(), noise=start()).actions)


def test_another_noise_source_than_the_recorded_one_is_refused_unless_forced(folder):
    with pytest.raises(NoiseSourceError, match="trained with noise source {'source': 'white'}"):
        Policy.load(folder, num_steps=1, noise_source=Pink(1.0))
    Policy.load(folder, num_steps=1, noise_source=White())
    recorded, forced = (
        Policy.load(folder, num_steps=1, **more) for more in ({}, {"noise_source": Pink(1.0), "force_noise": True})
    )
    draws = [
        policy.infer(observation(), generator=torch.Generator().manual_seed(7)).actions for policy in (recorded, forced)
    ]
    assert np.abs(draws[0] - draws[1]).max() > 1e-3


def test_a_joint_that_never_moved_in_training_is_pointed_out(tmp_path, caplog):
    settings, stats = BundleSettings(TINY), limit_statistics(ROBOT, BundleSettings(TINY))
    std = stats.state.std.copy()
    std[2] = 0.0
    still = dataclasses.replace(stats, state=dataclasses.replace(stats.state, std=std))
    save_bundle(tmp_path / "checkpoint", Pi0(TINY), settings, ROBOT, still)
    Policy.load(tmp_path / "checkpoint", num_steps=1)
    assert "(almost) never changed in training, so any change will seem huge: state[2]" in caplog.text


def test_a_camera_that_lies_otherwise_than_in_training_is_pointed_out(folder, caplog):
    Policy.load(folder, robot=ROBOT, num_steps=1)
    assert not caplog.text
    (slot, camera), *_ = ROBOT.present_cameras.items()
    turned = {**ROBOT.cameras, slot: camera.model_copy(update={"rotate": 180})}
    Policy.load(folder, robot=ROBOT.model_copy(update={"cameras": turned}), num_steps=1)
    assert f"right only if the robot is another than in training: {slot}.rotate: {camera.rotate} in" in caplog.text


def test_another_robot_is_refused_with_what_differs(folder):
    moved = ROBOT.model_copy(update={"max_skew": 0.05})  # where a robot may differ
    assert Policy.load(folder, robot=moved, num_steps=1).robot.max_skew == 0.05
    gripper = ROBOT.joints[5].model_copy(update={"open": -0.174, "closed": 1.745})
    other = ROBOT.model_copy(update={"control_rate": 50, "joints": (*ROBOT.joints[:5], gripper)})
    with pytest.raises(PolicyError) as caught:
        Policy.load(folder, robot=other)
    for fault in (
        "control_rate: 20 Hz in the checkpoint, 50 Hz in the robot file",
        "joint 'gripper' open: 1.745 in the checkpoint, -0.174 in the robot file",
    ):
        assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("robot", "with_stats", "error"),
    [(None, True, "holds no robot file, give one"), (ROBOT, False, "holds no normalisation statistics")],
)
def test_a_folder_without_robot_or_statistics_does_not_run(tmp_path, robot, with_stats, error):
    settings = BundleSettings(TINY)
    stats = limit_statistics(ROBOT, settings) if with_stats else None
    save_bundle(tmp_path / "checkpoint", Pi0(TINY), settings, robot, stats)
    with pytest.raises(PolicyError, match=error):
        Policy.load(tmp_path / "checkpoint")
    if robot is None:
        assert Policy.load(tmp_path / "checkpoint", robot=ROBOT, num_steps=1).robot == ROBOT


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"preset": "huge"}, "preset must be one of pi0, pi05, nano, nano05, found 'huge'"),
        ({"preset": TINY, "device": "tpu!"}, "device must be auto, cpu, cuda or cuda:N, found 'tpu!'"),
        ({"preset": TINY, "dtype": "float16"}, "dtype must be one of auto, float32, bfloat16, float8, found "),
        ({"preset": TINY, "dtype": "float8", "device": "cpu"}, "dtype float8 needs an NVIDIA GPU .*, device is cpu"),
        ({"preset": TINY, "device": "cuda:99"}, "device 'cuda:99' was asked for, torch sees"),
        ({"preset": dataclasses.replace(TINY, cameras=("base_0_rgb",))}, "camera left_wrist_0_rgb of .* has no slot"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, error):
    with pytest.raises(PolicyError, match=error):
        Policy.random(ROBOT, **arguments)


def test_a_cpu_takes_bfloat16_by_itself_for_large_models_where_it_has_it(monkeypatch):
    for capable, parameters, dtype in (
        (True, 10**8, torch.bfloat16),
        (True, 10**6, torch.float32),
        (False, 10**8, torch.float32),
    ):
        monkeypatch.setattr("pi0_ros.policy.processor.has_bfloat16", lambda _, capable=capable: capable)
        assert pick_device("cpu", "auto", parameters) == (torch.device("cpu"), dtype)
        assert pick_device("cpu", "float32", parameters)[1] == torch.float32


@pytest.mark.parametrize(
    ("vendor", "kind", "board", "there"),
    [
        ("0x10de", "0x030200", b"", True),  # a data centre's card has no display
        ("0x10de", "0x040300", b"", False),  # its sound
        ("0x1002", "0x030000", b"", False),  # another maker's
        ("", "", b"nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0", True),  # a Jetson
    ],
)
def test_a_gpu_is_found_with_or_without_a_driver(vendor, kind, board, there, tmp_path):
    device, compatible = tmp_path / "sys/bus/pci/devices/0000:01:00.0", tmp_path / "proc/device-tree/compatible"
    if vendor:
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    if board:
        compatible.parent.mkdir(parents=True)
        compatible.write_bytes(board)
    assert processor.has_nvidia_gpu(tmp_path) == there
    assert not processor.has_nvidia_gpu(tmp_path / "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("there", "visible", "told"), [(True, None, True), (True, "0", True), (True, "", False), (False, None, False)]
)
def test_a_gpu_that_torch_cannot_use_is_told_once_with_the_reason(there, visible, told, monkeypatch, caplog):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it")

    monkeypatch.setattr(processor, "has_nvidia_gpu", lambda: there)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    processor._tell_of_idle_gpu.cache_clear()
    assert [pick_device("auto", "auto")[0] for _ in range(2)] == [torch.device("cpu")] * 2
    line = (
        "this machine has an NVIDIA GPU that torch does not use, so the CPU does the work: The NVIDIA driver on your "
        "system is too old (found version 12020). Please update it"
    )
    assert caplog.messages == [line] * told
    with pytest.raises(PolicyError, match="'cuda' was asked for, torch sees 0 GPUs: The NVIDIA driver .* is too old"):
        pick_device("cuda", "auto")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(PolicyError, match=r"torch sees 0 GPUs: torch 2\S* is a build without CUDA$"):
        pick_device("cuda", "auto")


def test_bfloat16_stays_close():
    exact = Policy.random(ROBOT, TINY, num_steps=4).infer(observation(), noise=start())
    coarse = Policy.random(ROBOT, TINY, num_steps=4, dtype="bfloat16").infer(observation(), noise=start())
    assert 0 < np.abs(coarse.actions - exact.actions).max() < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_close_gives_the_gpus_memory_back():
    left = []
    for _ in range(3):  # the first time, libraries allocate workspaces that stay
        policy = Policy.random(ROBOT, preset=TINY, device="cuda")
        policy.warm_up()
        policy.infer(observation())
        policy.close()
        del policy
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[2]
