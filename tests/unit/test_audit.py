"""The audit finds every broken invariant in what was written, and counts what is there."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_stores import prepare_store
from tiny_tokenizers import sums

from nmar_ds.data import audit as audit_module
from nmar_ds.data import statistics
from nmar_ds.data.audit import audit
from nmar_ds.data.packing import pack
from nmar_ds.data.store import Store, manifest_checksum, shard_file, write_store
from nmar_ds.errors import StoreError
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import Role, Trace

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., Path]
X, P, E, B, C = Role
A, U = 9, -1  # an ordinary id; stands for the undo token


def trace(*segments: tuple[Role, list[int]], onsets: tuple[int, ...] = (), line: int = 1) -> Trace:
    return Trace(
        ids=np.array([i for _, ids in segments for i in ids], dtype=np.int32),
        roles=np.array([r for r, ids in segments for _ in ids], dtype=np.uint8),
        onsets=onsets, line=line,
    )  # fmt: skip


GOOD = [
    trace((X, [A, A]), (P, [A]), (E, [A, A]), (B, [U, U]), (C, [A]), onsets=(3,)),
    trace((P, [A, A])),
    trace((E, [A]), (B, [U]), (E, [A, A]), (B, [U, U]), (C, [A]), onsets=(0, 3)),
    trace((X, [A]), (P, [A]), (X, [A]), (E, [A]), (B, [U]), (C, [A]), (E, [A]), (B, [U]),
          (C, [A]), onsets=(3, 6)),
]  # fmt: skip
BAD = {
    "an undo too few": (
        trace((X, [A]), (E, [A, A]), (B, [U]), (C, [A]), onsets=(1,)), "do not take their deviation"),
    "an undo too many": (
        trace((X, [A]), (P, [A]), (E, [A]), (B, [U, U]), (C, [A]), onsets=(2,)),
        "do not take their deviation"),
    "an undo into the prompt": (
        trace((X, [A]), (E, [A]), (B, [U, U]), (C, [A]), onsets=(1,)), "nothing to undo"),
    "an undo in a prefix": (trace((X, [A]), (P, [A, U, A])), "outside the undo segments"),
    "another token among undos": (
        trace((P, [A]), (E, [A]), (B, [A]), (C, [A]), onsets=(1,)), "outside the undo segments"),
    "a deviation that stays": (trace((P, [A]), (E, [A]), (C, [A]), onsets=(1,)), "out of place"),
    "a correction of nothing": (trace((X, [A]), (C, [A])), "out of place"),
    "a prompt at the end": (trace((P, [A]), (X, [A])), "out of place"),
    "a prefix after an undo": (
        trace((E, [A]), (B, [U]), (P, [A]), onsets=(0,)), "out of place"),
    "no onset": (trace((P, [A]), (E, [A]), (B, [U]), (C, [A])), "more or fewer onsets"),
    "an onset too many": (trace((P, [A]), onsets=(0,)), "more or fewer onsets"),
    "an onset in the prefix": (
        trace((P, [A]), (E, [A]), (B, [U]), (C, [A]), onsets=(0,)), "onset outside its deviation"),
    "an onset among the undos": (
        trace((P, [A]), (E, [A]), (B, [U]), (C, [A]), onsets=(2,)), "onset outside its deviation"),
    "a role of its own": (trace((P, [A]), (7, [A])), "a role that does not exist"),  # type: ignore[arg-type]
    "no token": (trace(), "has no token"),
}  # fmt: skip


def written(traces: list[Trace], tokenizer: Tokenizer, folder: Path, machine: Machine | None = None,
            **more: object) -> Store:  # fmt: skip
    """A store that nobody has checked before it was written."""
    real = [
        replace(t, ids=np.where(t.ids == U, tokenizer.undo_id, t.ids), line=n)
        for n, t in enumerate(traces, 1)
    ]
    write_store(folder, real, tokenizer=tokenizer, machine=machine,
                sources=[{"path": "a.jsonl", "sha256": ""}], builder={"max_length": 16}, **more)  # fmt: skip
    return Store(folder)


def test_what_is_there_is_counted(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = audit(written(GOOD, small_tokenizer, tmp_path / "s"))
    assert (found.num_traces, found.num_tokens, found.num_without_target) == (4, 26, 0)
    assert found.tokens.tolist() == [4, 4, 7, 7, 4]
    assert found.deviations[:4].tolist() == [1, 1, 2, 0]
    assert found.deviation_lengths[:4].tolist() == [0, 3, 2, 0]
    assert found.undo_runs[:4].tolist() == [0, 3, 2, 0]
    assert found.delays[:3].tolist() == [
        4,
        1,
        0,
    ]  # the third trace's second error is noticed at once
    assert found.num_rows == pack([len(t) for t in GOOD], 16).num_rows
    assert found.packing_use == 26 / (16 * found.num_rows)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("block", [1, 10, 10**6])
def test_every_broken_invariant_is_found_and_named(
    name: str,
    block: int,
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit_module, "BLOCK_TOKENS", block)
    bad, message = BAD[name]
    own_role = name == "a role of its own"  # the writer counts roles, so it is put in afterwards
    if own_role:
        bad = trace((P, [A, A]))
    store = written([*GOOD, bad, *GOOD], small_tokenizer, tmp_path / "s")
    if own_role:
        roles = np.array(store._array(0, "roles"))
        roles[store._array(0, "offsets")[5] - 1] = 7
        store._arrays[shard_file(0, "roles")] = roles
    with pytest.raises(StoreError, match=rf"trace 4 \(a\.jsonl:5\): .*{message}"):
        audit(store)


@pytest.mark.parametrize("block", [1, 10**6])
@pytest.mark.parametrize(("trace_index", "role"), [(0, 0), (1, 1), (3, 4)])
def test_stored_counts_that_the_roles_do_not_bear_out(  # noqa: PLR0917 (fixtures)
    block: int, trace_index: int, role: int,
    small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Denominators are planned from them, so a wrong one would scale every loss of its step."""
    monkeypatch.setattr(audit_module, "BLOCK_TOKENS", block)
    store = written(GOOD, small_tokenizer, tmp_path / "s")
    counts = np.array(store._array(0, "role_counts"))
    counts[trace_index * len(Role) + role] += 1
    store._arrays[shard_file(0, "role_counts")] = counts
    with pytest.raises(StoreError, match=rf"trace {trace_index} .*stored counts by role"):
        audit(store)


@pytest.mark.parametrize(
    ("semantics", "good", "bad"),
    [
        # 7 is a boundary: a span undo pops back to it.
        ("span", trace((P, [A, 7]), (E, [A, 7, A]), (B, [U, U]), (C, [A]), onsets=(2,)),
         trace((P, [A, 7]), (E, [A, 7, A]), (B, [U]), (C, [A]), onsets=(2,))),
        ("reset", trace((X, [A]), (E, [A, A]), (B, [U]), (C, [A]), onsets=(1,)),
         trace((X, [A]), (P, [A]), (E, [A, A]), (B, [U]), (C, [A]), onsets=(2,))),
    ],
)  # fmt: skip
def test_the_semantics_of_the_store(
    semantics: str, good: Trace, bad: Trace, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    machine = Machine(small_tokenizer.undo_id, semantics,
                      frozenset({7} if semantics == "span" else ()))  # fmt: skip
    assert audit(written([good], small_tokenizer, tmp_path / "g", machine)).num_traces == 1
    with pytest.raises(StoreError, match=r"trace 0 \(a\.jsonl:1\)"):
        audit(written([bad], small_tokenizer, tmp_path / "b", machine))


@pytest.mark.parametrize("count", ["stored", "deviations", "clean", "tokens"])
def test_counts_that_the_traces_do_not_bear_out(
    count: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = written(GOOD, small_tokenizer, tmp_path / "s")
    manifest = store.manifest
    value = manifest["counts"][count]
    manifest["counts"][count] = {**value, "prefix": 99} if count == "tokens" else value + 1
    manifest["checksum"] = manifest_checksum(manifest)
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=rf"counts\.{count}: .*expected"):
        audit(Store(store.folder))


@pytest.mark.parametrize("builder", ["random", "hard"])
@pytest.mark.parametrize(
    ("semantics", "boundaries"), [("token", []), ("span", ["."]), ("reset", [])]
)
def test_real_stores_pass_whatever_the_block(  # noqa: PLR0917 (fixtures)
    builder: str, semantics: str, boundaries: list[str], write_jsonl: Write,
    sp_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prepare_store([write_jsonl(sums(80))], tmp_path / "s", sp_tokenizer, builder=builder,
                  max_length=400, traces_per_record=2, max_deviations=3, clean_share=0.2,
                  semantics=semantics, boundaries=boundaries)  # fmt: skip
    store = Store(tmp_path / "s")
    whole = audit(store)
    monkeypatch.setattr(audit_module, "BLOCK_TOKENS", 700)
    parted = audit(store)
    for name in ("tokens", "deviations", "deviation_lengths", "undo_runs", "delays"):
        assert np.array_equal(getattr(whole, name), getattr(parted, name))
    traces = [store.trace(n) for n in range(len(store))]
    assert whole.deviations[: len(Counter(len(t.onsets) for t in traces))].sum() == len(traces)
    runs = Counter(len(s.ids) for t in traces for s in t.segments() if s.role == B)
    assert {n: int(whole.undo_runs[n]) for n in runs} == dict(runs)


def test_traces_that_masked_sft_learns_nothing_from(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = written([*GOOD, trace((P, [A]))], small_tokenizer, tmp_path / "s")
    assert audit(store).num_without_target == 1  # its only token is nobody's target
    assert audit(store).num_rows_without_target == 0  # it shares a row with others
    alone = written(
        [trace((X, [A] * 15), (P, [A])), trace((P, [A]))], small_tokenizer, tmp_path / "a"
    )
    assert audit(alone).num_rows_without_target == 1


def test_the_page_says_it_in_text_picture_and_json(
    write_jsonl: Write, sp_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_store([write_jsonl(sums(60))], tmp_path / "s", sp_tokenizer, builder="hard",
                  max_length=300, max_deviations=2)  # fmt: skip
    main = runpy.run_path(str(ROOT / "launcher/show.py"))["main"]
    png = tmp_path / "s.png"
    assert main(["--store", str(tmp_path / "s"), "--verify", "--audit", "--png", str(png)]) == 0
    text = capsys.readouterr().out
    found = audit(Store(tmp_path / "s"))
    assert f"traces 60, tokens {found.num_tokens:,}" in text
    for name in ("tokens by role", "deviations of a trace", "undos after a deviation", "deviation"):
        assert name in text
    assert all(len(line) < 120 for line in text.splitlines() if str(tmp_path) not in line)
    with Image.open(png) as picture:
        assert picture.size == (1200, 700)
        shades = np.asarray(picture.convert("L"))
        assert 0.5 < (shades > 250).mean() < 0.99, "bars on white"
    first = png.read_bytes()
    statistics.picture(found, str(tmp_path / "s"), png)
    assert png.read_bytes() == first, "the same store, the same picture"
    loaded = json.loads(statistics.as_json(found))
    assert loaded["tokens_by_role"]["undo"] == found.tokens[B] and loaded["traces"] == 60


def test_an_empty_store(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = audit(written([], small_tokenizer, tmp_path / "s"))
    assert "no traces" in statistics.page(found, "s")
    json.loads(statistics.as_json(found))
