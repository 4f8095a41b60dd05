"""Word by word the ids are those of the whole text, or the text is encoded whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import corpus
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from nmar_ds.traces import words
from nmar_ds.traces.encoding import InexactError, load_tokenizer
from nmar_ds.traces.words import KNOWN_SPLITS, WordEncoder, is_word_by_word

PLAIN = settings(max_examples=400, deadline=None, derandomize=True, database=None)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WITH_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False)
STEPS = {
    "gpt2": WITH_REGEX,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WITH_REGEX]),
    **{
        f"split {number}": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), BYTES]
        )
        for number, pattern in enumerate(sorted(KNOWN_SPLITS))
    },
}
PIECES = (
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u200b", "'s", "'LL", "so",
    " the", "The", "12", "3", " 4567", "\u0661", "+", "==", ".\n", "<UNDO>", "</s>", "h\u00e9", "e\u0301",
    "\u65e5\u672c", "\U0001f600", "\ufeff", "_", "\u0120",
)  # fmt: skip


@pytest.fixture(params=STEPS)
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    """With merges over spaces, digits and line breaks wherever its pieces allow them."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = STEPS[request.param]
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>", "<UNDO>"], show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(
        [*corpus(), *(a + b + c for a in PIECES for b in PIECES for c in PIECES)], trainer
    )
    made.encode_special_tokens = True
    return made


def whole(tokenizer: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def spec_of(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def test_the_same_ids_as_whole(tokenizer: tokenizers.Tokenizer) -> None:
    assert is_word_by_word(spec_of(tokenizer))
    encode, by_word = whole(tokenizer), WordEncoder(whole(tokenizer))
    text = st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(max_size=20)

    @PLAIN
    @given(text)
    def run(text: str) -> None:
        assert by_word(text) == encode(text) == by_word(text)  # the second time from memory

    run()


def test_what_has_been_seen_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def encode(text: str) -> list[int]:
        asked.append(text)
        return list(text.encode())

    by_word = WordEncoder(encode)
    assert by_word("so the so the") == list(b"so the so the")
    assert asked == ["so", " the", " so"]
    assert by_word("so the") == list(b"so the") and len(asked) == 3
    long = "x" * (words.MAX_LENGTH + 1)
    assert by_word(long) == by_word(long) == list(long.encode()) and asked[3:] == [long, long]
    monkeypatch.setattr(words, "MAX_KNOWN", 3)
    assert by_word("new") == by_word("new") == list(b"new") and asked[5:] == ["new", "new"]


def spoilt(spec: dict[str, Any], how: str) -> dict[str, Any]:
    spec = copy.deepcopy(spec)
    if how == "normalizer":
        spec["normalizer"] = {"type": "NFC"}
    elif how == "dropout":
        spec["model"]["dropout"] = 0.1
    elif how == "unigram":
        spec["model"]["type"] = "Unigram"
    elif how == "added":
        spec["added_tokens"][0]["special"] = False
    elif how == "prefix":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    elif how == "no cut":
        spec["pre_tokenizer"]["use_regex"] = False
    elif how == "nothing":
        spec["pre_tokenizer"] = None
    elif how == "unknown split":
        split = {
            "type": "Split",
            "pattern": {"Regex": "the man"},
            "behavior": "Isolated",
            "invert": False,
        }
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, spec["pre_tokenizer"]],
        }
    elif how == "merged":
        (pattern, *_) = KNOWN_SPLITS
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "MergedWithNext",
            "invert": False,
        }
        spec["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, spec["pre_tokenizer"]],
        }
    return spec


@pytest.mark.parametrize(
    "how", ["normalizer", "dropout", "unigram", "added", "prefix", "no cut", "nothing",
            "unknown split", "merged"],
)  # fmt: skip
def test_others_are_not_taken_apart(how: str) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = WITH_REGEX
    made.add_special_tokens(["</s>"])
    spec = spec_of(made)
    assert is_word_by_word(spec)
    assert not is_word_by_word(spoilt(spec, how))


def test_a_token_over_a_space_that_text_can_produce(tmp_path: Path) -> None:
    """Such a tokenizer is encoded whole: word by word it would lose the token."""
    made = tokenizers.Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate("ab\u0120")}, merges=[])
    )
    made.pre_tokenizer, made.decoder = WITH_REGEX, decoders.ByteLevel()
    made.add_special_tokens(
        ["</s>", tokenizers.AddedToken("<UNDO>", special=True, normalized=False)]
    )
    made.add_tokens([tokenizers.AddedToken("a b", normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = load_tokenizer(tmp_path)
    assert [found.piece(token) for token in found.encode("a bb", continuation=True)] == ["a b", "b"]


def test_a_word_that_does_not_come_back(tmp_path: Path) -> None:
    """The unknown character is refused as in a tokenizer that is not taken apart."""
    made = tokenizers.Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate("ab\u0120")}, merges=[])
    )
    made.pre_tokenizer, made.decoder = WITH_REGEX, decoders.ByteLevel()
    made.add_special_tokens(
        ["</s>", tokenizers.AddedToken("<UNDO>", special=True, normalized=False)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = load_tokenizer(tmp_path)
    assert found.encode("a ab", continuation=True).tolist() == [0, 2, 0, 1]
    for text in ("a cab", "a cab"):
        assert found.encode(text, continuation=True).tolist() == [0, 2, 0, 1]
        with pytest.raises(InexactError, match="decodes to 'ab' instead of 'cab' at character 2"):
            found.encode_exactly(text, continuation=True)


def test_normalizers_may_join_words() -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.normalizer = WITH_REGEX, normalizers.Replace(" b", "b")
    assert not is_word_by_word(spec_of(made))


def test_a_text_may_be_cut_whatever_follows(tokenizer: tokenizers.Tokenizer) -> None:
    encode = whole(tokenizer)
    text = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
    found = [0]

    @PLAIN
    @given(text, st.integers(0, 9), text)
    def run(text: str, taken: int, then: str) -> None:
        end = max(len(text) - taken, 0)
        place = WordEncoder.cut_before(text, end)
        assert 0 <= place < max(end, 1)
        changed = text[:end] + then
        assert encode(changed) == encode(text[:place]) + encode(changed[place:])
        found[0] += place > 0

    run()
    assert found[0] > 40
