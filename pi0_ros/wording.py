"""How values and others' errors are told in messages: in one line, and not longer than can be read."""

from __future__ import annotations


def shown(value: object) -> str:
    """A value that was found where another was expected."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line that an error says, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:longest] if lines else type(error).__name__
