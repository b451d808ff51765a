"""A policy: what a robot sees, feels and was told -> an action chunk in its own units.

A `Policy` belongs to one thread. It resizes and encodes a frame once, tokenises a prompt once, and reuses the whole
prefix where neither is new.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pi0_ros.model.config import PRESETS, Pi0Config
from pi0_ros.model.flow import Cold, NoiseSource, noise_source_from_dict, require_same_source
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, load_bundle, misfit
from pi0_ros.policy.guided import Guidance
from pi0_ros.policy.images import ImageError, check_image, resize_with_pad
from pi0_ros.policy.processor import MANY_PARAMETERS, PolicyError, pick_device
from pi0_ros.policy.prompt import PromptEncoder
from pi0_ros.policy.realtime import GuidanceSettings, guidance_weights
from pi0_ros.policy.sampler import Sampler
from pi0_ros.policy.statistics import NormStats
from pi0_ros.policy.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from pi0_ros.policy.transforms import Group, build_transforms, limit_statistics
from pi0_ros.robot import Robot

_log = logging.getLogger(__name__)


class ObservationError(ValueError):
    """An observation that the policy cannot act on; the message names the camera or joint."""


@dataclass(frozen=True)
class RobotObservation:
    """What the robot sees, feels and was told at one instant."""

    stamp: int  # ns, the instant; a chunk's first action is meant for it
    images: Mapping[str, np.ndarray]  # slot -> uint8 [H, W, 3] RGB, oriented as the robot file says
    frames: Mapping[str, int]  # slot -> identity of the frame (its stamp in ns): the same id, the same pixels
    state: np.ndarray  # float64 [J], robot units, model order
    prompt: str


@dataclass(frozen=True)
class Chunk:
    """Actions to execute, the first at the observation's stamp, and how they came about."""

    actions: np.ndarray  # float64 [H, J], absolute, robot units, model order
    prefix_reused: bool
    cameras_encoded: int
    num_steps: int
    frozen: int  # how many of the first actions are those that were committed before
    latency: dict[str, float] = field(default_factory=dict)  # s: preprocess, vision, prefix, denoise, total


class Policy:
    """See `Policy.load` and `Policy.random`.

    Attributes: robot, config (the model's sizes), settings (the checkpoint's), digest ("random" for untrained weights),
    num_steps (Euler steps), transforms (robot units <-> model space), runs_on (device and dtype, in words), threads
    (that torch should use; None: its own number).
    """

    def __init__(
        self,
        model: Pi0,
        robot: Robot,
        stats: NormStats,
        settings: BundleSettings,
        tokenizer: Tokenizer,
        *,
        digest: str,
        device: str = "auto",
        dtype: str = "auto",
        num_steps: int = 10,
        guidance: GuidanceSettings | None = None,
        noise_source: NoiseSource | None = None,
        force_noise: bool = False,
        seed: int = 0,
    ) -> None:
        if fault := misfit(settings, robot):
            raise PolicyError(fault)
        self.robot, self.config, self.settings, self.digest = robot, settings.model, settings, digest
        self.num_steps = num_steps
        self.transforms: Group = build_transforms(robot, stats, settings)
        self.encoder = PromptEncoder(
            tokenizer, settings.prompt_format, self.config.max_token_len, self.config.action_dim
        )
        self._source = require_same_source(noise_source_from_dict(settings.noise_source), noise_source, force_noise)
        self._guidance = guidance or GuidanceSettings()
        self._generator = torch.Generator().manual_seed(seed)  # for calls that bring neither noise nor generator
        self._slots = tuple(slot for slot in self.config.cameras if slot in robot.present_cameras)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        device, dtype = pick_device(device, dtype, parameters)
        # A large model on a CPU wants every core. All else is over in microseconds, and threads that wait for one
        # another make it seconds where other programs hold the cores.
        self.threads = None if device.type == "cpu" and parameters >= MANY_PARAMETERS else 1
        self.runs_on = f"{device} in {str(dtype).removeprefix('torch.')}"
        self._sampler: Sampler | None = Sampler(
            model, cameras=self._slots, num_steps=num_steps, dtype=dtype, device=device
        )
        self.reset()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        robot: Robot | None = None,
        device: str = "auto",
        dtype: str = "auto",
        num_steps: int = 10,
        guidance: GuidanceSettings | None = None,
        noise_source: NoiseSource | None = None,
        force_noise: bool = False,
        seed: int = 0,
    ) -> Policy:
        """The policy of a checkpoint folder.

        Args:
            robot: the robot to run on, by default that of the folder. Topics and limits may differ from the folder's.
            device: "auto" (a GPU where there is one), or torch's name of one.
            dtype: "bfloat16", "float32" or "auto": bfloat16 on a GPU, and on a CPU that has it for a model whose time
                goes into its weights; else float32. "float8" on a GPU that has it: docs/benchmarks.md tells its error.
            num_steps: Euler steps of the flow.
            guidance: of real-time chunking, where the checkpoint was not trained for it.
            noise_source: what the flow starts from; another than the checkpoint was trained with must be forced.

        Raises:
            NoiseSourceError: `noise_source` is not the recorded one and `force_noise` is not given.
            PolicyError: the robot contradicts the folder's, or a robot or statistics are nowhere to be found.
            CheckpointError, TokenizerError: the folder is damaged or incomplete.
        """
        bundle = load_bundle(folder)
        if bundle.stats is None:
            raise PolicyError(f"{folder}: holds no normalisation statistics, so it can be trained from but not run")
        if robot is None and bundle.robot is None:
            raise PolicyError(f"{folder}: holds no robot file, give one")
        if robot is not None and bundle.robot is not None:
            if faults := bundle.robot.contradictions(robot):
                raise PolicyError(f"{folder}: trained for another robot than {robot.name!r}: {'; '.join(faults)}")
            if found := bundle.robot.differences(robot):
                _log.warning("%s: right only if the robot is another than in training: %s", folder, "; ".join(found))
        if constant := bundle.stats.constant():
            _log.warning(
                "%s: (almost) never changed in training, so any change will seem huge: %s", folder, ", ".join(constant)
            )
        tokenizer = load_tokenizer(bundle.tokenizer, bundle.settings.model.vocab_size)
        pick_device(device, dtype)  # a wrong name is told before gigabytes are read
        return cls(
            bundle.model(),  # on the CPU, memory-mapped, as stored: the sampler takes and casts what it needs
            robot or bundle.robot,
            bundle.stats,
            bundle.settings,
            tokenizer,
            digest=bundle.digest,
            device=device,
            dtype=dtype,
            num_steps=num_steps,
            guidance=guidance,
            noise_source=noise_source,
            force_noise=force_noise,
            seed=seed,
        )

    @classmethod
    def random(
        cls,
        robot: Robot,
        preset: str | Pi0Config = "nano",
        seed: int = 0,
        *,
        device: str = "auto",
        dtype: str = "auto",
        num_steps: int = 10,
        guidance: GuidanceSettings | None = None,
    ) -> Policy:
        """An untrained policy: random weights by `seed`, statistics from the joints' limits, byte-level tokens.

        It moves the robot, within bounds and to no purpose: for tests, timing and dry runs. PolicyError for an unknown
        preset, or one that has no place for the robot.
        """
        if isinstance(preset, str) and preset not in PRESETS:
            raise PolicyError(f"preset must be one of {', '.join(PRESETS)}, found {preset!r}")
        settings = BundleSettings(preset if isinstance(preset, Pi0Config) else PRESETS[preset])
        model = Pi0(settings.model, generator=torch.Generator().manual_seed(seed))
        return cls(
            model,
            robot,
            limit_statistics(robot, settings),
            settings,
            ByteTokenizer(),
            digest="random",
            device=device,
            dtype=dtype,
            num_steps=num_steps,
            guidance=guidance,
            seed=seed,
        )

    def infer(
        self,
        observation: RobotObservation,
        *,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | np.ndarray | None = None,
        executed: np.ndarray | None = None,
        following: np.ndarray | None = None,
        guided: bool = False,
    ) -> Chunk:
        """The chunk for an observation.

        Args:
            generator: draws the start of the flow; by default the policy's own, seeded once.
            noise: the start itself, [H, A] in model space, instead of a draw.
            executed: float64 [d, J], robot units: the actions from the observation's stamp on that will have been
                executed before this chunk can take over (real-time chunking); the chunk begins with them.
            following: float64 [n, J], robot units: what the chunk in execution would do after those, which guided
                in-painting leans on; by default the rest of the last chunk, if it was for the same prompt.
            guided: keep `executed` by guided in-painting even where training taught the clean prefix.

        Raises:
            ObservationError: a camera is missing, an image, the state, `executed` or `following` has the wrong shape
                or is not finite.
        """
        if self._sampler is None:
            raise RuntimeError("this policy is closed")
        begin = time.perf_counter()
        state = self._checked_state(observation.state)
        committed = self._checked_actions("executed", executed, self.config.action_horizon)
        images = {slot: self._image(observation, slot) for slot in self._slots}
        data = self.transforms.encode(state)
        tokens = self.encoder.encode(observation.prompt, data["state"][: len(state)])
        left = self._left_of_last(observation)
        start = self._start(state, left, generator, noise)
        if following is None:
            following = left[len(committed) :]
        following = self._checked_actions("following", following)
        frozen, guidance = self._conditions(state, committed, following, guided)
        preprocessed = time.perf_counter()
        try:
            sample = self._sampler.sample(
                images,
                tokens,
                data["state"],
                start,
                frames={slot: observation.frames[slot] for slot in self._slots},
                frozen=frozen,
                guidance=guidance,
            )
        except BaseException:
            self.reset()  # what the sampler holds may be half of this observation
            raise
        actions = self.transforms.decode(data["state"], sample.actions.double().numpy())
        actions[: len(committed)] = committed
        self._last = (observation.stamp, observation.prompt, actions.copy())
        latency = {"preprocess": preprocessed - begin, **sample.latency, "total": time.perf_counter() - begin}
        return Chunk(actions, sample.prefix_reused, sample.cameras_encoded, self.num_steps, len(committed), latency)

    def warm_up(self) -> None:
        """Run what a tick may need once, so that the first real observation takes no longer than the next.

        With CUDA graphs that is every set of cameras that may be new, and every length of the prompt. Guided
        real-time chunking is left out: it costs a backward pass, which many robots never ask for.
        """
        middle = np.array([joint.middle for joint in self.robot.joints])
        images = {slot: np.zeros((480, 640, 3), np.uint8) for slot in self._slots}
        generator = torch.Generator().manual_seed(0)
        committed = middle[None] if self.settings.rtc_max_delay else None
        if self._sampler.graphs.enabled:  # first: the chunks below leave the buffers of a camera's frame size behind
            self._sampler.capture(frozen=committed is not None)
        for stamp, executed in enumerate((None, committed)):
            frames = dict.fromkeys(self._slots, stamp)
            observation = RobotObservation(0, images, frames, middle, self.robot.prompt.default)
            self.infer(observation, generator=generator, executed=executed)
        self.reset()

    def reset(self) -> None:
        """Forget frames, prefix and the last chunk, as after a clock reset or at a new episode."""
        self._prepared: dict[str, tuple[int, np.ndarray]] = {}
        self.forget_chunk()
        if self._sampler is not None:
            self._sampler.reset()

    def forget_chunk(self) -> None:
        """Forget the last chunk alone: a cold start begins from the state, nothing follows what is executed."""
        self._last: tuple[int, str, np.ndarray] | None = None  # stamp, prompt, actions in robot units

    def close(self) -> None:
        """Give the weights' memory back; `infer` is an error from then on."""
        self._sampler = None
        self.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- the observation ----------------------------------------------------------------------------------------------

    def _checked_state(self, state: np.ndarray) -> np.ndarray:
        names, state = self.robot.joint_names, np.asarray(state, np.float64)
        if state.shape != (len(names),):
            raise ObservationError(
                f"state must have {len(names)} positions, {list(names)}, found shape {list(state.shape)}"
            )
        if bad := [names[i] for i in np.flatnonzero(~np.isfinite(state))]:
            raise ObservationError(f"state of {', '.join(bad)} is not finite")
        return state

    def _checked_actions(self, name: str, actions: np.ndarray | None, below: int | None = None) -> np.ndarray:
        joints = len(self.robot.joints)
        actions = np.empty((0, joints)) if actions is None else np.asarray(actions, np.float64)
        if actions.ndim != 2 or actions.shape[1] != joints or (below is not None and len(actions) >= below):
            rows = "any" if below is None else f"fewer than {below}"
            raise ObservationError(f"{name} actions must be [{rows}, {joints}], found shape {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise ObservationError(f"{name} actions are not finite")
        return actions

    def _image(self, observation: RobotObservation, slot: str) -> np.ndarray:
        """uint8 of a camera as the sampler takes it, prepared once a frame."""
        if slot not in observation.images or slot not in observation.frames:
            raise ObservationError(f"camera {slot!r} is missing, found {sorted(observation.images)}")
        frame, (known, image) = observation.frames[slot], self._prepared.get(slot, (None, None))
        if image is None or known != frame:
            try:
                image = self._prepare(observation.images[slot])
            except ImageError as error:
                raise ObservationError(f"camera {slot!r}: {error}") from None
            self._prepared[slot] = (frame, image)
        return image

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        """[S, S, 3]; for a GPU, which resizes by itself, [H, W, 3]."""
        if self._sampler.device.type == "cpu":
            return resize_with_pad(image, self.config.vision.image_size)
        check_image(image)
        return np.require(image, requirements=("C", "W"))  # what torch can take

    # --- the start of the flow, and the chunk before ------------------------------------------------------------------

    def _left_of_last(self, observation: RobotObservation) -> np.ndarray:
        """What is left of the last chunk at this stamp, robot units [up to H, J]; nothing after another prompt."""
        if self._last is None or self._last[1] != observation.prompt:
            return np.empty((0, len(self.robot.joints)))
        steps = round((observation.stamp - self._last[0]) / 1e9 * self.robot.control_rate)
        return self._last[2][steps:] if steps >= 0 else self._last[2][:0]

    def _to_model(self, state: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        """Robot units [n, J] -> model space [n, A], relative to the state as it is now."""
        return torch.from_numpy(self.transforms.encode(state, actions)["actions"]).float()

    def _start(
        self,
        state: np.ndarray,
        left: np.ndarray,
        generator: torch.Generator | None,
        noise: torch.Tensor | np.ndarray | None,
    ) -> torch.Tensor:
        horizon, dims = self.config.action_horizon, self.config.action_dim
        if noise is not None:
            noise = torch.as_tensor(noise, dtype=torch.float32)
            if tuple(noise.shape) != (horizon, dims):
                raise ValueError(f"noise must have shape {[horizon, dims]}, found {list(noise.shape)}")
            return noise
        trajectory = None
        if isinstance(self._source, Cold):
            # What is left of the last chunk, its last action held; the state held where there is none.
            known = self._to_model(state, left if len(left) else state[None])
            trajectory = known[torch.arange(horizon).clamp(max=len(known) - 1)][None]
        return self._source.start((1, horizon, dims), generator=generator or self._generator, trajectory=trajectory)[0]

    def _conditions(
        self, state: np.ndarray, committed: np.ndarray, following: np.ndarray, guided: bool = False
    ) -> tuple[torch.Tensor | None, Guidance | None]:
        """What holds the chunk to its committed actions: clean prefix where that was trained, guidance elsewhere."""
        if not len(committed):
            return None, None
        if len(committed) <= self.settings.rtc_max_delay and not guided:
            return self._to_model(state, committed), None
        horizon, settings = self.config.action_horizon, self._guidance
        known = np.concatenate([committed, following])[:horizon]
        previous = torch.zeros(horizon, self.config.action_dim)
        previous[: len(known)] = self._to_model(state, known)
        weights = torch.from_numpy(guidance_weights(len(committed), len(known), horizon, settings.schedule)).float()
        return None, Guidance(previous, weights, settings.max_weight, settings.jacobian, self.settings.loss_dims)
