"""The other way to the same numbers: one trace at a time, stock model, naive log-softmax, autograd.

It shares no code with the training step (nothing of `nmar_ds.model`, `nmar_ds.data` or
`nmar_ds.training`): two runs of one implementation would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nmar_ds.acceptance.tiny import NUM_TRACES, VOCAB, make_traces, model_keys
from nmar_ds.traces.schema import Role

Array = npt.NDArray[Any]
Named = dict[str, Array]


class Traces(Protocol):
    """Traces by index."""

    def ids(self, index: int) -> Array:
        """Ids[T] of one trace."""

    def roles(self, index: int) -> Array:
        """Roles[T] of one trace."""


def stock_model(state: Named, *, tied: bool, dtype: torch.dtype) -> Any:
    """The stock model with given weights, in one process."""
    import transformers

    keys = model_keys(tied)
    keys.pop("model_type")
    config = transformers.LlamaConfig(**keys, vocab_size=VOCAB, use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.set_attn_implementation("eager")
    loaded = {name.removeprefix("lm."): torch.from_numpy(value) for name, value in state.items()}
    missing = model.load_state_dict(loaded, strict=False)
    assert not missing.unexpected_keys
    model.tie_weights()
    return model


def reference_objective(
    state: Named,
    *,
    tied: bool,
    traces: list[int],
    weights: list[float],
    nll_clip: float = float("inf"),
    unlikelihood: float = 0.0,
    num_traces: int = NUM_TRACES,
) -> dict[str, Any]:
    """The loss sum with its options, target by target in plain Python, and its gradient."""
    model = stock_model(state, tied=tied, dtype=torch.float64)
    everything = make_traces(num=num_traces)
    total, pushed = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    counts, sums, num_beyond = np.zeros(5, dtype=np.int64), np.zeros(5), 0
    for index in traces:
        ids, roles = everything[index]
        if len(ids) < 2:
            continue
        logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
        p = torch.softmax(logits[:-1].double(), dim=-1)
        for place, role in enumerate(roles[1:].tolist()):
            p_target = p[place, int(ids[place + 1])]
            counts[role] += 1
            nll = -torch.log(p_target)
            sums[role] += float(nll.detach())
            if weights[role] < 0 and float(nll.detach()) > nll_clip:
                nll = torch.tensor(nll_clip, dtype=torch.float64)
                num_beyond += 1
            total = total + weights[role] * nll
            if role == Role.DEVIATION:
                pushed = pushed - torch.log(1 - p_target)
    loss = total + unlikelihood * pushed
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        "loss": float(loss.detach()),
        "unlikelihood": float(pushed.detach()),
        "counts": counts,
        "sums": sums,
        "num_beyond": num_beyond,
        "gradients": {
            f"lm.{name}": parameter.grad.numpy().copy()
            for name, parameter in model.named_parameters()
        },
    }


def reference_gradients(
    state: Named,
    *,
    tied: bool,
    traces: list[int],
    dtype: torch.dtype,
    num_traces: int = NUM_TRACES,
) -> tuple[dict[int, Named], Array, Array]:
    """Gradient of S_k for every role k, trace by trace, on the stock model.

    Returns:
        gradients[role][name], S_k as float64[5], N_k as int64[5].
    """
    model = stock_model(state, tied=tied, dtype=dtype)
    everything = make_traces(num=num_traces)
    sums, counts = np.zeros(5), np.zeros(5, dtype=np.int64)
    gradients: dict[int, Named] = {}
    for role in range(5):
        model.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for index in traces:
            ids, roles = everything[index]
            if len(ids) < 2:
                continue
            logits = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
            log_p = torch.log_softmax(logits[:-1].to(dtype), dim=-1)
            picked = np.flatnonzero(roles[1:] == role)
            counts[role] += len(picked)
            for place in picked:
                total = total - log_p[place, int(ids[place + 1])]
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        sums[role] = float(total.detach())
        gradients[role] = {
            f"lm.{name}": (
                np.zeros(tuple(p.shape)) if p.grad is None else p.grad.double().numpy().copy()
            )
            for name, p in model.named_parameters()
        }
    return gradients, sums, counts


def reference_nll(model: Any, traces: Traces, index: int) -> tuple[Tensor, Array]:
    """Naive per-target losses of one trace, alone, by the stock model; and the targets' roles."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(traces.ids(index)).to(device, torch.int64)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(logits.to(exact), dim=-1)
    return -log_p[torch.arange(len(ids) - 1), ids[1:]], traces.roles(index)[1:]


def reference_sums(model: Any, traces: Traces, indices: Iterable[int]) -> list[Tensor]:
    """S_k of SPEC 3 as five differentiable scalars, trace by trace."""
    device = next(model.parameters()).device
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(5)]
    for index in indices:
        nll, roles = reference_nll(model, traces, index)
        for role in range(5):
            picked = torch.from_numpy(roles == role).to(device)
            sums[role] = sums[role] + nll[picked].double().sum()
    return sums


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    """Full gradients of a loss, one tensor per parameter in order of name; zeros where unused."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))


def worst_gap(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """max|a - b| / max|b|, per tensor; the worst. NaN where anything is not a number."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        scale = float(b.abs().max())
        difference = float((a.to(b) - b).abs().max())
        gap = difference / scale if scale else difference
        if math.isnan(gap):
            return gap
        worst = max(worst, gap)
    return worst


def gap(a: Named, b: Named) -> float:
    """Max |a - b| / max |b| over all named arrays together. NaN where anything is not a number."""
    assert a.keys() == b.keys()
    largest = max(float(np.abs(value).max()) for value in b.values())
    return float(np.max([np.abs(a[name] - b[name]).max() for name in b])) / largest


def combine(parts: dict[int, Named], weights: Sequence[float], divisor: float) -> Named:
    """sum_k w_k G_k / D."""
    return {
        name: np.sum([weights[role] * parts[role][name] for role in range(5)], axis=0) / divisor
        for name in parts[0]
    }
