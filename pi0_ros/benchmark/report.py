"""Results as tables: on the terminal, and between two markers of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi0_ros.model import files

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table that reads well as plain text. `columns`: key of a row -> heading."""
    cells = [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(_is_number(row.get(key)) for row in rows) for key in columns]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value and abs(value) < 1e-2:
        return f"{value:.1e}"
    return str(value)


def peers_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Our time over transformers' PI0's."""
    columns = {
        "config": "sizes", "dtype": "dtype", "mode": "mode", "ratio": "ratio", "ratio_min": "least",
        "ratio_max": "largest", "aim": "aim", "ours_ms": "ours, ms", "peer_ms": "peer, ms",
        "max_abs_diff": "largest difference", "runs": "runs",
    }  # fmt: skip
    return table(rows, columns)


def sampler_text(result: Mapping[str, Any]) -> str:
    """A sampler's stages and memory."""
    rows = [
        {**row, **{key: f"{100 * row[key]:.0f} %" for key in ("rate_share", "bandwidth_share")}}
        for row in result["stages"]
    ]
    columns = {
        "case": "case", "stage": "stage", "p50_ms": "p50, ms", "p95_ms": "p95, ms", "gflop": "GFLOP",
        "rate_share": "of matmul rate", "mb": "MB", "bandwidth_share": "of bandwidth",
    }  # fmt: skip
    memory = ", ".join(f"{name.removesuffix('_mb').replace('_', ' ')} {mb} MB" for name, mb in result["memory"].items())
    return "\n".join(
        [
            f"{result['config']}, {result['dtype']} on {result['device']}: {result['cameras']} cameras, prompt of "
            f"{result['prompt']} tokens, {result['steps']} steps, {result['horizon']} actions; {result['runs']} runs. "
            f"The device: {_device(result)}. Memory: {memory}.",
            "",
            table(rows, columns),
        ]
    )


def training_text(result: Mapping[str, Any]) -> str:
    """A training step and augmentation."""
    return "\n".join(
        [
            f"{result['config']}, {result['dtype']} on {result['device']}: batch {result['batch']}, prompt of "
            f"{result['prompt']} tokens; {result['runs']} runs. {result['samples_per_s']} samples/s; loss and "
            f"gradients are {result['gflop']} GFLOP, {100 * result['rate_share']:.0f} % of the matmul rate "
            f"({result['matmul_gflops_per_s']} GFLOP/s); augmentation does {result['augment_images_per_s']} images/s.",
            "",
            table(result["parts"], {"part": "part", "p50_ms": "p50, ms", "p95_ms": "p95, ms"}),
        ]
    )


def node_text(result: Mapping[str, Any]) -> str:
    """The node's path and its parts."""
    rows = [*result["parts"][:-1], {**result["parts"][-1], "aim": result["aim_p95_ms"]}]
    return "\n".join(
        [
            f"{result['transport']}, {result['cameras']}: {result['frames_in_a_chunk']} of {result['frames_sent']} "
            "frames came into a chunk.",
            "",
            table(rows, {"part": "part", "p50_ms": "p50, ms", "p95_ms": "p95, ms", "aim": "aim of p95"}),
        ]
    )


def machine_text(facts: Mapping[str, Any]) -> str:
    """One paragraph about machine and versions."""
    gpu = f"{facts['gpu']}, " if "gpu" in facts else ""
    return (
        f"{gpu}{facts['processor']}, {facts['threads']} threads of torch, load {facts['load']} before the first "
        f"measurement; Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}; "
        f"allocator: {facts['malloc']}."
    )


def _device(result: Mapping[str, Any]) -> str:
    return f"{result['matmul_gflops_per_s']} GFLOP/s in a large product, {result['copy_gb_per_s']} GB/s in a large copy"


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all, and the folders that it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, data)


def rewrite(document: Path, text: str) -> bool:
    """Put `text` between the markers of `document`; False where there is no such document or no such place in it."""
    if not document.is_file():
        return False
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return False
    files.write_text(document, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}")
    return True
