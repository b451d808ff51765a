"""The thread that owns the policy, and with it the GPU: from configure to cleanup, it alone touches them.

It sleeps until it is woken (a timer, a message), takes the observation of that instant, infers and publishes. What
it shares with the executor's thread (`_active`, `_running`, `_epoch`, `_sequence`, `_prompt`, `_fresh`) is under
`_lock`, and a chunk is published under it as well: once `deactivate` or `bump` has returned, nothing older goes out.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from rclpy.impl.rcutils_logger import RcutilsLogger

from pi0_ros.msg import ActionChunk
from pi0_ros.policy.alignment import Rejected
from pi0_ros.policy.policy import ObservationError, RobotObservation
from pi0_ros.policy.processor import gpu_fault
from pi0_ros.ros.conversions import SECOND, chunk_message, void_message
from pi0_ros.ros.handover import Handover, Published
from pi0_ros.ros.health import Health
from pi0_ros.ros.streams import Frames, Streams
from pi0_ros.wording import first_line

if TYPE_CHECKING:
    from pi0_ros.policy.policy import Chunk, Policy

NO_CLOCK = Rejected("clock", "use_sim_time is set and nothing came on /clock yet", "missing")
SIGN_OF_LIFE = 0.1  # seconds between words to a player that wants no chunk yet
DISCOVERY = 2.0  # seconds after activation in which a stream that has not come yet is no news for the log


class Worker:
    """The inference thread.

    Args:
        load: makes the policy, in this thread.
        now: the node's clock, ns.
        logger: the node's.
        on_fault: called in this thread when a tick failed for good; `health.fault` says why.
        epoch: the epoch before the first.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        now: Callable[[], int],
        logger: RcutilsLogger,
        on_fault: Callable[[], None],
        epoch: int,
    ) -> None:
        self._load, self._now, self._logger, self._on_fault = load, now, logger, on_fault
        self.health, self.handover = Health(), Handover()
        self.on_demand_seconds = 0.0  # > 0: a chunk only when the player has less left
        self.realtime_chunking = "auto"  # or guided, never; auto: where training taught it
        self.seed = -1  # from 0 on: every chunk starts from the noise of this seed
        self.extra_latency = 0.0  # s that inference takes longer, on purpose
        self.policy: Policy | None = None
        self._streams: Streams | None = None
        self._publish: Callable[[ActionChunk], None] | None = None
        self._lock = threading.Lock()
        self._wake, self._ready, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._busy = self._active = False
        self._running = True  # while active; what the services start, stop and pause change
        self._activated = 0.0  # monotonic
        self._fresh = True  # forget caches before the next tick
        self._used = False  # a chunk of the present epoch went out
        self._spoken = 0.0  # monotonic, when the player was last told something
        self._epoch, self._sequence, self._prompt = epoch, 0, ""
        self._frames: Frames | None = None
        self._thread = threading.Thread(target=self._run, name="policy_worker", daemon=True)
        self._thread.start()

    def wait_until_loaded(self, alive: Callable[[], bool]) -> Policy:
        """The policy, loaded and warm. Raises what loading raised; InterruptedError when `alive` says no."""
        while not self._ready.wait(0.1):
            if not alive():
                raise InterruptedError("interrupted while the policy was loading")
        if self._error is not None:
            raise self._error
        return self.policy

    def connect(self, streams: Streams, publish: Callable[[ActionChunk], None]) -> None:
        """Where observations come from and chunks go to; before the first activation."""
        self._streams, self._publish = streams, publish
        self._position_limits = np.array([joint.position for joint in self.policy.robot.joints]).T  # low, high: [2, J]

    def activate(self, running: bool = True) -> None:
        """Begin to tick, at once or when `run` says so: a new epoch, chunks counted from 0."""
        self.health.fault = self.health.blame = ""
        self._activated = time.monotonic()
        self.handover.forget_all()
        with self._lock:
            self._active = self._fresh = True
            self._running = running
            self._sequence, self._used = 0, False
            self._epoch += 1
        self.wake()

    def deactivate(self) -> None:
        """Stop: chunks so far are void, the player holds, and nothing is published any more."""
        with self._lock:
            try:
                self._void()
            finally:
                self._active = False

    def run(self, running: bool) -> None:
        """Tick or not while active; caches and epoch stay. After `run(False)` nothing is published any more."""
        with self._lock:
            self._running = running
        self.wake()

    @property
    def ticking(self) -> bool:
        """Whether ticks lead to chunks."""
        return self._active and self._running

    @property
    def idle(self) -> bool:
        """Whether no tick is at work or about to be."""
        return not (self._busy or self._wake.is_set())

    def set_prompt(self, prompt: str) -> None:
        """Counts from the next tick on."""
        with self._lock:
            self._prompt = prompt

    def bump(self) -> None:
        """Void every chunk so far, the one in flight and the player's too, and forget every cache."""
        with self._lock:
            self._void()

    def _void(self) -> None:
        self._epoch += 1
        self._fresh, self._used = True, False
        self.handover.forget()
        if self._active:
            self._tell(self._sequence)
            self._sequence += 1

    def _sign_of_life(self) -> None:
        """No chunk is wanted yet: let the player know that one would come."""
        with self._lock:
            if self._active and self._running and time.monotonic() - self._spoken > SIGN_OF_LIFE:
                self._tell(max(0, self._sequence - 1))

    def _tell(self, sequence: int) -> None:
        self._spoken = time.monotonic()
        policy, now = self.policy, self._now()
        self._publish(
            void_message(
                policy.robot,
                now=now,
                sequence=sequence,
                epoch=self._epoch,
                prompt=self._prompt,
                checkpoint=policy.digest,
            )
        )

    @property
    def prompt(self) -> str:
        """The prompt of the next tick."""
        return self._prompt

    @property
    def epoch(self) -> int:
        """The present epoch."""
        return self._epoch

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def tick_due(self) -> None:
        """A tick of the rate timer; it is missed when the one before is still at work."""
        if self.ticking and not self._due():
            self._sign_of_life()
        elif self.ticking:
            missed = self._busy or self._wake.is_set()
            self.health.misses += missed
            self.health.missed.add(self._now() / SECOND, float(missed))
            self.wake()

    def close(self, seconds: float = 60.0) -> bool:
        """End the thread and free the policy. False when it did not end within `seconds`."""
        with self._lock:
            self._active = False
        self._ended.set()
        self.wake()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.policy = self._load()
            self.policy.warm_up()
        except BaseException as error:  # noqa: BLE001 - raised again by wait_until_loaded, in the caller's thread
            self._error = error
        self._ready.set()
        self._frames = Frames(self.policy.robot) if self.policy is not None else None
        while self._error is None:
            self._wake.wait()
            self._busy = True
            self._wake.clear()
            if self._ended.is_set():
                break
            try:
                if self.ticking and not self._due():
                    self._sign_of_life()
                elif self.ticking:
                    self._tick()
            except Exception as error:  # noqa: BLE001 - whatever it is, the node stays controllable and says so
                self._fail(error)
            self._busy = False
        if self.policy is not None:
            self.policy.close()
            self.policy = None

    def _due(self) -> bool:
        if self.on_demand_seconds <= 0:
            return True
        left = self.handover.seconds_left(self._now())
        return left is None or left < self.on_demand_seconds

    def _fail(self, error: Exception) -> None:
        self.health.fault = f"inference failed: {type(error).__name__}: {first_line(error)}"
        lost = gpu_fault()
        if lost:
            self.health.fault += f"; the GPU is lost to this process ({lost})"
        way_out = "end this node and start it again" if lost else "activate to try again"
        self._logger.error(f"{self.health.fault}; stopped, {way_out}")
        self._logger.debug("".join(traceback.format_exception(type(error), error, error.__traceback__)))
        try:
            self.deactivate()
        except Exception as silent:  # noqa: BLE001 - the fault must be told even where nothing can be published
            self._logger.error(f"the player could not be told: {silent}")
        self._on_fault()

    def _reject(self, now: int, rejected: Rejected) -> None:
        reason = f"no observation: {rejected.stream}: {rejected.reason}"
        self.health.reject(now, reason)
        if rejected.kind != "missing" or time.monotonic() - self._activated > DISCOVERY:
            self._logger.warning(reason, throttle_duration_sec=5.0)
        if rejected.kind == "clock":
            # A driver whose clock is ahead for good is found so at every tick; that voids chunks only once.
            if self._used:
                self.set_back()
            else:
                self._streams.clear()

    def set_back(self) -> None:
        """The clock was set back: nothing of before counts."""
        if self._streams is not None:
            self._streams.clear()
        self.handover.forget_all()
        self.health.clear_windows()
        self.bump()

    def _tick(self) -> None:
        policy, begin, clock = self.policy, self._now(), time.perf_counter
        with self._lock:
            epoch, prompt, fresh, self._fresh = self._epoch, self._prompt, self._fresh, False
        if fresh:
            policy.reset()
            self._frames.clear()
        self.health.ticks += 1
        started = clock()
        # What all streams have reached by now: a camera that shows the past would otherwise be paired with a state that
        # it was never recorded with. The chunk is meant for that instant, and the player skips what is past of it.
        observed = begin - round(policy.robot.latency * SECOND)
        snapshot = self._streams.observe(observed, begin) if begin else NO_CLOCK
        images = snapshot if isinstance(snapshot, Rejected) else self._frames.decode(snapshot.frames)
        if isinstance(images, Rejected):
            return self._reject(begin, images)
        decoded = clock()
        frames = {slot: sample.stamp_ns for slot, sample in snapshot.frames.items()}
        observation = RobotObservation(observed, images, frames, snapshot.state, prompt)
        guided = self.realtime_chunking == "guided"
        keep = guided or (self.realtime_chunking == "auto" and policy.settings.rtc_max_delay > 0)
        committed = self.handover.committed(observed, begin, epoch, prompt) if keep else None
        executed = committed and committed.executed[: None if guided else policy.settings.rtc_max_delay]
        generator = torch.Generator().manual_seed(self.seed) if self.seed >= 0 else None
        try:
            chunk = policy.infer(
                observation,
                generator=generator,
                executed=executed,
                following=committed and committed.following,
                guided=guided,
            )
            self._ended.wait(self.extra_latency)
        except ObservationError as error:
            return self._reject(begin, Rejected("observation", str(error), "missing"))
        if not np.isfinite(chunk.actions).all():
            raise FloatingPointError("the policy's actions are not finite")
        end, inferred = self._now(), clock()
        if not self._deliver(chunk, observed, begin, end, epoch, prompt):
            self.health.dropped += 1
            return None
        done = clock()
        stages = {**chunk.latency, "decode": decoded - started, "publish": done - inferred, "total": done - started}
        self.health.accept(begin, snapshot.skew)
        self.health.publish(end, observed, stages, chunk.prefix_reused)
        if self.health.chunks == 1:
            self._logger.info(f"first chunk after {stages['total'] * 1e3:.0f} ms")

    def _deliver(self, chunk: Chunk, observed: int, begin: int, end: int, epoch: int, prompt: str) -> bool:
        """Publish, unless the chunk's epoch or activation is over; returns whether it went out."""
        robot = self.policy.robot
        with self._lock:
            if not self.ticking or epoch != self._epoch:
                return False
            # The player keeps to the position limits, so what it executes does.
            actions = np.clip(chunk.actions, *self._position_limits)
            self.handover.published(Published(self._sequence, epoch, prompt, observed, end, actions, robot.dt))
            self._publish(
                chunk_message(
                    chunk,
                    robot,
                    observed=observed,
                    begin=begin,
                    end=end,
                    sequence=self._sequence,
                    epoch=epoch,
                    prompt=prompt,
                    checkpoint=self.policy.digest,
                )
            )
            self._sequence += 1
            self._used, self._spoken = True, time.monotonic()
        return True
