"""SentencePiece models as `tokenizer.json`, so that plain transformers loads them.

Exact, or refused by name. What has to be watched:

- BPE: only joins that SentencePiece makes are written down, in its order (`merges.py`).
- Unigram: SentencePiece adds scores in 32 bits, `tokenizers` in 64; where two ways to cut a text
  differ by less than that rounding, they may choose differently. No setting changes that:
  `parity.py` compares on the user's own texts.
- Control pieces come from no text in SentencePiece. In a tokenizer.json they are special added
  tokens, which `split_special_tokens` keeps from being parsed. A BPE model cannot reach them; a
  unigram lattice would, so they get a score below that of their best other spelling.
- User-defined symbols: in a unigram model they are pieces with a bonus. A BPE model matches them
  before anything else, in the text as it stands after spaces were marked: added tokens that are
  not special, "normalized". Where there is a dummy prefix, one text is out of reach: that which
  is nothing but such a symbol.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.encoding import TOKENIZER_JSON
from nmar_ds.traces.json_vocabulary import write_settings
from nmar_ds.traces.merges import InexpressibleError, derive_merges
from nmar_ds.traces.sentencepiece_vocabulary import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_MARK,
    SentencePieceVocabulary,
    pieces_of,
)

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
UNKNOWN_PENALTY = 10.0  # of SentencePiece and tokenizers alike, below the lowest score
SYMBOL_DISCOUNT = 0.1  # SentencePiece's, off the score of a user-defined symbol


def save_sentencepiece_as_json(tokenizer: SentencePieceVocabulary, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        VocabularyError: the model has something that cannot be converted exactly.
    """
    fast = _fast(tokenizer)
    settings: dict[str, Any] = dict(tokenizer.chat_settings)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    ids |= {"pad_token": tokenizer.pad_id, "unk_token": tokenizer.model.trainer_spec.unk_id}
    for name, number in ids.items():
        if number is not None:
            settings[name] = tokenizer.piece(number)
    if tokenizer.add_bos:
        bos = settings["bos_token"]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, int(tokenizer.bos_id or 0))],
        )
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A literal `<UNDO>` in a prompt stays text; but so would the specials of a chat template.
    settings["split_special_tokens"] = not tokenizer.has_chat_template
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_JSON).write_text(fast.to_str(pretty=True), encoding="utf-8")
    tokenizer.copy_chat_template(folder)
    write_settings(folder, settings, tokenizer.undo_token)


def _fast(tokenizer: SentencePieceVocabulary) -> Any:
    model = tokenizer.model
    _require_convertible(tokenizer)
    is_unigram = model.trainer_spec.model_type == UNIGRAM
    symbols = [] if is_unigram else pieces_of(model, USER_DEFINED)
    try:
        fast = FastTokenizer(_unigram(model) if is_unigram else _bpe(model, symbols))
    except InexpressibleError as error:
        raise VocabularyError(
            f"{tokenizer.path}: {error}, expected a model that tokenizer.json can express exactly"
        ) from None
    steps: list[Any] = [normalizers.Replace(" ", WORD_MARK)]
    endings: list[Any] = [
        decoders.Replace(WORD_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if model.normalizer_spec.add_dummy_prefix:
        # Not Metaspace: that adds no prefix where the text starts with a space, SentencePiece does.
        steps.insert(0, normalizers.Prepend(WORD_MARK))
        endings.append(decoders.Strip(content=" ", left=1, right=0))
        if symbols:
            # `tokenizers` normalises the symbols as it does a text, and they must stay as they are.
            pattern = rf"\A{WORD_MARK}(?=(?:{_any_of(symbols)})\z)"
            steps.insert(1, normalizers.Replace(Regex(pattern), ""))
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(endings)
    fast.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in symbols])
    fast.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in model.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    for number, piece in enumerate(model.pieces):
        assert fast.token_to_id(piece.piece) == number, "conversion renumbered a piece"
    return fast


def _any_of(texts: list[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _require_convertible(tokenizer: SentencePieceVocabulary) -> None:
    """Refuse by name what tokenizer.json cannot express.

    Normalising: the library's `Precompiled` reads the same table by other rules (grapheme by
    grapheme, the shortest match), so it is no way to do the same.
    """
    model = tokenizer.model
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    flaw = ""
    if trainer.model_type not in (UNIGRAM, BPE):
        flaw = "is neither a unigram nor a BPE model"
    elif normalizer.precompiled_charsmap:
        flaw = f"normalises text ({normalizer.name or 'its own rules'})"
    elif normalizer.remove_extra_whitespaces:
        flaw = "normalises text (removes extra white space)"
    for piece in model.pieces:
        if piece.type == USER_DEFINED and " " in piece.piece:
            flaw = (
                f"has the user-defined symbol {piece.piece!r} with a space, which nothing matches"
            )
        elif piece.type in (CONTROL, UNUSED, UNKNOWN) and len(piece.piece) == 1:
            flaw = f"has the single character {piece.piece!r} as a piece that no text may produce"
    if flaw:
        raise VocabularyError(
            f"{tokenizer.path}: {flaw}, expected a model that tokenizer.json can express exactly"
        )


def _unigram(model: Any) -> Any:
    kept = _without_last_controls(model)
    normal = {p.piece: float(p.score) for p in kept if p.type == NORMAL}
    # SentencePiece looks for the best score from FLT_MIN on, so it is never below 0.
    best, lowest = max(0.0, *normal.values()), min(normal.values()) - UNKNOWN_PENALTY
    symbols = {
        # The bonus that makes SentencePiece choose them always.
        p.piece: len(p.piece.encode("utf-8")) * best - SYMBOL_DISCOUNT
        for p in kept
        if p.type == USER_DEFINED
    }
    known = normal | symbols
    byte_fallback = model.trainer_spec.byte_fallback
    pieces: list[tuple[str, float]] = []
    for piece in kept:
        missing = sorted(set(piece.piece) - known.keys())
        if missing and byte_fallback:
            # Where bytes are no fallback, a text with such a character is refused anyway.
            raise InexpressibleError(
                f"the piece {piece.piece!r} has the character {missing[0]!r}, which is no piece"
            )
        score = known.get(piece.piece)
        if score is None:
            # SentencePiece never matches these in text, tokenizers matches whatever is in the
            # vocabulary. A score under that of the best other spelling keeps them out.
            score = _best_score(piece.piece, known, lowest) - 1.0
        pieces.append((piece.piece, score))
    return models.Unigram(pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=byte_fallback)


def _without_last_controls(model: Any) -> list[Any]:
    """Leave out control pieces at the end: as added tokens no text can spell them."""
    pieces = list(model.pieces)
    while pieces[-1].type == CONTROL:
        pieces.pop()
    return pieces


def _best_score(text: str, normal: dict[str, float], unknown: float) -> float:
    best = [0.0]
    for end in range(1, len(text) + 1):
        best.append(
            max(
                best[start] + normal.get(text[start:end], unknown if start == end - 1 else -1e9)
                for start in range(end)
            )
        )
    return best[-1]


def _bpe(model: Any, symbols: list[str]) -> Any:
    scores = {p.piece: p.score for p in model.pieces if p.type in (NORMAL, UNUSED)}
    symbol = re.compile(_any_of(symbols) or r"(?!)")
    merges = derive_merges(scores, lambda piece: symbol.search(piece) is not None)
    unused = set(pieces_of(model, UNUSED))
    for left, right in merges:
        if left + right in unused:
            raise InexpressibleError(
                f"the unused piece {left + right!r} is taken apart again after it was joined"
            )
    trainer = model.trainer_spec
    return models.BPE(
        vocab={piece.piece: n for n, piece in enumerate(_without_last_controls(model))},
        merges=merges,
        unk_token=model.pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )
