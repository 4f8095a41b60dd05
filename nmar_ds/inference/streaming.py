"""A response as a stream of text: what is added, and what is taken back again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nmar_ds.inference.rendering import STYLES
from nmar_ds.inference.stack import Event, Retract, Stack
from nmar_ds.traces.encoding import Tokenizer, common_length
from nmar_ds.traces.reduction import Machine
from nmar_ds.traces.schema import IdArray

UNFINISHED = "\ufffd"  # a character of which not all bytes have come


class Change(NamedTuple):
    """What an event does to the text.

    Attributes:
        num_retracted: characters to take off its end, and
        appended: text to put there then; both are empty where bytes of a character are missing.
        is_undo: whether it was an undo, a stray one too.
    """

    num_retracted: int
    appended: str
    is_undo: bool


class TextStream:
    """Turns events of ids into changes of text.

    Args:
        tokenizer: of the model.
        prompt_ids: what the response follows.
        machine: what one undo pops.
        start_ids: the beginning of the response, where it was given.

    Attributes:
        text: of the response so far.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: IdArray, machine: Machine, start_ids: IdArray
    ) -> None:
        self._tokenizer = tokenizer
        self._follows = len(tokenizer.decode_bytes(prompt_ids)) > 0
        self._undo_id = machine.undo_id
        self._stack = Stack(machine, start_ids.tolist())
        self.text = self._spelled()

    def take(self, event: Event) -> Change:
        """Carry out an event."""
        is_undo = isinstance(event, Retract)
        self._stack.write(self._undo_id if isinstance(event, Retract) else event.token)
        return self._become(self._spelled(), is_undo)

    def finish(self) -> Change:
        """Give up waiting: what stayed unfinished is text now, as in the finished response."""
        text = self._tokenizer.decode(self._stack.ids, continuation=self._follows)
        return self._become(text, is_undo=False)

    def _become(self, text: str, is_undo: bool) -> Change:
        shared = common_length(self.text, text)
        change = Change(len(self.text) - shared, text[shared:], is_undo)
        self.text = text
        return change

    def _spelled(self) -> str:
        """All characters that are whole."""
        text = self._tokenizer.decode(self._stack.ids, continuation=self._follows)
        return text.rstrip(UNFINISHED)


@contextlib.contextmanager
def shown(stream: TextStream, *, delay: float, file: IO[str] | None = None) -> Iterator[
    Callable[[int, Event], None]
]:  # fmt: skip
    """Show a response as it comes: on a terminal in place, elsewhere as JSON lines.

    On a terminal what is taken back stays for a moment, red and struck through. A line elsewhere
    has `append`, `retract` (characters) or both; all lines together add up to the response, its
    given beginning first.

    Args:
        stream: of one response.
        delay: seconds that each change stays, at least.
        file: a terminal or not; by default standard output.

    Yields:
        What `decode` takes as `on_event`.
    """
    file = file or sys.stdout
    console = Console(file=file)
    if not console.is_terminal:
        _as_json(Change(0, stream.text, is_undo=False), console.file)
        yield lambda _, event: _as_json(stream.take(event), console.file)
        _as_json(stream.finish(), console.file)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:

        def show(_: int, event: Event) -> None:
            before = stream.text
            change = stream.take(event)
            view = Text(stream.text)
            if change.num_retracted:
                view.append(before[len(before) - change.num_retracted :], STYLES["undone"])
            live.update(view, refresh=True)
            time.sleep(delay)

        yield show
        stream.finish()
        live.update(Text(stream.text), refresh=True)


def _as_json(change: Change, file: IO[str]) -> None:
    line: dict[str, object] = {}
    if change.is_undo or change.num_retracted:
        line["retract"] = change.num_retracted
    if change.appended:
        line["append"] = change.appended
    if line:
        print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
