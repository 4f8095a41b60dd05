"""The PNG and the TensorBoard scalars of an examination."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from nmar_ds.errors import ConfigError
from nmar_ds.inference.curves import scalars, write_scalars
from nmar_ds.inference.picture import AMOUNTS, NATS, PROBABILITIES, SHARES, picture


def measure(value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "of": 4}


REPORT: dict[str, Any] = {
    "model": "runs/x",
    "families": {
        "sums": {
            "measures": {
                "n": 4,
                "reduced": measure(0.75, 0.3, 0.95),
                "overhead": measure(1.5, 1.25, 1.75),
                "parrot": measure(None, 0.0, 1.0),
                "mean_delay": measure(2.0, None, None),
            },
        },
        "words": {"measures": {"n": 4, "reduced": measure(0.5, 0.15, 0.85)}},
    },
}
TRACES = {"measures": {"heldout/loss_undo": measure(0.25, 0.125, 0.5),
                       "heldout/p_undo_elsewhere": measure(0.01, 0.0, 0.02)}}  # fmt: skip
VOTE = {"k": 2, "accuracy": {"baseline": measure(0.5, 0.25, 0.75)},
        "difference": measure(0.25, -0.25, 0.75)}  # fmt: skip


def with_all() -> dict[str, Any]:
    return REPORT | {"teacher_forced": TRACES, "equal_compute": {"families": {"sums": VOTE}}}


def size_of(file: Path) -> tuple[int, int]:
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_picture_has_two_more_panels_for_traces_and_is_reproducible(tmp_path: Path) -> None:
    plain, again, more = (tmp_path / name for name in ("a.png", "b.dat", "c.png"))
    picture(REPORT, plain)
    picture(REPORT, again)
    picture(with_all(), more)
    assert plain.read_bytes() == again.read_bytes()
    assert size_of(plain) == (1300, 900) and size_of(more) == (1950, 900)


def test_picture_draws_each_measure_with_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmar_ds.inference import picture as module

    kept: list[Any] = []
    monkeypatch.setattr(module, "save_figure", lambda figure, file: kept.append(figure))
    picture(REPORT, Path("unused.png"))
    panels = {panel.get_title(): panel for panel in kept[0].axes}
    assert list(panels) == [*SHARES, *AMOUNTS]
    bars = [
        {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in group}
        for group in panels["right answers"].containers
        if hasattr(group, "errorbar")
    ]
    at = SHARES["right answers"].index("reduced")
    assert bars == [{at: 0.75}, {at + 0.4: 0.5}]
    (stem,) = panels["tokens and undos"].containers[1].errorbar[2]
    ends = sorted(tuple(segment[:, 1]) for segment in stem.get_segments())
    assert ends == [(1.25, 1.75), (2.0, 2.0)]  # no interval: no length


def test_scalars_are_values_and_the_ends_of_intervals() -> None:
    found = scalars(with_all())
    assert found == {
        "examined/sums/n": 4.0,
        "examined/sums/reduced": 0.75,
        "examined/sums/reduced/low": 0.3,
        "examined/sums/reduced/high": 0.95,
        "examined/sums/overhead": 1.5,
        "examined/sums/overhead/low": 1.25,
        "examined/sums/overhead/high": 1.75,
        "examined/sums/mean_delay": 2.0,
        "examined/sums/vote_k": 2.0,
        "examined/sums/vote_accuracy": 0.5,
        "examined/sums/vote_accuracy/low": 0.25,
        "examined/sums/vote_accuracy/high": 0.75,
        "examined/sums/vote_difference": 0.25,
        "examined/sums/vote_difference/low": -0.25,
        "examined/sums/vote_difference/high": 0.75,
        "examined/words/n": 4.0,
        "examined/words/reduced": 0.5,
        "examined/words/reduced/low": 0.15,
        "examined/words/reduced/high": 0.85,
        "heldout/loss_undo": 0.25,
        "heldout/loss_undo/low": 0.125,
        "heldout/loss_undo/high": 0.5,
        "heldout/p_undo_elsewhere": 0.01,
        "heldout/p_undo_elsewhere/low": 0.0,
        "heldout/p_undo_elsewhere/high": 0.02,
    }


def test_scalars_are_written_at_the_step_asked_for(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_scalars(REPORT, tmp_path / "tb", step=700)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(scalars(REPORT))
    (event,) = events.Scalars("examined/words/reduced")
    assert (event.step, event.value) == (700, 0.5)


def test_the_picture_names_what_is_measured() -> None:
    from nmar_ds.inference.bars import MEASURES

    drawn = [name for names in (SHARES | AMOUNTS).values() for name in names]
    assert set(drawn) <= set(MEASURES) and len(drawn) == len(set(drawn))
    assert not set(PROBABILITIES) & set(NATS)


def test_missing_matplotlib_and_unwritable_places_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.x\.png: No such file"):
        picture(REPORT, tmp_path / "nowhere" / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: .*expected a writable folder"):
        write_scalars(REPORT, tmp_path / "file", step=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"x\.png: needs matplotlib"):
        picture(REPORT, tmp_path / "x.png")
