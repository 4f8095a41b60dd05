"""The copy that is written while training goes on: the same bytes, and none that come later."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from nmar_ds.errors import SaveError
from nmar_ds.training.snapshot import HostMemory, Snapshot, host_copy, num_bytes, write_file


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class Scaler:
    def __init__(self) -> None:
        self.scale = 1.0


def state_of_a_run() -> dict[str, Any]:
    """What DeepSpeed hands over, in small: views, parameters, names on tensors, one tensor twice."""
    flat = torch.arange(12, dtype=torch.float32)
    named = torch.ones(3, requires_grad=True)
    named.ds_id = "0_16"  # type: ignore[attr-defined]
    (named * 2).sum().backward()
    options = {"lr": 0.1, "betas": (0.9, 0.95)}
    return {
        "groups": [flat, flat[3:7], flat.view(3, 4).t()],
        "named": named,
        "parameter": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        "again": flat,
        "empty": torch.empty(0),
        "scalar": torch.tensor(7),
        "options": [options, options],
        "scaler": Scaler(),
        "plain": {"step": 3, "name": "x", "none": None, 4: (1, [2])},
    }


def test_saving_the_copy_writes_the_very_same_bytes() -> None:
    state = state_of_a_run()
    copy, _ = host_copy(state, HostMemory())
    assert saved(copy) == saved(state)
    assert copy["named"].ds_id == "0_16" and copy["named"].grad is None
    assert copy["again"] is copy["groups"][0] and copy["options"][0] is copy["options"][1]
    copy["groups"][0][3] = -1  # a view still looks at the whole
    assert copy["groups"][1][0] == -1 and state["groups"][0][3] == 3


def test_nothing_that_happens_later_reaches_the_copy() -> None:
    state = state_of_a_run()
    before = saved(state)
    copy, _ = host_copy(state, HostMemory())
    with torch.no_grad():
        for tensor in (state["again"], state["named"], state["parameter"], state["scalar"]):
            tensor.add_(1)
    state["options"][0]["lr"] = 5.0
    state["scaler"].scale = 2.0
    state["plain"][4][1].append(9)
    assert saved(copy) == before != saved(state)


def test_files_are_written_in_order_and_their_memory_given_back(tmp_path: Path) -> None:
    state = {"x": torch.ones(3), "plain": {"step": 3}}
    write_file(state, tmp_path / "expected")
    shot = Snapshot(HostMemory())
    for name in ("a", "b"):
        shot.add(state, tmp_path / name)
    assert not (tmp_path / "a").exists()
    shot.write()
    assert (tmp_path / "a").stat().st_size == (tmp_path / "expected").stat().st_size
    assert torch.load(tmp_path / "b", weights_only=True)["plain"] == state["plain"]
    assert not shot._files
    assert num_bytes([torch.ones(3), {"x": (torch.ones(2, dtype=torch.int8), "y")}]) == 14


def test_a_file_that_cannot_be_written_is_named_with_what_it_needs(tmp_path: Path) -> None:
    shot = Snapshot(HostMemory())
    shot.add({"x": torch.ones(5)}, tmp_path / "none" / "a")
    with pytest.raises(
        SaveError, match=r"none/a: No such file.*it needs 20 bytes, [\d,]+ are free"
    ):
        shot.write()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory\nframe 1")]
)
def test_no_memory_for_the_copy_is_one_line_with_the_way_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(self: Any, storage: Any) -> Any:
        raise error

    monkeypatch.setattr(HostMemory, "copy_of", fail)
    with pytest.raises(SaveError) as caught:
        Snapshot(HostMemory()).add({"x": torch.ones(5)}, tmp_path / "a")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a'}: no host memory for a copy of 20 bytes: ")
    assert "\n" not in text and "checkpoint.asynchronous: false" in text


def test_the_next_copy_is_made_in_the_same_memory(tmp_path: Path) -> None:
    memory, places, whole = HostMemory(), [], torch.arange(6.0)
    for number in range(3):
        shot = Snapshot(memory)
        shot.add({"x": whole + number, "y": whole[2:4], "n": number}, tmp_path / str(number))
        state, storages = shot._files[0][1:]
        assert torch.equal(state["x"], whole + number) and torch.equal(state["y"], whole[2:4])
        places.append(sorted(storage.data_ptr() for storage in storages))
        shot.write()
    assert places[0] == places[1] == places[2]
    # What has not been written yet is not overwritten.
    first, second = Snapshot(memory), Snapshot(memory)
    first.add({"x": whole}, tmp_path / "first")
    second.add({"x": whole + 1}, tmp_path / "second")
    for shot in (first, second):
        shot.write()
    assert torch.equal(torch.load(tmp_path / "first", weights_only=True)["x"], whole)


def test_memory_comes_back_after_a_write_that_failed(tmp_path: Path) -> None:
    memory = HostMemory()
    shot = Snapshot(memory)
    shot.add({"x": torch.ones(5)}, tmp_path / "none" / "a")
    with pytest.raises(SaveError):
        shot.write()
    assert len(memory._free[20]) == 1
