"""Recorded bags and a robot file in, a checkpoint folder out that policy_node loads as it is.

OUTPUT/checkpoint/      averaged weights, robot file, statistics: for policy_node and evaluate
OUTPUT/state/           to go on from after an interruption
OUTPUT/options.yaml     every option, and what those left open were resolved to
OUTPUT/episodes.json    what was trained on and what held out
OUTPUT/loss.png, tensorboard/
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from pi0_ros.model.config import ConfigError
from pi0_ros.model.files import CheckpointError, write_json, write_text
from pi0_ros.model.flow import NoiseSourceError, noise_source_from_dict
from pi0_ros.policy.bundle import save_bundle
from pi0_ros.policy.processor import PolicyError
from pi0_ros.policy.prompt import PromptEncoder
from pi0_ros.policy.tokenizer import TokenizerError, load_tokenizer
from pi0_ros.policy.transforms import build_transforms
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.training import data
from pi0_ros.training.augment import augment
from pi0_ros.training.bags import BagError
from pi0_ros.training.batches import Batch, collate, prefetch
from pi0_ros.training.cache import CacheError
from pi0_ros.training.curves import plot_losses
from pi0_ros.training.dataset import Dataset, batch_indices, split, statistics
from pi0_ros.training.distributed import OthersFailed, World, joined
from pi0_ros.training.interrupt import asked_to_end
from pi0_ros.training.lora import merged
from pi0_ros.training.memory import available_memory, forecast, report
from pi0_ros.training.objective import flow_loss
from pi0_ros.training.optimise import Average, learning_rate, make_optimizer
from pi0_ros.training.options import RESOLVED, OptionsError, TrainOptions, changed_fields, parse, require_same
from pi0_ros.training.parts import frozen_digest, trained
from pi0_ros.training.progress import LOGGED, Progress, TrainingError
from pi0_ros.training.sharding import assign, like, shard, whole
from pi0_ros.training.start import start
from pi0_ros.training.state import StateError, alone, newest_state, remove_leftovers, save_state, saved_states
from pi0_ros.training.streams import step_streams
from pi0_ros.wording import first_line, told

EVALUATED = 256  # held-out samples that a look at the loss is averaged over
MOST_TOLD = 5  # prompts that are printed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Run:
    """One training run: its data, its model, and the loop. It goes on from the newest state in its output folder.

    Raises:
        OptionsError: options, robot file or recordings are not those that the run began with.
        StateError: the state is damaged, or not every process sees the same one.
    """

    def __init__(self, options: TrainOptions, world: World = World()) -> None:  # noqa: B008 - it is frozen
        self.options, self.world = options, world
        self.pieces = options.parts(world.size)  # of one optimizer step, over all processes
        self.device = world.device(options.device)
        saved = newest_state(options.output / "state")
        if saved:
            require_same(saved["options"], options.to_dict())
        self.robot = load_robot(options.robot)
        begin = start(options, self.robot)
        self.settings, self.tokenizer = begin.settings, begin.tokenizer
        self.source = noise_source_from_dict(dict(self.settings.noise_source))
        config = self.settings.model
        tokenizer = load_tokenizer(self.tokenizer, config.vocab_size)
        self.encoder = PromptEncoder(tokenizer, self.settings.prompt_format, config.max_token_len, config.action_dim)
        for note in begin.notes if world.first else ():
            print(note)
        if options.shard and world.size == 1:
            print("note: --shard shares nothing out: this is one process (torchrun starts several)")
        self._load_data()
        self._check_prompts()
        self.transforms = build_transforms(self.robot, self.stats, self.settings)
        self.model = begin.model(options)
        self.frozen = frozen_digest(self.model)  # while its weights are whole
        if world.first:
            self._forecast()  # before anything of it is taken
        self.model.to(self.device)
        if options.shard and world.size > 1:
            shard(self.model, self.device, world.size)
        self.optimizer = make_optimizer(self.model, options.weight_decay)
        self.average = Average(self.model, options.ema)
        self.step = self._saved = 0
        self.progress = Progress(world)
        self._restore(saved)
        self.forward = world.wrap(self.model, self.device)

    def _load_data(self) -> None:
        options = self.options
        size = self.settings.model.vision.image_size
        with self.world.one_first():
            units = data.load_units(
                options.bags,
                self.robot,
                size,
                cache=options.cache,
                prompt=options.prompt,
                idle=options.idle,
                jobs=options.jobs,
                quiet=not self.world.first,
            )
        self.cameras = tuple(slot for slot in self.settings.model.cameras if slot in self.robot.present_cameras)
        horizon = self.settings.model.action_horizon
        train, held_out = split(units, options.held_out, options.seed, horizon)
        first = max(1, round(options.first_seconds * self.robot.control_rate)) if options.first_seconds else None
        self.train_set, self.held_out = (
            Dataset(units, horizon, episodes=episodes, cameras=self.cameras, first=first)
            for episodes in (train, held_out)
        )
        if not len(self.train_set):
            raise BagError(f"{options.bags}: no usable sample for {self.robot.name!r}; inspect_bags says what is wrong")
        # Of whole episodes: runs that differ in where samples begin normalise alike.
        self.stats = statistics(Dataset(units, horizon, episodes=train), self.robot, self.settings)
        earlier = (data.trained_on(options.init) if options.init else None) or set()
        self.episodes = {
            "train": data.names(units, train),
            "held_out": data.names(units, held_out),
            "earlier": sorted(map(list, earlier)),
        }
        self.fingerprint = data.fingerprint(units, train, held_out)
        if self.world.first:
            counts = f"{len(train)} episodes, {len(self.train_set)} samples; held out {len(held_out)} episodes"
            print(f"training on {counts}")
            prompts = sorted(self.train_set.prompts())
            more = f" and {len(prompts) - MOST_TOLD} more" if len(prompts) > MOST_TOLD else ""
            print(f"prompts: {', '.join(map(repr, prompts[:MOST_TOLD]))}{more}")
            if seen := sum(tuple(name) in earlier for name in self.episodes["held_out"]):
                print(
                    f"warning: {seen} of {len(held_out)} held-out episodes were trained on before, in runs that "
                    f"{options.init} comes from: the held-out loss is flattered"
                )

    def _check_prompts(self) -> None:
        """OptionsError for a prompt that leaves no room for the state; a warning where the end of one is not read."""
        encoder, longest = self.encoder, np.ones(len(self.robot.joints))  # 1 is bin 255, and none has more digits
        found = [
            (len(ids), prompt, costs_state)
            for prompt in self.train_set.prompts() | self.held_out.prompts()
            for ids, costs_state in (encoder.tokens(prompt, longest),)
        ]
        count, prompt, costs_state = max(found)
        has = f"prompt {prompt!r:.80} has {count} tokens{' with the state' * encoder.reads_state}, the model reads"
        if costs_state:
            raise OptionsError(f"{has} {encoder.max_len}: some of the state would be cut; give a shorter --prompt")
        if count > encoder.max_len and self.world.first:
            print(f"warning: {has} the first {encoder.max_len} alone")

    # --- steps ------------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> list[Batch]:
        """This process's pieces of optimizer step `step`, augmented."""
        options, pieces = self.options, []
        for part in self._parts():
            indices = batch_indices(
                len(self.train_set), step, options.batch // self.pieces, seed=options.seed, rank=part, ranks=self.pieces
            )
            batch = collate(self.train_set, indices, self.transforms, self.encoder)
            if options.augment:
                generator = step_streams(options.seed, step, part).augmentation
                images = augment(batch.observation.images, self.cameras, generator)
                batch = Batch(replace(batch.observation, images=images), batch.actions)
            pieces.append(batch)
        return pieces

    def _parts(self) -> range:
        """Which of a step's pieces are this process's; as many processes with one piece each have the same ones."""
        own = self.options.accumulate
        return range(self.world.rank * own, (self.world.rank + 1) * own)

    def train_step(self, pieces: list[Batch]) -> float:
        """One optimizer step; returns its learning rate."""
        options, total = self.options, torch.zeros((), device=self.device)
        for part, batch in zip(self._parts(), pieces, strict=True):
            last = part == self._parts()[-1]
            with contextlib.nullcontext() if last else self.world.quiet(self.forward):
                loss = self._loss(self.forward, batch, options.seed, self.step, part) / len(pieces)
                loss.backward()
            total += loss.detach()
        rate = learning_rate(
            self.step,
            steps=options.steps,
            warmup=options.warmup_steps,
            peak=options.peak,
            final=options.final_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(list(trained(self.model).values()), options.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self.step += 1
        self.progress.add(total, whole(norm))
        return rate

    def _loss(self, model: torch.nn.Module, batch: Batch, seed: int, step: int, part: int = 0) -> torch.Tensor:
        return flow_loss(
            model,
            batch,
            step_streams(seed, step, part),
            source=self.source,
            draws=self.options.draws,
            max_delay=self.options.rtc_max_delay,
            loss_dims=self.settings.loss_dims,
            dtype=DTYPES[self.options.dtype],
            device=self.device,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss on held-out samples with the averaged weights, always the same noise and times."""
        count = min(EVALUATED, len(self.held_out))
        size, losses = min(32, count), []
        with self.average.in_place():
            for step in range(count // size):
                indices = batch_indices(len(self.held_out), step, size, seed=0)
                batch = collate(self.held_out, indices, self.transforms, self.encoder)
                losses.append(self._loss(self.model, batch, 0, step).item())
        return sum(losses) / len(losses)

    # --- saved and resumed ------------------------------------------------------------------------------------------

    def _restore(self, saved: dict[str, Any] | None) -> None:
        if not self.world.same(saved["step"] if saved else 0):
            raise StateError(f"{self.options.output}: not every machine sees the same state; use a folder they share")
        if saved is None:
            return
        for name, now in self._identity().items():
            if saved.get(name) == now:
                continue
            fields = f": {changed_fields(saved[name], now)}" if name == "robot" and name in saved else ""
            raise OptionsError(f"{self.options.output}: {CHANGED[name]}{fields}; use another --output for another run")
        parameters = trained(self.model)
        for name, parameter in parameters.items():
            assign(parameter, saved["weights"][name])
        for name, value in self.average.weights.items():
            assign(value, saved["average"][name])
        optimizer = saved["optimizer"]
        for place, parameter in enumerate(parameters.values()):
            moments = optimizer["state"][place]
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = like(moments[name], parameter)
        self.optimizer.load_state_dict(optimizer)
        self.step = self._saved = saved["step"]
        self.progress.losses, self.progress.held_out = (
            [tuple(x) for x in saved[name]] for name in ("losses", "held_out_losses")
        )

    def _identity(self) -> dict[str, object]:
        return {
            "robot": self.robot.to_yaml(),
            "recordings": self.fingerprint,
            "pieces": self.pieces,
            "frozen": self.frozen,
        }

    def save(self) -> None:
        """The state, to resume from, and the loss curve. Only what is trained: the rest comes from --init again."""
        self.progress.read(self.step)
        self._saved = self.step
        parts = {"weights": trained(self.model), "optimizer": self.optimizer.state_dict()}
        tensors = whole({**parts, "average": self.average.weights})
        if not self.world.first:
            return
        save_state(
            self.options.output / "state",
            self.step,
            {
                **tensors,
                "step": self.step,
                "losses": [list(x) for x in self.progress.losses],
                "held_out_losses": [list(x) for x in self.progress.held_out],
                "options": self.options.to_dict(),
                **self._identity(),
            },
        )
        plot_losses(self.options.output / "loss.png", self.progress.losses, self.progress.held_out)

    def export(self) -> str:
        """The checkpoint folder with the averaged weights; returns its digest ("" where another process writes)."""
        weights = whole(self.average.swapped(self.model.state_dict()))
        if not self.world.first:
            return ""
        settings = replace(self.settings, trained_steps=self.step)
        weights = merged(self.model, weights)
        robot = self.robot
        if self.options.prompt:  # the only one that the policy has seen
            prompt = robot.prompt.model_copy(update={"default": self.options.prompt})
            robot = robot.model_copy(update={"prompt": prompt})
        folder = self.options.output / "checkpoint"
        return save_bundle(folder, weights, settings, robot, self.stats, self.tokenizer)

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step, saving on the way, and export."""
        options, world = self.options, self.world
        options.output.mkdir(parents=True, exist_ok=True)
        if world.first:
            self._write_down()
            if self.step:
                print(f"going on from step {self.step}")
        self.progress.open(options.output / "tensorboard", self.step)
        # Several processes cannot agree on a step to end with without asking one another at each.
        asked = asked_to_end() if world.size == 1 else contextlib.nullcontext(threading.Event())
        bar = tqdm(total=options.steps, initial=self.step, desc="train", unit="step", disable=not world.first)
        with contextlib.closing(prefetch(self.batches, self.step, options.steps)) as batches, bar, asked as ending:
            began, first = time.monotonic(), self.step
            for pieces in batches:
                rate = self.train_step(pieces)
                bar.update()
                if self.step % LOGGED == 0 or self.step == options.steps:
                    self.progress.read(self.step)
                    speed = (self.step - first) * options.batch / (time.monotonic() - began)
                    self.progress.show(bar, self.step, rate, speed)
                late = options.minutes and world.agreed(time.monotonic() - began > options.minutes * 60)
                due = self.step % options.evaluate_every == 0 or self.step == options.steps
                if (due or late) and len(self.held_out):  # a run always ends with a look
                    self.progress.looked(self.step, self.evaluate())
                if self.step % options.save_every == 0 or ending.is_set():
                    self.save()
                if ending.is_set():
                    raise KeyboardInterrupt
                if late:
                    break
        if self.step > self._saved:
            self.save()
        digest = self.export()
        self.progress.close()
        if world.first:
            checkpoint = options.output / "checkpoint"
            print(f"checkpoint {digest} after {self.step} steps: {checkpoint}; losses: {options.output / 'loss.png'}")
            print(f"next: evaluate --bags {options.bags} --checkpoint {checkpoint}")

    def _forecast(self) -> None:
        """Say what will be trained and what it takes."""
        options = self.options
        needed = forecast(
            self.model,
            self.settings.model,
            piece=options.batch // self.pieces,
            cameras=len(self.cameras),
            dtype=DTYPES[options.dtype],
            gradient_checkpointing=options.gradient_checkpointing,
            draws=options.draws,
            average=options.ema > 0,
            processes=self.world.size if options.shard else 1,
        )
        print(report(self.model, needed, available_memory(self.device), str(self.device)))

    def _write_down(self) -> None:
        """What was asked for, and what is trained on."""
        output = self.options.output
        remove_leftovers(output)
        options = yaml.safe_dump(self.options.to_dict() | {RESOLVED: self._resolved()}, sort_keys=False)
        write_text(output / "options.yaml", options)
        write_json(output / data.EPISODES, self.episodes)

    def _resolved(self) -> dict[str, Any]:
        """What stood in for options that were left open."""
        return {
            "learning_rate": self.options.peak,
            "warmup": self.options.warmup_steps,
            "horizon": self.settings.model.action_horizon,
            "loss_dims": "all" if self.settings.loss_dims is None else "real",
            "noise": dict(self.settings.noise_source),
            "tokenizer": str(self.tokenizer or "bytes"),
            "device": str(self.device),
        }


CHANGED = {
    "robot": "the robot file is not the one that this run began with",
    "recordings": "the recordings are not those that this run began with",
    "pieces": "processes x --accumulate is not what this run began with",
    "frozen": "the weights of --init are not those that this run began with",
}
FAULTS = (
    OptionsError, RobotFileError, BagError, CacheError, CheckpointError, ConfigError, StateError, TrainingError,
    OthersFailed, PolicyError, TokenizerError, NoiseSourceError, OSError,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 and one line when something is wrong with options, data or checkpoint."""
    options = None
    try:
        options = parse(arguments)
        with joined() as world, world.by_first(alone(options.output)):
            Run(options, world).run()
    except KeyboardInterrupt:
        saved = saved_states(options.output / "state") if options else []
        after = f"goes on from {saved[-1].name}" if saved else "begins anew, nothing was saved yet (--save-every)"
        print(f"\nstopped; the same command {after}", file=sys.stderr)
        return 130
    except FAULTS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        print(f"error: {reason}: see the memory forecast above for what needs less", file=sys.stderr)
        return 1
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"error: --compile: {first_line(error)}; the same command without --compile goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
