"""Every key of every shipped configuration, misspelt in six ways: refused, and the right one named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nmar_ds.config import load_config
from nmar_ds.errors import ConfigError
from nmar_ds.theory.settings import load_settings
from nmar_ds.yaml_input import read_yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
Place = tuple[str, ...]


def keys(data: dict[str, Any], at: Place = ()) -> Iterator[Place]:
    for name, value in data.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from keys(value, (*at, name))


def misspellings(name: str) -> dict[str, str]:
    """By what was done; one that happens to spell the same word is left out."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    found = {
        "a letter dropped": name[:middle] + name[middle + 1 :],
        "the last letter dropped": name[:-1],
        "a letter doubled": name[:middle] + name[middle] + name[middle:],
        "two letters swapped": swapped,
        "upper case": name.upper(),
        "hyphens": name.replace("_", "-").capitalize(),
    }
    return {how: wrong for how, wrong in found.items() if wrong != name}


def misspelt(text: str, line: int, name: str, wrong: str) -> str:
    """The file with the key of one line renamed."""
    lines = text.splitlines(keepends=True)
    changed = re.sub(rf"(?<![\w-]){name}(?=\s*:)", wrong, lines[line - 1], count=1)
    assert changed != lines[line - 1]
    return "".join([*lines[: line - 1], changed, *lines[line:]])


def refusal(path: Path) -> str:
    """What is said of a file, up to and with the model's own configuration keys."""
    from nmar_ds.model.loading import config_of_keys

    try:
        load = load_settings if path.name == "safety_gap.yaml" else load_config
        section = load(path).model
        if section.config is not None:
            config_of_keys(section, vocab_size=40, ids={})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_misspelling_is_refused_and_mended(
    path: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data, lines = read_yaml(path)
    text = path.read_text(encoding="utf-8")
    bad, num = [], 0
    file = tmp_path / path.name
    for place in keys(data):
        for how, wrong in misspellings(place[-1]).items():
            file.write_text(misspelt(text, lines[place], place[-1], wrong), encoding="utf-8")
            said = refusal(file)
            dotted = ".".join([*place[:-1], wrong])
            num += 1
            if place == ("model", "config", "model_type"):  # its section is what names it
                expected = f"{wrong!r} is no key of it, did you mean 'model_type'?"
            elif place[:2] == ("model", "config") and len(place) > 2:  # by transformers' own names
                expected = f"{dotted}: unknown key; did you mean {place[-1]!r}?"
            else:
                where = f"{file}:{lines[place]}: {dotted}"
                expected = f"{where}: unknown key; did you mean {place[-1]!r}?"
            if expected not in said:
                bad.append((how, dotted, said))
    assert not bad, f"{len(bad)} of {num}: {bad[:5]}"
    assert num > 100
    record_property("cases", num)


def test_the_files_as_they_are_are_accepted() -> None:
    assert len(CONFIGS) >= 2
    assert all(refusal(path) == "" for path in CONFIGS)


def test_rope_keys_by_layer_type_are_looked_at_too() -> None:
    """transformers itself only warns, and trains with the default of the key that is missing."""
    from nmar_ds.model.loading import _check_rope_keys

    good = {"rope_type": "default", "rope_theta": 100.0}
    _check_rope_keys({"full_attention": good, "sliding_attention": good}, "at")
    _check_rope_keys(None, "at")
    wrong = {"full_attention": good, "sliding_attention": {"rope_type": "default", "rope_teta": 1}}
    message = r"at\.sliding_attention\.rope_teta: unknown key; did you mean 'rope_theta'\?"
    with pytest.raises(ConfigError, match=message):
        _check_rope_keys(wrong, "at")
