"""Build the cache of many bags on all cores; a bag that cannot be read costs only itself."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch
from tqdm import tqdm

from pi0_ros.robot import Robot
from pi0_ros.training.bags import BagError, BagFiles
from pi0_ros.training.cache import CacheError, Unit, build_unit, remove_leftovers
from pi0_ros.training.episodes import Selection

Result = TypeVar("Result")


@dataclass
class Cached:
    """The units of all bags that could be read, in the order of the bags, and why others were not."""

    units: list[Unit] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # bag -> reason
    decoded: int = 0  # frames decoded by this call


def build_cache(
    bags: Sequence[BagFiles],
    robot: Robot,
    image_size: int,
    folder: Path,
    *,
    selection: Selection = Selection(),  # noqa: B008
    jobs: int | None = None,
    progress: bool = True,
) -> Cached:
    """Every bag decoded into `folder`; what is there already is taken as it is.

    Args:
        image_size: side of the model's square images, pixels.
        jobs: processes; None for one a core.

    Raises:
        CacheError: the folder cannot be written (disk full); bags that were finished stay.
    """
    cached = Cached()
    jobs = min(jobs or cores(), len(bags))
    threads = max(cores() // max(jobs, 1), 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder}: the cache cannot be written: {error.strerror}; choose another folder") from None
    remove_leftovers(folder)
    tasks = [(files, robot, image_size, selection, folder, threads) for files in bags]
    with tqdm(total=len(bags), desc="cache", unit="bag", disable=None if progress else True) as bar:
        expected = [frames for files in bags if (frames := expected_frames(files, robot))]
        done, usual = 0, sum(expected) / len(expected) if expected else 0.0

        def show() -> None:
            now = frames_in_work(folder, image_size)
            part = sum(min(frames / usual, 0.99) for frames in now) if usual else 0
            # Never back: frames of a bag that was just finished are neither in work nor done for a moment.
            bar.n = round(min(max(done + part, bar.n), len(bags)), 2)
            bar.set_postfix_str(f"{cached.decoded + sum(now)} frames decoded")

        def advance(outcome: tuple[Unit, int] | str) -> None:
            nonlocal done
            done += 1
            cached.decoded += 0 if isinstance(outcome, str) else outcome[1]

        with contextlib.nullcontext() if bar.disable else repeated(show):
            outcomes = run_all(_build, tasks, jobs, advance)
    for files, outcome in zip(bags, outcomes, strict=True):
        if isinstance(outcome, str):
            cached.skipped[str(files.path)] = outcome
        else:
            cached.units.append(outcome[0])
    return cached


def expected_frames(files: BagFiles, robot: Robot) -> float:
    """About how many frames a recording will give: one a tick from each camera, or all where there are fewer. 0 where
    its metadata does not tell."""
    try:
        ticks = files.metadata["duration"]["nanoseconds"] / 1e9 * robot.control_rate
        topics = files.metadata["topics_with_message_count"]
        counts = {topic["topic_metadata"]["name"]: topic["message_count"] for topic in topics}
        names = [(camera.topic, f"{camera.topic}/compressed") for camera in robot.present_cameras.values()]
        frames = sum(min(ticks, max(counts.get(name, 0) for name in pair)) for pair in names)
    except (TypeError, KeyError, AttributeError):
        return 0.0
    return max(frames, 0.0) if math.isfinite(frames) else 0.0


def frames_in_work(folder: Path, image_size: int) -> list[int]:
    """Frames that each unfinished bag has so far, whichever process works on it: the files tell, at no cost to it."""
    counts = []
    for partial in folder.glob("*.partial-*"):
        with contextlib.suppress(OSError):  # finished meanwhile
            counts.append(sum(file.stat().st_size for file in partial.glob("*.u8")) // (3 * image_size**2))
    return counts


@contextlib.contextmanager
def repeated(show: Callable[[], None]) -> Iterator[None]:
    """`show()` twice a second in the time of the block, and once after it."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(0.5):
            show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        show()


def _build(*task: Any) -> tuple[Unit, int] | str:
    try:
        return build_unit(*task)
    except BagError as error:
        return str(error)


def run_all(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    advance: Callable[[Result], None],
) -> list[Result]:
    """`function(*task)` of every task in worker processes, results in order; `advance` sees each when it is done."""
    if jobs <= 1:
        results = []
        for task in tasks:
            results.append(function(*task))
            advance(results[-1])
        return results
    # A trainer has threads, and forking those is not safe; a server without any imports once and forks the workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pi0_ros.training.build", "pi0_ros.training.report"])
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures: list[Future[Result]] = [pool.submit(function, *task) for task in tasks]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    advance(future.result())
        except BrokenProcessPool:
            raise CacheError("a worker process was killed (out of memory?); use fewer with --jobs") from None
        finally:
            for future in waiting:
                future.cancel()
    return [future.result() for future in futures]


def _start_worker() -> None:
    """One core for each library, and no life beyond the parent's: a killed trainer must leave nothing running."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; one stack trace less for each
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
