"""SentencePiece models as `tokenizer.json`, so that plain transformers loads them.

Exact where the model normalises nothing; anything else is refused rather than approximated.
`encoding.assert_parity` compares ids afterwards on the run's own texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from nmar_ds.errors import VocabularyError
from nmar_ds.traces.encoding import TOKENIZER_JSON
from nmar_ds.traces.json_vocabulary import write_settings
from nmar_ds.traces.sentencepiece_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    WORD_MARK,
    SentencePieceVocabulary,
)

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
UNKNOWN_PENALTY = 10.0  # of SentencePiece and tokenizers alike, below the lowest score


def save_sentencepiece_as_json(tokenizer: SentencePieceVocabulary, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        VocabularyError: the model has something that cannot be converted exactly.
    """
    model = tokenizer.model
    _require_convertible(tokenizer)
    if model.trainer_spec.model_type == UNIGRAM:
        fast = FastTokenizer(_unigram(model))
    else:
        fast = FastTokenizer(_bpe(model))
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
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(endings)
    fast.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in model.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    for number, piece in enumerate(model.pieces):
        assert fast.token_to_id(piece.piece) == number, "conversion renumbered a piece"
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names |= {"pad_token": tokenizer.pad_id, "unk_token": model.trainer_spec.unk_id}
    settings: dict[str, Any] = {
        name: model.pieces[number].piece for name, number in names.items() if number is not None
    }
    if tokenizer.add_bos:
        bos = settings["bos_token"]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, int(tokenizer.bos_id or 0))],
        )
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["split_special_tokens"] = True  # a literal `<UNDO>` in a prompt stays text
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_JSON).write_text(fast.to_str(pretty=True), encoding="utf-8")
    write_settings(folder, settings, tokenizer.undo_token)


def _require_convertible(tokenizer: SentencePieceVocabulary) -> None:
    normalizer, trainer = tokenizer.model.normalizer_spec, tokenizer.model.trainer_spec
    flaw = ""
    if trainer.model_type not in (UNIGRAM, BPE):
        flaw = "is neither a unigram nor a BPE model"
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        flaw = "normalises text"
    for piece in tokenizer.model.pieces:
        if piece.type not in (NORMAL, UNKNOWN, CONTROL, BYTE):
            flaw = f"has the user-defined or unused piece {piece.piece!r}"
    if flaw:
        raise VocabularyError(
            f"{tokenizer.path}: {flaw}, expected a model that tokenizer.json can express exactly"
        )


def _unigram(model: Any) -> Any:
    kept = _without_last_controls(model)
    pieces = [(piece.piece, float(piece.score)) for piece in kept]
    normal = {p.piece: float(p.score) for p in kept if p.type == NORMAL}
    lowest = min(normal.values()) - UNKNOWN_PENALTY
    for number, piece in enumerate(kept):
        if piece.type != NORMAL:
            # SentencePiece never matches these in text, tokenizers matches whatever is in the
            # vocabulary. A score under that of the best other spelling keeps them out.
            pieces[number] = (piece.piece, _best_score(piece.piece, normal, lowest) - 1.0)
    return models.Unigram(
        pieces, unk_id=model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback
    )


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


def _bpe(model: Any) -> Any:
    """Derive merges: any split of a piece into two pieces, the best-scored result first.

    SentencePiece merges whichever neighbours spell the best-scored piece; `tokenizers` needs each
    such pair written down (as transformers' own converter does).
    """
    number_of = {piece.piece: n for n, piece in enumerate(_without_last_controls(model))}
    score_of = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in score_of.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in score_of and right in score_of:
                ranked.append((-score, number_of[left], number_of[right], left, right))
    ranked.sort()
    trainer = model.trainer_spec
    return models.BPE(
        vocab=number_of,
        merges=[(left, right) for *_, left, right in ranked],
        unk_token=model.pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )
