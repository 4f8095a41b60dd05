"""The page's pictures as plain SVG text: a packed row, and which of its tokens see which.

They carry a white ground of their own, so that they read the same on light and on dark pages.
"""

# T tokens of the row, S segments

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from example import Example

from nmar_ds.data.view import LETTERS, visible
from nmar_ds.model.weighting import role_weights
from nmar_ds.traces.schema import NO_ROLE, Role

ROLE_COLOURS = {
    Role.PROMPT: "#dfe3e8", Role.PREFIX: "#b5e3c4", Role.DEVIATION: "#ffb0a8",
    Role.UNDO: "#dcb8ff", Role.CORRECTION: "#a9d6f5",
}  # fmt: skip
TRACE_COLOURS = ("#4c78a8", "#e07b1a", "#3f9a4a")
PADDING, INK, PALE, LEAK = "#f3f3f3", "#1b1f24", "#8a9099", "#d62828"
PER_LINE = 24  # cells of the row in one line of the picture
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def pictures(example: Example) -> dict[str, str]:
    """SVG text by file name."""
    return {
        "packed-row.svg": packed_row(example),
        "attention-mask.svg": attention_mask(example),
        "leaking-mask.svg": leaking_mask(example),
    }


def _box(  # noqa: PLR0917 (as a rect has them)
    x: float, y: float, width: float, height: float, fill: str, stroke: str = "none"
) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def _text(x: float, y: float, text: str, size: float = 13, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" {more}>{escape(text)}</text>'


def _centred(x: float, y: float, text: str, size: float = 13, more: str = "") -> str:
    return _text(x, y, text, size, f'text-anchor="middle" {more}')


def _page(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" font-family="{MONO}" fill="{INK}">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>"]) + "\n"


def token_texts(example: Example) -> list[str]:
    """The row's tokens as they are drawn; nothing for padding."""
    batch, undo_id = example.batch, example.tokenizer.undo_id
    return [
        "" if role == NO_ROLE else "UNDO" if token == undo_id else visible(piece)
        for token, role, piece in zip(
            batch.input_ids[0], batch.roles[0], example.pieces(batch.input_ids[0]), strict=True
        )
    ]


def _colour(role: int) -> str:
    return PADDING if role == NO_ROLE else ROLE_COLOURS[Role(int(role))]


def _letter(role: int) -> str:
    return "" if role == NO_ROLE else LETTERS[Role(int(role))]


def _weight(role: int, preset: str) -> str:
    return "" if role == NO_ROLE else f"{role_weights(preset)[int(role)]:g}"


def _row_lines(example: Example) -> list[tuple[str, list[str], list[str]]]:
    """(name, texts, colours) of each line of cells, for the whole row."""
    batch, texts = example.batch, token_texts(example)
    roles, target_roles = batch.roles[0].tolist(), batch.target_roles.tolist()
    targets = [
        texts[place + 1] if role != NO_ROLE else "" for place, role in enumerate(target_roles)
    ]
    own, of_target = [_colour(r) for r in roles], [_colour(r) for r in target_roles]
    weights = {preset: [_weight(r, preset) for r in target_roles] for preset in ("msft", "sft")}
    trained = {
        preset: [
            c if w == "1" else PADDING for w, c in zip(weights[preset], of_target, strict=True)
        ]
        for preset in weights
    }
    return [
        ("token", texts, own),
        ("role", [_letter(role) for role in roles], own),
        ("position id", [str(p) for p in batch.position_ids[0].tolist()], ["#ffffff"] * len(roles)),
        ("target", targets, of_target),
        ("target role", [_letter(role) for role in target_roles], of_target),
        ("weight mSFT", weights["msft"], trained["msft"]),
        ("weight SFT", weights["sft"], trained["sft"]),
    ]


def packed_row(example: Example) -> str:
    """The row as coloured cells, in lines of `PER_LINE`."""
    cell, high, left = 38, 24, 104
    lines = _row_lines(example)
    length = example.batch.input_ids.shape[1]
    block = 44 + high * len(lines) + 18
    parts: list[str] = []
    for first in range(0, length, PER_LINE):
        top = 14 + first // PER_LINE * block
        parts += _brackets(example, first, left, top, cell)
        for number, (name, texts, colours) in enumerate(lines):
            y = top + 44 + number * high
            parts.append(_text(left - 8, y + 16, name, 12, 'text-anchor="end"'))
            for place in range(first, min(first + PER_LINE, length)):
                x = left + (place - first) * cell
                parts.append(_box(x, y, cell, high, colours[place], "#ffffff"))
                size = 13 if len(texts[place]) < 5 else 10
                parts.append(_centred(x + cell / 2, y + 16, texts[place], size))
    bottom = 14 + -(-length // PER_LINE) * block
    parts += _role_legend(left, bottom + 6)
    legend = "UNDO is <UNDO>, \\n a line end, \u2581 a space; a blank has no target and no loss"
    parts.append(_text(left, bottom + 44, legend, 12))
    return _page(
        left + PER_LINE * cell + 14, bottom + 58, "A packed row of three traces and padding", parts
    )


def _brackets(example: Example, first: int, left: int, top: int, cell: int) -> list[str]:
    """A bar with its name over the cells of each segment, and the places in the row."""
    parts = [_text(left - 8, top + 38, "place in row", 12, f'text-anchor="end" fill="{PALE}"')]
    borders = example.batch.cu_seqlens.tolist()
    for (start, end), trace in zip(pairwise(borders), example.batch.trace_ids, strict=True):
        begin, stop = max(start, first), min(end, first + PER_LINE)
        if begin >= stop:
            continue
        x, width = left + (begin - first) * cell, (stop - begin) * cell
        colour = PALE if trace < 0 else TRACE_COLOURS[int(trace)]
        name = "padding" if trace < 0 else f"trace {trace}" + (", goes on" if start < first else "")
        parts += [
            _box(x + 1, top + 16, width - 2, 5, colour),
            _text(x + 2, top + 11, name, 12, f'fill="{colour}" font-weight="bold"'),
        ]
        parts += [
            _centred(x + (place - begin + 0.5) * cell, top + 38, str(place), 11, f'fill="{PALE}"')
            for place in range(begin, stop)
        ]
    return parts


def _role_legend(left: float, y: float) -> list[str]:
    parts = []
    for number, role in enumerate(Role):
        x = left + number * 150
        parts.append(_box(x, y, 22, 18, ROLE_COLOURS[role]))
        parts.append(_centred(x + 11, y + 13, LETTERS[role], 12))
        parts.append(_text(x + 28, y + 13, role.label, 12))
    return parts


def attention_mask(example: Example) -> str:
    """Who sees whom under segment attention, measured."""
    texts, roles = token_texts(example), example.batch.roles[0].tolist()
    cell, left, top = 15, 92, 96
    seen = example.sees_TT
    size = len(seen) * cell
    parts = [
        _text(8, 16, "columns: the token that is seen", 12),
        _text(8, 32, "rows: the token that sees", 12),
    ]
    for place, (text, role) in enumerate(zip(texts, roles, strict=True)):
        shown, at = text or "pad", place * cell
        parts.append(_box(left - 54, top + at, 52, cell, _colour(role)))
        parts.append(_text(left - 5, top + at + 11.5, shown, 11, 'text-anchor="end"'))
        parts.append(_box(left + at, top - 54, cell, 52, _colour(role)))
        turn = f'transform="rotate(-90 {left + at + 11.5:g} {top - 5})"'
        parts.append(_text(left + at + 11.5, top - 5, shown, 11, turn))
    parts += _matrix(example, seen, left, top, cell)
    parts += _named_segments(example, left, top, cell)
    parts += _role_legend(left, top + size + 14)
    return _page(left + size + 14, top + size + 44, "Which token sees which in the row", parts)


def leaking_mask(example: Example) -> str:
    """The same for a stock model with the usual all-ones mask; leaks in red."""
    cell, left, top = 8, 14, 40
    size = len(example.leaks_TT) * cell
    num = int((example.leaks_TT & ~example.sees_TT).sum())
    parts = [_text(left, 24, f"{num} cells (red) see what they must not", 12)]
    parts += _matrix(example, example.leaks_TT, left, top, cell)
    return _page(left + size + 40, top + size + 14, "A mask that leaks", parts)


def _matrix(example: Example, seen_TT: Any, left: int, top: int, cell: int) -> list[str]:
    """Grid, allowed cells by trace, what segment attention would not allow in red."""
    segment_T = np.repeat(example.batch.trace_ids, np.diff(example.batch.cu_seqlens))
    length = len(seen_TT)
    parts = [_box(left, top, length * cell, length * cell, "#fafbfc", "#c4c9d0")]
    for row, column in np.argwhere(seen_TT).tolist():
        trace = int(segment_T[row])
        colour = PALE if trace < 0 else TRACE_COLOURS[trace]
        colour = colour if example.sees_TT[row, column] else LEAK
        parts.append(
            _box(left + column * cell + 0.5, top + row * cell + 0.5, cell - 1, cell - 1, colour)
        )
    for border in example.batch.cu_seqlens.tolist()[1:-1]:
        at = border * cell
        line = f'stroke="{INK}" stroke-dasharray="3 3" stroke-width="0.8"'
        both = f"M{left} {top + at}h{length * cell}M{left + at} {top}v{length * cell}"
        parts.append(f'<path d="{both}" {line}/>')
    return parts


def _named_segments(example: Example, left: int, top: int, cell: int) -> list[str]:
    """The name of each segment, right above its triangle's diagonal."""
    parts = []
    borders = example.batch.cu_seqlens.tolist()
    for (start, end), trace in zip(pairwise(borders), example.batch.trace_ids, strict=True):
        name = "padding: each sees itself" if trace < 0 else f"trace {trace}"
        colour = INK if trace < 0 else TRACE_COLOURS[int(trace)]
        if start * 2 > len(example.sees_TT):  # beside the triangle, where there is room
            x, anchor = left + start * cell - 8, "end"
        else:
            x, anchor = left + (start + end) / 2 * cell + 24, "start"
        y = top + (start + end) / 2 * cell
        more = f'text-anchor="{anchor}" fill="{colour}" font-weight="bold"'
        parts.append(_text(x, y, name, 13, more))
    return parts
