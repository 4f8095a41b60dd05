"""Strict YAML: no repeated keys, no surprising numbers, and the line of every key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nmar_ds.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `1e-3` is a number, `010` is not 8, a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        mark = key_node.start_mark
        if isinstance(key, list | dict | set):
            what = type(key).__name__
            raise ConfigError(f"{mark.name}:{mark.line + 1}: a {what} cannot be a key")
        if key in mapping:
            raise ConfigError(f"{mark.name}:{mark.line + 1}: {key}: given twice, expected once")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, whatever its case; None where none is."""
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def nearest(name: str, known: Any) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or the list of all of them."""
    close = closest(name, known)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; expected one of {', '.join(sorted(known))}"


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Returns the mapping, and the 1-based line of every key and list entry by its path."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from None
    try:
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: not YAML: {error.reason} (#x{error.character:04x})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Of a value: month 13, a number of 5,000 digits, brackets a thousand deep.
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: is a {type(data).__name__}, expected a mapping")
    lines: dict[tuple[str, ...], int] = {}

    def visit(at: yaml.Node | None, prefix: tuple[str, ...]) -> None:
        if isinstance(at, yaml.MappingNode):
            for key_node, value_node in at.value:
                place = (*prefix, str(key_node.value))
                lines[place] = key_node.start_mark.line + 1
                visit(value_node, place)
        elif isinstance(at, yaml.SequenceNode):
            for number, item in enumerate(at.value):
                lines[*prefix, str(number)] = item.start_mark.line + 1
                visit(item, (*prefix, str(number)))

    visit(node, ())
    return data, lines


def apply_override(data: dict[str, Any], text: str) -> tuple[str, ...]:
    """Put one `a.b=value` into the mapping, sections made as needed; returns the key's path."""
    key, separator, value = text.partition("=")
    parts = tuple(key.split("."))
    if not separator or not all(parts):
        raise ConfigError(f"override {text!r}: expected key.subkey=value")
    try:
        loader = _Loader(value)
        loader.name = f"override {key}"
        parsed = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {text!r}: the value is not YAML") from None
    at = data
    for position, part in enumerate(parts[:-1]):
        if not isinstance(at.get(part), dict):
            if at.get(part) is not None:
                place = ".".join(parts[: position + 1])
                raise ConfigError(f"override {text!r}: {place} is a value, not a section")
            at[part] = {}
        at = at[part]
    at[parts[-1]] = parsed
    return parts
