"""The stack decoder: parity with one-by-one decoding on a real model, guards on a scripted one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
)

from nmar_ds.errors import ConfigError, VocabularyError
from nmar_ds.inference.decoding import Decoded, decode
from nmar_ds.inference.limits import MAX_TEMPERATURE, MAX_UNDO_BIAS, MIN_TEMPERATURE
from nmar_ds.inference.metrics import num_revisits
from nmar_ds.inference.plain import UndoLogitsProcessor, reduce_generated
from nmar_ds.inference.sampling import sample
from nmar_ds.inference.stack import Event, Retract, Stack
from nmar_ds.traces.reduction import Machine, reduce

VOCAB, UNDO, EOS, PAD = 40, 39, 2, 0
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Random weights, scaled up so that argmaxes differ between contexts and stop tokens occur."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(
                    12.0 if "embed" in name or "q_proj" in name or "k_proj" in name else 4.0
                )
    return model


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, VOCAB - 1, size=n).astype(np.int32) for n in rng.integers(1, 30, 33)]


def greedy_alone(model: Any, ids: list[int], limit: int, banned: bool = False) -> list[int]:
    """The definition of greedy decoding: whole forwards, no cache, no padding, no batch."""
    emitted: list[int] = []
    while len(emitted) < limit and EOS not in emitted:
        with torch.inference_mode():
            logits = model(torch.tensor([ids + emitted]), use_cache=False).logits[0, -1]
            if banned:
                logits[UNDO] = -torch.inf
        emitted.append(int(logits.argmax()))
    return emitted


def run(model: Any, prompts: list[np.ndarray], **changes: Any) -> list[Decoded]:
    settings: dict[str, Any] = {
        "machine": Machine(UNDO), "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 24,
    }  # fmt: skip
    return decode(model, prompts, **(settings | changes))


def same(left: list[Decoded], right: list[Decoded]) -> bool:
    return all(np.array_equal(a.raw_ids, b.raw_ids) for a, b in zip(left, right, strict=True))


def test_decode_ragged_batch_is_right_with_sliding_windows(prompts: list[np.ndarray]) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=12, initializer_range=0.4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    found = run(model, prompts, batch_size=7)
    wanted = [greedy_alone(model, prompt.tolist(), 24) for prompt in prompts]
    assert [decoded.raw_ids.tolist() for decoded in found] == wanted
    assert len({len(ids) for ids in wanted}) > 2


@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_decode_ragged_batch_equals_whole_forwards_one_by_one(
    llama: Any, prompts: list[np.ndarray], batch_size: int
) -> None:
    found = run(llama, prompts, batch_size=batch_size)
    wanted = [greedy_alone(llama, prompt.tolist(), 24) for prompt in prompts]
    assert [decoded.raw_ids.tolist() for decoded in found] == wanted
    lengths = {len(ids) for ids in wanted}
    assert len(lengths) > 3, "the test needs sequences that finish at different steps"
    assert sum(decoded.num_undos for decoded in found) > 0, "and some undos"
    for decoded, ids in zip(found, wanted, strict=True):
        assert decoded.stop_reason == ("eos" if EOS in ids else "length")
        assert decoded.num_undos == ids.count(UNDO)


def test_decode_forced_ids_equal_a_longer_prompt_but_can_be_undone(
    llama: Any, prompts: list[np.ndarray]
) -> None:
    rng = np.random.default_rng(2)
    forced = [rng.integers(3, UNDO, size=n).astype(np.int32) for n in rng.integers(0, 9, 33)]
    joined = [np.concatenate(pair) for pair in zip(prompts, forced, strict=True)]
    force: dict[str, Any] = {"undo_bias": 1e6, "max_consecutive_undos": 3}  # three undos, then free
    found, longer = run(llama, prompts, forced=forced, **force), run(llama, joined, **force)
    for one, other, start in zip(found, longer, forced, strict=True):
        assert one.raw_ids.tolist() == start.tolist() + other.raw_ids.tolist()
        assert one.emitted_ids.tolist() == other.raw_ids.tolist()
        assert one.num_forced == len(start)
        assert one.num_strays == max(0, 3 - len(start)) and other.num_strays == 3
        kept = start[: max(0, len(start) - 3)].tolist()
        assert one.reduced_ids.tolist() == kept + other.reduced_ids.tolist()


def test_decode_ban_equals_banned_one_by_one(llama: Any, prompts: list[np.ndarray]) -> None:
    found = run(llama, prompts, undo_mode="ban")
    wanted = [greedy_alone(llama, prompt.tolist(), 24, banned=True) for prompt in prompts]
    assert [decoded.raw_ids.tolist() for decoded in found] == wanted
    assert not any(decoded.undo_limited for decoded in found)


def test_decode_sampling_is_reproducible_and_independent_of_the_batch(
    llama: Any, prompts: list[np.ndarray]
) -> None:
    sampled = run(llama, prompts, temperature=3.0, top_p=0.9, seed=5)
    assert same(sampled, run(llama, prompts, temperature=3.0, top_p=0.9, seed=5, batch_size=4))
    assert not same(sampled, run(llama, prompts, temperature=3.0, top_p=0.9, seed=6))
    assert not same(sampled, run(llama, prompts))
    # A nucleus of almost no mass holds the likeliest token alone.
    assert same(run(llama, prompts, temperature=1.0, top_p=1e-6), run(llama, prompts))


class Scripted(torch.nn.Module):
    """A model whose next token is a function of the position (real tokens before it, less one)."""

    def __init__(self, script: Callable[[int], dict[int, float]]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 1)
        self.config = LlamaConfig(
            vocab_size=VOCAB, num_hidden_layers=1, max_position_embeddings=1000
        )
        self.script = script

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Any, position_ids: Any, past_key_values: Any, **_: Any) -> Any:
        states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(states, states, 0)
        logits = torch.full((len(input_ids), 1, VOCAB), -50.0)
        for row, position in enumerate(position_ids[:, -1].tolist()):
            for token, value in self.script(position).items():
                logits[row, 0, token] = value
        return SimpleNamespace(logits=logits)


PROMPT = [np.array([5, 6, 7], np.int32)]


def play(tokens: list[int], **changes: Any) -> Decoded:
    """Decode a script after the 3-token prompt; token 9 stands ready wherever one is banned."""
    start = 2 + len(changes.get("forced", [[]])[0])
    padded = tokens + [9] * 100
    model = Scripted(lambda at: {9: 0.5, padded[at - start]: 1.0})
    return run(model, PROMPT, **changes)[0]


def test_decode_reduces_at_the_end_and_keeps_the_raw_ids() -> None:
    decoded = play([10, 11, UNDO, 12, EOS])
    assert decoded.raw_ids.tolist() == [10, 11, UNDO, 12, EOS]
    assert decoded.reduced_ids.tolist() == [10, 12, EOS]
    assert (decoded.num_undos, decoded.num_strays, decoded.stop_reason) == (1, 0, "eos")
    assert not decoded.undo_limited


def test_decode_never_pops_into_the_prompt() -> None:
    decoded = play([10, UNDO, UNDO, UNDO, 11, EOS])
    assert decoded.reduced_ids.tolist() == [11, EOS]
    assert (decoded.num_undos, decoded.num_strays) == (3, 2)


def test_decode_pops_forced_ids_down_to_the_prompt() -> None:
    decoded = play([UNDO, UNDO, UNDO, 12, EOS], forced=[np.array([20, 21], np.int32)])
    assert decoded.raw_ids.tolist() == [20, 21, UNDO, UNDO, UNDO, 12, EOS]
    assert decoded.reduced_ids.tolist() == [12, EOS]
    assert (decoded.num_forced, decoded.num_undos, decoded.num_strays) == (2, 3, 1)


def test_decode_carries_out_the_semantics_of_the_machine() -> None:
    script = [10, 11, 12, 13, 14, UNDO, 15, EOS]
    for machine, wanted in (
        (Machine(UNDO), [10, 11, 12, 13, 15, EOS]),
        (Machine(UNDO, "span", frozenset({11})), [10, 11, 15, EOS]),
        (Machine(UNDO, "span", frozenset({14})), [15, EOS]),  # the top itself always goes
        (Machine(UNDO, "reset"), [15, EOS]),
    ):
        decoded = play(script, machine=machine)
        assert decoded.raw_ids.tolist() == script and decoded.num_strays == 0
        assert decoded.reduced_ids.tolist() == wanted


def test_decode_counts_strays_of_any_semantics() -> None:
    for machine in (Machine(UNDO, "span", frozenset({11})), Machine(UNDO, "reset")):
        decoded = play(
            [UNDO, UNDO, 12, UNDO, EOS], machine=machine, forced=[np.array([20, 21], np.int32)]
        )
        assert decoded.reduced_ids.tolist() == [EOS]
        # One undo takes both forced ids, the next finds nothing; 12 is there again to take.
        assert (decoded.num_undos, decoded.num_strays) == (3, 1)


def test_decode_total_limit_bans_the_undo_from_then_on() -> None:
    decoded = play([UNDO, 10, UNDO, 11, UNDO, UNDO, EOS], max_undos=2)
    assert decoded.raw_ids.tolist() == [UNDO, 10, UNDO, 11, 9, 9, EOS]
    assert decoded.undo_limited and decoded.num_undos == 2


def test_decode_consecutive_limit_counts_only_undos_in_a_row() -> None:
    script = [10, UNDO, UNDO, 11, UNDO, UNDO, UNDO, UNDO, UNDO, EOS]
    decoded = play(script, max_consecutive_undos=3)
    assert decoded.raw_ids.tolist() == [10, UNDO, UNDO, 11, UNDO, UNDO, UNDO, 9, 9, EOS]
    assert decoded.undo_limited and decoded.num_undos == 5
    assert not play(script, max_consecutive_undos=6).undo_limited


def test_decode_length_is_bounded_without_a_stop_token() -> None:
    decoded = play([UNDO] * 50, max_new_tokens=12, max_undos=100, max_consecutive_undos=100)
    assert decoded.raw_ids.tolist() == [UNDO] * 12
    assert (decoded.stop_reason, decoded.num_strays) == ("length", 12)
    assert len(decoded.reduced_ids) == 0


def test_decode_bias_makes_the_undo_likelier_by_that_much() -> None:
    model = Scripted(lambda at: {10: 1.0, UNDO: 0.0} if at < 4 else {EOS: 1.0})
    assert run(model, PROMPT, undo_bias=0.9)[0].num_undos == 0
    assert run(model, PROMPT, undo_bias=1.1)[0].num_undos == 2
    assert run(model, PROMPT, undo_bias=1.1, undo_mode="ban")[0].num_undos == 0


def test_decode_sampling_follows_the_distribution_and_never_picks_a_banned_undo() -> None:
    model = Scripted(lambda at: {10: np.log(0.6), 11: np.log(0.3), UNDO: np.log(0.1), 12: -99.0}
                     if at == 2 else {EOS: 50.0})  # fmt: skip
    many = PROMPT * 500
    first = np.array([d.raw_ids[0] for d in run(model, many, temperature=1.0, batch_size=500)])
    assert {int(token) for token in first} == {10, 11, UNDO}
    assert abs((first == 10).mean() - 0.6) < 0.07
    nucleus = run(model, many, temperature=1.0, top_p=0.85, batch_size=500)
    assert {int(d.raw_ids[0]) for d in nucleus} == {10, 11}
    banned = run(model, many, temperature=1.0, undo_mode="ban", undo_bias=9.0, batch_size=500)
    assert UNDO not in {int(d.raw_ids[0]) for d in banned}


def test_sample_inverts_the_distribution_at_a_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]]).expand(2000, -1)
    draws = (torch.arange(2000) + 0.5) / 2000
    tokens = sample(logits, draws, temperature=2.0, top_p=1.0)
    shares = torch.bincount(tokens, minlength=4) / 2000
    assert torch.allclose(shares, (logits[0] / 2).softmax(0), atol=1e-3)
    # Nucleus: the two likeliest have .506 and .307; their ratio is kept, the rest is cut off.
    tokens = sample(logits, draws, temperature=2.0, top_p=0.6)
    share = float((tokens == 1).float().mean())
    assert set(tokens.tolist()) == {1, 2}
    assert share == pytest.approx(1 / (1 + np.exp(-0.5)), abs=1e-3)


def test_sample_highest_draw_never_reaches_a_banned_token() -> None:
    logits = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = -torch.inf
    highest = torch.full((4000,), 1 - 2**-24)
    assert 7 not in sample(logits, highest, temperature=1.0, top_p=1.0).tolist()


def test_decode_positions_start_at_zero_whatever_the_padding() -> None:
    model = Scripted(lambda at: {10 + at: 1.0} if at < 8 else {EOS: 1.0})
    ragged = [np.arange(3, 3 + size, dtype=np.int32) for size in (2, 6, 1)]
    found = run(model, ragged)
    assert [d.raw_ids.tolist() for d in found] == [
        [*range(9 + size, 18), EOS] for size in (2, 6, 1)
    ]


def test_decode_drops_finished_sequences_from_the_batch() -> None:
    model = Scripted(lambda at: {10: 1.0} if at < 8 else {EOS: 1.0})
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run(model, [np.arange(3, 3 + size, dtype=np.int32) for size in (8, 6, 4, 2)])
    assert rows == [4, 4, 3, 3, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: 0, expected at least 1"),
        ({"max_new_tokens": 126}, ConfigError, "make 129, expected at most the model's 128"),
        ({"temperature": -1.0}, ConfigError, "temperature: -1.0"),
        ({"temperature": float("nan")}, ConfigError, "temperature: nan"),
        ({"temperature": float("inf")}, ConfigError, "temperature: inf, expected 0 (greedy) or"),
        ({"temperature": 1e39}, ConfigError, "temperature: 1e+39, expected 0 (greedy) or 0.0001"),
        ({"temperature": 1e-40}, ConfigError, "temperature: 1e-40, expected 0 (greedy) or 0.0001"),
        ({"undo_bias": 1e39}, ConfigError, "undo_bias: 1e+39, expected -1e+06 to 1e+06"),
        ({"undo_bias": -1e39}, ConfigError, "undo_bias: -1e+39, expected"),
        ({"undo_bias": float("nan")}, ConfigError, "undo_bias: nan, expected"),
        ({"top_p": 0.0}, ConfigError, "top_p: 0.0"),
        ({"max_revisits": -1}, ConfigError, "max_revisits: -1, expected 0 or more"),
        ({"undo_mode": "Ban"}, ConfigError, "undo_mode: 'Ban'"),
        ({"machine": Machine(VOCAB)}, VocabularyError, "id 40: beyond the model's vocabulary"),
    ],
)
def test_decode_refuses_settings_in_one_line(
    llama: Any, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match="decoding: ") as caught:
        run(llama, PROMPT, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, MAX_TEMPERATURE])
@pytest.mark.parametrize("bias", [-MAX_UNDO_BIAS, MAX_UNDO_BIAS])
def test_decode_computes_with_all_numbers_it_takes(
    temperature: float, bias: float, llama: Any, prompts: list[np.ndarray]
) -> None:
    """A banned token has no probability, however the others are bent."""
    banned = [*range(4), *range(20, UNDO)]
    found = run(
        llama, prompts, temperature=temperature, undo_bias=bias, banned_ids=banned, max_undos=7
    )  # fmt: skip
    emitted = np.concatenate([decoded.emitted_ids for decoded in found])
    assert not np.isin(emitted, banned).any()
    if bias < 0:
        assert UNDO not in emitted
    else:
        assert all(decoded.emitted_ids[:7].tolist() == [UNDO] * 7 for decoded in found)
        assert all(decoded.num_undos == 7 for decoded in found)


def test_decode_refuses_an_empty_prompt(llama: Any) -> None:
    with pytest.raises(ConfigError, match="prompt: no token"):
        run(llama, [*PROMPT, np.empty(0, np.int32)])


def test_decode_nothing_gives_nothing(llama: Any) -> None:
    assert run(llama, []) == []


# --- guards that look at the stack, events ------------------------------------------------------

SEMANTICS = (
    Machine(UNDO), Machine(UNDO, "span", frozenset({11, 14})), Machine(UNDO, "reset"),
)  # fmt: skip


@pytest.mark.parametrize("machine", SEMANTICS, ids=["token", "span", "reset"])
def test_the_running_stack_is_the_finished_one(machine: Machine) -> None:
    """Against the machine over whole responses, with the counts of `metrics`."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([10, 11, 12, 14, UNDO], size=rng.integers(0, 25)).astype(np.int32)
        stack = Stack(machine)
        kept: list[int] = []
        for place, token in enumerate(ids.tolist()):
            event = stack.write(token)
            if isinstance(event, Retract):
                taken = len(event.tokens)
                assert event.tokens == tuple(kept[len(kept) - taken :])
                del kept[len(kept) - taken :]
            else:
                kept.append(event.token)
            assert stack.ids == kept == reduce(ids[: place + 1], machine).tolist()
        assert stack.num_revisits == num_revisits(ids, machine)
        again = stack.copy()
        again.write(10)
        assert stack.ids == kept and again.ids == [*kept, 10]


def test_tabu_keeps_what_was_taken_back_from_coming_again() -> None:
    """9 stands ready: after 10 11 was undone, 10 may not come where it stood, but elsewhere."""
    script = [10, 11, UNDO, 11, UNDO, UNDO, 10, 10, EOS]
    assert play(script).raw_ids.tolist() == script
    decoded = play(script, tabu=True)
    # 11 was taken back after 10, so 9 comes instead; then 9 and 10 go, and 10 may not start again.
    assert decoded.raw_ids.tolist() == [10, 11, UNDO, 9, UNDO, UNDO, 9, 10, EOS]
    assert decoded.reduced_ids.tolist() == [9, 10, EOS]


@pytest.mark.parametrize("begin", [[], [5, 14]], ids=["at base", "after a boundary"])
@pytest.mark.parametrize("machine", SEMANTICS[1:], ids=["span", "reset"])
def test_tabu_lets_a_correction_repeat_the_right_tokens_taken_along(
    begin: list[int], machine: Machine
) -> None:
    """10 was right, and has to be written again (SPEC 2); the 12 after it was wrong."""
    rest = [*begin, 10] if machine.semantics == "reset" else [10]
    right = play([*begin, 10, 12, UNDO, *rest, 13, EOS], machine=machine, tabu=True)
    assert right.reduced_ids.tolist() == [*begin, 10, 13, EOS]
    # What was taken back does not come again as a whole; without the guard it does.
    script = [*begin, 10, 12, UNDO, *rest, 12, EOS]
    assert play(script, machine=machine).reduced_ids.tolist() == [*begin, 10, 12, EOS]
    again = play(script, machine=machine, tabu=True)
    assert again.reduced_ids.tolist() == [*begin, 10, 9, EOS]
    late = play([*begin, 10, 12, 13, UNDO, *rest, 12, 13, EOS], machine=machine, tabu=True)
    assert late.reduced_ids.tolist() == [*begin, 10, 12, 9, EOS]


def test_tabu_knows_the_beginning_that_was_given() -> None:
    forced = [np.array([20, 21, UNDO], np.int32)]
    model = Scripted(lambda at: {21: 1.0, 9: 0.5} if at == 5 else {EOS: 1.0})
    assert run(model, PROMPT, forced=forced)[0].emitted_ids.tolist() == [21, EOS]
    assert run(model, PROMPT, forced=forced, tabu=True)[0].emitted_ids.tolist() == [9, EOS]


def test_loops_end() -> None:
    """10 UNDO 10 UNDO ... comes back to 10 each time."""
    script = [10, UNDO] * 10 + [EOS]
    decoded = play(script, max_revisits=2)
    # Three ways back are one too many: from then on 9 stands where an undo would have been.
    assert decoded.raw_ids.tolist() == [*[10, UNDO] * 3, 10, *[9, 10] * 6, 9, EOS]
    assert decoded.loop_limited and not decoded.undo_limited and decoded.num_undos == 3
    assert not play(script, max_revisits=9).loop_limited
    assert not play(script).loop_limited
    # What was given does not count.
    forced = [np.array([10, UNDO] * 5, np.int32)]
    assert not play([10, EOS], forced=forced, max_revisits=1).loop_limited


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_events_say_what_happens_as_it_happens(
    bias: float, llama: Any, prompts: list[np.ndarray]
) -> None:
    events: dict[int, list[Event]] = {}
    found = run(
        llama, prompts, undo_bias=bias, batch_size=7,
        on_event=lambda index, event: events.setdefault(index, []).append(event),
    )  # fmt: skip
    plain = run(llama, prompts, undo_bias=bias)
    assert same(found, plain), "watching changes nothing"
    assert sum(decoded.num_undos for decoded in found) > (5 if bias else 0)
    if not bias:
        assert len({len(decoded.raw_ids) for decoded in found}) > 3, "rows are dropped meanwhile"
    for index, decoded in enumerate(found):
        kept: list[int] = []
        for event in events[index]:
            if isinstance(event, Retract):
                del kept[len(kept) - len(event.tokens) :]
            else:
                kept.append(event.token)
        assert kept == decoded.reduced_ids.tolist()
        assert len(events[index]) == len(decoded.emitted_ids)


def test_a_response_may_be_stopped_by_what_is_left_of_it(
    llama: Any, prompts: list[np.ndarray]
) -> None:
    decoded = play([10, 11, UNDO, 12, 13, EOS], should_stop=lambda ids: list(ids) == [10, 12])
    assert decoded.raw_ids.tolist() == [10, 11, UNDO, 12]
    assert decoded.stop_reason == "stop"
    assert play([10, EOS], should_stop=lambda ids: EOS in ids).stop_reason == "eos"
    # Row by row: each ends where it would alone, whatever batch it is in.
    found = run(llama, prompts, batch_size=5, should_stop=lambda ids: len(ids) >= 3)
    alone = [greedy_alone(llama, prompt.tolist(), 24) for prompt in prompts]
    for decoded, ids in zip(found, alone, strict=True):
        assert decoded.raw_ids.tolist() == ids[: len(decoded.raw_ids)]
        assert decoded.stop_reason in ("eos", "length") or len(decoded.reduced_ids) == 3


# --- plain generate ------------------------------------------------------------------------------

GUARDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"undo_bias": 4.0},
    "limits": {"undo_bias": 6.0, "max_undos": 4, "max_consecutive_undos": 2},
    "ban": {"undo_mode": "ban"},
    "tabu": {"undo_bias": 4.0, "tabu": True},
    "loops": {"undo_bias": 5.0, "max_revisits": 1},
}


@pytest.mark.parametrize("guards", GUARDS)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("machine", SEMANTICS, ids=["token", "span", "reset"])
def test_plain_generate_with_the_processor_gives_the_same(
    guards: str, begun: bool, machine: Machine, llama: Any, prompts: list[np.ndarray]
) -> None:
    """Ragged prompts, padded on the left, in one call of transformers' own `generate`."""
    start = np.array([10, 11, 12], np.int32) if begun else np.empty(0, np.int32)
    found = run(
        llama, prompts, machine=machine, forced=[start] * len(prompts), **GUARDS[guards]
    )  # fmt: skip
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest + len(start)), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = np.concatenate([prompt, start])
        ids[row, len(ids[row]) - len(own) :] = torch.from_numpy(own)
        mask[row, len(ids[row]) - len(own) :] = 1
    processor = UndoLogitsProcessor(
        machine, num_prompt=longest, num_forced=len(start), **GUARDS[guards]
    )
    output = llama.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=EOS,
        pad_token_id=PAD, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    reduced = reduce_generated(output, longest, machine, eos_id=EOS)
    assert [ids.tolist() for ids in reduced] == [d.reduced_ids.tolist() for d in found]
    if "undo_bias" in GUARDS[guards]:
        assert sum(decoded.num_undos for decoded in found) > 0


def test_the_processor_follows_beams(llama: Any, prompts: list[np.ndarray]) -> None:
    """Each beam's own history counts, wherever beam search has moved it."""
    rules: dict[str, Any] = {"num_prompt": 5, "undo_bias": 6.0, "max_undos": 2, "tabu": True}

    class Compared(UndoLogitsProcessor):
        """What it remembers is what it would find out."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            found = super().__call__(input_ids, scores)
            afresh = UndoLogitsProcessor(Machine(UNDO), **rules)(input_ids, scores)
            assert torch.equal(found, afresh)
            return found

    processor = Compared(Machine(UNDO), **rules)
    prompt = torch.from_numpy(np.concatenate([p for p in prompts if len(p) > 4])[:5])[None].long()
    output = llama.generate(
        prompt, max_new_tokens=12, num_beams=4, num_return_sequences=4, do_sample=False,
        eos_token_id=EOS, pad_token_id=PAD, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    for row in output[:, 5:].tolist():
        assert row.count(UNDO) <= 2
        stack = Stack(Machine(UNDO))
        for token in row:
            assert token not in stack.taken_back or token == PAD
            stack.write(token)
    assert any(UNDO in row for row in output[:, 5:].tolist())


def test_the_processor_knows_the_beginning_that_was_given() -> None:
    processor = UndoLogitsProcessor(Machine(UNDO), num_prompt=1, num_forced=3, tabu=True)
    for more in ([], [30, UNDO]):
        scores = processor(torch.tensor([[5, 20, 21, UNDO, *more]]), torch.zeros(1, VOCAB))
        banned = torch.isinf(scores[0]).nonzero()[:, 0].tolist()
        assert banned == ([21, 30] if more else [21])


def test_reducing_what_a_server_returned() -> None:
    sequences = [[5, 6, 10, 11, UNDO, 12, EOS, PAD, PAD], [7, 8, UNDO, 10]]
    first, second = reduce_generated(sequences, 2, Machine(UNDO), eos_id=[EOS, 3])
    assert first.tolist() == [10, 12, EOS] and second.tolist() == [10]
    assert first.dtype == np.int32
    with pytest.raises(ConfigError, match="num_prompt, num_forced: 0, 0, expected at least 1"):
        UndoLogitsProcessor(Machine(UNDO), num_prompt=0)
