"""Stores: what goes in comes out, damage is found, and nothing half-written stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmar_ds.data import store as store_module
from nmar_ds.data.store import MANIFEST, Store, manifest_checksum, read_manifest, write_store
from nmar_ds.errors import StoreError
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import NUM_ROLES, Role, Trace


def some_traces(number: int, seed: int = 0, highest: int = 290) -> list[Trace]:
    rng = np.random.default_rng(seed)
    traces = []
    for line in range(1, number + 1):
        length = int(rng.integers(1, 30))
        roles = np.sort(rng.integers(0, NUM_ROLES, size=length)).astype(np.uint8)
        onsets = tuple(sorted(rng.integers(0, length, size=int(rng.integers(0, 4))).tolist()))
        ids = rng.integers(0, highest, size=length).astype(np.int32)
        traces.append(Trace(ids=ids, roles=roles, onsets=onsets, line=line, source=line % 3))
    return traces


def assert_holds(store: Store, traces: list[Trace]) -> None:
    assert store.num_traces == len(store) == len(traces)
    for index, trace in enumerate(traces):
        back = store.trace(index)
        assert back.ids.tolist() == trace.ids.tolist() and back.ids.dtype == np.int32
        assert back.roles.tolist() == trace.roles.tolist()
        assert (back.onsets, back.line, back.source) == (trace.onsets, trace.line, trace.source)
    assert store.lengths.tolist() == [len(trace) for trace in traces]
    assert store.lengths.dtype == np.int32 and store.role_counts.dtype == np.int32
    expected = [[int((trace.roles[1:] == r).sum()) for r in range(NUM_ROLES)] for trace in traces]
    assert store.role_counts.tolist() == expected


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    number=st.integers(0, 60),
    shard=st.integers(1, 400),
    flush=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_round_trip_over_shards(  # noqa: PLR0917 (hypothesis and fixtures)
    number: int, shard: int, flush: int, seed: int, sp_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    traces = some_traces(number, seed)
    folder = tmp_path_factory.mktemp("round") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "FLUSH_TOKENS", flush)
        manifest = write_store(folder, iter(traces), tokenizer=sp_tokenizer, shard_tokens=shard)
    store = Store(folder)
    store.verify()
    assert_holds(store, traces)
    total = sum(len(trace) for trace in traces)
    assert sum(manifest["counts"]["tokens"].values()) == total
    assert sum(s["num_tokens"] for s in manifest["shards"]) == total
    if total > 2 * (shard + 30):
        assert len(manifest["shards"]) > 1
    assert all(s["num_tokens"] < shard + flush + 30 for s in manifest["shards"])
    assert manifest["counts"]["stored"] == number
    assert manifest["counts"]["clean"] == sum(not trace.onsets for trace in traces)
    assert manifest["counts"]["deviations"] == sum(len(trace.onsets) for trace in traces)


@pytest.fixture
def stored(sp_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    traces = some_traces(50)
    write_store(
        tmp_path / "store", traces, tokenizer=sp_tokenizer, shard_tokens=200, seed=5,
        sources=[{"path": "a.jsonl", "sha256": "0" * 64}], builder={"name": "given"},
        counts={"read": 50}, notes={"dropped": [{"line": 3}]},
    )  # fmt: skip
    return tmp_path / "store"


def test_manifest(stored: Path, sp_tokenizer: Tokenizer) -> None:
    store = Store(stored)
    manifest = store.manifest
    assert manifest["tokenizer"] == {
        "fingerprint": sp_tokenizer.fingerprint, "size": sp_tokenizer.size, "undo_token": "<UNDO>",
        "undo_id": sp_tokenizer.undo_id, "bos_id": sp_tokenizer.bos_id,
        "eos_id": sp_tokenizer.eos_id, "pad_id": sp_tokenizer.pad_id,
    }  # fmt: skip
    assert (manifest["semantics"], manifest["context"], manifest["seed"]) == ("token", "linear", 5)
    assert manifest["sources"] == [{"path": "a.jsonl", "sha256": "0" * 64}]
    assert (manifest["counts"]["read"], manifest["counts"]["stored"]) == (50, 50)
    assert manifest["ids_dtype"] == "<u2" and len(manifest["shards"]) > 1
    on_disk = {str(f.relative_to(stored)) for f in stored.rglob("*") if f.is_file()}
    assert on_disk == {*manifest["files"], MANIFEST}
    assert (stored / "dropped.jsonl").read_text() == '{"line": 3}\n'
    assert store.tokenizer().fingerprint == sp_tokenizer.fingerprint


def test_rows_are_views(stored: Path) -> None:
    store = Store(stored)
    for row in (store.ids(7), store.roles(7)):
        assert not row.flags.owndata and not row.flags.writeable
    assert store.ids(7).dtype == np.dtype("<u2")
    for index in (-1, 50):
        with pytest.raises(IndexError):
            store.ids(index)


def test_large_vocabularies_get_wide_ids(sp_tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Large:
        def __getattr__(self, name: str) -> object:
            return 70_000 if name == "size" else getattr(sp_tokenizer, name)

    traces = some_traces(20, highest=69_999)
    write_store(tmp_path / "s", traces, tokenizer=Large())  # type: ignore[arg-type]
    assert Store(tmp_path / "s").manifest["ids_dtype"] == "<i4"
    assert_holds(Store(tmp_path / "s"), traces)


def test_same_input_gives_the_same_bytes(
    stored: Path, sp_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    again = tmp_path / "elsewhere" / "again"
    write_store(
        again, some_traces(50), tokenizer=sp_tokenizer, shard_tokens=200, seed=5,
        sources=[{"path": "a.jsonl", "sha256": "0" * 64}], builder={"name": "given"},
        counts={"read": 50}, notes={"dropped": [{"line": 3}]},
    )  # fmt: skip
    for file in stored.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(stored)).read_bytes() == file.read_bytes(), file
    assert sorted(f.name for f in tmp_path.iterdir()) == ["elsewhere", "store"]


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_one_flipped_bit_is_found_in_every_file(stored: Path) -> None:
    for file in files_of(stored):
        content = file.read_bytes()
        if not content:
            continue
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 4
            file.write_bytes(damaged)
            with pytest.raises(StoreError, match="prepare it again") as caught:
                Store(stored).verify()
            assert str(file) in str(caught.value)
        file.write_bytes(content)
    Store(stored).verify()


@pytest.mark.parametrize(
    "array",
    ["ids", "roles", "offsets", "onsets", "onset_offsets", "lines", "sources", "role_counts"],
)
def test_damage_is_found_before_the_first_row_is_used(stored: Path, array: str) -> None:
    file = stored / f"shard-00001.{array}.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store = Store(stored)
    first_of_second = int(store.manifest["shards"][0]["num_traces"])
    store.trace(0)  # the other shard is sound
    with pytest.raises(StoreError, match=f"{array}.bin: damaged"):
        _ = store.role_counts if array == "role_counts" else store.trace(first_of_second)


def test_missing_and_cut_files_are_found_on_opening(stored: Path) -> None:
    for file in files_of(stored):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(StoreError, match=f"{file.name}: missing"):
            Store(stored)
        if len(content) > 1 and file.name != MANIFEST:
            file.write_bytes(content[:-1])
            with pytest.raises(
                StoreError, match=f"{len(content) - 1} bytes, expected {len(content)}"
            ):
                Store(stored)
        file.write_bytes(content)


def test_manifest_damage_and_versions(stored: Path) -> None:
    file = stored / MANIFEST
    original = file.read_text()
    manifest = json.loads(original)
    for content, part in (
        ("", "damaged"), ("[]", "damaged"), ("{}", "damaged"), (original[:-9], "damaged"),
        (original.replace('"seed": 5', '"seed": 6'), "checksum"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(StoreError, match=part):
            Store(stored)
    manifest["format_version"] = 99
    manifest["checksum"] = manifest_checksum(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="format version 99, expected 1"):
        read_manifest(stored)


def test_another_tokenizer_in_the_store_is_found(stored: Path, small_tokenizer: Tokenizer) -> None:
    target = stored / "tokenizer" / "tokenizer.model"
    shutil.copyfile(small_tokenizer.path, target)
    manifest = json.loads((stored / MANIFEST).read_text())
    manifest["files"]["tokenizer/tokenizer.model"] = store_module._described(target)
    manifest["checksum"] = manifest_checksum(manifest)
    (stored / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="another tokenizer"):
        Store(stored).tokenizer()


class Stop(BaseException):
    """A crash: nothing may catch it."""


def test_a_crash_while_writing_leaves_the_previous_store(
    stored: Path, sp_tokenizer: Tokenizer
) -> None:
    before = {file: file.read_bytes() for file in files_of(stored)}

    def crashing() -> Iterator[Trace]:
        yield from some_traces(30, seed=9)
        raise Stop

    with pytest.raises(Stop):
        write_store(stored, crashing(), tokenizer=sp_tokenizer, shard_tokens=100)
    assert {file: file.read_bytes() for file in files_of(stored)} == before
    # The next run clears what the crash left, and replaces the store.
    write_store(stored, some_traces(3, seed=9), tokenizer=sp_tokenizer)
    assert_holds(Store(stored), some_traces(3, seed=9))
    assert [f.name for f in stored.parent.iterdir() if f.name.startswith("store")] == ["store"]


@pytest.mark.parametrize("crash_at", range(1, 40))
def test_a_crash_at_any_step_leaves_old_new_or_nothing(
    crash_at: int, stored: Path, sp_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash at each change of names and each sync in turn."""
    old, new = some_traces(50), some_traces(4, seed=9)
    steps = 0

    def counted(original: object) -> object:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal steps
            steps += 1
            if steps == crash_at:
                raise Stop
            return original(*args, **kwargs)  # type: ignore[operator]

        return step

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(store_module, "sync", counted(store_module.sync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    finished = False
    try:
        write_store(stored, new, tokenizer=sp_tokenizer, shard_tokens=2**20)
        finished = True
    except Stop:
        pass
    monkeypatch.undo()
    if finished:
        assert steps < crash_at
        return
    if stored.exists():
        store = Store(stored)
        store.verify()
        assert_holds(store, old if store.num_traces == 50 else new)
    else:
        with pytest.raises(StoreError, match=r"rename .*store\.previous back"):
            Store(stored)
        assert_holds(Store(stored.with_name("store.previous")), old)


def test_a_new_store_is_nothing_until_it_is_whole(
    tmp_path: Path, sp_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        assert not (tmp_path / "s").exists()
        raise Stop

    monkeypatch.setattr(store_module, "_put_in_place", broken)
    with pytest.raises(Stop):
        write_store(tmp_path / "s", some_traces(3), tokenizer=sp_tokenizer)
    with pytest.raises(StoreError, match="missing, expected a trace store"):
        Store(tmp_path / "s")


def test_other_peoples_files_are_never_replaced(tmp_path: Path, sp_tokenizer: Tokenizer) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(StoreError, match="expected a store or no such folder"):
            write_store(tmp_path / name, some_traces(2), tokenizer=sp_tokenizer)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_store(tmp_path / "empty", some_traces(2), tokenizer=sp_tokenizer)
    assert Store(tmp_path / "empty").num_traces == 2


def test_an_unwritable_place_is_a_store_error(tmp_path: Path, sp_tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="expected a writable place"):
        write_store(tmp_path / "file" / "store", some_traces(2), tokenizer=sp_tokenizer)


def test_traces_keep_their_meaning() -> None:
    assert [role.value for role in Role] == list(range(NUM_ROLES))  # stored as bytes: never change
