"""Measures on a store of traces, against one forward of every prefix of every trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import examined
import numpy as np
import pytest
import torch
from oracles import settings_of
from tiny_stores import prepare_store

from nmar_ds.data.store import Store, write_store
from nmar_ds.errors import ConfigError, StoreError
from nmar_ds.inference import teacher_forced
from nmar_ds.inference.exported import load_model
from nmar_ds.inference.fitting import open_store
from nmar_ds.inference.intervals import Mean
from nmar_ds.inference.metrics import Rate
from nmar_ds.inference.picture import NATS, PROBABILITIES
from nmar_ds.inference.teacher_forced import measure_store
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import Role

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    place = tmp_path_factory.mktemp("store")
    records = examined.write(place / "h.jsonl", examined.records(12, seed=4))
    prepare_store([records], place / "heldout", tokenizer, builder="hard", max_length=256)
    return place / "heldout"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Any:
    return load_model(examined.make_export(tmp_path_factory.mktemp("export") / "m", tokenizer))


@torch.inference_mode()
def by_prefix(model: Any, store: Store, index: int, undo_id: int) -> dict[str, list[float]]:
    """What one trace adds to each measure: a number for every place that counts."""
    ids, roles = store.ids(index).tolist(), store.roles(index).tolist()
    found: dict[str, list[float]] = {name: [] for name in (
        "loss_prefix", "loss_deviation", "loss_undo", "loss_correction", "p_undo_where_due",
        "p_undo_elsewhere", "p_undo_at_first_place", "enters_error_greedy",
        "enters_error_sampled", "log_p_deviation_per_token", "undo_count_accuracy")}  # fmt: skip
    undo_at: list[float] = []
    onsets = store.onsets(index).tolist()
    wrong = {
        place
        for onset in onsets
        for place in range(onset, next(p for p in range(onset, len(ids)) if roles[p] != 2))
    }
    for place in range(1, len(ids)):
        logp = model(torch.tensor([ids[:place]])).logits[0, -1].double().log_softmax(0)
        own, undo = float(logp[ids[place]]), float(logp[undo_id].exp())
        undo_at.append(undo)
        role = Role(roles[place])
        if role is Role.PROMPT:
            continue
        found[f"loss_{role.label}"].append(-own)
        if role is Role.UNDO:
            found["p_undo_where_due"].append(undo)
            if roles[place - 1] == Role.DEVIATION:
                found["p_undo_at_first_place"].append(undo)
        elif role is not Role.DEVIATION:
            found["p_undo_elsewhere"].append(undo)
        if place in wrong:
            found["log_p_deviation_per_token"].append(own)
        if place in onsets:
            found["enters_error_sampled"].append(float(np.exp(own)))
            found["enters_error_greedy"].append(float(int(logp.argmax()) == ids[place]))
    for first in (p for p in range(1, len(ids)) if roles[p] == 3 and roles[p - 1] == 2):
        end = next((p for p in range(first, len(ids)) if roles[p] != 3), len(ids))
        sure = [undo_at[place - 1] > 0.5 for place in range(first, min(end + 1, len(ids)))]
        wanted = [place < end for place in range(first, min(end + 1, len(ids)))]
        found["undo_count_accuracy"].append(float(sure == wanted))
    return found


def test_every_measure_is_that_of_single_prefixes(
    folder: Path, model: Any, tokenizer: Tokenizer
) -> None:
    store = open_store(folder, settings_of(tokenizer))
    found = measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=10_000)
    parts = [by_prefix(model, store, n, tokenizer.undo_id) for n in range(store.num_traces)]
    assert len(parts) > 10 and any(part["enters_error_sampled"] for part in parts)
    seen = {name for part in parts for name, values in part.items() if values}
    assert set(found) == {f"heldout/{name}" for name in seen}
    # All there are, and so all that the picture draws.
    assert seen == {*PROBABILITIES, *NATS}
    for name in seen:
        # A ratio of sums over traces, and so is its interval.
        wanted = Mean.ratio(
            [sum(part[name]) for part in parts], [len(part[name]) for part in parts]
        )
        measure = found[f"heldout/{name}"]
        assert measure["value"] == pytest.approx(wanted.value, rel=1e-4, abs=1e-7), name
        low, high = wanted.bounds()
        if name in {"undo_count_accuracy", "enters_error_greedy"}:
            nums = [int(sum(part[name])) for part in parts]
            low, high = Rate.spread(nums, [len(part[name]) for part in parts]).bounds
        assert measure["low"] == pytest.approx(low, rel=1e-4, abs=1e-7), name
        assert measure["high"] == pytest.approx(high, rel=1e-4, abs=1e-7), name
        assert measure["of"] == sum(bool(part[name]) for part in parts)
    assert found["heldout/loss_deviation"]["low"] < found["heldout/loss_deviation"]["high"]  # type: ignore[operator]


def test_entering_an_error_is_writing_its_first_wrong_token(
    model: Any, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greedy model that writes just what stands there enters every error; p is 1."""
    store = open_store(folder, settings_of(tokenizer))

    def sure(_: Any, sequences: list[Any], *, undo_id: int) -> list[Any]:
        assert undo_id == tokenizer.undo_id
        return [
            teacher_forced.TargetScores(
                nll=np.zeros(len(ids) - 1), undo_nll=np.full(len(ids) - 1, 9.0),
                is_top=np.ones(len(ids) - 1, np.bool_),
            )
            for ids in sequences
        ]  # fmt: skip

    monkeypatch.setattr(teacher_forced, "score_targets", sure)
    found = measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=100)
    assert found["heldout/enters_error_greedy"]["value"] == 1.0
    assert found["heldout/enters_error_sampled"]["value"] == 1.0
    # All did, which of so many traces is no certainty; a bootstrap would have said so.
    sizes = [len(store.onsets(n)) for n in range(store.num_traces)]
    low, high = Rate.spread(sizes, sizes).bounds
    greedy = found["heldout/enters_error_greedy"]
    assert (greedy["low"], greedy["high"]) == (pytest.approx(low), high) and 0.5 < low < 0.95
    assert found["heldout/enters_error_sampled"]["low"] is None
    assert found["heldout/undo_count_accuracy"]["value"] == 0.0
    assert found["heldout/undo_count_accuracy"]["high"] == pytest.approx(1 - low)


def test_one_trace_with_a_deviation_gives_its_measures_no_interval(
    model: Any, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    """However many clean ones stand beside it."""
    rows = examined.write(tmp_path / "clean.jsonl", examined.records(11, seed=5))
    prepare_store([rows], tmp_path / "clean", tokenizer, builder="given", max_length=256)
    clean, erring = Store(tmp_path / "clean"), Store(folder)
    wrong = next(n for n in range(erring.num_traces) if len(erring.onsets(n)))
    traces = [*(clean.trace(n) for n in range(11)), erring.trace(wrong)]
    write_store(tmp_path / "both", traces, tokenizer=tokenizer)
    store = Store(tmp_path / "both")
    found = measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=100)
    for name in ("p_undo_where_due", "loss_undo", "loss_deviation", "enters_error_sampled"):
        measure = found[f"heldout/{name}"]
        assert (measure["of"], measure["low"], measure["high"]) == (1, None, None), name
    for name in ("undo_count_accuracy", "enters_error_greedy"):
        measure = found[f"heldout/{name}"]
        low, high = measure["low"], measure["high"]
        assert measure["of"] == 1 and low is not None and high is not None
        assert high - low > 0.75, name  # one event
    prefix = found["heldout/loss_prefix"]
    assert (prefix["of"] or 0) >= 11 and prefix["low"] is not None


def test_traces_are_spread_over_the_store(
    model: Any, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(folder, settings_of(tokenizer))
    seen: list[list[int]] = []
    real = teacher_forced.score_targets

    def keeping(lm: Any, sequences: list[Any], *, undo_id: int) -> Any:
        seen.extend(ids.tolist() for ids in sequences)
        return real(lm, sequences, undo_id=undo_id)

    monkeypatch.setattr(teacher_forced, "score_targets", keeping)
    found = measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=3)
    num = store.num_traces
    assert seen == [store.ids(n).tolist() for n in (0, num // 3, 2 * num // 3)]
    begun = [Role.PREFIX in store.roles(n)[1:] for n in (0, num // 3, 2 * num // 3)]
    assert found["heldout/loss_prefix"]["of"] == sum(begun) > 0
    alone = measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=1)
    assert alone["heldout/loss_correction" if "heldout/loss_correction" in alone
                 else "heldout/loss_prefix"]["low"] is None  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_fingerprint": "0" * 64}, "tokenizer.fingerprint: .*expected '000"),
        ({"undo_id": 5}, "tokenizer.undo_id: .*, expected 5 as in the model's nmar.json"),
        ({"semantics": "reset"}, "semantics: 'token', expected 'reset'"),
        ({"boundary_ids": (7,)}, r"boundary_ids: \[\], expected \[7\]"),
        ({"context": "pruned"}, "context: 'linear', expected 'pruned'"),
        ({"chat": {"system": None, "template_sha256": "a"}}, "builder.chat: None, expected"),
    ],
)
def test_a_store_that_means_something_else_is_refused(
    changes: dict[str, Any], words: str, folder: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(StoreError, match=rf"manifest\.json: {words}"):
        open_store(folder, replace(settings_of(tokenizer), **changes))


def test_an_empty_store_and_a_trace_beyond_the_positions_are_refused(
    folder: Path, tokenizer: Tokenizer, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "none", [], tokenizer=tokenizer)
    with pytest.raises(StoreError, match="holds no traces, expected some"):
        open_store(tmp_path / "none", settings_of(tokenizer))
    store = open_store(folder, settings_of(tokenizer))
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    with pytest.raises(ConfigError, match="tokens, expected at most the model's 20 positions"):
        measure_store(model, store, undo_id=tokenizer.undo_id, num_traces=100)
