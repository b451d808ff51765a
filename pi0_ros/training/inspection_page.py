"""The inspection as one HTML page: tables, plots and frames inside the file, nothing to load from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from pi0_ros.training.html import document, drawn, picture, table
from pi0_ros.training.report import BagReport


def page(reports: list[BagReport], summary: dict[str, Any]) -> str:
    """The whole page."""
    parts = [_verdict(summary), _totals(summary)]
    parts += [f'<p class="warn">{escape(text)}</p>' for text in summary["warnings"]]
    parts += [_joints(summary["joints"]), _histograms(reports)]
    parts += ["<h2>Recordings</h2>", *(_bag(report, summary) for report in reports)]
    return document(f"Recordings for {summary['robot']}", parts)


def _verdict(summary: dict[str, Any]) -> str:
    if summary["refused"]:
        return f'<p class="bad"><b>Cannot be trained on:</b> {escape(summary["refused"])}</p>'
    return "<p>Can be trained on.</p>"


def _totals(s: dict[str, Any]) -> str:
    chunk = s["chunk"]
    rows = {
        "recordings usable": f"{s['usable_bags']} of {s['bags']}",
        "episodes": s["episodes"],
        "hours": f"{s['hours']:.2f}",
        "ticks kept": f"{s['kept']} of {s['ticks']}",
        **{f"dropped: {why}": count for why, count in s["dropped"].items()},
        "idle trimmed": f"{s['idle_seconds']:.1f} s, threshold {s['idle_threshold']:.2%} of a joint's range",
        "chunk": f"{chunk['horizon']} actions, {chunk['seconds']:.2f} s",
        **{f"prompt: {prompt}": f"{count} episodes" for prompt, count in s["prompts"].items()},
    }
    if skew := s["skew_ms"]:
        rows["skew"] = f"median {skew['p50']:.1f} ms, 95 % {skew['p95']:.1f} ms, worst {skew['max']:.1f} ms"
    return table(["", ""], [[name, value] for name, value in rows.items()])


def _joints(joints: list[dict[str, Any]]) -> str:
    names = ("mean", "std", "q01", "q99", "min", "max")
    rows = []
    for joint in joints:
        for what in ("state", "actions"):
            column = joint[what]
            if column:
                remarks = "near-constant" if column["near_constant"] else ""
                if what == "state" and "gripper" in joint:
                    remarks += f" {joint['gripper']['remark']}"
                values = [f"{column[name]:.4f}" for name in names]
                rows.append(
                    [
                        joint["name"],
                        joint["unit"],
                        what,
                        *values,
                        f"{column['outside_limits']:.1%}",
                        column["nan"],
                        remarks,
                    ]
                )
    head = ["joint", "unit", "of", *names, "outside limits", "NaN", "remarks"]
    return "<h2>Joints</h2>" + table(head, rows) if rows else ""


def _histograms(reports: list[BagReport]) -> str:
    skew = np.concatenate([report.skew_ms for report in reports])
    seconds = [e["seconds"] for report in reports for e in report.numbers.get("episodes", [])]
    if not len(skew) or not seconds:
        return ""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(skew, bins=40)
    left.set(xlabel="skew between streams, ms", ylabel="ticks")
    right.hist(seconds, bins=min(40, max(len(seconds), 5)))
    right.set(xlabel="length of episodes, s", ylabel="episodes")
    return picture(drawn(figure), "skew between streams, lengths of episodes")


def _bag(report: BagReport, summary: dict[str, Any]) -> str:
    n = report.numbers
    parts = [f"<h3>{escape(n['bag'])}</h3>"]
    if n["refused"]:
        parts.append(f'<p class="bad">Refused: {escape(n["refused"])}</p>')
    parts += [f"<p>{escape(note)}</p>" for note in n["notes"]]
    if "streams" in n:
        rows = [
            [
                name,
                stream["topic"],
                stream["messages"],
                f"{stream['rate']:.1f}" if stream["rate"] else "",
                stream["gaps"],
                f"{stream['longest_gap']:.2f}" if stream["longest_gap"] else "",
                f"{100 * stream['lost']:.0f}",
                f"{d['min']:.1f} .. {d['max']:.1f}" if (d := stream.get("bag_minus_header_ms")) else "",
            ]
            for name, stream in n["streams"].items()
        ]
        parts.append(
            table(["stream", "topic", "messages", "Hz", "gaps", "longest, s", "missing, %", "bag - header, ms"], rows)
        )
        bad = [[reason, count] for reason, count in n["bad_messages"].items()]
        parts.append(table(["bad messages", ""], bad) if bad else "")
        if n["ticks"]:
            dropped = [[f"dropped: {reason}", count] for reason, count in n["dropped"].items()]
            parts.append(table(["ticks", ""], [["kept", n["kept"]], *dropped]))
    parts += [_frame(slot, seconds, frame) for slot, seconds, frame in report.samples]
    if report.samples and report.episode is not None:
        parts.append(_curves(report.episode, summary["joints"]))
    return "".join(parts)


def _frame(slot: str, seconds: float, frame: np.ndarray) -> str:
    _, data = cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    return picture(data.tobytes(), slot, f"{slot}, {seconds:.1f} s")


def _curves(episode: dict[str, np.ndarray], joints: list[dict[str, Any]]) -> str:
    rows = (len(joints) + 2) // 3
    figure = Figure(figsize=(10, 1.9 * rows), layout="constrained")
    for i, joint in enumerate(joints):
        axis = figure.add_subplot(rows, 3, i + 1)
        axis.plot(episode["seconds"], episode["state"][:, i], label="state")
        axis.plot(episode["seconds"], episode["actions"][:, i], label="action")
        low, high = axis.get_ylim()
        axis.fill_between(episode["seconds"], low, high, where=~episode["usable"], color="0.85", label="not used")
        axis.set_title(joint["name"], fontsize=9, parse_math=False)
        axis.set_ylabel(joint["unit"], fontsize=8)
        if i == 0:
            axis.legend(fontsize=7)
    return picture(drawn(figure), "states and actions", "first episode, over seconds; grey: not used")
