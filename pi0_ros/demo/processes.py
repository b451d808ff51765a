"""Child processes that never outlive their parent, each with a log file of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: nothing may be imported between fork and exec


def end_on_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt. SIGINT too: a shell starts background jobs with it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


class ProcessDied(RuntimeError):
    """A child that should be running has ended; the message names it, its exit code and its last words."""


class Processes:
    """Starts, watches and stops a set of Python modules run as processes.

    A context manager: leaving it stops every child, with SIGINT first, then SIGKILL. The kernel sends the children
    SIGKILL should this process be killed itself (Linux's parent-death signal), so no orphan is left in any case.
    """

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs, self._environment = logs, environment
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Run `python -m module arguments...` under `name`, its output going to logs/name.log."""
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died before the line above
                os._exit(1)

        with open(self.log(name), "wb") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the children in order
                preexec_fn=die_with_parent,
            )

    def log(self, name: str) -> Path:
        """The file that holds what `name` printed."""
        return self._logs / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process number of `name`."""
        return self._children[name].pid

    def check(self) -> None:
        """Raises ProcessDied if any child has ended."""
        for name, child in self._children.items():
            if child.poll() is not None:
                lines = self.log(name).read_text(errors="replace").strip().splitlines()
                last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
                raise ProcessDied(
                    f"{name} ended with exit code {child.returncode}: {last} (whole log: {self.log(name)})"
                )

    def stop(self, grace: float = 8.0) -> list[str]:
        """End every child, newest first; returns the names of those that had to be killed."""
        for child in reversed(self._children.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        deadline, killed = time.monotonic() + grace, []
        for name, child in reversed(self._children.items()):
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                killed.append(name)
        self._children.clear()
        return killed

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
