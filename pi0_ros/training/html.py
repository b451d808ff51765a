"""An HTML page that needs no other file: tables and pictures inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

_STYLE = """body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.bad{color:#b00020}.warn{color:#9a5b00}img{max-width:100%}
figure{display:inline-block;margin:.4em}figcaption{font-size:12px;color:#666}"""


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page: `title` (text) as its heading, then `parts` (HTML)."""
    title = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Headings and cells as text, whatever they hold."""
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"


def picture(png: bytes, name: str, caption: str = "") -> str:
    """A PNG; `name` for those who cannot see it."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{data}">{below}</figure>'


def drawn(figure: Figure) -> bytes:
    """A figure as PNG."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=90)
    return target.getvalue()
