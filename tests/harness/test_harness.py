"""lm-eval's model `nmar`: reduced texts, plain scores, and the launcher on the tasks of examples/harness."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import examined
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from test_chat import write_chat_folder
from tiny_tokenizers import write_bpe
from transformers import AutoModelForCausalLM

from nmar_ds.errors import ConfigError, NmarError, VocabularyError
from nmar_ds.inference.decoding import decode
from nmar_ds.inference.generation import encode_prompt
from nmar_ds.inference.harness import NmarLM
from nmar_ds.inference.harness_requests import draw_numbers, understand
from nmar_ds.inference.rendering import response_text, without_undos
from nmar_ds.inference.scoring import score_texts
from nmar_ds.traces.chat import ChatTemplate
from nmar_ds.traces.encoding import Tokenizer, add_undo, train_sentencepiece
from nmar_ds.traces.reduction import reduce

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "examples" / "harness"
PROMPTS = [f"{row['prompt']}" for row in examined.records(9)]
UNDOING = dict(undo_bias=2.0, seed=5)  # the random model then undoes now and then
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def generate_launcher() -> Any:
    return runpy.run_path(str(ROOT / "launcher/generate.py"))["main"]


def asked(kind: str, *arguments: Any, document: int = 0, task: str = "task") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, document, 1))


def generation(
    prompts: list[str], *, first: int = 0, task: str = "task", **keywords: Any
) -> list[Instance]:
    """Requests of documents `first` and on."""
    return [
        asked("generate_until", prompt, keywords, document=number, task=task)
        for number, prompt in enumerate(prompts, first)
    ]


def draws(num: int) -> list[int]:
    """Of the documents of `generation`."""
    return draw_numbers([("task", number) for number in range(num)])


def test_the_registry_knows_it() -> None:
    assert get_model("nmar") is NmarLM


@pytest.mark.parametrize("semantics", ["token", "span", "reset"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_are_those_of_reduced_ids(
    semantics: str, temperature: float, export: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    boundaries = np.flatnonzero(~tokenizer.is_special)[::4].tolist() if semantics == "span" else []
    folder = examined.variant(
        export, tmp_path / "export", semantics=semantics, boundary_ids=boundaries
    )
    lm = NmarLM(folder, batch_size=4, **UNDOING)
    keywords = {"max_gen_toks": 30, "temperature": temperature, "do_sample": temperature > 0}
    texts = lm.generate_until(generation(PROMPTS, **keywords), disable_tqdm=True)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    wanted = decode(
        lm.model, prompts, machine=lm.settings.machine, eos_id=tokenizer.eos_id, pad_id=None,
        max_new_tokens=30, temperature=temperature, numbers=draws(len(PROMPTS)), **UNDOING,
    )  # fmt: skip
    num_telling = 0
    for text, prompt, decoded in zip(texts, prompts, wanted, strict=True):
        assert "<UNDO>" not in text
        ids = reduce(decoded.raw_ids, lm.settings.machine)
        assert text == response_text(tokenizer, prompt, ids)
        raw = response_text(tokenizer, prompt, without_undos(decoded.raw_ids, tokenizer.undo_id))
        num_telling += text != raw
    assert num_telling > 2, "undos that change nothing show nothing"
    generated = lm.get_model_info()["nmar"]["generated"]
    assert generated["responses"] == len(PROMPTS)
    assert generated["undos"] == sum(decoded.num_undos for decoded in wanted)
    assert generated["responses_with_undo"] == sum(decoded.num_undos > 0 for decoded in wanted)
    assert generated["stray_undos"] == sum(decoded.num_strays for decoded in wanted)
    assert generated["tokens_emitted"] == sum(len(decoded.emitted_ids) for decoded in wanted)
    assert generated["tokens_kept"] == sum(len(decoded.reduced_ids) for decoded in wanted)
    assert generated["cut_off"] == sum(decoded.stop_reason == "length" for decoded in wanted)


def test_texts_are_those_of_the_generate_launcher(
    export: Path, generate_launcher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = NmarLM(export, batch_size=3, undo_bias=2.0)
    requests = generation(PROMPTS, max_gen_toks=25)
    whole = lm.generate_until(requests, disable_tqdm=True)
    assert lm.counts["undos"] > 0
    for until in ([], [max(whole, key=len)[8:12]]):
        requests = generation(PROMPTS, max_gen_toks=25, until=until)
        texts = lm.generate_until(requests, disable_tqdm=True)
        stops = [word for text in until for word in ("--stop", text)]
        for prompt, text in zip(PROMPTS, texts, strict=True):
            code = generate_launcher(
                ["--model", str(export), "--prompt", prompt, "--max-new-tokens", "25",
                 "--undo-bias", "2", "--show", "reduced", *stops]
            )  # fmt: skip
            shown = capsys.readouterr().out.removesuffix("\n")
            assert code == 0 and text == (shown.split(until[0])[0] if until else shown)
        assert (texts == whole) == (not until)


def test_until_is_looked_for_in_what_is_left(export: Path, tokenizer: Tokenizer) -> None:
    """A text that only the raw response holds, across what was taken back, ends nothing."""
    lm = NmarLM(export, seed=5)
    keywords = dict(max_gen_toks=30, temperature=1.5, do_sample=True)
    prompts = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    decodes = decode(
        lm.model, prompts, machine=lm.settings.machine, eos_id=tokenizer.eos_id, pad_id=None,
        max_new_tokens=30, temperature=1.5, numbers=draws(len(PROMPTS)), seed=5,
    )  # fmt: skip
    num_across = 0
    for number, (text, prompt, decoded) in enumerate(zip(PROMPTS, prompts, decodes, strict=True)):
        # What was left after each token, for texts that are gone in the end end a response too.
        left = [
            response_text(tokenizer, prompt, reduce(decoded.raw_ids[:n], lm.settings.machine))
            for n in range(len(decoded.raw_ids) + 1)
        ]
        raw = response_text(tokenizer, prompt, without_undos(decoded.raw_ids, tokenizer.undo_id))
        pieces = [raw[i : i + 5] for i in range(len(raw) - 4)]
        across = [piece for piece in pieces if not any(piece in part for part in left)]
        stopped = [until for until in (across[:1], [left[-1][2:5]]) if until]
        texts = [
            lm.generate_until(
                generation([text], first=number, until=until, **keywords), disable_tqdm=True
            )[0]
            for until in stopped
        ]
        if across:
            assert texts[0] == left[-1], (across[0], raw)
            num_across += 1
        assert (
            texts[-1]
            == next(part for part in left if left[-1][2:5] in part).split(stopped[-1][0])[0]
        )
    assert num_across > 2


def test_a_sample_depends_on_its_own_document_alone(export: Path) -> None:
    keywords = dict(do_sample=True, temperature=2.0, top_p=0.9, max_gen_toks=20)
    lm = NmarLM(export, batch_size=4, seed=3)
    texts = lm.generate_until(generation(PROMPTS, **keywords), disable_tqdm=True)
    later = generation(PROMPTS[5:], first=5, **keywords)
    assert lm.generate_until(later, disable_tqdm=True) == texts[5:]
    repeats = generation(PROMPTS[:1], **keywords) * 3
    twice = lm.generate_until(repeats, disable_tqdm=True)
    assert twice[0] == texts[0] and len(set(twice)) == 3, "repeats differ"
    # Equal prompts have draws of their own, in one task as in two.
    alike = lm.generate_until(generation([PROMPTS[0]] * 3, **keywords), disable_tqdm=True)
    assert alike[0] == texts[0] and len(set(alike)) == 3
    other_task = generation(PROMPTS, task="other", **keywords)
    both = lm.generate_until([*other_task, *generation(PROMPTS, **keywords)], disable_tqdm=True)
    assert both[len(PROMPTS) :] == texts
    assert all(a != b for a, b in zip(both, texts, strict=False))
    assert lm.generate_until(other_task, disable_tqdm=True) == both[: len(PROMPTS)]
    other = NmarLM(export, batch_size=4, seed=4)
    assert other.generate_until(generation(PROMPTS, **keywords), disable_tqdm=True) != texts
    mixed = generation(PROMPTS[:2], max_gen_toks=20) + generation(PROMPTS[:2], **keywords)
    assert lm.generate_until(mixed, disable_tqdm=True)[2:] != texts[:2]


def test_no_row_that_is_no_token_is_written(export: Path, tokenizer: Tokenizer) -> None:
    """With `until` every token is spelled as it comes; a row beyond the tokenizer says nothing."""
    lm = NmarLM(export)
    lm.model.resize_token_embeddings(tokenizer.size + 300, mean_resizing=False)
    keywords = dict(do_sample=True, temperature=5.0, max_gen_toks=20)
    for until in ([], ["nowhere to be found"]):
        requests = generation(PROMPTS, until=until, **keywords)
        assert any(lm.generate_until(requests, disable_tqdm=True))


def test_greedy_and_sampled_requests_may_be_mixed(export: Path) -> None:
    lm = NmarLM(export, batch_size=3)
    greedy = generation(PROMPTS[:4], max_gen_toks=20)
    sampled = generation(PROMPTS[4:8], first=4, max_gen_toks=20, temperature=2.0)
    apart = [lm.generate_until(part, disable_tqdm=True) for part in (greedy, sampled)]
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    mixed = lm.generate_until([[*greedy, *sampled][i] for i in order], disable_tqdm=True)
    assert mixed == [[*apart[0], *apart[1]][i] for i in order]


@pytest.mark.parametrize("undo", ["allow", "ban"])
def test_loglikelihood_is_that_of_transformers(
    undo: str, export: Path, tokenizer: Tokenizer
) -> None:
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    pairs = [(row["prompt"], row["reference"]) for row in examined.records(7)]
    pairs += [("", "sun mat"), ("7. Reverse: sun\n", " mat<UNDO>"), ("sun ", "mat")]
    answers = NmarLM(export, batch_size=3, undo=undo).loglikelihood(
        [asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True
    )
    for (context, text), (log_probability, is_greedy) in zip(pairs, answers, strict=True):
        before = [tokenizer.bos_id, *tokenizer.encode(context, continuation=False).tolist()]
        after = tokenizer.encode(text, continuation=context != "").tolist()
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        if undo == "ban":
            logits[:, tokenizer.undo_id] = -torch.inf
        wanted = logits.log_softmax(-1)[torch.arange(len(after)), after].sum()
        assert log_probability == pytest.approx(float(wanted), abs=1e-5)
        assert is_greedy == (logits.argmax(-1).tolist() == after)
    banned = NmarLM(export, undo="ban").loglikelihood(
        [asked("loglikelihood", *pairs[0])], disable_tqdm=True
    )
    assert (banned[0][0] > answers[0][0] + 1e-4) == (undo == "allow")


def test_a_continuation_is_encoded_as_one(tmp_path: Path) -> None:
    """Where a start of text gets a space of its own, a continuation must not."""
    plain = write_bpe(tmp_path / "plain", add_prefix_space=True)
    tokenizer = add_undo(plain, tmp_path / "undo")
    lm = NmarLM(examined.make_export(tmp_path / "export", tokenizer))
    ids = tokenizer.encode("sun", continuation=True)
    assert ids.tolist() != tokenizer.encode("sun", continuation=False).tolist()
    prompt = encode_prompt("Reverse: nus\n", tokenizer)
    (wanted,) = score_texts(lm.model, [prompt], [ids], undo_id=tokenizer.undo_id)
    request = asked("loglikelihood", "Reverse: nus\n", "sun")
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    assert found == pytest.approx(wanted.log_probability, abs=1e-6)


def test_what_greedy_decoding_writes_is_greedy(export: Path) -> None:
    lm = NmarLM(export, undo="ban")
    texts = lm.generate_until(generation(PROMPTS, max_gen_toks=1), disable_tqdm=True)
    pairs = [pair for pair in zip(PROMPTS, texts, strict=True) if pair[1]]
    pairs += [(prompt, text + "sun mat") for prompt, text in pairs]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    verdicts = [greedy for _, greedy in lm.loglikelihood(requests, disable_tqdm=True)]
    half = len(pairs) // 2
    assert half > 4 and verdicts == [True] * half + [False] * half


def test_rolling_scores_every_token_once(export: Path, tokenizer: Tokenizer) -> None:
    lm = NmarLM(export)
    text = " ".join(examined.WORDS * 2)
    (whole,) = lm.loglikelihood_rolling([asked("rolling", text)], disable_tqdm=True)
    ((wanted, _),) = lm.loglikelihood([asked("loglikelihood", "", text)], disable_tqdm=True)
    assert whole == pytest.approx(wanted, abs=1e-5)
    lm.model.config.max_position_embeddings = 7
    (windowed,) = lm.loglikelihood_rolling([asked("rolling", text)], disable_tqdm=True)
    ids = tokenizer.encode(text, continuation=False).tolist()
    direct = 0.0
    for end in range(0, len(ids), 7):
        scored = ids[end : end + 7]
        seen = [tokenizer.bos_id, *ids][: end + len(scored)][-7:]
        with torch.no_grad():
            logits = lm.model(torch.tensor([seen])).logits[0, -len(scored) :]
        direct += float(logits.log_softmax(-1)[torch.arange(len(scored)), scored].sum())
    assert windowed == pytest.approx(direct, abs=1e-4) and abs(windowed - whole) > 1e-3


def test_rolling_needs_something_before_a_text(tmp_path: Path) -> None:
    """BOS; where there is none, or a chat template that every training text had, it is refused."""
    request = asked("rolling", "sun mat", document=3)
    talks = add_undo(write_chat_folder(tmp_path / "chat"), tmp_path / "chat_undo")
    facts = ChatTemplate(talks).facts
    lm = NmarLM(examined.make_export(tmp_path / "chat_export", talks, chat=facts))
    with pytest.raises(ConfigError, match=r"task: document 3: loglikelihood_rolling: .* chat temp"):
        lm.loglikelihood_rolling([request], disable_tqdm=True)
    plain = add_undo(write_bpe(tmp_path / "plain", add_prefix_space=False), tmp_path / "undo")
    lm = NmarLM(examined.make_export(tmp_path / "export", plain))
    assert not lm.tokenizer.add_bos
    with pytest.raises(ConfigError, match=r"has no BOS token, .*; expected tasks that generate"):
        lm.loglikelihood_rolling([request], disable_tqdm=True)
    assert lm.loglikelihood_rolling([], disable_tqdm=True) == []
    # Continuations it scores, after a prompt.
    ((score, _),) = lm.loglikelihood([asked("loglikelihood", "sun", " mat")], disable_tqdm=True)
    assert score < 0


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_beams": 4}, "num_beams: 4, expected only until"),
        ({"top_k": 50}, "top_k: 50"),
        ({"length_penalty": 1.0}, "length_penalty"),
        ({"do_sample": True}, "do_sample: true, expected a temperature"),
    ],
)
def test_keywords_without_meaning_are_refused(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        understand(keywords, max_new_tokens=None)


def test_keywords_are_understood() -> None:
    rules = understand(
        {"until": "\n", "do_sample": False, "num_beams": 1, "max_gen_toks": 12}, max_new_tokens=None
    )
    assert (rules.until, rules.max_new_tokens, rules.temperature) == (("\n",), 12, 0.0)
    rules = understand({"until": ["", "a"], "temperature": 0.5, "top_p": 0.9}, max_new_tokens=40)
    assert rules.until == ("a",) and rules.max_new_tokens == 40
    assert (rules.temperature, rules.top_p) == (0.5, 0.9)
    assert understand({"until": None, "max_gen_toks": 9}, max_new_tokens=5).max_new_tokens == 5
    assert understand({}, max_new_tokens=None).max_new_tokens == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": "auto"}, "batch_size: 'auto', expected a number"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"undo": "force"}, "undo: 'force', expected 'allow' or 'ban'"),
    ],
)
def test_arguments_are_checked(export: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NmarLM(export, **arguments)


def test_bad_requests_name_their_document(export: Path) -> None:
    lm = NmarLM(export)
    for kind, arguments, words in [
        ("generate_until", ("\N{SNOWMAN}", {}), "task: document 4: .*lacks the characters"),
        ("loglikelihood", ("sun", ""), "task: document 4: continuation: empty"),
        ("loglikelihood", ("sun", "\N{SNOWMAN}"), "task: document 4: continuation: .*lacks"),
        ("loglikelihood", ("sun", " sun" * 600), "expected at most the model's 512 positions"),
        ("generate_until", ("sun" * 300, {}), "expected at most the model's 512 positions"),
    ]:
        with pytest.raises(NmarError, match=words):
            getattr(lm, kind)([asked(kind, *arguments, document=4)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="chat template"):
        lm.apply_chat_template([{"role": "user", "content": "sun"}])


def test_a_model_without_undo_is_refused(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(export, plain)
    (plain / "nmar.json").unlink()
    with pytest.raises(ConfigError, match="nothing is known of <UNDO> in this model"):
        NmarLM(plain)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    assert main(["--model", str(plain), "--tasks", "x"]) == 2
    assert "nothing is known of <UNDO>" in capsys.readouterr().err
    lacking = examined.variant(export, tmp_path / "lacking")
    model = AutoModelForCausalLM.from_pretrained(export)
    model.resize_token_embeddings(json.loads((export / "nmar.json").read_text())["undo_id"])
    model.save_pretrained(lacking)
    with pytest.raises(VocabularyError, match=r"<UNDO> has id .* tokens that the model knows"):
        NmarLM(lacking)


@pytest.fixture(scope="module")
def sums_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer can spell the tasks' sums."""
    lines = (TASKS / "chain_sum.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)[key] for line in lines for key in ("prompt", "reference")]
    folder = tmp_path_factory.mktemp("sums")
    tokenizer = train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=60)
    return examined.make_export(folder / "export", tokenizer)


def test_the_launcher_runs_the_tasks_offline(
    sums_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    main = runpy.run_path("launcher/evaluate_harness.py")["main"]
    output = tmp_path / "results.json"
    code = main(
        ["--model", str(sums_export), "--tasks", "nmar_chain_sum", "nmar_chain_sum_choice",
         "--tasks-path", "examples/harness", "--limit", "6", "--batch-size", "5",
         "--max-new-tokens", "16", "--output", str(output)]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "of 6 responses took" in out
    results = json.loads(output.read_text("utf-8"))
    choice = results["results"]["nmar_chain_sum_choice"]
    shown = next(line.split() for line in out.splitlines() if "nmar_chain_sum_choice" in line)
    assert shown[1:3] == ["acc", "none"] and shown[5] == "6"
    assert shown[3:5] == [f"{choice['acc,none']:.4f}", f"{choice['acc_stderr,none']:.4f}"]
    lm = NmarLM(sums_export, max_new_tokens=16)
    documents = [json.loads(line) for line in (TASKS / "chain_sum.jsonl").open("rb")][:6]
    samples = results["samples"]
    texts = lm.generate_until(
        generation([document["prompt"] for document in documents], until=["\n"]), disable_tqdm=True
    )
    assert [sample["resps"][0][0] for sample in samples["nmar_chain_sum"]] == texts
    assert results["results"]["nmar_chain_sum"]["exact_match,none"] == 0
    right = 0
    for document, sample in zip(documents, samples["nmar_chain_sum_choice"], strict=True):
        requests = [
            asked("loglikelihood", document["prompt"], choice) for choice in document["choices"]
        ]
        scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        answers = [float(answer[0][0]) for answer in sample["resps"]]
        assert answers == pytest.approx(scores, abs=1e-4)
        right += int(np.argmax(scores)) == document["right"]
    assert results["results"]["nmar_chain_sum_choice"]["acc,none"] == pytest.approx(right / 6)
    about = results["config"]["nmar"]
    assert about["generated"]["responses"] == 6 and about["max_new_tokens"] == 16
    assert about["semantics"] == "token" and results["config"]["model"] == "nmar"


def test_a_right_response_is_counted_as_right(
    sums_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of one's own, whose references are what the model itself writes, taken back and all."""
    prompts = [json.loads(line)["prompt"] for line in (TASKS / "chain_sum.jsonl").open("rb")][:8]
    lm = NmarLM(sums_export, max_new_tokens=24, seed=2)
    texts = lm.generate_until(
        generation(prompts, task="own", temperature=1.5, do_sample=True), disable_tqdm=True
    )
    assert lm.counts["undos"] > 0 and len(set(texts)) == 8
    lines = [
        {"prompt": prompt, "reference": text if number % 2 else text + "1"}
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    examined.write(tmp_path / "own.jsonl", lines)
    config = (TASKS / "nmar_chain_sum.yaml").read_text("utf-8")
    config = config.replace("nmar_chain_sum", "own").replace('["\\n"]', "[]")
    (tmp_path / "own.yaml").write_text(
        config.replace("examples/harness/chain_sum.jsonl", str(tmp_path / "own.jsonl"))
    )
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    common = ["--model", str(sums_export), "--tasks", "own", "--tasks-path", str(tmp_path),
              "--max-new-tokens", "24", "--seed", "2", "--output", str(tmp_path / "out.json")]  # fmt: skip
    assert main([*common, "--temperature", "1.5"]) == 0
    own = json.loads((tmp_path / "out.json").read_text("utf-8"))["results"]["own"]
    assert own["exact_match,none"] == pytest.approx(0.5)
    assert main([*common, "--temperature", "1.5", "--undo", "ban"]) == 0
    banned = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert banned["results"]["own"]["exact_match,none"] < 0.5
    assert banned["config"]["nmar"]["generated"]["undos"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "nmar_chain_sums"], "'nmar_chain_sums': no such task, the nearest is 'nmar_"),
        (["--tasks", "nmar_chain_sum", "--output", "nowhere/x"], "--output: no folder nowhere"),
        (
            ["--tasks", "nmar_chain_sum", "--tasks-path", "nowhere"],
            "--tasks-path: nowhere: no such",
        ),
    ],
)
def test_the_launcher_refuses_in_one_line(
    sums_export: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    main = runpy.run_path("launcher/evaluate_harness.py")["main"]
    common = ["--model", str(sums_export), "--tasks-path", "examples/harness"]
    assert main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_data_that_is_not_there_is_one_line(
    sums_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    common = ["--model", str(sums_export), "--tasks", "nmar_chain_sum", "--tasks-path", str(TASKS)]
    assert main(common) == 2
    error = capsys.readouterr().err
    assert "error: --tasks: " in error and "chain_sum.jsonl" in error


def own_task(
    folder: Path, *, change: tuple[str, str] = ("", ""), data: bytes | None = None
) -> None:
    """A copy of the first task, named `own`, with a place of its YAML or its data changed."""
    yaml = (TASKS / "nmar_chain_sum.yaml").read_text("utf-8").replace("nmar_chain_sum", "own")
    yaml = yaml.replace("examples/harness/chain_sum.jsonl", str(folder / "own.jsonl"))
    assert change[0] in yaml
    (folder / "own.yaml").write_text(yaml.replace(*change) if change[0] else yaml, "utf-8")
    lines = (TASKS / "chain_sum.jsonl").read_bytes().splitlines(keepends=True)[:4]
    (folder / "own.jsonl").write_bytes(b"".join(lines) if data is None else data)


ROW = b'{"prompt": "1 + 1", "reference": "2"}\n'


@pytest.mark.parametrize(
    ("malformed", "words"),
    [
        ({"data": ROW + b'{"prompt": "1 + 2", \n'}, "own.jsonl: line 2: Expecting property name"),
        ({"data": b'{"prompt": "\xff"}\n'}, "own.jsonl: line 1: not UTF-8, expected one JSON obj"),
        ({"data": ROW + b"[1]\n"}, "own.jsonl: line 2: list, expected one JSON object a line"),
        ({"data": b""}, "own.jsonl: it has no documents"),
        ({"change": ("metric_list:", "metric_list: [")}, "own.yaml: line 19: "),
        ({"change": ("num_fewshot:", "num_fewshots:")}, "own.yaml: TypeError: .*num_fewshots"),
        ({"change": ("{{reference}}", "{{answer}}")}, "own.yaml: UndefinedError: 'answer' is"),
        ({"change": ("test_split: test", "test_split: tset")}, "own.yaml: KeyError: 'tset'"),
        ({"change": ("metric: exact_match", "metric: exact_mach")}, "metric_list: 'exact_mach'"),
        (
            {
                "change": ("{{prompt}}", "{{prompt + 1}}"),
                "data": b'{"prompt": 1, "reference": "2"}\n{"prompt": null, "reference": "2"}\n',
            },
            "own.yaml: document 1: TypeError: ",
        ),
    ],
)
def test_a_malformed_task_is_one_line(
    malformed: dict[str, Any], words: str, sums_export: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It names the task's YAML or the file of its data, and comes before anything is decoded."""
    own_task(tmp_path, **malformed)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    capfd.readouterr()
    code = main(["--model", str(sums_export), "--tasks", "own", "--tasks-path", str(tmp_path)])
    error = capfd.readouterr().err
    assert code == 2 and "Traceback" not in error and "generate_until" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert re.search(words, line) and str(tmp_path) in line and "expected" in line


def test_a_fault_that_is_no_tasks_is_not_blamed_on_one(
    sums_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: NmarLM, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise RuntimeError("a fault of the decoder")

    own_task(tmp_path)
    monkeypatch.setattr(NmarLM, "generate_until", broken)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    with pytest.raises(RuntimeError, match="a fault of the decoder"):
        main(["--model", str(sums_export), "--tasks", "own", "--tasks-path", str(tmp_path)])


def test_one_response_is_counted_as_a_number(
    sums_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_task(tmp_path, data=ROW)
    main = runpy.run_path(str(ROOT / "launcher/evaluate_harness.py"))["main"]
    common = ["--model", str(sums_export), "--tasks", "own", "--tasks-path", str(tmp_path)]
    assert main([*common, "--max-new-tokens", "2", "--undo", "ban"]) == 0
    assert "0 of 1 responses took something back" in capsys.readouterr().out
