"""The experiments: which runs, and which of them are compared.

Starts, steps and sizes are chosen so that the base model lands between 0.2 and 0.9 on its task and
a run takes a minute or two on one core. What was tried is said in docs/results/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from cells import Cell, Command

from nmar_ds.traces import arithmetic
from nmar_ds.traces.arithmetic import MODULUS

SEEDS = (0, 1, 2)
SUMS, STEPS = "examples/experiments/sums.yaml", "examples/experiments/steps.yaml"
TRAIN, HELDOUT = (f"examples/quickstart/chain_sum.{part}.jsonl" for part in ("train", "heldout"))
STEPS_HELDOUT = "{cell}/heldout.jsonl"
# A piece each: names, two-digit numbers, what stands between them.
STEPS_PHRASES = [
    "\n", ": ", ". ", " = ", " + ", *(str(number) for number in range(10, MODULUS)),
    *(f"{place} {thing}" for place in arithmetic.PLACES for thing in arithmetic.THINGS),
]  # fmt: skip
LONG_RATE = 0.5
SHORT_STEPS = 850  # of a base: as many problems as 1,500 steps at a retry rate of 0.5 have
NUM_HELDOUT = 400
NUM_SOURCES = 5000  # records that traces are made of
# On top of the base: the same number of steps and the same schedule for every objective.
TUNING = (
    "training.steps=300", "optimizer.learning_rate=1.5e-3", "optimizer.warmup_steps=20",
    "model.config=null", 'model.path="{base}/export"', "tokenizer.train=null",
    'tokenizer.path="{base}/tokenizer.model"',
)  # fmt: skip
PLACES = ('output="{cell}/run"', 'data.store="{cell}/store"')
SOURCES = ("random", "hard", "on_policy")
CHOICES = (1, 3, 9)  # equally likely wrong values of a result: 0, 1.58 and 3.17 bits
WRONG_SHARE = 0.5
Arm = tuple[str, str]  # condition, objective


@dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment.

    Attributes:
        name: of its page.
        question: what it asks.
        design: how, in a paragraph.
        cells: in an order in which each comes after those it needs.
        base: the arm whose greedy accuracy says whether the task can tell anything.
        differences: arms (a, b): a - b is reported, paired by seed.
        gaps: conditions whose SFT - mSFT differences are compared, first against each other one.
        untrained: conditions whose runs stand for the model they start from: of their held-out
            figures those before the first step count.
    """

    name: str
    question: str
    design: str
    cells: tuple[Cell, ...]
    base: Arm
    differences: tuple[tuple[Arm, Arm], ...]
    gaps: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()


def _to_export() -> tuple[tuple[str, Command], ...]:
    return (
        ("prepare", ("launcher/prepare.py", "--config", "{cell}/run.yaml")),
        ("train", ("launcher/train.py", "--config", "{cell}/run.yaml")),
        ("export", ("launcher/export.py", "--run", "{cell}/run", "--output", "{cell}/export")),
    )


def _examined(heldout: str, num: int) -> tuple[tuple[str, Command], ...]:
    words = ("launcher/evaluate_undo.py", "--model", "{cell}/export", "--heldout", heldout,
             "--num-problems", str(num), "--allow-fewer", "--samples", "2")  # fmt: skip
    return (
        ("greedy", (*words, "--output", "{cell}/greedy.json")),
        ("sampled", (*words, "--temperature", "1", "--output", "{cell}/sampled.json")),
    )


def _drawn(records: str, num: int, output: str) -> tuple[tuple[str, Command], ...]:
    """Samples of the base to the first records of a file."""
    part = f"{{cell}}/{output}.jsonl"
    return (
        (f"first {output}", ("examples/experiments/records.py", "first", "--records", records,
                             "--num", str(num), "--output", part)),
        (f"sample {output}", (
            "launcher/sample.py", "--config", "{cell}/run.yaml", "--model", "{cell}/export",
            "--records", part, "--output", f"{{cell}}/sampled.{output}.jsonl",
            "--max-new-tokens", "64", "--batch-size", "500",
        )),
    )  # fmt: skip


def base_cell(seed: int) -> Cell:
    """A model trained on clean responses alone, and its own samples."""
    return Cell(
        name=f"base-seed{seed}", condition="none", objective="base", seed=seed, config=SUMS,
        overrides=(*PLACES, f"seed={seed}", 'tokenizer.path="{cell}/tokenizer.model"'),
        commands=(
            *_to_export(), *_examined(HELDOUT, NUM_HELDOUT), *_drawn(TRAIN, NUM_SOURCES, "train"),
            *_drawn(HELDOUT, NUM_HELDOUT, "heldout"),
        ),
        reads=(TRAIN, HELDOUT),
    )  # fmt: skip


def tuned_cell(source: str, objective: str, seed: int) -> Cell:
    """The base, trained on: on traces of an error source, or (`clean`) without errors."""
    train, heldout, more = f"{{path: {TRAIN}, max_records: {NUM_SOURCES}}}", HELDOUT, []
    if source == "on_policy":
        train, heldout = "{base}/sampled.train.jsonl", "{base}/sampled.heldout.jsonl"
    clean = source == "none"
    more = [f"data.traces.builder={'hard' if clean else source}",
            f"data.traces.clean_share={1.0 if clean else 0.2}"]  # fmt: skip
    preset = "sft" if clean else objective
    return Cell(
        name=f"{source}-{objective}-seed{seed}", condition=source, objective=objective, seed=seed,
        config=SUMS,
        overrides=(
            *PLACES, *TUNING, f"seed={seed}", f"data.train=[{_quoted(train)}]",
            f"data.heldout=[{_quoted(heldout)}]", *more, f"objective.preset={preset}",
        ),
        commands=(*_to_export(), *_examined(HELDOUT, NUM_HELDOUT)),
        reads=(TRAIN, HELDOUT), needs={"base": base_cell(seed)},
    )  # fmt: skip


def _quoted(source: str) -> str:
    """A placeholder's braces would be a mapping in YAML."""
    return source if source.startswith("{path:") else f'"{source}"'


def masking() -> Study:
    """(i): base, SFT and mSFT on traces, by where the errors come from."""
    cells = [base_cell(seed) for seed in SEEDS]
    cells += [
        tuned_cell(source, objective, seed)
        for seed in SEEDS
        for source in SOURCES
        for objective in ("sft", "msft")
    ]
    cells += [tuned_cell("none", "clean", seed) for seed in SEEDS]
    clean = ("none", "clean")
    return Study(
        name="masking",
        question="Does masking the errors matter, greedily and sampled, and for which errors?",
        design=(
            "One base per seed is trained on clean responses. From it, with the same records, "
            "steps and schedule, SFT and mSFT go on over traces whose errors are uniform tokens "
            "(random), stretches of other references (hard), or the base's own samples where they "
            "depart from the reference (on_policy); `clean` goes on without errors. SFT and mSFT "
            "of a seed and source see the same batches. All have the same number of steps of about "
            "1,024 tokens; traces spend a part of them on errors and undos, so `clean` sees more "
            "right ones. Own samples hold fewer errors than the other traces (last column). "
            "Undone, exact-k and corrected are about hard errors for every model."
        ),
        cells=tuple(cells), base=("none", "base"),
        differences=(
            *(((source, "sft"), (source, "msft")) for source in SOURCES),
            *(((source, objective), clean) for source in SOURCES for objective in ("sft", "msft")),
        ),
        gaps=("on_policy", "hard", "random"),
    )  # fmt: skip


def entropy_cell(choices: int, objective: str, seed: int) -> Cell:
    """The base, trained on results of which half are first written as one of so many wrong ones."""
    marked = ("examples/experiments/records.py", "wrong", "--choices", str(choices),
              "--share", str(WRONG_SHARE), "--seed", str(seed))  # fmt: skip
    return Cell(
        name=f"choices{choices}-{objective}-seed{seed}", condition=f"{choices} wrong values",
        objective=objective, seed=seed, config=SUMS,
        overrides=(
            *PLACES, *TUNING, f"seed={seed}", 'data.train=["{cell}/train.jsonl"]',
            'data.heldout=["{cell}/heldout.jsonl"]', "data.traces={builder: given}",
            f"objective.preset={objective}",
        ),
        commands=(
            ("wrong train", (*marked, "--records", TRAIN, "--num", str(NUM_SOURCES),
                             "--output", "{cell}/train.jsonl")),
            ("wrong heldout", (*marked, "--records", HELDOUT, "--num", str(NUM_HELDOUT),
                               "--output", "{cell}/heldout.jsonl")),
            *_to_export(), *_examined(HELDOUT, NUM_HELDOUT),
        ),
        reads=(TRAIN, HELDOUT, "examples/experiments/records.py"),
        needs={"base": base_cell(seed)},
    )  # fmt: skip


def entropy() -> Study:
    """(ii): the SFT - mSFT gap against the entropy of the error distribution."""
    conditions = {choices: f"{choices} wrong values" for choices in CHOICES}
    return Study(
        name="entropy",
        question="Does the SFT - mSFT gap under greedy decoding grow as errors get predictable?",
        design=(
            f"From the base of a seed, traces in which each result of a sum is, with probability "
            f"{WRONG_SHARE}, first written wrong: as one of 1, 3 or 9 values near the right one, "
            f"equally likely. Given which result is wrong, its value has an entropy of exactly 0, "
            f"1.58 or 3.17 bits. The error of a trace begins at the first character that differs; "
            f"given that place, which tells something of the value, its entropy is 0, 1.44 or "
            f"2.81 bits in the mean. Which results are wrong is the same draw in all three."
        ),
        cells=(
            *(base_cell(seed) for seed in SEEDS),
            *(entropy_cell(choices, objective, seed) for seed in SEEDS for choices in CHOICES
              for objective in ("sft", "msft")),
        ),
        base=("none", "base"),
        differences=tuple(((name, "sft"), (name, "msft")) for name in conditions.values()),
        gaps=tuple(conditions.values()),
    )  # fmt: skip


def retry_cell(builder: str, rate: float, objective: str, seed: int) -> Cell:
    """From scratch, over steps that are begun too early at a rate; rate 0 is the base."""
    condition = f"{builder} {rate:g}" if rate else "none"
    return Cell(
        name=f"{condition.replace(' ', '-')}-{objective}-steps-seed{seed}", condition=condition,
        objective=objective, seed=seed, config=STEPS,
        overrides=(
            *PLACES, f"seed={seed}", 'tokenizer.path="{cell}/tokenizer.model"',
            f"tokenizer.train.phrases={json.dumps(STEPS_PHRASES)}",
            f"data.traces.builder={builder}",
            *((f"data.traces.retry_rate={rate}", "data.traces.clean_share=0.0") if rate else ()),
            *((f"training.steps={SHORT_STEPS}",) if objective == "short" else ()),
            # Retries of retries: 1 or 2 in 1,000 traces do not fit into a row, at lower rates none.
            *(("data.overlong=drop",) if rate >= LONG_RATE else ()),
            f"objective.preset={objective if rate else 'sft'}",
            f'data.heldout=["{STEPS_HELDOUT}"]',
        ),
        commands=(
            ("heldout", ("examples/experiments/records.py", "steps", "--num", str(NUM_HELDOUT),
                         "--seed", "2", "--operations", "1", "2", "--operators", "+",
                         "--output", STEPS_HELDOUT)),
            *_to_export(), *_examined(STEPS_HELDOUT, NUM_HELDOUT),
        ),
        reads=("examples/experiments/records.py",),
    )  # fmt: skip


def retry() -> Study:
    """(iii): the retry rate, masked and unmasked."""
    arms = (("retry", 0.1), ("retry", 0.5), ("weak_retry", 0.5))
    names = [f"{builder} {rate:g}" for builder, rate in arms]
    return Study(
        name="retry",
        question="What do retries do to a model from scratch, by rate, masked and unmasked?",
        design=(
            "Dependency arithmetic from scratch: one or two additions mod 23, every name a token. "
            "Before each step another is begun and undone, written out whole, with probability r "
            "and again after each: one that depends on a step not taken yet (retry), or any later "
            "one (weak_retry). The base is r = 0. All have the same number of steps of about 1,024 "
            "tokens; errors and undos take their part of these, so that arms with more retries see "
            "fewer problems: at 0.5, about as many as a base of 850 steps, `short`. SFT and "
            "mSFT of a seed, rate and kind see the same batches. Undone, exact-k and corrected are "
            "about hard errors for every model; log p(e|p), P(undo) first and count right are "
            "about held-out errors of the arm's own kind, so between retry and weak_retry they "
            "compare errors as well as models."
        ),
        cells=(
            *(retry_cell("retry", 0.0, "base", seed) for seed in SEEDS),
            *(retry_cell(builder, rate, objective, seed) for seed in SEEDS
              for builder, rate in arms for objective in ("sft", "msft")),
            *(retry_cell("retry", 0.0, "short", seed) for seed in SEEDS),
        ),
        base=("none", "base"),
        differences=(
            *(((name, "sft"), (name, "msft")) for name in names),
            *(((name, objective), ("none", "base")) for name in names
              for objective in ("sft", "msft")),
            *((("weak_retry 0.5", objective), ("retry 0.5", objective))
              for objective in ("sft", "msft")),
            *(((name, objective), ("none", "short")) for name in names if name != "retry 0.1"
              for objective in ("sft", "msft")),
        ),
    )  # fmt: skip


def parroting_cell(source: str, seed: int) -> Cell:
    """A model of `masking`, asked about the base's own errors: teacher-forced, held out."""
    trained = tuned_cell(source, "msft", seed)
    return Cell(
        name=f"own-errors-{trained.name}", condition=f"{source}, shown own errors",
        objective="msft", seed=seed, config=SUMS,
        overrides=(
            *PLACES, *(text for text in TUNING if not text.startswith(("model.path", "training."))),
            'model.path="{start}/export"', f"seed={seed}", "training.steps=1",
            "optimizer.warmup_steps=0", 'data.train=["{base}/sampled.heldout.jsonl"]',
            'data.heldout=["{base}/sampled.heldout.jsonl"]', "data.traces.builder=on_policy",
            "data.traces.clean_share=0.0", "objective.preset=msft",
        ),
        # The held-out figures before the first step are the trained model's; that step itself is
        # the least a run can have.
        commands=_to_export()[:2],
        needs={"base": base_cell(seed), "start": trained},
    )  # fmt: skip


def parroting() -> Study:
    """(iv): trained on synthetic errors, tested on on-policy ones."""
    own = {source: f"{source}, shown own errors" for source in SOURCES}
    return Study(
        name="parroting",
        question="Does a model that was trained on synthetic errors notice those a model makes?",
        design=(
            "The mSFT models of `masking` are shown held-out responses with the errors that the "
            "base made itself, teacher-forced (\"shown own errors\"; held-out figures at the start "
            "of a run of one step). The rows above them are the same models on errors like those "
            "they were trained on. Log p(e|p) of other errors says what these errors are like, not "
            "what a model does."
        ),
        cells=(
            *(base_cell(seed) for seed in SEEDS),
            *(tuned_cell(source, "msft", seed) for seed in SEEDS for source in SOURCES),
            *(parroting_cell(source, seed) for seed in SEEDS for source in SOURCES),
        ),
        base=("none", "base"), untrained=tuple(own.values()),
        differences=(
            *(((own[source], "msft"), (source, "msft")) for source in SOURCES),
            *(((own[source], "msft"), (own["on_policy"], "msft")) for source in ("random", "hard")),
        ),
    )  # fmt: skip


STUDIES: dict[str, Callable[[], Study]] = {
    "masking": masking, "entropy": entropy, "retry": retry, "parroting": parroting,
}  # fmt: skip
