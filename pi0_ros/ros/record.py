"""record: demonstrations as recordings, one bag an episode, with all that the trainer will want.

`ros2 run pi0_ros record --robot FILE --output DIR` listens to the topics that the robot file names. Keys of its
terminal or services (std_srvs/Trigger, for a pedal or the teleoperation's own buttons) begin, keep and discard
episodes: recorder/start, recorder/keep, recorder/discard.

Each kept episode is looked at by inspect_bags at once, so that what is wrong shows after the first and not after fifty.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from std_msgs.msg import String
from std_srvs.srv import Trigger

from pi0_ros.robot_file import RobotFileError, load_robot, robot_path
from pi0_ros.ros.program import end, ending, forget_ending, run_node
from pi0_ros.ros.qos import LATCHED
from pi0_ros.ros.recorder import EpisodeRecorder, RecordingError

LOOK, SHOW = 0.5, 0.1  # s between two looks at the graph, and at the keys
SETTLED = 2.0  # s; until then nodes are still finding one another
LOOKED_AT = 60.0  # s that the program waits at its end for the last episodes to be looked at
NUMBERS = "numbers.json"
SECONDS = re.compile(r"(?<= for )[\d.]+(?= s )")  # of a silence, which grow
ALONE = " (1 recordings)"  # what inspect_bags counts
HELP = "Enter: begin an episode, then keep it; d: discard it; p TEXT: prompt; q: end"


@dataclass
class Options:
    """Record demonstrations, one bag an episode: the topics of the robot file, and the prompt."""

    robot: Path
    """The robot file, which says what is recorded; `actions` in it is what the arm is told."""
    output: Path
    """Folder for the episodes; those that are there already stay."""
    prompt: str | None = None
    """The instruction of the episodes. None: the newest on the robot file's prompt topic, or its default."""


class Looks:
    """inspect_bags over kept episodes, one after another, in a process of its own that leaves the recording the way."""

    def __init__(self, robot: Path) -> None:
        self._robot = robot
        self._folder: tempfile.TemporaryDirectory | None = None
        self._waiting: deque[Path] = deque()
        self._process: subprocess.Popen | None = None  # over the first that waits

    def begin(self, episode: Path) -> None:
        """Look at one when those before are done."""
        self._waiting.append(episode)

    def done(self) -> list[str]:
        """What was found since the last call, a line each."""
        if self._process is None:
            if self._waiting:
                self._process = self._start(self._waiting[0])
            return []
        if self._process.poll() is None:
            return []
        errors = self._process.stderr.read().strip().splitlines()
        numbers = Path(self._folder.name, NUMBERS)
        found = json.loads(numbers.read_text()) if numbers.is_file() else None
        numbers.unlink(missing_ok=True)
        self._process, name = None, self._waiting.popleft().name
        return [f"{name}: {line}" for line in (verdict(found) if found else errors[-1:])]

    def _start(self, episode: Path) -> subprocess.Popen:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="pi0_ros_record_")
        command = ["nice", sys.executable, "-m", "pi0_ros.training.inspect_bags", str(episode), "--jobs", "1"]
        command += ["--robot", str(self._robot), "--json", str(Path(self._folder.name, NUMBERS))]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether some are still to be looked at."""
        return bool(self._waiting)

    def close(self) -> None:
        """Stop looking."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()


def verdict(found: dict[str, Any]) -> list[str]:
    """What a person should know of one episode: lines from inspect_bags' numbers."""
    (bag,), summary = found["bags"], found["summary"]
    if why := bag["refused"] or summary["refused"]:
        return [f"CANNOT BE USED: {why}"]
    dropped = "".join(f", {count} {why}" for why, count in bag["dropped"].items())
    lines = [f"{bag['kept']} of {bag['ticks']} ticks can be used{dropped}"]
    return lines + [f"warning: {text.removesuffix(ALONE)}" for text in summary["warnings"]]


class Keys:
    """Lines that are typed into the program's terminal, where it has one."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A process in the background would be stopped for reading.
        try:
            self.there = sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
        except (OSError, AttributeError):  # a terminal of somebody else, or none at all
            self.there = False
        if self.there:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            for line in sys.stdin:
                self.lines.put(line.strip())
        self.lines.put("q")


class Recorder(Node):
    """The node: keys and services in, lines for a person out."""

    _episodes: EpisodeRecorder | None = None

    def __init__(self, options: Options) -> None:
        super().__init__("recorder")
        robot = load_robot(options.robot)
        self._prompt = options.prompt if options.prompt is not None else robot.prompt.default
        self._episodes = EpisodeRecorder(self, robot, options.output)
        self._looks = Looks(robot_path(options.robot).absolute())
        self._keys = Keys()
        self._lacking: list[str] | None = None  # what was told to be missing
        self._noticed: list[str] | None = None  # at the last look
        self._begun = time.monotonic()
        self._fault = ""  # the last one told
        self._drawn = False  # whether a line of `_draw` stands in the terminal
        if options.prompt is None:
            self.create_subscription(String, robot.prompt.topic, lambda said: self._take_prompt(said.data), LATCHED)
        for name, act in (("start", self._begin), ("keep", self._keep), ("discard", self._discard)):
            self.create_service(Trigger, f"~/{name}", self._answerer(act))
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # simulated time may stand still
        self.create_timer(LOOK, self._look, clock=steady)
        self.create_timer(SHOW, self._show, clock=steady)
        self._say(f"records {robot.name} into {options.output}")
        self._say(HELP if self._keys.there else "services: recorder/start, recorder/keep, recorder/discard")

    # What a person says

    def _begin(self) -> str:
        name = self._episodes.begin(self._prompt)
        return f"{name}: recording {self._prompt!r}"

    def _keep(self) -> str:
        seconds = self._episodes.seconds
        path = self._episodes.keep()
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        self._looks.begin(path)
        return f"{path.name}: kept, {seconds:.1f} s, {size:.1f} MB"

    def _discard(self) -> str:
        return f"{self._episodes.discard()}: discarded"

    def _act(self, act: Callable[[], str]) -> tuple[bool, str]:
        try:
            done, text = True, act()
        except RecordingError as error:
            done, text = False, str(error)
        self._say(text if done else f"not possible: {text}")
        return done, text

    def _answerer(self, act: Callable[[], str]) -> Callable[[Any, Trigger.Response], Trigger.Response]:
        def answer(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            response.success, response.message = self._act(act)
            return response

        return answer

    def _typed(self, line: str) -> None:
        if not line:
            self._act(self._keep if self._episodes.episode else self._begin)
        elif line == "d":
            self._act(self._discard)
        elif line == "q":
            end()
        elif line.startswith("p "):
            self._take_prompt(line[2:].strip())
        else:
            self._say(f"{line!r} is none of these. {HELP}")

    def _take_prompt(self, prompt: str) -> None:
        self._prompt = prompt
        later = ", from the next episode on" if self._episodes.episode else ""
        self._say(f"prompt: {prompt!r}{later}")

    # What a person is told

    def _look(self) -> None:
        """At the graph: subscribe, and say what is missing when that changes."""
        self._draw()
        self._episodes.listen()
        lacking = self._episodes.lacking()
        reasons = [SECONDS.sub("", line) for line in lacking]
        before, self._noticed = self._noticed, reasons
        if reasons == self._lacking or reasons != before:  # what lasts for a moment only need not be told
            return
        if lacking and time.monotonic() - self._begun < SETTLED:
            return
        self._lacking = reasons
        self._say("\n".join(f"missing: {line}" for line in lacking) or f"ready: {self._rates()}; {self._prompt!r}")

    def _draw(self) -> None:
        """The running episode, where there is a terminal."""
        if self._episodes.episode and sys.stdout.isatty():
            self._print(f"\r\033[K{self._episodes.episode}: {self._episodes.seconds:.0f} s, {self._rates()}", end="")
            self._drawn = True

    def _show(self) -> None:
        """What was typed, found and failed meanwhile."""
        while not self._keys.lines.empty():
            self._typed(self._keys.lines.get())
        for line in self._looks.done():
            self._say(line)
        if self._episodes.fault != self._fault:
            self._fault = self._episodes.fault
            if self._fault:
                self._say(self._fault)

    def _rates(self) -> str:
        return ", ".join(f"{name} {rate:.0f} Hz" for name, rate in self._episodes.rates().items())

    def _say(self, text: str) -> None:
        self._print("\r\033[K" * self._drawn + text)
        self._drawn = False

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, flush=True)
        except OSError:  # the terminal was closed: nobody reads, and the episode is kept all the same
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process

    def destroy_node(self) -> None:
        """Keep the episode that is being recorded, and wait until all have been looked at, or a second Ctrl-C."""
        if self._episodes is None:
            return super().destroy_node()
        if self._episodes.episode:
            self._act(self._keep)
        forget_ending()
        deadline = time.monotonic() + LOOKED_AT
        while self._looks.busy and time.monotonic() < deadline and not ending():
            time.sleep(SHOW)
            self._show()
        self._looks.close()
        self._episodes.close()
        super().destroy_node()


def main(args: Sequence[str] | None = None) -> int:
    """Record until told to end; 1 and one line on stderr when that cannot begin."""
    args = list(sys.argv if args is None else args)
    at = args.index("--ros-args") if "--ros-args" in args else len(args)
    options = tyro.cli(Options, prog="record", description=Options.__doc__, args=args[1:at])
    errors = (RecordingError, RobotFileError)
    return run_node("record", (), lambda: Recorder(options), errors=errors, args=[args[0], *args[at:]])


if __name__ == "__main__":
    sys.exit(main())
