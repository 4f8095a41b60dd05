"""What lm-eval's requests ask of generation, in the stack decoder's terms."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from nmar_ds.errors import ConfigError

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where neither the task nor the user says
# Keywords of tasks that mean nothing at these values, and are refused at others.
_NEUTRAL = {"num_beams": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The generation keywords of a request, as the stack decoder takes them."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


def understand(keywords: Mapping[str, Any], *, max_new_tokens: int | None) -> Generation:
    """Read a task's `generation_kwargs`.

    Args:
        keywords: as the task gives them.
        max_new_tokens: goes before the task's own number, which does not count on undone tokens.

    Raises:
        ConfigError: a keyword that the decoder has nothing for, or sampling without temperature.
    """
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(keywords), DEFAULT_NEW_TOKENS))
    until, tokens = known.pop("until"), known.pop("max_gen_toks")
    samples, temperature = known.pop("do_sample"), known.pop("temperature", 0.0)
    top_p = known.pop("top_p", 1.0)
    for name, value in known.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise ConfigError(
                f"generation_kwargs: {name}: {value!r}, expected only until, max_gen_toks, "
                "do_sample, temperature and top_p"
            )
    if samples and not temperature:
        raise ConfigError("generation_kwargs: do_sample: true, expected a temperature above 0 too")
    return Generation(
        until=tuple(text for text in until if text),
        max_new_tokens=int(tokens if max_new_tokens is None else max_new_tokens),
        temperature=float(temperature),
        top_p=float(top_p),
    )


def draw_numbers(documents: Sequence[tuple[str | None, int | None]]) -> list[int]:
    """What fixes the draws of each response beside the seed: its task, its document, which repeat.

    So a sample depends neither on the tasks that run beside nor on how many documents do, and
    equal prompts of two tasks, of two documents or of one document's repeats differ.

    Args:
        documents: of each request its task's name and its document's number in it.

    Returns:
        63-bit numbers.
    """
    seen: Counter[tuple[str | None, int | None]] = Counter()
    numbers = []
    for task, document in documents:
        repeat = seen[task, document]
        digest = hashlib.sha256(f"{repeat}\x1f{document}\x1f{task}".encode()).digest()
        numbers.append(int.from_bytes(digest[:8], "little") >> 1)
        seen[task, document] += 1
    return numbers
