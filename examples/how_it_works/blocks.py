"""The page's blocks of values: plain text between the markers of docs/how-it-works.md."""

# T tokens of a trace or row, K roles

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
from example import FOLDER, Example, arguments_of
from pictures import token_texts

from nmar_ds.data.view import LETTERS, visible
from nmar_ds.errors import TraceError
from nmar_ds.inference.rendering import as_plain, response_text, runs
from nmar_ds.model.weighting import DENOMINATORS, denominator, role_weights
from nmar_ds.traces.assembly import check, said_by
from nmar_ds.traces.records import read_records
from nmar_ds.traces.reduction import Machine, bases_of, reduce
from nmar_ds.traces.schema import NO_ROLE, Role, Trace
from nmar_ds.traces.turns import encode_record

RESPONSE = [role for role in Role if role is not Role.PROMPT]
NUM_LOGGED = 2


def blocks(example: Example) -> dict[str, str]:
    """Fenced text by block name."""
    records = (FOLDER / "train.jsonl").read_text("utf-8").splitlines()
    texts = {
        "records": records,
        "encoding": _encoding(example),
        "trace": _trace(example),
        "checks": _checks(example),
        "store": _store(example),
        "packing": _packing(example),
        "layout": _layout(example),
        "losses": _losses(example),
        "sums": _sums(example),
        "gradient": _gradient(example),
        "step": _step(example),
        "checkpoint": [*example.checkpoint, *(f"export/{name}" for name in example.exported)],
        "decoding": _decoding(example),
    }
    return {
        name: "\n".join(["```json" if name == "records" else "```text", *lines, "```"])
        for name, lines in texts.items()
    }


def _columns(rows: Iterable[Iterable[Any]], width: int = 6) -> list[str]:
    """Rows of cells under each other; the first cell is wider and names the row."""
    lines = []
    for name, *cells in rows:
        lines.append(f"{name!s:<12}" + "".join(f"{cell!s:>{width}}" for cell in cells))
    return [line.rstrip() for line in lines]


def _number(value: float) -> str:
    """Four significant digits: as many as agree on every machine."""
    return f"{value:#.4g}"


def _pieces(example: Example, ids: Any) -> list[str]:
    undo_id = example.tokenizer.undo_id
    names = zip(ids, example.pieces(ids), strict=True)
    return ["UNDO" if token == undo_id else visible(piece) for token, piece in names]


def _encoding(example: Example) -> list[str]:
    lines = [example.prepared[0], ""]
    for record in read_records(FOLDER / "train.jsonl"):
        (turn,) = encode_record(record, example.tokenizer).turns
        (text,) = record.turns
        lines += _columns(
            [
                ("prompt", *_pieces(example, turn.prompt_ids)),
                ("ids", *turn.prompt_ids),
                ("reference", *_pieces(example, turn.reference_ids)),
                ("ids", *turn.reference_ids),
            ]
        )
        for (at, wrong), deviation in zip(text.deviations, turn.deviations, strict=True):
            lines += _columns([("deviation", *_pieces(example, deviation.ids)),
                               ("ids", *deviation.ids)])  # fmt: skip
            lines += [
                f"  given as {wrong!r} at character {at} of the reference,",
                f"  stands before its token {deviation.cut}; onset: its token {deviation.onset}",
            ]
        lines.append("")
    return lines[:-1]


def _trace(example: Example) -> list[str]:
    trace = example.trace(0)
    lines = []
    for segment in trace.segments():
        shown = " ".join(_pieces(example, segment.ids))
        ids = " ".join(str(token) for token in segment.ids)
        lines.append(f"{LETTERS[segment.role]} {segment.role.label:<11} {shown:<24} {ids}")
    return [*lines, f"{len(trace)} tokens, onset {trace.onsets[0]}"]


def _checks(example: Example) -> list[str]:
    trace, tokenizer = example.trace(0), example.tokenizer
    record = next(read_records(FOLDER / "train.jsonl"))
    said = said_by(encode_record(record, tokenizer).turns)
    machine = Machine(tokenizer.undo_id)
    reduced = reduce(trace.ids, machine, bases_of(trace.roles))
    check(trace, tokenizer=tokenizer, machine=machine, path="train.jsonl", said=said)
    lines = [
        f"reduce(trace)       {' '.join(_pieces(example, reduced))}",
        f"prompt + reference  {' '.join(_pieces(example, said))}",
        f"equal: {np.array_equal(reduced, said)}",
        "",
        "the same trace without its last <UNDO>:",
    ]
    last = int(np.flatnonzero(trace.roles == Role.UNDO)[-1])
    fewer = Trace(
        ids=np.delete(trace.ids, last), roles=np.delete(trace.roles, last), onsets=trace.onsets,
        line=trace.line,
    )  # fmt: skip
    try:
        check(fewer, tokenizer=tokenizer, machine=machine, path="train.jsonl", said=said)
    except TraceError as error:
        return [*lines, str(error)]
    return [*lines, "accepted"]


def _store(example: Example) -> list[str]:
    store = example.plan.store
    ids, roles = np.asarray(store.ids(1)), np.asarray(store.roles(1))
    counts = store.role_counts
    return [
        *textwrap.wrap(re.sub(" +", " ", example.prepared[1]), 76, subsequent_indent="  "),
        "",
        f"trace 1, ids    {ids.tobytes().hex(' ', ids.itemsize)}",
        f"trace 1, roles  {roles.tobytes().hex(' ')}",
        "",
        *_columns(
            [
                ("trace", "length", *(LETTERS[role] for role in Role)),
                *(
                    (index, store.lengths[index], *counts[index])
                    for index in range(store.num_traces)
                ),
            ]
        ),
    ]


def _packing(example: Example) -> list[str]:
    plan, batch = example.plan.plan, example.batch
    return [
        f"lengths     {example.plan.store.lengths.tolist()}",
        *(f"row {row}       traces {plan.row(row).tolist()}" for row in range(plan.num_rows)),
        f"capacity    {plan.capacity}, {batch.num_tokens} used, {example.plan.packing_use:.1%}",
        f"cu_seqlens  {batch.cu_seqlens.tolist()}",
        f"trace_ids   {batch.trace_ids.tolist()}   (-1: padding)",
    ]


def _layout(example: Example) -> list[str]:
    layout = arguments_of(example.batch, role_weights("msft"))["layout"]
    allowed = int(example.sees_TT.sum())
    leaked = int((example.leaks_TT & ~example.sees_TT).sum())
    lines = [
        f"kernel call {number}: {bucket.num_segments} segment(s) padded to {bucket.padded_length}, "
        f"{bucket.num_tokens} tokens"
        for number, bucket in enumerate(layout.buckets)
    ]
    lines.append(f"pairs that see each other: {allowed} of {example.sees_TT.size}")
    return [*lines, f"with an all-ones mask:     {allowed + leaked}, {leaked} of them leaks"]


def _losses(example: Example) -> list[str]:
    batch, texts = example.batch, token_texts(example)
    weights = role_weights("msft"), role_weights("sft")
    lines = _columns([("place", "token", "target", "role", "mSFT", "SFT", "-log p")], 9)
    borders = batch.cu_seqlens.tolist()
    for place in range(borders[2]):
        role = int(batch.target_roles[place])
        if role in (NO_ROLE, Role.PROMPT):
            continue
        cells = [texts[place], texts[place + 1], LETTERS[Role(role)]]
        cells += [f"{table[role]:g}" for table in weights]
        lines += _columns([(place, *cells, _number(example.nll_N[place]))], 9)
    return lines


def _sums(example: Example) -> list[str]:
    counts, sums = example.counts_K, example.sums_K
    tables = {preset: role_weights(preset) for preset in ("msft", "sft")}
    lines = _columns(
        [
            ("", *(role.label for role in RESPONSE)),
            ("targets N_k", *(counts[role] for role in RESPONSE)),
            ("sum S_k", *(_number(sums[role]) for role in RESPONSE)),
            *(
                (f"w_k {name}", *(f"{w[role]:g}" for role in RESPONSE))
                for name, w in tables.items()
            ),
        ],
        12,
    )
    lines += ["", *_columns([("", "D mSFT", "D SFT", "L mSFT", "L SFT")], 12)]
    for kind in DENOMINATORS:
        divisors = [
            denominator(kind, counts, w, example.plan.store.num_traces) for w in tables.values()
        ]
        losses = [
            float((w * sums)[1:].sum()) / d for w, d in zip(tables.values(), divisors, strict=True)
        ]
        lines += _columns([(kind, *(f"{d:g}" for d in divisors), *map(_number, losses))], 12)
    return lines


def _gradient(example: Example) -> list[str]:
    found, num = example.gradients, int(example.counts_K[1:].sum())
    name, row, column = example.shown
    token = visible(example.tokenizer.piece(row))
    lines = [f"one weight: {name}[{row}, {column}], of the head's row for {token!r}"]
    for kind in ("common", "trained"):
        sft, msft = found["sft", kind], found["msft", kind]
        entries = [float(gradient[name][row, column]) for gradient in (sft, msft, found["e"])]
        worst = max(
            float((sft[key] - msft[key] - found["e"][key] / num).abs().max()) for key in sft
        )
        scale = max(float((value / num).abs().max()) for value in found["e"].values())
        verdict = "below 1e-5" if worst / scale < 1e-5 else _number(worst / scale)
        lines += [
            "",
            f"denominator {kind}",
            f"  g_SFT            {_number(entries[0]):>12}",
            f"  g_mSFT           {_number(entries[1]):>12}",
            f"  g_SFT - g_mSFT   {_number(entries[0] - entries[1]):>12}",
            f"  G_e / {num}         {_number(entries[2] / num):>12}",
            f"  all weights, largest |g_SFT - g_mSFT - G_e / {num}| / largest |G_e / {num}|: "
            f"{verdict}",
        ]
    return lines


def _step(example: Example) -> list[str]:
    rate = example.config.optimizer.learning_rate
    logged = [line for line in example.log if line.startswith("step ") and "total" in line]
    return [
        "float64, on one process, without DeepSpeed:",
        f"  L before the step   {example.losses[0]:.3f}",
        f"  gradient norm       {_number(example.norm)}, clipped to "
        f"{example.config.optimizer.max_grad_norm:g}",
        f"  learning rate       {rate:g}",
        f"  the weight above    {_number(example.weight[0])} -> {_number(example.weight[1])}",
        f"  L after the step    {example.losses[1]:.3f}",
        "",
        "launcher/train.py, float32, ZeRO-3:",
        *(f"  {_without_pace(line)}" for line in logged[:NUM_LOGGED]),
    ]


def _without_pace(line: str) -> str:
    """A line of progress up to its last loss: tokens per second differ from run to run."""
    return line[: re.search(r"\s+[\d,]+ tok/s", line).start()]


def _decoding(example: Example) -> list[str]:
    tokenizer = example.tokenizer
    lines = []
    for prompt_ids, decoded in example.decoded:
        parts = runs(
            tokenizer, prompt_ids, decoded.raw_ids, Machine(tokenizer.undo_id),
            num_forced=decoded.num_forced,
        )  # fmt: skip
        reduced = response_text(tokenizer, prompt_ids, decoded.reduced_ids)
        lines += [
            f"prompt   {' '.join(_pieces(example, prompt_ids))}",
            f"forced   {' '.join(_pieces(example, decoded.raw_ids[: decoded.num_forced]))}",
            f"emitted  {' '.join(_pieces(example, decoded.emitted_ids))}",
            f"raw      {as_plain(parts, tokenizer.undo_token)}",
            f"reduced  {reduced}",
            f"         {decoded.num_undos} undos, {decoded.num_strays} stray, stopped by "
            f"{decoded.stop_reason}",
            "",
        ]
    return [line.rstrip() for line in lines[:-1]]
