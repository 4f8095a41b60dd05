"""Packed rows made readable: every token with its role, its weight, its trace and its position.

The lines are `rich` texts: printed on a terminal they carry colours, elsewhere their plain form
says the same with the role letters of SPEC section 1. What is shown is a real `Batch`, as the
training loop gets it, not a second reading of the store.
"""

# S segments (traces, and the padding of each row)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from nmar_ds.data.loader import Batch, TraceSource, make_batch
from nmar_ds.data.packing import pack
from nmar_ds.data.store import Store, boundary_ids_of
from nmar_ds.errors import StoreError
from nmar_ds.traces.schema import NUM_ROLES, Role

LETTERS = {
    Role.PROMPT: "x",
    Role.PREFIX: "p",
    Role.DEVIATION: "e",
    Role.UNDO: "b",
    Role.CORRECTION: "c",
}
STYLES = {
    Role.PROMPT: "bright_black",
    Role.PREFIX: "green",
    Role.DEVIATION: "red strike",
    Role.UNDO: "bold magenta",
    Role.CORRECTION: "cyan",
}
Weights = npt.NDArray[np.float64]  # float64[NUM_ROLES], indexed by Role


class Pieces(Protocol):
    """What the view needs of a tokenizer."""

    def piece(self, token_id: int, /) -> str:
        """Return the display form of an id."""


def print_store(
    store: Store,
    *,
    num_shown: int,
    sequence_length: int | None,
    weights: Weights,
    seed: int | None,
    single: bool,
) -> None:
    """Print legend, rows and counts, coloured on a terminal.

    Args:
        store: the traces.
        num_shown: rows, or traces where `single`.
        sequence_length: tokens per row; None: 512, or the longest trace if that is longer.
        weights: of each role's targets, to be marked.
        seed: draws what is shown; None takes the first ones.
        single: show traces one by one instead of packed rows.

    Raises:
        StoreError: the store is empty, or a trace is longer than a row.
    """
    if store.num_traces == 0:
        raise StoreError(f"{store.folder}: holds no trace, expected at least one")
    longest = int(store.lengths.max())
    length = sequence_length or max(512, longest)
    if longest > length:
        raise StoreError(
            f"{store.folder}: trace {int(store.lengths.argmax())} has {longest} tokens, expected "
            f"at most --sequence-length {length}"
        )
    console = Console()
    lines = [*legend(weights), undo_line(store.manifest), Text()]
    if single:
        plan = [np.array([index], np.int64) for index in range(store.num_traces)]
    else:
        packed = pack(store.lengths, length)
        plan = [packed.row(index) for index in range(packed.num_rows)]
    for index in _choose(len(plan), num_shown, seed):
        traces = plan[index]
        lines += row_view(
            store,
            traces,
            title=f"{'trace' if single else 'row'} {index}",
            length=int(store.lengths[traces].sum()) if single else length,
            weights=weights,
            tokenizer=store.tokenizer(),
            origin={t: f"source {store.source(t)}, line {store.line(t)}" for t in traces.tolist()},
            onsets={t: store.onsets(t).tolist() for t in traces.tolist()},
        )
        lines.append(Text())
    lines += counts_view(store.role_counts.sum(axis=0), weights)
    for line in lines:
        if console.is_terminal:
            console.print(line, soft_wrap=True)
        else:
            print(line.plain)


def _choose(num: int, num_shown: int, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(min(num, num_shown)))
    drawn = np.random.default_rng(seed).permutation(num)[:num_shown]
    return sorted(drawn.tolist())


def legend(weights: Weights) -> Iterator[Text]:
    """Explain letters, colours and marks."""
    yield Text("role (letter)    weight  mark")
    for role in Role:
        line = Text(f"{role.label:<10} ({LETTERS[role]})  ", style=STYLES[role])
        yield line.append(f"{weights[role]:>8g}  {_mark(weights[role])}")
    yield Text(
        "one line per segment: letter, mark, position of its first token, tokens between bars; "
        "a trace's first token is nobody's target; in a deviation || stands before the first wrong "
        "token where right ones come before it"
    )


def undo_line(manifest: Mapping[str, Any]) -> Text:
    """Say what one undo takes back in a store, from its manifest."""
    taken = {
        "token": "one token",
        "span": "the last token and on back to a boundary",
        "reset": "the whole response",
    }[manifest["semantics"]]
    texts = ", ".join(repr(text) for text in manifest.get("boundaries", []))
    ends = f"; {len(boundary_ids_of(manifest))} boundary ids end with {texts}" if texts else ""
    return Text(f"undo: {manifest['semantics']}, one takes back {taken}{ends}")


def row_view(
    source: TraceSource,
    traces: npt.NDArray[np.int64],
    *,
    title: str,
    length: int,
    weights: Weights,
    tokenizer: Pieces,
    origin: dict[int, str],
    onsets: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Iterator[Text]:
    """Lines for one packed row.

    Args:
        source: the store.
        traces: int64[n] store indices in row order.
        title: opens the headline.
        length: tokens per row.
        weights: weight of each role's targets.
        tokenizer: gives each id its display form.
        origin: where each trace came from, by store index.
        onsets: index of each deviation's first wrong token, by store index; unmarked if absent.
    """
    batch = make_batch(source, [traces], length=length, pad_id=0)
    used = batch.num_tokens
    share = 100 * used / length
    yield Text(f"{title}: {len(traces)} traces, {used} of {length} tokens ({share:.1f} %)", "bold")
    borders = batch.cu_seqlens.tolist()
    for index, start, end in zip(batch.trace_ids.tolist(), borders, borders[1:], strict=False):
        if index < 0:
            yield Text(f"+-- padding: {end - start} tokens", style="bright_black")
        else:
            yield from _trace_view(
                batch, start, end, index=index, weights=weights, tokenizer=tokenizer,
                origin=origin, onsets=onsets.get(index, ()),
            )  # fmt: skip


def _trace_view(
    batch: Batch,
    start: int,
    end: int,
    *,
    index: int,
    weights: Weights,
    tokenizer: Pieces,
    origin: dict[int, str],
    onsets: Sequence[int],
) -> Iterator[Text]:
    positions = batch.position_ids.ravel()[start:end]
    roles = batch.roles.ravel()[start:end]
    ids = batch.input_ids.ravel()[start:end]
    targets = batch.target_roles[start:end]
    num_trained = sum(int((targets == role).sum()) for role in Role if weights[role] != 0)
    yield Text(
        f"+-- trace {index} ({origin.get(index, '?')}): {end - start} tokens at {start}-{end - 1}, "
        f"positions {positions[0]}-{positions[-1]}, {num_trained} trained targets"
    )
    cuts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(roles)]
    for first, last in pairwise(cuts):
        role = Role(int(roles[first]))
        line = Text(f"|   {LETTERS[role]} {_mark(weights[role]):<4} {positions[first]:>5} ")
        for place, token in enumerate(ids[first:last].tolist(), start=first):
            line.append("||" if place in onsets and place > first else "|", style="bright_black")
            line.append(visible(tokenizer.piece(token)), style=STYLES[role])
        yield line.append("|", style="bright_black")


def counts_view(counts: npt.NDArray[np.int64], weights: Weights) -> Iterator[Text]:
    """Lines with the targets of each role and what part of them is trained.

    Args:
        counts: int64[NUM_ROLES] targets per role.
        weights: weight of each role's targets.
    """
    assert len(counts) == NUM_ROLES
    total = int(counts.sum())
    num_trained = sum(int(counts[role]) for role in Role if weights[role] != 0)
    yield Text(f"targets in the whole store: {total}, trained: {num_trained}", style="bold")
    for role in Role:
        share = 100 * int(counts[role]) / total if total else 0.0
        line = Text(f"  {role.label:<10} ({LETTERS[role]})", style=STYLES[role])
        yield line.append(f" {int(counts[role]):>12}  {share:>5.1f} %  {_mark(weights[role])}")


def visible(text: str) -> str:
    """Text on one line: control characters as escapes, everything else as it is."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _mark(weight: float) -> str:
    return {0.0: ".", 1.0: "+"}.get(weight, f"{weight:g}")
