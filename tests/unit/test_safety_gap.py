"""The Safety Gap study: its formulas by hand, a tiny run end to end, and what its page may say."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nmar_ds.acceptance.reference import gradients, reference_nll, reference_sums
from nmar_ds.errors import ConfigError
from nmar_ds.pictures import new_figure
from nmar_ds.theory import exact_part, formulas, material, picture, report, safety_gap, seeds
from nmar_ds.theory.directions import directions
from nmar_ds.theory.settings import load_settings
from nmar_ds.traces.schema import Role

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/safety_gap.yaml"
EXAMPLES = ROOT / "examples/quickstart/chain_sum"
TINY = [
    "num_seeds=1",
    f"records.train=[{{path: {EXAMPLES}.train.jsonl, max_records: 300}}]",
    f"records.heldout=[{{path: {EXAMPLES}.heldout.jsonl, max_records: 40}}]",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "batch_rows=2",
    "start.steps=6",
    "curves.steps=2",
    "curves.eval_every=1",
    "curves.eval_rows=2",
    "measure.identity_traces=4",
    "measure.probe_traces=3",
    "under_zero3=false",
]


def settings(folder: Path, *more: str):
    return load_settings(CONFIG, [*TINY, f"output={folder}", *more])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished tiny study: its configuration and its report."""
    config = settings(tmp_path_factory.mktemp("study") / "out")
    safety_gap.run_study(config)  # what it finds is judged by the tests
    return config, json.loads((Path(config.output) / "report.json").read_text("utf-8"))


def rows(config, chosen, seed=0):
    _, heldout = seeds.stores_of(config)
    size = {"length": config.records.sequence_length, "batch_rows": config.batch_rows}
    return material.rows_of(heldout, np.asarray(chosen, dtype=np.int64), seed=seed, **size)


def model(config):
    return material.new_model(config.model, seeds.stores_of(config)[0], 3)


def scalars(*values: float):
    return [[torch.tensor([value], dtype=torch.float64)] for value in values]


def test_differences_of_gradients_by_hand():
    """Prompt 100, G_p 2, G_e 6, G_b 4, G_c 8; 7 prompt targets, which count nowhere, and 10 others."""
    by_role, counts = scalars(100, 2, 6, 4, 8), [7, 3, 2, 4, 1]
    (common,) = formulas.predicted_difference("common", by_role, counts)
    (trained,) = formulas.predicted_difference("trained", by_role, counts)
    assert float(common) == pytest.approx(6 / 10)
    assert float(trained) == pytest.approx(6 / 10 - 2 / (10 * 8) * (2 + 4 + 8))


def test_one_step_alpha_and_cosine_by_hand():
    a = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    b = [torch.tensor([4.0, 5.0]), torch.tensor([6.0])]
    assert formulas.predicted_log_ratio(0.1, a, b) == pytest.approx(3.2)
    assert formulas.alpha_hat([-2, 4, -5], [1, 2, 3]) == pytest.approx(0.5)
    assert formulas.alpha_hat([1.0], [0.0]) is None
    assert formulas.cosine([torch.tensor([3.0, 4.0])], [torch.tensor([4.0, 3.0])]) == pytest.approx(
        24 / 25
    )
    assert formulas.cosine(a, [torch.zeros(2), torch.zeros(1)]) is None
    assert formulas.norm([torch.tensor([3.0]), torch.tensor([4.0])]) == pytest.approx(5)


def test_intervals_by_hand():
    found = formulas.interval([1, 2, 3])
    assert found["mean"] == 2
    assert found["high"] == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert found["low"] == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert not formulas.excludes_zero(found)
    assert formulas.excludes_zero(formulas.interval([1, 1.1, 1.2]))
    assert formulas.excludes_zero(formulas.interval([-1, -1.1, -1.2]))
    alone = formulas.interval([4])
    assert alone == {"mean": 4, "low": None, "high": None}
    assert not formulas.excludes_zero(alone)
    # Quantiles of Student's t from printed tables, on either side of the end of our own.
    for freedom, quantile in ((2, 4.303), (30, 2.042), (31, 2.040), (40, 2.021), (120, 1.980)):
        assert formulas.t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)
    wide = formulas.interval([0.0, 1.0] * 16)  # standard deviation .508
    assert wide["high"] == pytest.approx(0.5 + 2.0395 * 0.508 / math.sqrt(32), abs=2e-4)
    assert len(formulas.T_QUANTILES) == 30 and sorted(formulas.T_QUANTILES)[0] == 2.042


@pytest.mark.parametrize(
    "values", [[0.0025] * 3, [0.3 - 0.2, 0.1, 0.5 - 0.4], [0.0] * 3, [-7e3] * 4]
)
def test_repetitions_that_agree_have_no_interval(values):
    """Up to rounding: 0.3 - 0.2 is not 0.1. A point would leave out 0 at any distance."""
    found = formulas.interval(values)
    assert (found["low"], found["high"]) == (None, None)
    assert found["mean"] == pytest.approx(values[0]) and not formulas.excludes_zero(found)
    assert formulas.excludes_zero(formulas.interval([0.0025, 0.0025, 0.0025 + 1e-9]))


def test_the_probe_counts_wrong_tokens_from_the_onset_on(study):
    config, _ = study
    loader = rows(config, material.with_deviations(seeds.stores_of(config)[1], 3, 0))
    batch, lm = material.whole_batch(loader), model(config)

    def later(index):  # the first token of each deviation is right
        return np.asarray(loader.source.onsets(index)) + 1

    exact, stock = material.in_float64(lm), material.in_float64(lm, "sdpa")
    expected = 0.0
    for index in range(3):
        nll, roles = reference_nll(stock, loader.source, index)
        opening = np.asarray(loader.source.onsets(index)) - 1  # as targets
        wrong = np.flatnonzero(roles == Role.DEVIATION)
        expected -= float(nll[np.setdiff1d(wrong, opening)].sum().detach())
    seen = float(material.log_p_errors(exact, batch, later).detach())
    assert seen == pytest.approx(expected, rel=1e-10)


def test_a_step_goes_down_the_slope_and_leaves_the_start_alone(study):
    config, _ = study
    lm = model(config)
    before = copy.deepcopy(dict(lm.named_parameters()))
    slope = [torch.full_like(weight, 2.0) for _, weight in sorted(lm.named_parameters())]
    after = dict(material.stepped(lm, slope, 0.25).named_parameters())
    for name, weight in lm.named_parameters():
        assert torch.equal(weight, before[name])
        assert torch.allclose(after[name], weight - 0.5)


def test_identities_hold_and_a_wrong_gradient_is_seen(study, monkeypatch):
    config, _ = study
    loader = rows(config, material.with_deviations(seeds.stores_of(config)[1], 4, 0))
    lm = model(config)
    good = exact_part.identity_gaps(lm, loader)
    assert good.pop("apart") > 0.01
    assert len(good) == 10 and max(good.values()) < 1e-10
    right = exact_part.packed_gradient

    def wrong(lm, batch, weights, divisor):
        gradient, losses = right(lm, batch, weights, divisor)
        if weights[Role.DEVIATION] == 0:
            gradient, losses = [1.01 * g for g in gradient], losses * 1.01
        return gradient, losses

    monkeypatch.setattr(exact_part, "packed_gradient", wrong)
    bad = exact_part.identity_gaps(lm, loader)
    for name in good:
        touched = name.startswith("(b)") or "mSFT" in name
        assert (bad[name] > 1e-4) == touched, name


def test_directions_against_traces_one_by_one(study):
    config, _ = study
    loader = rows(config, material.with_deviations(seeds.stores_of(config)[1], 2, 0))
    lm = model(config)
    found = directions(lm, loader)
    stock = material.in_float64(lm, "sdpa")
    inner, squares, means = [], [], {}
    for index in range(2):
        sums = reference_sums(stock, loader.source, [index])
        e, b, c = (
            torch.cat([g.flatten() for g in gradients(stock, sums[role])])
            for role in (Role.DEVIATION, Role.UNDO, Role.CORRECTION)
        )
        inner.append((float(e @ b), float(e @ c)))
        squares.append(float(e @ e))
        for name, g in zip("ebc", (e, b, c), strict=True):
            means[name] = means.get(name, 0) + g / 2
    of_b, of_c = (-sum(each) / sum(squares) for each in zip(*inner, strict=True))
    assert found["alpha"] == {
        "b": pytest.approx(of_b), "c": pytest.approx(of_c), "bc": pytest.approx(of_b + of_c)
    }  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(means["e"], means["c"], dim=0)
    assert found["cosine"]["c"] == pytest.approx(float(cosine))
    assert found["norm"]["b"] == pytest.approx(float(means["b"].norm()))
    assert found["rms_norm"]["e"] == pytest.approx(math.sqrt(sum(squares) / 2))


def test_both_objectives_start_alike_and_see_the_same_batches(study, monkeypatch):
    config, found = study
    seen = []

    def watched(lm, loader, weights, *, optimizer, num_steps, each=lambda done: None):
        order = [loader.batches_of_step(s)[0].trace_ids.tolist() for s in range(num_steps)]
        start = [weight.detach().clone() for weight in lm.parameters()]
        seen.append((weights.tolist(), order, start))
        right(lm, loader, weights, optimizer=optimizer, num_steps=num_steps, each=each)

    right = seeds.train
    monkeypatch.setattr(seeds, "train", watched)
    again = seeds.run_seed(config, 0, lambda line: None)
    assert len(seen) == 5  # the common start, then two objectives under two optimizers
    sft, msft = seen[1], seen[2]
    assert sft[0] == [0, 1, 1, 1, 1] and msft[0] == [0, 1, 0, 1, 1]
    for _, order, start in seen[2:]:
        assert order == sft[1]
        assert all(torch.equal(a, b) for a, b in zip(start, sft[2], strict=True))
    assert all(index >= 0 for index in sft[1][0][:1])
    (kept,) = found["by_seed"]
    assert kept | {"fingerprint": None} == again | {"fingerprint": None}, "the same bits again"


def test_the_report_of_a_tiny_study(study):
    config, found = study
    train, _ = seeds.stores_of(config)
    dirty = [Role.DEVIATION in train.roles(index) for index in range(len(train))]
    assert found["clean_share"]["traces"] == pytest.approx(1 - sum(dirty) / len(dirty))
    assert 0 < found["clean_share"]["targets"] < found["clean_share"]["traces"]
    roles = np.concatenate([train.roles(index)[1:] for index in range(len(train))])
    share = (roles == Role.DEVIATION).sum() / (roles != Role.PROMPT).sum()
    assert found["clean_share"]["error_targets"] == pytest.approx(share)
    assert [row["eta"] for row in found["one_step"]] == [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]
    assert abs(found["one_step"][-1]["lowest"] - 1) < 0.01
    for optimizer in ("sgd", "adamw"):
        for objective in ("sft", "msft"):
            curve = found["by_seed"][0]["curves"][optimizer][objective]
            assert curve["step"] == [0, 1, 2]
            assert curve["log_p_error"][0] < 0 < curve["ce_undo"][0]
            assert f"{optimizer} {objective}" in found["directions"]
    text = (Path(config.output) / "report.txt").read_text("utf-8")
    for part in ("(a)", "(b)", "under `trained`", "(c)", "(d)", "(e)", "alpha", "|g_e|", "clean"):
        assert part in text
    assert "EXACT PART: PASS" in text and found["good"] and found["zero3"] is None
    assert (Path(config.output) / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(text.splitlines()) < 80, "one page"


def repeated(found, num, *, shift=0.0):
    """By-seed results that differ a little; SFT's last log p(e|p) is raised by `shift`."""
    made = []
    for number in range(num):
        one = copy.deepcopy(found["by_seed"][0]) | {"seed": number}
        for optimizer in ("sgd", "adamw"):
            sft, msft = (one["curves"][optimizer][name] for name in ("sft", "msft"))
            for key in ("log_p_error", "ce_undo", "ce_correction"):
                wobble = (number - (num - 1) / 2) / 10
                sft[key][-1] = msft[key][-1] + wobble + (shift if key == "log_p_error" else 0)
        made.append(one)
    return made


def summary(study, made):
    config, found = study
    return report.summarize(config, made, clean=found["clean_share"], zero3=None)


def test_curves_are_spoken_of_from_three_seeds_on_and_with_intervals(study):
    def about_curves(found):
        return [line for line in found["shown"] if "steps on this data" in line]

    two, three = (summary(study, repeated(study[1], num, shift=5)) for num in (2, 3))
    assert not about_curves(two)
    assert [line for line in two["not_shown"] if "2 seeds" in line]
    assert len(about_curves(three)) == 2  # log p(e|p), under either optimizer
    assert "log p(e|p) is higher under SFT: +5.000 [+4.752, +5.248]" in about_curves(three)[0]
    assert not about_curves(summary(study, repeated(study[1], 3)))


def test_seeds_that_agree_show_nothing_and_are_drawn_without_a_band(study, tmp_path):
    made = [copy.deepcopy(study[1]["by_seed"][0]) | {"seed": number} for number in range(3)]
    found = summary(study, made)
    assert not [line for line in found["shown"] if "steps on this data" in line]
    same = [line for line in found["not_shown"] if "all seeds have the same" in line]
    assert len(same) == 6 and "holds 0" not in " ".join(found["not_shown"])
    assert "SFT - mSFT" in report.page(found)

    def bands(seeds, key):
        """Whether each point of the two curves has one."""
        panel = new_figure(tmp_path / "p.png", (4, 3)).subplots()
        picture._curves(panel, {"by_seed": seeds}, "sgd", key)
        return [len(path.vertices) > 0 for band in panel.collections for path in band.get_paths()]

    assert not any(bands(made, "ce_undo"))
    for one in made[1:]:
        one["curves"]["sgd"]["sft"]["ce_undo"][1] += 0.1 * one["seed"]
        one["curves"]["sgd"]["sft"]["ce_undo"][2] += 0.1 * one["seed"]
    assert sum(bands(made, "ce_undo")) == 1


def test_what_may_not_be_claimed_never_is(study):
    for num, shift in ((1, 0), (3, 5), (3, -5)):
        found = summary(study, repeated(study[1], num, shift=shift))
        whole = " ".join(found["shown"])
        assert "at the same parameters (a)" in whole
        assert "after training" not in whole and "falls" not in whole and "safe" not in whole
        assert any("after training" in line for line in found["not_shown"])
        assert any("either way" in line for line in found["not_shown"])
        assert sum("moved by" in line for line in found["not_shown"]) == 2


@pytest.mark.parametrize("value", [1e-6, float("nan")])
def test_a_residual_fails_the_page_whatever_seed_it_is_of(study, value):
    for place in (0, 1, 2):
        made = repeated(study[1], 3)
        made[place]["identities"]["(b) g_SFT - g_mSFT = G_e / D"] = value
        found = summary(study, made)
        assert not found["good"]
        assert not any("(b)" in line for line in found["shown"])
        assert "EXACT PART: FAIL" in report.page(found)


def test_an_identity_that_holds_under_trained_too_fails(study):
    made = repeated(study[1], 3)
    made[1]["identities"]["apart"] = 1e-9
    assert not summary(study, made)["good"]


@pytest.mark.parametrize("ratio", [1.2, float("nan")])
def test_a_ratio_that_does_not_go_to_one_fails(study, ratio):
    made = repeated(study[1], 3)
    made[1]["one_step"][-1]["ratio"] = ratio
    found = summary(study, made)
    assert not found["good"] and not any("(c)" in line for line in found["shown"])


def test_finished_seeds_are_skipped_and_damaged_or_other_ones_are_not(study, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(study[0].output, tmp_path / "out")
    config = settings(tmp_path / "out")
    done = []

    def counting(config, seed, say=print):
        done.append(seed)
        return {"seed": seed}

    monkeypatch.setattr(seeds, "run_seed", counting)
    assert seeds.run_seeds(config)[0]["weights"] and done == []
    seeds.run_seeds(settings(tmp_path / "out", "num_seeds=2", "workers=1"))
    assert done == [1]
    file = tmp_path / "out/seeds/seed-0.json"
    file.write_text(file.read_text("utf-8")[:-10], encoding="utf-8")
    seeds.run_seeds(config)
    assert done == [1, 0]
    seeds.run_seeds(settings(tmp_path / "out", "curves.steps=1"))
    assert done == [1, 0, 0], "other settings"
    assert sorted(path.name for path in file.parent.iterdir()) == ["seed-0.json", "seed-1.json"]


def launcher():
    import importlib.util

    spec = importlib.util.spec_from_file_location("launcher_gap", ROOT / "launcher/safety_gap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_exit_codes(good, code, monkeypatch):
    monkeypatch.setattr(safety_gap, "run_study", lambda config: good)
    assert launcher().main(["--config", str(CONFIG)]) == code


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curves.step=3", "curves.step: unknown key; did you mean 'steps'?"),
        ("measure.etas=[1e-3, 1e-2]", "measure.etas: are [0.001, 0.01], expected at least two"),
        ("measure.etas=[1e-3]", "measure.etas: are [0.001], expected at least two"),
        ("num_seeds=0", "num_seeds: Input should be greater than 0"),
        ("model.dtype=bfloat16", "`model` needs `config`, and `dtype` float32"),
        ("records.traces.builder=given", "records.traces"),
        ("start.learning_rate=-1", "start.learning_rate: Input should be greater than 0"),
        ("model.config.hiden_size=3", "model.config.hiden_size: unknown key; did you mean"),
        ("measure.probe_traces=9999", "measure: asks for 9999 traces with deviations, expected at"),
    ],
)
def test_bad_settings_are_one_line_and_2(override, message, tmp_path, capsys, study):
    import shutil

    if "9999" in override:
        shutil.copytree(study[0].output, tmp_path / "out")
    code = launcher().main(["--config", str(CONFIG), *TINY, f"output={tmp_path}/out", override])
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_no_store_of_clean_traces_alone(study):
    config, _ = study
    with pytest.raises(ConfigError, match="holds no trace of the kind"):
        rows(config, [])


def test_a_launcher_and_its_ranks_are_ended_together():
    """Ranks have sessions of their own, as torchrun's have."""
    import subprocess
    import sys

    import psutil

    from nmar_ds.theory.on_ranks import _kill_tree

    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as launcher:
        child = psutil.Process(int(launcher.stdout.readline()))
        try:
            _kill_tree(launcher.pid)
            gone = not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        finally:
            if child.is_running():
                child.kill()
        assert launcher.wait(10) != 0
    assert gone
