"""How values and others' errors are told in messages: in one line, and not longer than can be read."""

from __future__ import annotations


def shown(value: object) -> str:
    """A value that was found where another was expected."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def told(error: BaseException) -> str:
    """What an error says; of a file, without the number that the system has for it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line that an error says, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:longest] if lines else type(error).__name__
