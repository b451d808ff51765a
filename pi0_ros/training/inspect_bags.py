"""Look at recordings before training: what is there, what is missing, what would be kept, dropped and why.

`ros2 run pi0_ros inspect_bags DIR --robot FILE` prints a table; `--json` and `--html` write the same for programs and
as a page with plots and sample frames. Exit code 1 when the data cannot be trained on, with the reason. Without a robot
file it tells what the first recording holds, from which one can be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from pi0_ros.model.config import PRESETS
from pi0_ros.model.files import write_json, write_text
from pi0_ros.robot_file import RobotFileError, load_robot
from pi0_ros.training.bags import BagError, find_bags
from pi0_ros.training.build import cores, run_all
from pi0_ros.training.cache import CacheError
from pi0_ros.training.contents import contents
from pi0_ros.training.episodes import Selection
from pi0_ros.training.options import OptionsError, require_at_least
from pi0_ros.training.report import LOST, BagReport, inspect_bag, summarise
from pi0_ros.wording import told

DETAILED = 8  # bags that the table shows stream by stream
PICTURED = 6  # bags whose frames and curves the page shows


@dataclass
class Options:
    """Look at recordings before training: what is there, what is missing, what is kept, dropped and why."""

    bags: Annotated[Path, tyro.conf.Positional]
    """A recording (folder, .mcap or .db3), or a folder of recordings."""
    robot: Path | None = None
    """The robot file that the recordings were made with. None: tell topics, joints and ranges, to write it from."""
    json: Path | None = None
    """Write all numbers to this file as JSON."""
    html: Path | None = None
    """Write a page with plots and sample frames, which needs no other file."""
    preset: Literal["nano", "nano05", "pi0", "pi05"] = "nano"
    """The model to be trained, which sets chunk and images."""
    horizon: int | None = None
    """Actions of a chunk; None: the preset's."""
    image_size: int | None = None
    """Side of the square images that the model sees, pixels; None: the preset's."""
    prompt: str | None = None
    """The instruction of every episode, instead of the recorded one."""
    idle: float = 0.005
    """Start and end of an episode are trimmed until a joint moves by this share of its range; 0: not at all."""
    jobs: int | None = None
    """Processes; as many as there are cores by default."""

    def __post_init__(self) -> None:
        require_at_least(self, horizon=1, image_size=1, idle=0, jobs=1)
        for name, path in (("json", self.json), ("html", self.html)):
            if path and self.robot is None:
                raise OptionsError(f"--{name} needs --robot: without it there is only what a recording holds")
            if path and not path.parent.is_dir():
                raise OptionsError(f"--{name} {path}: there is no folder {path.parent}")


def inspect(options: Options) -> tuple[list[BagReport], dict[str, Any]]:
    """The reports of all recordings and their summary.

    Raises:
        BagError: no recording there; RobotFileError: the robot file cannot be used.
    """
    robot, bags = load_robot(options.robot), find_bags(options.bags)
    selection = Selection(options.idle, options.prompt)
    model, pictured = PRESETS[options.preset], 3 if options.html else 0
    size = options.image_size or model.vision.image_size
    tasks = [(bag, robot, selection, size, pictured if i < PICTURED else 0) for i, bag in enumerate(bags)]
    jobs = min(options.jobs or cores(), len(bags))
    with tqdm(total=len(bags), desc="inspect", unit="bag", disable=None) as bar:
        reports = run_all(inspect_bag, tasks, jobs, lambda _: bar.update())
    return reports, summarise(reports, robot, options.horizon or model.action_horizon, selection)


def unread(bags: Path) -> str:
    """What the first recording at `bags` holds, as text. BagError when there is none, or it cannot be read."""
    first, *others = find_bags(bags)
    more = [f"and {len(others)} more recordings"] if others else []
    way = "write a robot file from this (docs/robot.md; config/six_joint_arm.yaml is one), then give it as --robot"
    return "\n".join([*contents(first), *more, way])


def table(reports: list[BagReport], summary: dict[str, Any]) -> str:
    """The report as text."""
    lines = [line for report in reports[:DETAILED] for line in _bag_lines(report.numbers)]
    for numbers in [report.numbers for report in reports[DETAILED:]]:
        lines += _short_lines(numbers, known=set(lines))
    lines += ["", f"In total, for {summary['robot']}:"]
    lines.append(f"  {summary['usable_bags']} of {summary['bags']} recordings usable, {summary['episodes']} episodes")
    lines.append(f"  ticks kept {summary['kept']} of {summary['ticks']}{_dropped(summary['dropped'])}")
    lines.append(f"  idle: {summary['idle_seconds']:.1f} s at starts and ends, {_threshold(summary['idle_threshold'])}")
    chunk = summary["chunk"]
    lines.append(f"  chunk: {chunk['horizon']} actions at {chunk['control_rate']:g} Hz = {chunk['seconds']:.2f} s")
    if skew := summary["skew_ms"]:
        lines.append(f"  skew: median {skew['p50']:.1f} ms, 95 % {skew['p95']:.1f} ms, worst {skew['max']:.1f} ms")
    for prompt, count in list(summary["prompts"].items())[:20]:
        lines.append(f"  prompt {prompt!r}: {count} episodes")
    lines += _joint_lines(summary["joints"])
    lines += [f"warning: {text}" for text in summary["warnings"]]
    return "\n".join(lines)


def _bag_lines(n: dict[str, Any]) -> list[str]:
    lines = [n["bag"]]
    if "streams" in n:
        lines.append(f"  {n['duration']:.1f} s, {n['messages']} messages, {len(n['episodes'])} episodes")
        for name, stream in n["streams"].items():
            rate = f"{stream['rate']:.1f} Hz" if stream["rate"] else "-"
            gap = f", {stream['gaps']} gaps, longest {stream['longest_gap']:.2f} s" if stream["gaps"] else ""
            gap += f", {100 * stream['lost']:.0f} % missing" if stream["lost"] > LOST else ""
            behind = _behind(stream.get("bag_minus_header_ms"))
            where = "" if stream["topic"] == name else f" ({stream['topic']})"
            lines.append(f"  {name}{where}: {stream['messages']} messages, {rate}{gap}{behind}")
        if n["missing"]:
            lines.append(f"  missing: {', '.join(n['missing'])}")
        if n["bad_messages"]:
            lines += [f"  bad messages: {count} x {reason}" for reason, count in n["bad_messages"].items()]
        if n["ticks"]:
            lines.append(f"  ticks kept {n['kept']} of {n['ticks']}{_dropped(n['dropped'])}")
        for e in [e for e in n["episodes"] if e["idle_start"] or e["idle_end"]][:10]:
            name = e["label"] or "episode"
            lines.append(
                f"  {name}: {e['seconds']:.1f} s, idle {e['idle_start']:.1f} s at start, {e['idle_end']:.1f} s at end"
            )
    lines += [f"  note: {note}" for note in n["notes"]]
    if n["refused"]:
        lines.append(f"  REFUSED: {n['refused']}")
    return lines


def _behind(delay: dict[str, float] | None) -> str:
    if delay is None:
        return ""
    if abs(delay["p50"]) > 60_000:
        return f", clocks {delay['p50'] / 1000:.0f} s apart, within {delay['max'] - delay['min']:.1f} ms"
    return f", recorded {delay['min']:.1f}..{delay['max']:.1f} ms after its stamp"


def _short_lines(n: dict[str, Any], known: set[str]) -> list[str]:
    """One line, and what was not said of an earlier recording."""
    kept = (
        f"{n['duration']:.1f} s, ticks kept {n['kept']} of {n['ticks']}{_dropped(n['dropped'])}" if "kept" in n else ""
    )
    lines = [f"  note: {note}" for note in n["notes"]] + ([f"  REFUSED: {n['refused']}"] if n["refused"] else [])
    return [f"{n['bag']}: {kept}", *(line for line in lines if line not in known)]


def _dropped(dropped: dict[str, int]) -> str:
    if not dropped:
        return ""
    return "; dropped " + ", ".join(f"{n} {why}" for why, n in sorted(dropped.items(), key=lambda item: -item[1]))


def _threshold(idle: float) -> str:
    return f"until a joint moves by {idle:.2%} of its range (--idle)" if idle else "not trimmed (--idle 0)"


COLUMNS = ("mean", "std", "q01", "q99", "min", "max")


def _joint_lines(joints: list[dict[str, Any]]) -> list[str]:
    if not joints:
        return []
    width = max(len(joint["name"]) for joint in joints)
    lines = ["", f"  {'joint':{width}}  what   " + "".join(f"{name:>9}" for name in COLUMNS) + "  outside  remarks"]
    for joint in joints:
        for what in ("state", "actions"):
            c = joint[what]
            if c is None:
                continue
            remarks = ["near-constant"] if c["near_constant"] else []
            remarks += [f"{c['nan']} NaN"] if c["nan"] else []
            if what == "state" and (gripper := joint.get("gripper")):
                remarks.append(f"gripper {gripper['remark']}")
            numbers = "".join(f"{c[name]:9.3f}" for name in COLUMNS)
            lines.append(
                f"  {joint['name']:{width}}  {what:7}{numbers}{c['outside_limits']:9.1%}  {', '.join(remarks)}".rstrip()
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the data can be trained on, 1 when not."""
    try:
        options = tyro.cli(Options, prog="inspect_bags", description=Options.__doc__, args=arguments)
        if options.robot is None:
            print(unread(options.bags))
            return 0
        reports, summary = inspect(options)
        print(table(reports, summary))
        if options.json:
            data = {"summary": summary, "bags": [report.numbers for report in reports]}
            write_json(options.json, data)
        if options.html:
            from pi0_ros.training.inspection_page import page  # matplotlib takes a second to import

            write_text(options.html, page(reports, summary))
    except (OptionsError, BagError, CacheError, RobotFileError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if summary["refused"]:
        print(f"error: {summary['refused']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
