"""A ROS domain of one's own, so that demos and test runs side by side on one machine do not hear each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

# The domains whose ports lie below Linux's ephemeral ones; 0 is everybody's default and left alone.
DOMAINS = range(1, 101)


class NoFreeDomainError(RuntimeError):
    """Every ROS domain of this machine is taken."""


class Domain:
    """Holds a free ROS domain until `release`, or until the process ends.

    A domain is taken by an exclusive lock on a file in the temporary folder. The file stays, the lock goes with
    the process, however it ends. Use it as a context manager, or call `release`.

    Raises:
        NoFreeDomainError: all of `DOMAINS` are taken.
    """

    def __init__(self) -> None:
        # Begin at different numbers: ports of a domain that was left a moment ago may still be in use.
        first = os.getpid() % len(DOMAINS)
        for number in (*DOMAINS[first:], *DOMAINS[:first]):
            lock = _try_lock(Path(tempfile.gettempdir()) / f"pi0_ros_domain_{number}.lock")
            if lock is not None:
                self.id = number
                self._lock = lock
                return
        raise NoFreeDomainError(
            f"all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are taken by other demos or tests of this machine "
            f"(lock files {tempfile.gettempdir()}/pi0_ros_domain_*.lock)"
        )

    def environment(self) -> dict[str, str]:
        """Environment variables that put a process into this domain, with discovery on this machine only."""
        here = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        if os.environ.get("ROS_DISTRO") == "humble":  # it does not know that variable, and later ones complain of this
            here = {"ROS_LOCALHOST_ONLY": "1"}
        return {"ROS_DOMAIN_ID": str(self.id), **here}

    def release(self) -> None:
        """Give the domain back; more than once is fine."""
        self._lock.close()

    def __enter__(self) -> Domain:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _try_lock(path: Path) -> IO[str] | None:
    try:
        file = path.open("a")
    except OSError:  # another user's
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
