"""Recorded bags and a robot file in, a checkpoint folder out that policy_node loads as it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pi0_ros.model.checkpoint import open_checkpoint
from pi0_ros.model.config import PRESETS, Pi0Config
from pi0_ros.model.files import CheckpointError
from pi0_ros.model.flow import Cold, NoiseSource, Pink, White, sample_time
from pi0_ros.model.pi0 import Pi0
from pi0_ros.policy.bundle import BundleSettings, save_bundle
from pi0_ros.policy.policy import PolicyError
from pi0_ros.policy.prompt import PromptEncoder
from pi0_ros.policy.statistics import NormStats
from pi0_ros.policy.tokenizer import load_tokenizer
from pi0_ros.policy.transforms import Group, build_transforms
from pi0_ros.robot import Robot, RobotFileError, load_robot
from pi0_ros.training.augment import augment
from pi0_ros.training.bags import BagError, find_bags
from pi0_ros.training.batches import Batch, collate, prefetch
from pi0_ros.training.build import build_cache
from pi0_ros.training.cache import FOLDER, CacheError
from pi0_ros.training.curves import plot_losses
from pi0_ros.training.dataset import Dataset, batch_indices, split, statistics
from pi0_ros.training.episodes import Selection
from pi0_ros.training.optimise import Average, learning_rate, make_optimizer
from pi0_ros.training.options import OptionsError, TrainOptions, parse
from pi0_ros.training.state import StateError, newest_state, save_state
from pi0_ros.training.streams import Streams, step_streams

EVALUATED = 256  # held-out samples that a look at the loss is averaged over


class Run:
    """One training run: its data, its model, and the loop."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.robot: Robot = load_robot(options.robot)
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
        )
        self.source = noise_source(options)
        checkpoint = open_checkpoint(options.init) if options.init else None
        config: Pi0Config = checkpoint.config if checkpoint else PRESETS[options.preset]
        if options.horizon:
            config = replace(config, action_horizon=options.horizon)
        self.settings = BundleSettings(
            config,
            noise_source=self.source.to_dict(),
            rtc_max_delay=options.rtc_max_delay,
            loss_dims=len(self.robot.joints) if options.loss_dims == "real" else None,
        )
        self.train_set, self.held_out = self._load_data()
        self.stats: NormStats = statistics(self.train_set, self.robot, self.settings)
        self.transforms: Group = build_transforms(self.robot, self.stats, self.settings)
        self.encoder = PromptEncoder(
            load_tokenizer(None, config.vocab_size), self.settings.prompt_format, config.max_token_len,
            config.action_dim,
        )  # fmt: skip
        if checkpoint:
            self.model = checkpoint.model(torch.float32, progress=True)
            self.model.config = config
        else:
            self.model = Pi0(config, generator=torch.Generator().manual_seed(options.seed))
        self.model.to(self.device).train()
        self.model.set_gradient_checkpointing(options.gradient_checkpointing)
        self.optimizer = make_optimizer(self.model, options.weight_decay)
        self.average = Average(self.model, options.ema)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.held_out_losses: list[tuple[int, float]] = []

    def _load_data(self) -> tuple[Dataset, Dataset]:
        options, robot = self.options, self.robot
        bags = find_bags(options.bags)
        root = options.bags if options.bags.is_dir() else options.bags.parent
        cached = build_cache(
            bags,
            robot,
            self.settings.model.vision.image_size,
            options.cache or root / FOLDER,
            selection=Selection(prompt=options.prompt),
            jobs=options.jobs,
        )
        for bag, reason in cached.skipped.items():
            print(f"skipped {bag}: {reason}")
        cameras = tuple(slot for slot in self.settings.model.cameras if slot in robot.present_cameras)
        parts = [
            Dataset(cached.units, self.settings.model.action_horizon, episodes=episodes, cameras=cameras)
            for episodes in split(cached.units, options.held_out, options.seed)
        ]
        if not len(parts[0]):
            raise BagError(f"{options.bags}: no usable sample for {robot.name!r}; inspect_bags says what is wrong")
        return parts[0], parts[1]

    # --- steps ------------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> list[Batch]:
        """The pieces of optimizer step `step`."""
        size = self.options.batch // self.options.accumulate
        return [
            collate(
                self.train_set,
                batch_indices(
                    len(self.train_set), step, size, seed=self.options.seed, rank=part, ranks=self.options.accumulate
                ),
                self.transforms,
                self.encoder,
            )
            for part in range(self.options.accumulate)
        ]

    def loss(self, batch: Batch, streams: Streams, augmented: bool) -> torch.Tensor:
        """Flow-matching loss of one piece, a scalar."""
        observation, actions = batch.observation, batch.actions
        if augmented:
            images = augment(observation.images, self.train_set.cameras, streams.augmentation)
            observation = replace(observation, images=images)
        noise = self.source.start(tuple(actions.shape), generator=streams.noise, trajectory=actions)
        time = sample_time(len(actions), generator=streams.time)
        observation, actions, noise, time = (x.to(self.device) for x in (observation, actions, noise, time))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            loss = self.model.compute_loss(
                observation, actions, noise=noise, time=time, loss_dims=self.settings.loss_dims
            )
        return loss.float().mean()

    def train_step(self, pieces: list[Batch]) -> tuple[torch.Tensor, float]:
        """One optimizer step; the loss and the learning rate."""
        options, total = self.options, torch.zeros((), device=self.device)
        for part, batch in enumerate(pieces):
            streams = step_streams(options.seed, self.step, part)
            loss = self.loss(batch, streams, options.augment) / len(pieces)
            loss.backward()
            total += loss.detach()
        rate = learning_rate(
            self.step,
            steps=options.steps,
            warmup=min(options.warmup, options.steps // 10),
            peak=options.peak,
            final=options.final_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], options.clip, foreach=True
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self.step += 1
        return total, rate

    @torch.no_grad()
    def evaluate(self) -> float:
        """Loss on held-out samples with the averaged weights, always the same noise and times."""
        count = min(EVALUATED, len(self.held_out))
        size, losses = min(32, count), []
        with self._averaged():
            for step in range(count // size):
                indices = batch_indices(len(self.held_out), step, size, seed=0)
                batch = collate(self.held_out, indices, self.transforms, self.encoder)
                losses.append(self.loss(batch, step_streams(0, step), augmented=False).item())
        return sum(losses) / len(losses)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        live = {name: p.detach().clone() for name, p in self.model.named_parameters() if name in self.average.weights}
        self.model.load_state_dict(self.average.swapped(self.model.state_dict()))
        try:
            yield
        finally:
            self.model.load_state_dict({**self.model.state_dict(), **live})

    # --- the run ----------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go on from the newest saved state, if there is one."""
        saved = newest_state(self.options.output / "state")
        if saved is None:
            return False
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, value in saved["average"].items():
            self.average.weights[name].copy_(value)
        self.step = saved["step"]
        self.losses, self.held_out_losses = ([tuple(x) for x in saved[name]] for name in ("losses", "held_out_losses"))
        return True

    def save(self) -> None:
        """The state, to resume from."""
        save_state(
            self.options.output / "state",
            self.step,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.weights,
                "step": self.step,
                "losses": [list(x) for x in self.losses],
                "held_out_losses": [list(x) for x in self.held_out_losses],
            },
        )

    def export(self) -> str:
        """The checkpoint folder with the averaged weights; returns its digest."""
        settings = replace(self.settings, trained_steps=self.step)
        weights = self.average.swapped(self.model.state_dict())
        return save_bundle(self.options.output / "checkpoint", weights, settings, self.robot, self.stats)

    def run(self) -> None:
        """Train to the last step, saving on the way."""
        options = self.options
        (options.output).mkdir(parents=True, exist_ok=True)
        if self.resume():
            print(f"going on from step {self.step}")
        (options.output / "options.yaml").write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))
        began, first = time.monotonic(), self.step
        board = SummaryWriter(str(options.output / "tensorboard"), purge_step=self.step)
        with tqdm(total=options.steps, initial=self.step, desc="train", unit="step") as bar:
            for pieces in prefetch(self.batches, self.step, options.steps):
                loss, rate = self.train_step(pieces)
                bar.update()
                if self.step % 10 == 0 or self.step == options.steps:  # reading the loss waits for the device
                    self._log(board, bar, loss.item(), rate, (self.step - first) / (time.monotonic() - began))
                if self.step % options.evaluate_every == 0 and len(self.held_out):
                    self.held_out_losses.append((self.step, self.evaluate()))
                    board.add_scalar("loss/held_out", self.held_out_losses[-1][1], self.step)
                if self.step % options.save_every == 0:
                    self.save()
                    plot_losses(options.output / "loss.png", self.losses, self.held_out_losses)
                if options.minutes and time.monotonic() - began > options.minutes * 60:
                    break
        board.close()
        self.save()
        plot_losses(options.output / "loss.png", self.losses, self.held_out_losses)
        print(f"checkpoint {self.export()} after {self.step} steps: {options.output / 'checkpoint'}")

    def _log(self, board: SummaryWriter, bar: tqdm, loss: float, rate: float, speed: float) -> None:
        if loss != loss:
            raise OptionsError(f"the loss is not a number at step {self.step}: try a smaller --learning-rate")
        self.losses.append((self.step, loss))
        board.add_scalar("loss/train", loss, self.step)
        board.add_scalar("learning_rate", rate, self.step)
        held = f" held out {self.held_out_losses[-1][1]:.4f}" if self.held_out_losses else ""
        recent = [value for _, value in self.losses[-20:]]
        bar.set_postfix_str(
            f"loss {sum(recent) / len(recent):.4f}{held} lr {rate:.1e} {speed * self.options.batch:.0f} samples/s"
        )


def noise_source(options: TrainOptions) -> NoiseSource:
    """The noise source that the options ask for."""
    if options.noise == "pink":
        return Pink(options.noise_beta)
    if options.noise == "cold":
        return Cold(options.cold, options.cold_strength)
    return White()


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 and one line when something is wrong with options, data or checkpoint."""
    try:
        options = parse(arguments)
        Run(options).run()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    except (
        OptionsError, RobotFileError, BagError, CacheError, CheckpointError, PolicyError, StateError, ValueError, OSError
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
