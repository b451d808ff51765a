"""Build the cache of many bags on all cores; a bag that cannot be read costs only itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
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

        def advance(outcome: tuple[Unit, int] | str) -> None:
            cached.decoded += 0 if isinstance(outcome, str) else outcome[1]
            bar.set_postfix_str(f"{cached.decoded} frames decoded")
            bar.update()

        outcomes = run_all(_build, tasks, jobs, advance)
    for files, outcome in zip(bags, outcomes, strict=True):
        if isinstance(outcome, str):
            cached.skipped[str(files.path)] = outcome
        else:
            cached.units.append(outcome[0])
    return cached


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
