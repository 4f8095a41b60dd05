"""Decodes during training: the result of the stack decoder in few forwards, and their table."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import VOCAB, build

from nmar_ds.inference.decoding import Decoded, decode
from nmar_ds.inference.drafted import Asked, decode_drafted
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.reduction import Machine, reduce
from nmar_ds.traces.schema import NUM_ROLES, IdArray, Role
from nmar_ds.training import decodes
from nmar_ds.training.decodes import Exercise, choose, decode_exercises, table
from nmar_ds.training.monitor import Monitor

torch.set_num_threads(1)
X, P, E, B, C = Role
UNDO, EOS = 7, 3
MACHINE = Machine(UNDO)


def ints(*ids: int) -> IdArray:
    return np.array(ids, np.int32)


# -- decoding with guesses -------------------------------------------------------------------


class Engine:
    """The training model, called as the real engine is."""

    device = torch.device("cpu")

    def __init__(self, family: str = "llama") -> None:
        # Wide weights: next tokens depend on the context, and stop tokens and undos occur.
        self.lm = build(family, initializer_range=0.6).eval()
        self.stock = build(family, initializer_range=0.6, attention="eager").eval()
        self.model = UndoTrainingModel(self.lm)
        self.calls: list[int] = []
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> None:
        self.modes.append(mode)

    def __call__(self, **arguments: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled() and self.modes[-1] is False
        self.calls.append(arguments["input_ids_BT"].numel())
        found = self.model(**arguments)
        assert isinstance(found, torch.Tensor)
        return found


def exercises(seed: int, drafts: Sequence[IdArray] | None = None) -> list[Exercise]:
    rng = np.random.default_rng(seed)
    made = []
    for number, size in enumerate([1, 9, 4, 4, 14, 2]):
        prompt, forced, draft = (
            rng.integers(8, VOCAB, size=n).astype(np.int32)
            for n in (size, number % 3, rng.integers(0, 20))
        )
        made.append(
            Exercise(
                prompt_ids=prompt, forced_ids=forced, reference_ids=draft,
                draft_ids=draft if drafts is None else drafts[number],
            )
        )  # fmt: skip
    return made


def answer(engine: Engine, given: list[Exercise], **changes: Any) -> list[Decoded]:
    settings: dict[str, Any] = {
        "machine": MACHINE, "eos_id": EOS, "num_known": VOCAB, "max_length": 200, "max_forwards": 64,
        "rank": 0, "world_size": 1, "sum_over_ranks": lambda tensor: tensor,
    }  # fmt: skip
    return decode_exercises(engine, given, **(settings | changes))


def by_stack_decoder(engine: Engine, given: list[Exercise], **changes: Any) -> list[Decoded]:
    settings = {"machine": MACHINE, "eos_id": EOS, "pad_id": 0, "max_new_tokens": 64} | changes
    prompts = [each.prompt_ids for each in given]
    return decode(engine.stock, prompts, forced=[each.forced_ids for each in given], **settings)


def facts(found: list[Decoded]) -> list[Any]:
    return [
        (d.raw_ids.tolist(), d.num_forced, d.reduced_ids.tolist(), d.num_undos, d.num_strays,
         d.stop_reason)
        for d in found
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_guesses_change_the_number_of_forwards_and_nothing_else(family: str) -> None:
    engine = Engine(family)
    given = exercises(1)
    often = np.bincount(np.concatenate([d.emitted_ids for d in by_stack_decoder(engine, given)]))
    often[EOS] = 0
    machine = Machine(int(often.argmax()))  # random weights have no undo of their own
    wanted = by_stack_decoder(engine, given, machine=machine)
    assert len({len(d.emitted_ids) for d in wanted}) >= 3, "the test needs different lengths"
    assert sum(d.num_undos for d in wanted) > 3, "and undos"
    for drafts in (None, [ints()] * 6, [d.emitted_ids[:5] for d in wanted]):
        found = answer(engine, exercises(1, drafts), machine=machine)
        assert facts(found) == facts(wanted)
    engine.calls.clear()
    told = exercises(1, [d.emitted_ids for d in wanted])
    assert facts(answer(engine, told, machine=machine)) == facts(wanted)
    assert len(engine.calls) == 1
    assert engine.modes == [False, True] * 4


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_what_the_ranks_find_is_put_together(world_size: int) -> None:
    """All ranks' forwards for every question; each but the last stops where it would wait."""
    engine = Engine()
    given = exercises(1)
    longest = max(len(each.prompt_ids) + len(each.forced_ids) for each in given)
    wanted = answer(engine, given, max_length=longest + 6)
    rooms = [longest + 6 - len(each.prompt_ids) - len(each.forced_ids) for each in given]
    assert len(set(rooms)) > 2, "the test needs responses with and without room"
    parts: list[torch.Tensor] = []
    asked_of: list[int] = []

    class Waits(Exception):
        pass

    def add_up(tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor.clone())
        if len(parts) < world_size:
            raise Waits
        return torch.stack(parts).sum(0)

    def next_ids(asked: Sequence[Asked]) -> list[IdArray]:
        parts.clear()
        asked_of.append(sum(len(question.ids) for question in asked))
        for rank in range(world_size):
            with contextlib.suppress(Waits):
                return decodes.next_ids_of(
                    engine, asked, num_known=VOCAB, rank=rank, world_size=world_size,
                    sum_over_ranks=add_up,
                )  # fmt: skip
        raise AssertionError("the last rank has the sum")

    engine.calls.clear()
    engine.train(False)
    with torch.no_grad():
        found = decode_drafted(
            next_ids, [each.prompt_ids for each in given], [each.draft_ids for each in given],
            machine=MACHINE, eos_id=EOS, max_new_tokens=rooms, max_forwards=64,
            forced=[each.forced_ids for each in given],
        )  # fmt: skip
    assert facts(found) == facts(wanted)
    assert len(engine.calls) == world_size * len(asked_of), "every rank runs every forward"
    own = np.array(engine.calls).reshape(-1, world_size)
    assert (own.sum(axis=1) >= asked_of).all()
    assert own[0].max() < asked_of[0], "and only for its share"


def test_limits_cut_a_response_and_change_none_of_it() -> None:
    engine = Engine()
    given = exercises(1, [ints()] * 6)
    whole = by_stack_decoder(engine, given)
    engine.calls.clear()
    cut = answer(engine, given, max_forwards=5)
    assert len(engine.calls) == 5
    for some, all_ in zip(cut, whole, strict=True):
        assert 5 <= len(some.emitted_ids) or some.stop_reason == "eos"
        assert some.raw_ids.tolist() == all_.raw_ids[: len(some.raw_ids)].tolist()
        assert some.reduced_ids.tolist() == reduce(some.raw_ids, MACHINE).tolist()


def test_each_response_has_the_room_of_its_own_context() -> None:
    """A long context shortens its own response alone, down to none."""
    engine = Engine()
    given = exercises(1)
    contexts = [len(each.prompt_ids) + len(each.forced_ids) for each in given]
    for max_length in (max(contexts) + 6, max(contexts), max(contexts) - 1):
        wanted = []
        for each, length in zip(given, contexts, strict=True):
            room = max_length - length
            alone = by_stack_decoder(engine, [each], max_new_tokens=max(room, 1))[0]
            if room <= 0:
                nothing = reduce(each.forced_ids, MACHINE)
                alone = dataclasses.replace(
                    alone, raw_ids=each.forced_ids, reduced_ids=nothing, stop_reason="length",
                    num_undos=0,
                )  # fmt: skip
            wanted.append(alone)
        found = answer(engine, given, max_length=max_length)
        assert facts(found) == facts(wanted)
        written = [len(each.emitted_ids) for each in found]
        assert max(written) > 6 >= written[contexts.index(max(contexts))]
        for forwards in (1, 3):
            cut = answer(engine, given, max_length=max_length, max_forwards=forwards)
            for some, all_ in zip(cut, wanted, strict=True):
                assert some.raw_ids.tolist() == all_.raw_ids[: len(some.raw_ids)].tolist()


def test_spare_rows_are_never_written() -> None:
    engine = Engine()
    given = exercises(3)
    plain = np.concatenate([d.emitted_ids for d in answer(engine, given)])
    known = 40
    assert plain.max() >= known
    found = answer(engine, given, num_known=known)
    wanted = by_stack_decoder(engine, given, banned_ids=range(known, VOCAB))
    for some, all_ in zip(found, wanted, strict=True):
        assert len(some.emitted_ids) > 0 and some.emitted_ids.max() < known
        assert some.raw_ids.tolist() == all_.raw_ids[: len(some.raw_ids)].tolist()


# -- choosing and showing --------------------------------------------------------------------


class Traces:
    """Traces given as lists of (role, id)."""

    def __init__(self, *traces: list[tuple[int, int]]) -> None:
        self.traces = traces

    def ids(self, index: int) -> npt.NDArray[np.integer]:
        return np.array([token for _, token in self.traces[index]], np.uint16)

    def roles(self, index: int) -> npt.NDArray[np.uint8]:
        return np.array([role for role, _ in self.traces[index]], np.uint8)

    @property
    def role_counts(self) -> npt.NDArray[np.int32]:
        rows = [
            np.bincount(self.roles(n)[1:], minlength=NUM_ROLES) for n in range(len(self.traces))
        ]
        return np.array(rows, np.int32)


CLEAN = [(X, 10), (P, 11), (P, EOS)]
WRONG = [(X, 10), (X, 12), (P, 13), (E, 14), (E, 15), (B, UNDO), (B, UNDO), (C, 16), (C, EOS)]
TWICE = [*WRONG[:-1], (E, 17), (B, UNDO), (C, EOS), (X, 18), (P, 19), (P, EOS)]
NO_PROMPT = [(P, 13), *WRONG[3:]]


def lists(found: list[Exercise]) -> list[list[list[int]]]:
    return [
        [ids.tolist() for ids in (e.prompt_ids, e.forced_ids, e.draft_ids, e.reference_ids)]
        for e in found
    ]


def test_prompts_are_answered_freely_and_after_the_first_error() -> None:
    right = [13, 16, EOS]
    free, forced = lists(choose(Traces(CLEAN, WRONG), 1, MACHINE))
    assert free == [[10, 12], [], right, right]
    assert forced == [[10, 12], [13, 14, 15], [UNDO, UNDO, 16, EOS], right]
    # Of several turns the first, of several errors the first.
    free, forced = lists(choose(Traces(TWICE), 5, MACHINE))
    assert free == [[10, 12], [], right, right]
    assert forced == [[10, 12], [13, 14, 15], [UNDO, UNDO, 16, 17, UNDO, EOS], right]
    assert lists(choose(Traces(CLEAN, CLEAN), 1, MACHINE)) == [[[10], [], [11, EOS], [11, EOS]]]
    assert choose(Traces(NO_PROMPT, [(X, 10), (X, 11)]), 2, MACHINE) == []
    assert choose(Traces(WRONG), 0, MACHINE) == []


def test_prompts_are_spread_over_the_traces_and_none_comes_twice() -> None:
    def numbered(number: int) -> list[tuple[int, int]]:
        return [(X, 100 + number), *WRONG[2:]]

    traces = Traces(*[numbered(n) for n in range(10)], *[NO_PROMPT] * 10)
    prompts = [each.prompt_ids[0] - 100 for each in choose(traces, 4, MACHINE)]
    assert prompts == [0, 0, 5, 5]
    assert len(choose(Traces(WRONG, WRONG, WRONG), 9, MACHINE)) == 6


@pytest.fixture
def make(small_tokenizer: Tokenizer) -> Callable[..., tuple[Exercise, Decoded]]:
    def made(prompt: str, forced: str, raw: list[str | int], right: str, stop: bool = True) -> Any:
        encode = small_tokenizer.encode
        undo, eos = small_tokenizer.undo_id, small_tokenizer.eos_id
        start = encode(forced, continuation=True)
        written: list[int] = []
        for piece in raw:
            written += (
                [undo] * piece if isinstance(piece, int)
                else encode(piece, continuation=True).tolist()
            )  # fmt: skip
        ids = np.array([*start.tolist(), *written, *([eos] if stop else [])], np.int32)
        exercise = Exercise(
            prompt_ids=encode(prompt, continuation=False), forced_ids=start, draft_ids=ints(),
            reference_ids=ints(*encode(right, continuation=True).tolist(), eos),
        )  # fmt: skip
        return exercise, Decoded(
            raw_ids=ids, num_forced=len(start), num_undos=0, num_strays=0, undo_limited=False,
            reduced_ids=reduce(ids, Machine(undo)), loop_limited=False,
            stop_reason="eos" if stop else "length",
        )  # fmt: skip

    return made


def as_shown(markdown: str, tmp_path: Path) -> list[list[str]]:
    """Cells as TensorBoard's own reader of Markdown makes them of what was written."""
    from html.parser import HTMLParser

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    with Monitor(tmp_path, is_writer=True, total_steps=3) as monitor:
        monitor.text(3, "heldout/decodes", markdown)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("heldout/decodes/text_summary")
    assert event.step == 3
    rows: list[list[str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("")
            else:
                assert tag in ("table", "thead", "tbody"), f"{tag} in a table of plain text"

        def handle_data(self, data: str) -> None:
            if rows and rows[-1]:
                rows[-1][-1] += data

    Reader().feed(markdown_to_safe_html(event.tensor_proto.string_val[0]))
    return [[cell.strip("\n") for cell in row] for row in rows]


def test_the_table_shows_what_was_undone_and_who_was_right(
    small_tokenizer: Tokenizer, make: Callable[..., Any], tmp_path: Path
) -> None:
    cases = [
        make("1+2?", "", ["5", 1, "3"], "3"),
        make("1+2?", "4", [1, "3"], "3"),
        make("1+2?", "4", ["5"], "3"),
        make("1+2?", "", ["3"], "3", stop=False),
    ]
    markdown = table(small_tokenizer, Machine(small_tokenizer.undo_id), *zip(*cases, strict=True))
    head, *rows = as_shown(markdown, tmp_path)
    assert head == ["prompt", "error forced on it", "raw", "reduced", ""]
    assert rows == [
        ["1+2?", "", "[-5-]<UNDO>3", "3", "right"],
        ["1+2?", "[-4-]", "<UNDO>3", "3", "right"],
        ["1+2?", "4", "5", "45", "wrong, expected 3"],
        ["1+2?", "", "3", "3", "cut off, expected 3"],
    ]


def test_text_is_shown_as_it_is(bpe_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever a model writes: no Markdown, no HTML, no cell of its own."""
    encode = bpe_tokenizer.encode
    wild = "*a* _b_ `c` |d| <b>e</b> &amp; &#42; [f](g) \\| # ~h~ ![i](j) é日"
    long = "x" * 1000 + "END"
    eos = bpe_tokenizer.eos_id
    rows = []
    for prompt, response in ((wild, wild), (long, long), ("two\nlines\n", "a\n\nb")):
        ids = ints(*encode(response, continuation=True).tolist(), eos)
        exercise = Exercise(
            prompt_ids=encode(prompt, continuation=False), forced_ids=ints(), draft_ids=ints(),
            reference_ids=ids,
        )  # fmt: skip
        found = Decoded(
            raw_ids=ids, num_forced=0, reduced_ids=ids, num_undos=0, num_strays=0,
            undo_limited=False, loop_limited=False, stop_reason="eos",
        )  # fmt: skip
        rows.append((exercise, found))
    markdown = table(bpe_tokenizer, Machine(bpe_tokenizer.undo_id), *zip(*rows, strict=True))
    _, plain, cut, lines = as_shown(markdown, tmp_path)
    assert plain == [wild, "", wild, wild, "right"]
    assert cut[0].startswith("…x") and cut[0].endswith("xEND") and len(cut[0]) == 401
    assert cut[2] == cut[3] == "x" * 400 + "…" and cut[4] == "right"
    assert lines == ["two ⏎ lines", "", "a ⏎  ⏎ b", "a ⏎  ⏎ b", "right"]
