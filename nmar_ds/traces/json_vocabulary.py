"""`tokenizer.json` files as tokenizers, without transformers (SPEC 2.5, 2.6)."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nmar_ds.errors import NoUndoTokenError, VocabularyError
from nmar_ds.traces.encoding import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    Tokenizer,
    fingerprint_of,
)
from nmar_ds.traces.schema import IdArray
from nmar_ds.traces.words import WordEncoder, is_word_by_word

WORD_MARK = "\u2581"
CHAT_TEMPLATE = "chat_template.jinja"
SIDE_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class JsonVocabulary(Tokenizer):
    """A tokenizer of the `tokenizers` library: byte-level, or with `▁` for spaces."""

    def __init__(self, file: Path, *, undo_token: str) -> None:
        self.path, self.undo_token = file, undo_token
        self._spec = read_spec(file)
        self._require_undo()
        plain = copy.deepcopy(self._spec)
        plain["truncation"] = plain["padding"] = None  # both would change ids silently
        continuing, self._prefix_kind = without_prefix_space(plain)
        self._start = _open(plain, file)
        self._continuation = _open(continuing, file) if self._prefix_kind else self._start
        self._by_word = (
            WordEncoder(self._word) if not self._prefix_kind and is_word_by_word(plain) else None
        )
        added = {token["id"]: token for token in self._spec["added_tokens"]}
        specials = {number for number, token in added.items() if token["special"]}
        pieces = self._vocabulary()
        table = _byte_table(self._spec, pieces, added, file)
        unknown = self._unknown_id(pieces)
        specials |= {number for number, piece in enumerate(pieces) if piece == ""}
        self._finish(pieces, table, specials | ({unknown} if unknown is not None else set()))
        self._set_ids()
        self.fingerprint = fingerprint_of(
            {
                "kind": "tokenizers",
                "spec": {k: v for k, v in self._spec.items() if k not in ("truncation", "padding")},
                "specials": [self.undo_id, self.bos_id, self.eos_id, self.pad_id, self.add_bos],
            }
        )

    def _require_undo(self) -> None:
        file, undo_token = self.path, self.undo_token
        found = [token for token in self._spec["added_tokens"] if token["content"] == undo_token]
        if found and not found[0]["special"]:
            raise VocabularyError(
                f"{file}: {undo_token!r} is an added token that text can produce, expected a "
                'special one; set "special": true for it in added_tokens'
            )
        if found and found[0]["normalized"]:
            raise VocabularyError(
                f'{file}: {undo_token!r} is matched after normalising, expected "normalized": '
                "false for it in added_tokens"
            )
        if not found and undo_token in _model_vocabulary(self._spec):
            raise VocabularyError(
                f"{file}: {undo_token!r} is an ordinary piece that text can produce, expected a "
                "special added token; choose another undo token"
            )
        if not found:
            raise NoUndoTokenError(
                f"{file}: no special token {undo_token!r}, expected one; add it with "
                "nmar_ds.traces.encoding.add_undo"
            )

    def _vocabulary(self) -> list[str]:
        """List the pieces by id; "" where an id has none (such ids count as special)."""
        vocabulary = self._start.get_vocab(with_added_tokens=True)
        pieces = [""] * (max(vocabulary.values()) + 1)
        for piece, number in vocabulary.items():
            pieces[number] = piece
        return pieces

    def _unknown_id(self, pieces: list[str]) -> int | None:
        model = self._spec["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        unknown = model.get("unk_token")
        return pieces.index(unknown) if unknown in pieces else None

    def _set_ids(self) -> None:
        settings = read_settings(self.path.parent)
        named = {
            name: self._special_id(settings.get(f"{name}_token"), f"{name}_token")
            for name in ("bos", "eos", "pad")
        }
        undo_id = self._start.token_to_id(self.undo_token)
        if named["eos"] is None:
            raise VocabularyError(
                f"{self.path}: no stop token known, expected eos_token in {TOKENIZER_CONFIG} "
                "beside it"
            )
        self.undo_id, self.eos_id = undo_id, named["eos"]
        self.bos_id, self.pad_id = named["bos"], named["pad"]
        with_specials = self._start.encode("a", add_special_tokens=True).ids
        self.add_bos = self.bos_id is not None and with_specials[:1] == [self.bos_id]

    def _special_id(self, token: Any, name: str) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        number = self._start.token_to_id(text)
        if number is None or not self.is_special[number]:
            raise VocabularyError(
                f"{self.path.parent / TOKENIZER_CONFIG}: {name}: {text!r} is not a special token "
                f"of {self.path.name}, expected one"
            )
        return int(number)

    def _raw_encode(self, text: str, continuation: bool) -> Sequence[int]:
        tokenizer = self._continuation if continuation else self._start
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def cut_before(self, text: str, end: int) -> int:
        """Where words are encoded one by one, the start of one of them."""
        return 0 if self._by_word is None else self._by_word.cut_before(text, end)

    def _word(self, word: str) -> list[int]:
        ids = super().encode(word, continuation=True)
        self._require_exact(ids, word, continuation=True)
        known: list[int] = ids.tolist()
        return known

    def encode(self, text: str, *, continuation: bool) -> IdArray:
        """As its words, where that is the same."""
        if self._by_word is not None:
            with contextlib.suppress(VocabularyError):  # what is wrong is said of the whole text
                return np.array(self._by_word(text), dtype=np.int32)
        return super().encode(text, continuation=continuation)

    def encode_exactly(self, text: str, *, continuation: bool) -> IdArray:
        """As its words, each of which is known to come back."""
        if self._by_word is not None:
            with contextlib.suppress(VocabularyError):
                return np.array(self._by_word(text), dtype=np.int32)
        return super().encode_exactly(text, continuation=continuation)

    def _starts_with_space(self, text: str) -> bool:
        if self._prefix_kind == "unless-space":
            return bool(text) and text[0] not in (" ", WORD_MARK)
        return bool(text) and self._prefix_kind == "always"

    def chat_template(self) -> str | None:
        """Source of the chat template beside the tokenizer, None where there is none."""
        file = self.path.parent / CHAT_TEMPLATE
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = read_settings(self.path.parent).get("chat_template")
        if isinstance(template, list):  # named templates; transformers takes "default"
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return None if template is None else str(template)

    def named_specials(self) -> dict[str, str]:
        """Texts of the special tokens by the names a chat template knows them by."""
        settings = read_settings(self.path.parent)
        texts = {name: settings.get(name) for name in NAMED_TOKENS}
        return {
            name: str(text["content"] if isinstance(text, dict) else text)
            for name, text in texts.items()
            if text is not None
        }

    def special_texts(self) -> dict[str, int]:
        """Added tokens by their text: what a template's literal parts are parsed for."""
        return {str(token["content"]): int(token["id"]) for token in self._spec["added_tokens"]}

    def continues_after_special(self) -> bool:
        """Whether text after a special token goes without the space put before a whole text."""
        mixed = tokenizers.Tokenizer.from_str(self._start.to_str())
        mixed.encode_special_tokens = False
        ids = mixed.encode(self.piece(self.eos_id) + "a", add_special_tokens=False).ids[1:]
        return bool(ids == list(self._raw_encode("a", True)))

    def plain_decode(self, ids: IdArray) -> str:
        """Decode the start of a text by the library itself, as transformers does."""
        text: str = self._start.decode(ids.tolist(), skip_special_tokens=False)
        return text

    def save(self, folder: str | Path) -> Path:
        """Copy tokenizer.json and the files that name its special tokens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / TOKENIZER_JSON)
        for name in SIDE_FILES:
            if (self.path.parent / name).is_file():
                shutil.copyfile(self.path.parent / name, folder / name)
        return folder / TOKENIZER_JSON

    def save_transformers(self, folder: str | Path) -> None:
        """Copy the files; the configuration is completed with the undo token."""
        folder = Path(folder)
        self.save(folder)
        settings = read_settings(self.path.parent)
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # With it a literal `<UNDO>` in a prompt stays text in plain transformers too; but a chat
        # template's own `<|im_start|>` would be spelt out as well, so not where there is one.
        has_template = "chat_template" in settings or (folder / CHAT_TEMPLATE).is_file()
        settings["split_special_tokens"] = not has_template
        write_settings(folder, settings, self.undo_token)


def read_spec(file: Path) -> dict[str, Any]:
    """Read a tokenizer.json.

    Raises:
        VocabularyError: it is not one.
    """
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(spec, dict) or "model" not in spec:
            raise ValueError("it has no model")
    except (OSError, ValueError) as error:
        raise VocabularyError(f"{file}: not a {TOKENIZER_JSON}, expected one ({error})") from None
    spec.setdefault("added_tokens", [])
    _open(spec, file)
    return spec


def add_special_token(
    file: Path, destination: Path, undo_token: str, reserved: str | None = None
) -> Path:
    """Write a copy of a tokenizer folder with the undo token added, or a reserved one renamed."""
    spec = read_spec(file)
    tokenizer = _open(spec, file)
    before = tokenizer.get_vocab(with_added_tokens=True)
    if undo_token in before:
        raise VocabularyError(f"{file}: has {undo_token!r} already, expected none to add it")
    if reserved is None:
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(undo_token, special=True, normalized=False)]
        )
        expected = {**before, undo_token: max(before.values()) + 1}
    else:
        tokenizer = _open(_renamed(spec, file, reserved, undo_token), file)
        expected = {undo_token if piece == reserved else piece: n for piece, n in before.items()}
    if tokenizer.get_vocab(with_added_tokens=True) != expected:
        raise VocabularyError(f"{file}: adding {undo_token!r} would change other ids")
    destination.mkdir(parents=True, exist_ok=True)
    (destination / TOKENIZER_JSON).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    for name in SIDE_FILES:
        if (file.parent / name).is_file() and destination.resolve() != file.parent.resolve():
            shutil.copyfile(file.parent / name, destination / name)
    settings = read_settings(destination)
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if isinstance(extra, list):  # a renamed token's old text must not be added again
        settings["extra_special_tokens"] = [token for token in extra if token != reserved]
        settings.pop("additional_special_tokens", None)
    write_settings(destination, settings, undo_token)
    return destination / TOKENIZER_JSON


def _renamed(spec: dict[str, Any], file: Path, reserved: str, undo_token: str) -> dict[str, Any]:
    """A specification in which a reserved special token has the undo token's text."""
    usable = [
        str(token["content"])
        for token in spec["added_tokens"]
        if token["special"] and not _is_used(str(token["content"]), file.parent)
    ]
    if reserved not in usable:
        known = ", ".join(repr(text) for text in usable[:5]) or "none"
        raise VocabularyError(
            f"{file}: undo.reserved_token: {reserved!r} is no special token to spare, expected one "
            f"of: {known}; or leave it out for a new id"
        )
    if reserved in json.dumps(spec.get("post_processor"), ensure_ascii=False):
        raise VocabularyError(
            f"{file}: undo.reserved_token: {reserved!r} is put into every text by the tokenizer's "
            "post_processor, expected a token that is not in use"
        )
    renamed = copy.deepcopy(spec)
    for token in renamed["added_tokens"]:
        if token["content"] == reserved:
            token["content"], token["normalized"] = undo_token, False
            token["lstrip"] = token["rstrip"] = token["single_word"] = False
    vocabulary = renamed["model"].get("vocab")
    if isinstance(vocabulary, dict) and reserved in vocabulary:
        vocabulary[undo_token] = vocabulary.pop(reserved)
    elif isinstance(vocabulary, list):
        for entry in vocabulary:
            if entry[0] == reserved:
                entry[0] = undo_token
    return renamed


def _is_used(text: str, folder: Path) -> bool:
    """Whether a special token has a name, or stands in the chat template."""
    settings = read_settings(folder)
    named = [settings.get(name) for name in NAMED_TOKENS]
    file = folder / CHAT_TEMPLATE
    template = file.read_text(encoding="utf-8") if file.is_file() else ""
    template += json.dumps(settings.get("chat_template", ""), ensure_ascii=False)
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    return text in texts or text in template


def write_settings(folder: Path, settings: dict[str, Any], undo_token: str) -> None:
    """Write tokenizer_config.json with the undo token among the extra special tokens."""
    name = "extra_special_tokens"
    extra = settings.get(name) or settings.pop("additional_special_tokens", None) or []
    if isinstance(extra, dict):
        extra = {**extra, "undo_token": undo_token}
    elif undo_token not in [t.get("content") if isinstance(t, dict) else t for t in extra]:
        extra = [*extra, undo_token]
    settings[name] = extra
    for token in NAMED_TOKENS:
        if isinstance(settings.get(token), dict):  # as in special_tokens_map.json
            settings[token] = settings[token]["content"]
    # Clean-up would rewrite " ." to "." in decoded text.
    settings["clean_up_tokenization_spaces"] = False
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def without_prefix_space(spec: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Copy a specification without the space it puts before a text.

    Returns:
        The copy, and "" (there was none), "always" or "unless-space" (not where the text starts
        with one).
    """
    found = {""}

    def rewrite(node: Any) -> Any:
        if isinstance(node, list):
            return [rewrite(item) for item in node]
        if not isinstance(node, dict):
            return node
        node = {key: rewrite(value) for key, value in node.items()}
        kind = node.get("type")
        if kind == "ByteLevel" and node.get("add_prefix_space"):
            node["add_prefix_space"] = False
            found.add("unless-space")
        if kind == "Metaspace" and node.get("prepend_scheme", "always") != "never":
            node["prepend_scheme"] = "never"
            found.add("unless-space")
        if kind == "Prepend":
            found.add("always")
            node["prepend"] = ""
        pattern = node.get("pattern")
        if kind == "Replace" and str(pattern.get("Regex", "")).startswith(f"\\A{WORD_MARK}("):
            node["pattern"] = {"Regex": r"(?!)"}  # takes back a prefix that is no longer there
        return node

    copied = dict(spec)
    for part in ("normalizer", "pre_tokenizer"):
        copied[part] = rewrite(spec.get(part))
    return copied, max(found, key=["", "unless-space", "always"].index)


def _open(spec: dict[str, Any], file: Path) -> Any:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises plain Exception
        raise VocabularyError(f"{file}: not a {TOKENIZER_JSON}, expected one ({error})") from None
    tokenizer.encode_special_tokens = True  # a literal `</s>` in a text is text
    return tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what names the special tokens; the configuration wins over the older map."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        if (folder / name).is_file():
            try:
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise VocabularyError(f"{folder / name}: not JSON, expected it ({error})") from None
    return settings


def _model_vocabulary(spec: dict[str, Any]) -> set[str]:
    vocabulary = spec["model"].get("vocab", {})
    return {entry if isinstance(entry, str) else entry[0] for entry in vocabulary}


def _types(node: Any) -> set[str]:
    """Collect the `type` of every part of a specification."""
    if isinstance(node, list):
        return set().union(*(_types(item) for item in node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*(_types(value) for value in node.values()))


def _byte_table(
    spec: dict[str, Any], pieces: list[str], added: dict[int, Any], file: Path
) -> list[bytes]:
    decoders = _types(spec.get("decoder"))
    if "ByteLevel" in decoders:
        letters = _byte_letters()

        def spell(piece: str) -> bytes:
            return bytes(letters[letter] for letter in piece if letter in letters)

    elif "Metaspace" in decoders or WORD_MARK in json.dumps(
        spec.get("decoder"), ensure_ascii=False
    ):
        fallback = "ByteFallback" in decoders

        def spell(piece: str) -> bytes:
            if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace(WORD_MARK, " ").encode("utf-8")

    else:
        raise VocabularyError(
            f"{file}: decodes with {sorted(decoders - {'None'}) or 'nothing'}, expected a "
            "byte-level or a Metaspace decoder, whose tokens spell the text exactly"
        )
    # A token that is matched after normalising has its spaces marked as other pieces do.
    marked = {n for n, token in added.items() if token["normalized"] and not token["special"]}
    plain = added.keys() - (marked if "ByteLevel" not in decoders else set())
    return [
        added[number]["content"].encode("utf-8") if number in plain else spell(piece)
        for number, piece in enumerate(pieces)
    ]


def _byte_letters() -> dict[str, int]:
    """Map the letters that byte-level vocabularies write for bytes back to them (GPT-2)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + place): byte for place, byte in enumerate(hidden)}
