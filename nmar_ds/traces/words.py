"""Texts word by word: the ids of a text where they are known to be those of its words, on end.

Most of what a preparation spends goes into encoding, and most words of a corpus have been seen
before. A byte-level tokenizer cuts a text by a regular expression and merges inside the pieces
only. All expressions that are known here start a piece at every space that comes after a visible
character, and look back at nothing; so a text may be cut there, and the ids of a word remembered.
(Not inside a run of spaces, nor after it.) Tokenizers that are not known to do so encode every
text whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WORD = re.compile(r"(?<=\S)(?= )")
MAX_KNOWN = 2**18  # words; some 50 MB
MAX_LENGTH = 48  # characters of a word that is worth remembering

# The expressions of GPT-4 (cl100k) and its kin, by the number of digits in a piece; Llama 3 has
# three, Qwen 2 and 3 one. That of GPT-2 is `ByteLevel` with `use_regex`.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN_SPLITS = frozenset(_CL100K % digits for digits in (r"\p{N}{1,3}", r"\p{N}"))


class WordEncoder:
    """Encodes as a function does whose ids of a text are those of its words.

    Args:
        encode: the ids of a text.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text."""
        known, ids = self._known, list[int]()
        for word in WORD.split(text):
            try:
                ids += known[word]
            except KeyError:
                ids += self._learn(word)
        return ids

    @staticmethod
    def cut_before(text: str, end: int) -> int:
        """The last place where a text is cut, whatever comes from `end` on; 0 if there is none."""
        at = end
        while (at := text.rfind(" ", 1, at)) > 0:
            if WORD.match(text, at):
                return at
        return 0

    def _learn(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(word))
        if len(word) <= MAX_LENGTH and len(self._known) < MAX_KNOWN:
            self._known[word] = ids
        return ids


def is_word_by_word(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is known to encode words as they are encoded alone.

    Args:
        spec: its content. Special tokens are not looked for in texts; those that are not special
            are, and may reach over a space.
    """
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    if spec.get("normalizer") is not None:
        return False
    if not all(token["special"] for token in spec["added_tokens"]):
        return False
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not all(_keeps_words(step) for step in steps):
        return False
    # Bytes are named in the end, and something before or there cuts at spaces.
    return steps[-1].get("type") == "ByteLevel" and any(map(_cuts_words, steps))


def _keeps_words(step: Mapping[str, Any]) -> bool:
    """Whether a step cuts the same places whether words come alone or together."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step.get("add_prefix_space")
    return kind == "Digits" or _is_known_split(step)


def _cuts_words(step: Mapping[str, Any]) -> bool:
    return _is_known_split(step) or (
        # Older files lack the entry and mean true.
        step.get("type") == "ByteLevel" and bool(step.get("use_regex", True))
    )


def _is_known_split(step: Mapping[str, Any]) -> bool:
    return (
        step.get("type") == "Split"
        and step["pattern"].get("Regex") in KNOWN_SPLITS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )
