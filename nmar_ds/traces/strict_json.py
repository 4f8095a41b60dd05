"""JSON read strictly: what Python's json lets through and training data must not contain.

Every fault is a `Flaw`, which names the field but not yet the file and line.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, NoReturn


class Flaw(Exception):
    """A fault in one line; `parse_line` adds the place and turns it into a TraceError."""

    def __init__(self, field: str, problem: str, expected: str) -> None:
        super().__init__(field, problem, expected)
        self.field, self.problem, self.expected = field, problem, expected


def load_object(raw: bytes) -> dict[str, Any]:
    """Read one line as a JSON object; a Flaw where it is anything else."""
    if raw.startswith(b"\xef\xbb\xbf"):
        raise Flaw("record", "starts with a byte order mark", "UTF-8 without one")
    if not raw.strip():
        raise Flaw("record", "blank line", "a JSON object")
    try:
        loaded = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise Flaw("record", f"byte {error.start + 1} is not UTF-8", "UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"not JSON at column {error.colno} ({error.msg})"
        raise Flaw("record", problem, "one JSON object per line") from None
    except ValueError:  # an integer of more than 4300 digits
        raise Flaw("record", "a number too long to read", "token ids and offsets") from None
    except RecursionError:
        raise Flaw("record", "nested too deeply", "at most three levels") from None
    if not isinstance(loaded, dict):
        raise Flaw("record", f"is {kind_of(loaded)}", "a JSON object")
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Flaw(shown(twice), "given twice", "each field once")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise Flaw("record", f"{name} is not JSON", "a finite number")


def require_known(fields: dict[str, Any], names: tuple[str, ...], prefix: str) -> None:
    """Refuse fields that are not among `names`."""
    for name in fields:
        if name not in names:
            problem = f"unknown field {shown(name)}{nearest(name, names)}"
            raise Flaw(prefix.rstrip(".") or "record", problem, ", ".join(names))


def nearest(name: str, names: tuple[str, ...]) -> str:
    """Return a hint at the name that was probably meant, or ""."""
    near = difflib.get_close_matches(name[:64], names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def as_text(value: Any, field: str) -> str:
    """Require a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise Flaw(field, f"is {kind_of(value)}", "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"lone surrogate at character {error.start}"
        raise Flaw(field, problem, "text that can be written as UTF-8") from None
    return value


def as_filled_text(value: Any, field: str) -> str:
    """Require a string that is not empty."""
    if not as_text(value, field):
        raise Flaw(field, "empty", "at least one character")
    return str(value)


def as_integer(value: Any, field: str, highest: int) -> int:
    """Require an integer from 0 to `highest`."""
    if type(value) is not int:  # bool is an int to Python, not to us
        raise Flaw(field, f"is {kind_of(value)}", "an integer")
    if not 0 <= value <= highest:
        raise Flaw(field, f"{shown(value)} is out of range", f"0 to {highest}")
    return value


def as_list(value: Any, field: str) -> list[Any]:
    """Require a list."""
    if not isinstance(value, list):
        raise Flaw(field, f"is {kind_of(value)}", "a list")
    return value


def as_object(value: Any, field: str) -> dict[str, Any]:
    """Require an object."""
    if not isinstance(value, dict):
        raise Flaw(field, f"is {kind_of(value)}", "an object")
    return value


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    kinds = {
        bool: "a boolean", int: "an integer", float: "a fraction", str: "a string",
        list: "a list", dict: "an object", type(None): "null",
    }  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")  # columns hold more than JSON


def shown(value: object) -> str:
    """One short printable line: repr escapes line breaks and surrogates."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
