"""Records to traces: SPEC 2's invariants over random traces, and what deviations may look like."""

from __future__ import annotations

import itertools
import json
import random as stdlib_random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invariants import assert_invariants
from tiny_tokenizers import sums

from nmar_ds.errors import TraceError
from nmar_ds.traces.assembly import Deviation, Turn, assemble, check, said_by
from nmar_ds.traces.builders import Pool, encode_record, hard, random, rng_of, trace_of_ids
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.records import Record, parse_line
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role, Trace

PLAIN = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
WORDS = (" the", " answer", " is", "so", " so", "1", "23", ",", " add", " carry", "h\u00e9llo")
ALPHABET = "0123456789 +=.,so the<UNDO>\u00e9\u65e5\U0001f600"


def record_of(fields: dict[str, object]) -> Record:
    return parse_line(json.dumps(fields).encode(), path="r.jsonl", line=3)


def trace_of(turns: Sequence[Turn], tokenizer: Tokenizer) -> Trace:
    return assemble(turns, machine=Machine(tokenizer.undo_id), line=3, source=0)


def built(fields: dict[str, object], tokenizer: Tokenizer) -> tuple[Trace, tuple[Turn, ...], int]:
    encoded = encode_record(record_of(fields), tokenizer)
    trace = trace_of(encoded.turns, tokenizer)
    check(
        trace,
        tokenizer=tokenizer,
        machine=Machine(tokenizer.undo_id),
        path="r.jsonl",
        said=said_by(encoded.turns),
    )
    return trace, encoded.turns, encoded.num_snaps


@st.composite
def text_turns(draw: st.DrawFn) -> list[dict[str, object]]:
    """Segments of a record of form 2 over several turns; cuts fall anywhere in words."""
    text = st.one_of(
        st.text(ALPHABET, min_size=1, max_size=12),
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join),
    )
    pieces: list[tuple[str, str]] = []
    for number in range(draw(st.integers(1, 3))):
        if number or draw(st.booleans()):
            pieces.append(("prompt", draw(text)))
        response = draw(text)
        cuts = sorted(draw(st.lists(st.integers(0, len(response) - 1), max_size=3)))
        if not cuts or cuts[0] > 0:
            pieces.append(("prefix", response[: cuts[0] if cuts else None]))
        for cut, end in itertools.pairwise([*cuts, len(response)]):
            pieces.append(("deviation", draw(text)))
            if end > cut:
                pieces.append(("correction", response[cut:end]))
    return [{"role": role, "text": content} for role, content in pieces]


@pytest.mark.parametrize("name", ["sp", "bpe", "bpe_prefix"])
def test_invariants_of_given_traces(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    seen: Counter[str] = Counter()

    @PLAIN
    @given(text_turns())
    def run(pieces: list[dict[str, object]]) -> None:
        try:
            trace, turns, num_snaps = built({"segments": pieces}, tokenizer)
        except TraceError as error:
            # Only what cannot be right: nothing wrong in it, or an ambiguous space at the start.
            assert "says what the reference says" in error.problem or tokenizer.has_prefix_space
            seen["refused"] += 1
            return
        seen["built"] += 1
        seen["snapped"] += num_snaps > 0
        assert_invariants(trace, turns, tokenizer)
        joined = "".join(str(p["text"]) for p in pieces if p["role"] != "deviation")
        assert tokenizer.decode(said_by(turns)) == joined
        texts = [piece for piece in pieces if piece["role"] == "deviation"]
        for segment, piece in zip(
            [s for s in trace.segments() if s.role == Role.DEVIATION], texts, strict=True
        ):
            # The deviation says its text, after what snapping moved into it.
            start = segment.start == 0
            assert tokenizer.decode(segment.ids, continuation=not start).endswith(
                str(piece["text"])
            )

    run()
    assert seen["built"] > 30 and (seen["snapped"] > 0 or name == "sp")


def test_reference_is_encoded_whole_and_cuts_snap_left(bpe_tokenizer: Tokenizer) -> None:
    fields = {"prompt": "q", "reference": " the answer", "deviations": [{"at": 7, "text": "gle"}]}
    trace, turns, num_snaps = built(fields, bpe_tokenizer)
    whole = bpe_tokenizer.encode(" the answer", continuation=True)
    assert turns[0].reference_ids.tolist() == [*whole.tolist(), bpe_tokenizer.eos_id]
    assert len(whole) == 2 and num_snaps == 1  # "answer" is one token: the cut moves to its start
    ((cut, ids, onset),) = turns[0].deviations
    assert cut == 1 and bpe_tokenizer.decode(ids, continuation=True) == " angle"
    together = bpe_tokenizer.encode(" the angle", continuation=True)
    assert ids.tolist() == together[1:].tolist()
    # Right tokens come first: those that spell " an".
    assert bpe_tokenizer.decode(ids[:onset], continuation=True) in " an"
    assert not " answer".startswith(bpe_tokenizer.decode(ids[: onset + 1], continuation=True))
    assert trace.onsets == (len(turns[0].prompt_ids) + 1 + onset,)
    assert [s.role for s in trace.segments()] == list(Role)


def test_exact_cuts_are_not_snapped(sp_tokenizer: Tokenizer) -> None:
    for at, length in ((0, 0), (3, 3), (6, 6)):
        fields = {"prompt": "q", "reference": "123456", "deviations": [{"at": at, "text": "99"}]}
        _, turns, num_snaps = built(fields, sp_tokenizer)
        ((cut, ids, onset),) = turns[0].deviations
        assert (cut, len(ids), onset, num_snaps) == (length, 2, 0, 0)


def test_a_deviation_that_would_change_the_tokens_before_it(bpe_tokenizer: Tokenizer) -> None:
    """Where p's ids would change, e is encoded by itself, as a continuation."""
    whole = bpe_tokenizer.encode(" the", continuation=True)
    assert len(whole) == 1
    fields = {"prompt": "q", "reference": " t.", "deviations": [{"at": 2, "text": "he"}]}
    _, turns, num_snaps = built(fields, bpe_tokenizer)
    ((cut, ids, _),) = turns[0].deviations
    before = turns[0].reference_ids[:cut]
    assert num_snaps == 0 and bpe_tokenizer.decode(before, continuation=True) == " t"
    assert ids.tolist() == bpe_tokenizer.encode("he", continuation=True).tolist()


def test_repeated_errors_have_no_correction_between(sp_tokenizer: Tokenizer) -> None:
    fields = {"prompt": "1", "reference": "23",
              "deviations": [{"at": 1, "text": "9"}, {"at": 1, "text": "8"}, {"at": 2, "text": "7"}]}  # fmt: skip
    trace, turns, _ = built(fields, sp_tokenizer)
    assert "".join("xpebc"[s.role] for s in trace.segments()) == "xpebebcebc"
    assert_invariants(trace, turns, sp_tokenizer)
    assert trace.ids[-1] == sp_tokenizer.eos_id and trace.ids[0] == sp_tokenizer.bos_id


def test_stop_token_and_bos(sp_tokenizer: Tokenizer, bpe_tokenizer: Tokenizer) -> None:
    pieces = [("prompt", "1"), ("prefix", "2"), ("prompt", "3"), ("prefix", "4")]
    fields: dict[str, object] = {"segments": [{"role": r, "text": t} for r, t in pieces]}
    for tokenizer, num_bos in ((sp_tokenizer, 1), (bpe_tokenizer, 0)):
        trace, _, _ = built(fields, tokenizer)
        ids = trace.ids.tolist()
        assert ids.count(tokenizer.eos_id) == 2 and len(ids) == 6 + num_bos
        assert [int(trace.roles[n]) for n, i in enumerate(ids) if i == tokenizer.eos_id] == [1, 1]
    trace, _, _ = built({"reference": "2"}, sp_tokenizer)
    assert trace.roles.tolist() == [0, 1, 1]  # BOS is the whole prompt
    trace, _, _ = built({"reference": "2"}, bpe_tokenizer)
    assert trace.roles.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("fields", "field", "part"),
    [
        ({"reference": "12", "deviations": [{"at": 0, "text": "1"}]}, "deviations[0]", "says what"),
        ({"reference": "12", "deviations": [{"at": 1, "text": "2"}]}, "deviations[0]", "says what"),
        ({"reference": "1Z"}, "reference", "lacks"),
        ({"prompt": "\u65e5Z", "reference": "1"}, "prompt", "lacks"),
        ({"reference": "1", "deviations": [{"at": 0, "text": "Z"}]}, "deviations[0]", "lacks"),
        ({"reference": "a\u2581b".replace("b", "d")}, "reference", "instead of"),
    ],
)
def test_what_the_tokenizer_cannot_say_is_refused(
    fields: dict[str, object], field: str, part: str, small_tokenizer: Tokenizer
) -> None:
    with pytest.raises(TraceError) as caught:
        encode_record(record_of(fields), small_tokenizer)
    assert (caught.value.line, caught.value.field) == (3, field)
    assert part in str(caught.value)


def test_normalising_tokenizers_are_refused(tmp_path: Path) -> None:
    import sentencepiece

    from nmar_ds.traces.encoding import load_tokenizer

    with (tmp_path / "n.model").open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["fi 12 so the answer"] * 9), model_writer=writer, vocab_size=40,
            control_symbols=["<UNDO>"], hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "n.model")
    encode_record(record_of({"prompt": "so", "reference": "12"}), tokenizer)
    with pytest.raises(TraceError, match="normalises text, which is not supported"):
        encode_record(record_of({"prompt": "so", "reference": "\uff11"}), tokenizer)


# --- records of ids, and the check itself ---


def ids_record(*pieces: tuple[str, list[int]]) -> Record:
    return record_of({"segments": [{"role": role, "ids": ids} for role, ids in pieces]})


def test_records_of_ids(sp_tokenizer: Tokenizer) -> None:
    undo, eos = sp_tokenizer.undo_id, sp_tokenizer.eos_id
    record = ids_record(
        ("prompt", [260]), ("prefix", [261]), ("deviation", [262, 263]), ("undo", [undo] * 2),
        ("deviation", [264]), ("undo", [undo]), ("correction", [262, 265, eos]),
        ("prompt", [266]), ("deviation", [267]), ("undo", [undo]), ("correction", [268]),
    )  # fmt: skip
    trace = trace_of_ids(record, source=4)
    check(trace, tokenizer=sp_tokenizer, machine=Machine(sp_tokenizer.undo_id), path="r.jsonl")
    assert trace.onsets == (3, 6, 12)  # the first deviation starts with a right token
    assert (trace.line, trace.source, len(trace)) == (3, 4, 15)
    same = ids_record(("deviation", [5, 6]), ("undo", [undo] * 2), ("correction", [5, 6, 7]))
    with pytest.raises(TraceError, match="says what the correction says"):
        trace_of_ids(same, source=0)


def test_onsets_do_not_look_into_the_next_turn(sp_tokenizer: Tokenizer) -> None:
    undo = [sp_tokenizer.undo_id]
    record = ids_record(
        ("prefix", [261]), ("deviation", [270]), ("undo", undo), ("prompt", [266]),
        ("deviation", [271]), ("undo", undo), ("correction", [270]),
    )  # fmt: skip
    assert trace_of_ids(record, source=0).onsets == (1, 4)


def bad_traces(
    tokenizer: Tokenizer,
) -> list[tuple[str, list[int], list[int], tuple[int, ...], str]]:
    u, stop, size = tokenizer.undo_id, tokenizer.eos_id, tokenizer.size
    return [
        ("too few undos", [260, 261, 262, u, 263], [1, 2, 2, 3, 4], (1,), "expected 2"),
        ("too many undos", [260, 261, u, u, 263], [1, 2, 3, 3, 4], (1,), "expected 1"),
        ("undo in prefix", [260, u, 261], [1, 1, 1], (), "outside undo segments"),
        ("undo in prompt", [260, u, 261], [0, 0, 1], (), "outside undo segments"),
        ("undo in deviation", [260, 261, u, u, u, 262], [1, 2, 2, 3, 3, 4], (1,), "outside undo"),
        ("other in undo", [260, 261, 262, 263], [1, 2, 3, 4], (1,), "outside undo segments"),
        ("stop in deviation", [260, stop, u, 261], [1, 2, 3, 4], (1,), "stop token in a dev"),
        ("pad in deviation", [260, tokenizer.pad_id or 0, u, 261], [1, 2, 3, 4], (1,), "special"),
        ("no undo", [260, 261, 262], [1, 2, 4], (1,), "correction after deviation"),
        ("starts corrected", [260], [4], (), "correction at the start"),
        ("undo first", [u, 260], [3, 4], (), "undo at the start"),
        ("says nothing", [260, 261, u], [0, 2, 3], (1,), "reduces to nothing"),
        ("turn says nothing", [260, 261, u, 260, 261], [0, 2, 3, 0, 1], (1,), "reduces to nothing"),
        ("prompt only", [260, 261], [0, 0], (), "prompt at the end"),
        ("id too large", [260, size], [0, 1], (), f"id {size} is not in the tokenizer"),
        ("id negative", [260, -1], [0, 1], (), "id -1"),
        ("lengths differ", [260, 261], [0], (), "2 ids and 1 roles"),
        ("empty", [], [], (), "0 ids"),
        ("onset before", [260, 261, u, 262], [1, 2, 3, 4], (0,), "lies outside"),
        ("onset after", [260, 261, u, 262], [1, 2, 3, 4], (2,), "lies outside"),
        ("onset missing", [260, 261, u, 262], [1, 2, 3, 4], (), "lies outside"),
        ("onset left over", [260, 261], [0, 1], (1,), "more onsets"),
    ]


def test_check_finds_every_broken_invariant(sp_tokenizer: Tokenizer) -> None:
    for name, ids, roles, onsets, part in bad_traces(sp_tokenizer):
        trace = Trace(
            ids=np.array(ids, dtype=np.int32), roles=np.array(roles, dtype=np.uint8),
            onsets=onsets, line=5,
        )  # fmt: skip
        with pytest.raises(TraceError) as caught:
            check(
                trace, tokenizer=sp_tokenizer, machine=Machine(sp_tokenizer.undo_id), path="r.jsonl"
            )
        assert part in str(caught.value), name
        assert str(caught.value).startswith("r.jsonl:5: "), name


def test_check_compares_with_what_was_to_be_said(sp_tokenizer: Tokenizer) -> None:
    turns = encode_record(record_of({"prompt": "1", "reference": "234"}), sp_tokenizer).turns
    trace = trace_of(turns, sp_tokenizer)
    said = said_by(turns)
    check(trace, tokenizer=sp_tokenizer, machine=Machine(sp_tokenizer.undo_id), path="r", said=said)
    for other in (said[:-1], np.append(said, 260), said[::-1].copy()):
        with pytest.raises(TraceError, match="reduces to something else from token"):
            check(
                trace,
                tokenizer=sp_tokenizer,
                machine=Machine(sp_tokenizer.undo_id),
                path="r",
                said=other,
            )


# --- random and hard ---


def records_and_pool(tokenizer: Tokenizer, number: int) -> tuple[list[Record], Pool]:
    records = [
        parse_line(json.dumps(fields).encode(), path="r.jsonl", line=line)
        for line, fields in enumerate(sums(number, seed=5), start=1)
    ]
    pool = Pool(tokenizer)
    for record in records:
        for turn in encode_record(record, tokenizer).turns:
            pool.add(record.group, turn.reference_ids, (0, record.line))
    pool.finish()
    return records, pool


def deviating(
    builder: str, record: Record, tokenizer: Tokenizer, pool: Pool, copy: int = 0
) -> tuple[Turn, ...]:
    turns = encode_record(record, tokenizer).turns
    rng = rng_of(11, 0, record.line, copy)
    asked = {"tokenizer": tokenizer, "max_deviations": 3, "max_deviation_length": 5}
    if builder == "random":
        return random(turns, rng, **asked).turns
    return hard(turns, rng, pool=pool, group=record.group, record=(0, record.line), **asked).turns


@pytest.mark.parametrize("builder", ["random", "hard"])
def test_invariants_of_made_traces(builder: str, any_tokenizer: Tokenizer) -> None:
    records, pool = records_and_pool(any_tokenizer, 120)
    shapes: Counter[str] = Counter()
    for record in records:
        turns = deviating(builder, record, any_tokenizer, pool)
        trace = trace_of(turns, any_tokenizer)
        machine = Machine(any_tokenizer.undo_id)
        check(trace, tokenizer=any_tokenizer, machine=machine, path="r", said=said_by(turns))
        assert_invariants(trace, turns, any_tokenizer)
        for turn in turns:
            for cut, ids, onset in turn.deviations:
                right = turn.reference_ids
                assert 1 <= len(ids) <= 5 and 0 <= cut < len(right) - 1 and onset == 0
                # Wrong from its first token on, in text and so in ids.
                first = any_tokenizer.decode(ids[:1], continuation=True)
                assert not any_tokenizer.decode(right[cut:], continuation=True).startswith(first)
        shapes["".join("xpebc"[s.role] for s in trace.segments())] += 1
    assert any("ebeb" in shape for shape in shapes), "no repeated error at one place"
    assert any("ebcebc" in shape for shape in shapes), "no two deviations"
    assert sum("e" in shape for shape in shapes) == len(shapes)


def test_hard_deviations_are_canonical_and_from_elsewhere(any_tokenizer: Tokenizer) -> None:
    records, pool = records_and_pool(any_tokenizer, 150)
    references = {record.turns[0].reference: record.group for record in records}
    found = 0
    for record in records:
        own = record.turns[0].reference
        for turn in deviating("hard", record, any_tokenizer, pool):
            for cut, ids, _ in turn.deviations:
                before = any_tokenizer.decode(turn.reference_ids[:cut], continuation=True)
                text = any_tokenizer.decode(ids, continuation=True)
                together = any_tokenizer.encode(before + text, continuation=True)
                assert together.tolist() == [*turn.reference_ids[:cut].tolist(), *ids.tolist()]
                donors = [
                    r for r, group in references.items() if group == record.group and r != own
                ]
                assert any(text in donor for donor in donors)
                found += 1
    assert found > 150


def first_classes(builder: str, tokenizer: Tokenizer, number: int = 250) -> list[tuple[str, str]]:
    """(class of the correct piece, class of the deviation's first piece) at each deviation."""
    records, pool = records_and_pool(tokenizer, number)
    pairs = []
    for record in records:
        for turn in deviating(builder, record, tokenizer, pool):
            for cut, ids, _ in turn.deviations:
                right = int(turn.reference_ids[cut])
                pairs.append((tokenizer.piece_class(right), tokenizer.piece_class(int(ids[0]))))
    return pairs


def classes_agree(pairs: list[tuple[str, str]]) -> bool:
    """Whether the first piece's class tells nothing: same distribution, place by place."""
    return len(pairs) > 100 and all(right == made for right, made in pairs)


def test_first_piece_of_hard_deviations_tells_nothing(any_tokenizer: Tokenizer) -> None:
    pairs = first_classes("hard", any_tokenizer)
    assert classes_agree(pairs)
    assert len({right for right, _ in pairs} & {"digit", "punct", "letter", "word-letter"}) > 1


def test_the_class_check_can_fail(any_tokenizer: Tokenizer) -> None:
    assert not classes_agree(first_classes("random", any_tokenizer))


def test_hard_without_donors(sp_tokenizer: Tokenizer) -> None:
    record = record_of({"prompt": "1", "reference": " 2 so", "group": "alone"})
    turns = encode_record(record, sp_tokenizer).turns
    asked = {"tokenizer": sp_tokenizer, "max_deviations": 1, "max_deviation_length": 5}
    pool = Pool(sp_tokenizer)
    pool.add("alone", turns[0].reference_ids, (0, 3))
    pool.add("alone", turns[0].reference_ids, (0, 4))  # another record that reads the same
    pool.add(
        "other",
        encode_record(record_of({"reference": " 3 the"}), sp_tokenizer).turns[0].reference_ids,
        (0, 5),
    )
    pool.finish()
    made = hard(turns, rng_of(0, 0, 0, 0), pool=pool, group="alone", record=(0, 3), **asked)
    assert made.num_missing == 1 and made.turns == turns


def test_pool_draws_every_other_piece_of_the_class(sp_tokenizer: Tokenizer) -> None:
    pool = Pool(sp_tokenizer)
    for line, text in enumerate(("12", "34 so", "5so", "5so", "7")):
        ids = sp_tokenizer.encode(text, continuation=True)
        pool.add("g", np.append(ids, np.int32(sp_tokenizer.eos_id)), (0, line))
    pool.finish()
    rng = np.random.default_rng(0)
    own = sp_tokenizer.encode("12", continuation=True)
    number = pool.number_of(np.append(own, np.int32(sp_tokenizer.eos_id)))
    asked = {"group": "g", "right_id": int(own[0]), "rng": rng, "own": number, "record": (0, 0)}
    draws = [pool.draw(length=3, **asked) for _ in range(600)]
    seen = Counter(sp_tokenizer.decode(ids, continuation=True) for ids in draws if ids is not None)
    # "12" is the record's own; "1" is right, so drawn for neither; "5so" stands there twice.
    assert set(seen) == {"", "34 so", "4 so", "5so", "7"}
    assert all(60 < seen[text] < 140 for text in ("", "34 so", "4 so", "7"))
    assert 140 < seen["5so"] < 260
    assert pool.draw(length=3, **{**asked, "group": "none"}) is None
    alone = Pool(sp_tokenizer)
    for line in range(2):
        alone.add("g", np.append(own, np.int32(sp_tokenizer.eos_id)), (0, line))
    alone.finish()
    assert alone.draw(length=3, **asked) is None


@pytest.mark.parametrize("builder", ["random", "hard"])
def test_some_errors_are_repeated_at_once(builder: str, sp_tokenizer: Tokenizer) -> None:
    records, pool = records_and_pool(sp_tokenizer, 150)
    same = pairs = 0
    for record in records:
        for turn in deviating(builder, record, sp_tokenizer, pool):
            cuts = [deviation.cut for deviation in turn.deviations]
            same += sum(one == other for one, other in itertools.pairwise(cuts))
            pairs += max(len(cuts) - 1, 0)
    assert 0.07 < same / pairs < 0.3  # 0.03 by chance alone


def test_hard_over_several_turns(sp_tokenizer: Tokenizer) -> None:
    _, pool = records_and_pool(sp_tokenizer, 50)
    encoded = encode_record(record_of({"segments": [
        {"role": "prompt", "text": "1"}, {"role": "prefix", "text": " the answer is 12"},
        {"role": "prompt", "text": "2"}, {"role": "prefix", "text": " so 34 + 56"},
    ]}), sp_tokenizer)  # fmt: skip
    hit = Counter(
        number
        for copy in range(40)
        for number, turn in enumerate(
            hard(
                encoded.turns, rng_of(0, 0, 9, copy), pool=pool, group="g0", record=(0, 999),
                tokenizer=sp_tokenizer, max_deviations=2, max_deviation_length=4,
            ).turns
        )
        if turn.deviations
    )  # fmt: skip
    assert hit[0] > 5 and hit[1] > 5


def test_builders_depend_on_seed_source_line_copy_only(sp_tokenizer: Tokenizer) -> None:
    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    draws = [rng_of(*key).integers(2**62) for key in keys]
    assert len(set(draws)) == len(keys)
    assert rng_of(1, 2, 3, 4).integers(2**62) == draws[0]
    records, pool = records_and_pool(sp_tokenizer, 20)
    for builder in ("random", "hard"):
        for record in records:
            one, two = (
                trace_of(deviating(builder, record, sp_tokenizer, pool), sp_tokenizer) for _ in "ab"
            )
            assert one.ids.tolist() == two.ids.tolist()
        other = trace_of(deviating(builder, records[0], sp_tokenizer, pool, copy=1), sp_tokenizer)
        assert (
            other.ids.tolist()
            != trace_of(
                deviating(builder, records[0], sp_tokenizer, pool), sp_tokenizer
            ).ids.tolist()
        )


# --- literal look-alikes ---

LOOKALIKES = (
    "<UNDO>", "\uff1c\uff35\uff2e\uff24\uff2f\uff1e", "<UN", "DO>", "<UN" "DO>", "<s>", "</s>",
    "<pad>", "<unk>", "<|im_start|>", "<|endoftext|>", "<0x0A>", "<undo>", "\u1d41NDO",
)  # fmt: skip


@pytest.mark.parametrize("name", ["sp", "bpe", "bpe_prefix"])
def test_a_corpus_of_lookalikes_yields_only_the_undos_asked_for(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    rng = stdlib_random.Random(3)
    specials = np.flatnonzero(tokenizer.is_special).tolist()
    for _ in range(300):
        pick = lambda: "".join(rng.choices(LOOKALIKES, k=rng.randint(1, 4)))  # noqa: E731
        prompt, reference, wrong = pick(), pick(), "?" + pick()
        fields = {"prompt": prompt, "reference": reference,
                  "deviations": [{"at": rng.randint(0, len(reference)), "text": wrong}]}  # fmt: skip
        trace, turns, _ = built(fields, tokenizer)
        (deviation,) = turns[0].deviations
        expected = Counter({tokenizer.undo_id: len(deviation.ids), tokenizer.eos_id: 1})
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            expected[tokenizer.bos_id] = 1
        found = Counter(i for i in trace.ids.tolist() if i in specials)
        assert found == expected
        assert tokenizer.decode(said_by(turns)) == prompt + reference
        assert (trace.ids == tokenizer.undo_id).tolist() == (trace.roles == Role.UNDO).tolist()


def test_hand_made_turns_with_a_special_are_caught(sp_tokenizer: Tokenizer) -> None:
    (turn,) = encode_record(record_of({"prompt": "1", "reference": "234"}), sp_tokenizer).turns
    for token in (sp_tokenizer.undo_id, sp_tokenizer.eos_id, sp_tokenizer.bos_id):
        bad = replace(turn, deviations=(Deviation(1, np.array([token], dtype=np.int32), 0),))
        with pytest.raises(TraceError):
            check(
                trace_of([bad], sp_tokenizer),
                tokenizer=sp_tokenizer,
                machine=Machine(sp_tokenizer.undo_id),
                path="r",
            )
