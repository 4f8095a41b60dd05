"""One small run from records to a decoded answer, measured at every stage by the package's code.

Nothing here is computed a second way, with one exception: `role_gradients` takes the traces one by
one through a stock model and a naive log-softmax, because the Safety Gap identity compared with
itself would prove nothing.
"""

# B rows, T tokens per row, N = B*T, V vocabulary, K roles

from __future__ import annotations

import copy
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nmar_ds.config import RunConfig, deepspeed_config, load_config
from nmar_ds.data.loader import Batch, RowLoader
from nmar_ds.data.prepare import prepare_run
from nmar_ds.inference.decoding import Decoded, decode
from nmar_ds.inference.exported import load_exported_tokenizer, load_model, read_settings
from nmar_ds.model import loading
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import denominator, role_weights
from nmar_ds.traces.encoding import Tokenizer
from nmar_ds.traces.schema import NUM_ROLES, IdArray, Role, Trace
from nmar_ds.training.engine import make_optimizer
from nmar_ds.training.export import export_checkpoint
from nmar_ds.training.loop import forward_arguments, learning_rate
from nmar_ds.training.planning import RunPlan, plan_run

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
Gradients = dict[str, torch.Tensor]


@dataclasses.dataclass(kw_only=True)
class Example:
    """What the page shows.

    Attributes:
        config: the run's configuration, its outputs in a folder of their own.
        prepared: the lines that `launcher/prepare.py` prints.
        tokenizer: trained on the example's records.
        plan: stores and rows.
        batch: the one packed row.
        undo_row: how `<UNDO>` got its row in the model.
        nll_N: float64[N], -log p of every response target, 0 elsewhere.
        counts_K: int64[K] targets of the row by role.
        sums_K: float64[K], the S_k of SPEC section 3.
        gradients: by (preset, denominator) the gradient of the loss; "e" is G_e by autograd alone.
        sees_TT: bool[T, T], whether the output at a place depends on the token at another.
        leaks_TT: the same for the stock model with an all-ones mask over the whole row.
        shown: (parameter, row, column) of the one weight that the page follows.
        norm: gradient norm before clipping.
        losses: L before and after one step, in float64. weight: the shown one, likewise.
        log: what the ZeRO-3 run printed.
        checkpoint, exported: the files it left.
        decoded: prompts with their greedy answers: the first trace's prefix and deviation are
            forced on the model, the third prompt is answered freely.
    """

    config: RunConfig
    prepared: list[str]
    tokenizer: Tokenizer
    plan: RunPlan
    batch: Batch
    undo_row: str
    nll_N: np.ndarray[Any, Any]
    counts_K: np.ndarray[Any, Any]
    sums_K: np.ndarray[Any, Any]
    gradients: dict[Any, Gradients]
    sees_TT: np.ndarray[Any, Any]
    leaks_TT: np.ndarray[Any, Any]
    shown: tuple[str, int, int]
    norm: float
    losses: tuple[float, float]
    weight: tuple[float, float]
    log: list[str]
    checkpoint: list[str]
    exported: list[str]
    decoded: list[tuple[IdArray, Decoded]]

    def trace(self, index: int) -> Trace:
        """A stored trace."""
        return self.plan.store.trace(index)

    def pieces(self, ids: Any) -> list[str]:
        """Display forms of ids."""
        return [self.tokenizer.piece(int(token)) for token in ids]


def run_example(folder: Path) -> Example:
    """Prepare, measure, train, export and decode, all under `folder`."""
    os.chdir(ROOT)  # the configuration names its records from there
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    config = load_config(FOLDER / "config.yaml", overrides(folder))
    prepared = [line.replace(f"{folder}/", "") for line in prepare_run(config)]
    size = int(re.findall(r"(\d+) ids", prepared[0])[0])
    write_model(folder / "model", num_rows=size - 1)  # it doesn't know <UNDO> yet
    plan = plan_run(config)
    loader = RowLoader(
        plan.store, plan.plan, plan.store.role_counts, seed=config.seed, global_batch_rows=1,
        micro_batch_rows=1, rank=0, world_size=1, pad_id=plan.store.manifest["tokenizer"]["pad_id"],
    )  # fmt: skip
    (batch,) = loader.batches_of_step(0)
    lm, undo_row = float64_model(config, plan)
    stock = copy.deepcopy(lm)  # before ours refuses masks
    stock.set_attn_implementation("sdpa")
    stock.config.use_cache = False
    model = UndoTrainingModel(lm)
    measured = forward_and_backward(model, batch, loader)
    measured["gradients"]["e"] = deviation_gradient(stock, plan, measured["gradients"])
    # In the head, the row of the first wrong token: what SFT pulls up and mSFT leaves alone.
    first = plan.store.trace(0)
    shown = ("lm_head.weight", int(first.ids[first.onsets[0]]), 0)
    return Example(
        config=config, prepared=prepared, tokenizer=plan.store.tokenizer(), plan=plan, batch=batch,
        undo_row=undo_row, **measured, sees_TT=dependence(model, batch),
        leaks_TT=dependence(stock, batch), shown=shown,
        **one_step(model, batch, config, loader, shown),
        **train_and_decode(config, plan, folder),
    )  # fmt: skip


def overrides(folder: Path) -> list[str]:
    """Arguments that place everything the run writes under `folder`."""
    places = {"output": "run", "data.store": "store", "model.path": "model"}
    places |= {"tokenizer.path": "tokenizer.model"}
    return [f"{key}={folder / name}" for key, name in places.items()]


def write_model(folder: Path, *, num_rows: int) -> None:
    """A Llama of 2 layers with weights from NumPy's generator: the same on every machine."""
    settings = transformers.LlamaConfig(
        vocab_size=num_rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    lm = transformers.LlamaForCausalLM(settings)
    rng = np.random.Generator(np.random.Philox(key=7))
    with torch.no_grad():
        for _, parameter in sorted(lm.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(rng.normal(0, 0.2, size=parameter.shape)))
    lm.save_pretrained(folder)


def float64_model(config: RunConfig, plan: RunPlan) -> tuple[Any, str]:
    """The run's model as `run.py` builds it, on one process and in double precision."""
    facts = plan.store.manifest["tokenizer"]
    loaded = loading.load_model(
        config.model, deepspeed_config(config, world_size=1, device="cpu"),
        tokenizer_size=facts["size"],
        undo_id=facts["undo_id"], tokenizer_fingerprint=facts["fingerprint"],
        ids={f"{name}_token_id": facts[f"{name}_id"] for name in ("bos", "eos", "pad")},
        seed=config.seed, undo_init=plan.undo_init, partition=False,
    )  # fmt: skip
    return loaded.model.double(), loaded.undo_row


def arguments_of(batch: Batch, weights: Any) -> dict[str, Any]:
    """What the loop hands to the model."""
    return forward_arguments(batch, weights, torch.device("cpu"))


def forward_and_backward(
    model: UndoTrainingModel, batch: Batch, loader: RowLoader
) -> dict[str, Any]:
    """Losses per token and role, and gradients under both presets and two denominators."""
    counts_K, num_traces = loader.counts_of_step(0)
    nll_N = model(**arguments_of(batch, role_weights("msft")), mode="nll").numpy()
    gradients: dict[Any, Gradients] = {}
    for preset in ("msft", "sft"):
        weights = role_weights(preset)
        result = model(**arguments_of(batch, weights), also_untrained=True)
        for kind in ("common", "trained"):
            divisor = denominator(kind, counts_K, weights, num_traces)
            gradients[preset, kind] = gradients_of(model.lm, result.loss_sum / divisor)
    sums_K = result.role_sums.numpy()
    return {"nll_N": nll_N, "counts_K": counts_K, "sums_K": sums_K, "gradients": gradients}


def gradients_of(lm: Any, loss: torch.Tensor) -> Gradients:
    """Every parameter's gradient of a loss, by name."""
    names, parameters = zip(*lm.named_parameters(), strict=True)
    values = torch.autograd.grad(loss, parameters, retain_graph=True)
    return dict(zip(names, values, strict=True))


def deviation_gradient(stock: Any, plan: RunPlan, like: dict[Any, Gradients]) -> Gradients:
    """G_e: each trace alone, stock attention, naive log-softmax, autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for index in range(plan.store.num_traces):
        ids = torch.from_numpy(plan.store.ids(index).astype(np.int64))
        is_deviation = torch.from_numpy(plan.store.roles(index)[1:] == Role.DEVIATION)
        log_p = torch.log_softmax(stock(input_ids=ids[None], use_cache=False).logits[0, :-1], -1)
        total = total - log_p[torch.arange(len(ids) - 1), ids[1:]][is_deviation].sum()
    return gradients_of(stock, total)


def dependence(model: Any, batch: Batch) -> np.ndarray[Any, Any]:
    """Which output depends on which input: where its derivative is not zero. bool[T, T].

    A stock model gets the usual all-ones mask; the training model has its segment attention.
    """
    caught: list[torch.Tensor] = []
    lm = getattr(model, "lm", model)
    hook = lm.get_input_embeddings().register_forward_hook(lambda *call: caught.append(call[2]))
    arguments = arguments_of(batch, np.zeros(NUM_ROLES))
    ids_BT, positions_BT = arguments["input_ids_BT"], arguments["position_ids_BT"]
    if model is lm:
        logits_TV = lm(
            input_ids=ids_BT, position_ids=positions_BT, attention_mask=torch.ones_like(ids_BT)
        ).logits[0]
    else:
        places = torch.arange(ids_BT.numel())
        logits_TV = model(
            ids_BT, positions_BT, arguments["layout"], mode="logits", positions_M=places
        )
    hook.remove()
    mixed_T = logits_TV @ torch.linspace(1, 2, logits_TV.shape[1], dtype=logits_TV.dtype)
    rows = [
        torch.autograd.grad(value, caught[0], retain_graph=True)[0][0].abs().sum(dim=1) > 0
        for value in mixed_T
    ]
    return torch.stack(rows).numpy()


def one_step(
    model: UndoTrainingModel,
    batch: Batch,
    config: RunConfig,
    loader: RowLoader,
    shown: tuple[str, int, int],
) -> dict[str, Any]:
    """The optimizer's first step under the run's objective, clipped as the engine clips."""
    weights = role_weights(config.objective.preset)
    counts_K, num_traces = loader.counts_of_step(0)
    divisor = denominator(config.objective.denominator, counts_K, weights, num_traces)
    optimizer = make_optimizer(model, config.optimizer)
    assert config.training.steps is not None
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(0, config.training.steps, config.optimizer)
    before, weight_before = loss_of(model, batch, weights) / divisor, value_at(model.lm, shown)
    before.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
    optimizer.step()
    after = loss_of(model, batch, weights) / divisor
    return {
        "norm": float(norm),
        "losses": (float(before.detach()), float(after.detach())),
        "weight": (weight_before, value_at(model.lm, shown)),
    }


def loss_of(model: UndoTrainingModel, batch: Batch, weights: Any) -> torch.Tensor:
    """The weighted sum of the row, not divided."""
    loss: torch.Tensor = model(**arguments_of(batch, weights)).loss_sum
    return loss


def value_at(lm: Any, place: tuple[str, int, int]) -> float:
    """One weight: (parameter, row, column)."""
    name, row, column = place
    return float(lm.get_parameter(name)[row, column].detach())


def train_and_decode(config: RunConfig, plan: RunPlan, folder: Path) -> dict[str, Any]:
    """The real run under ZeRO-3 on one rank; then export and decode with what it wrote."""
    command = [sys.executable, "launcher/train.py", "--config", FOLDER / "config.yaml"]
    launched = subprocess.run(
        [*command, *overrides(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if launched.returncode != 0:
        raise SystemExit(f"launcher/train.py: exit {launched.returncode}\n{launched.stderr}")
    export_checkpoint(Path(config.output), folder / "export")
    files = sorted(
        str(file.relative_to(config.output))
        for file in (Path(config.output) / "checkpoints").rglob("*")
        if file.is_file()
    )
    settings = read_settings(folder / "export")
    tokenizer = load_exported_tokenizer(folder / "export", settings)
    asked = [
        _forced(plan.store.trace(0), Role.DEVIATION),
        _forced(plan.store.trace(2), Role.PROMPT),
    ]
    decoded = decode(
        load_model(folder / "export"), [prompt_ids for prompt_ids, _ in asked],
        machine=settings.machine, eos_id=settings.eos_id, pad_id=settings.pad_id,
        max_new_tokens=24, forced=[forced_ids for _, forced_ids in asked],
    )  # fmt: skip
    assert tokenizer.size == plan.store.manifest["tokenizer"]["size"]
    return {
        "log": launched.stdout.splitlines(),
        "checkpoint": files,
        "exported": sorted(file.name for file in (folder / "export").iterdir()),
        "decoded": [(ids, one) for (ids, _), one in zip(asked, decoded, strict=True)],
    }


def _forced(trace: Trace, last: Role) -> tuple[IdArray, IdArray]:
    """A trace's prompt, and what follows it up to the end of a segment."""
    ends = [int(np.flatnonzero(trace.roles == role)[-1]) + 1 for role in (Role.PROMPT, last)]
    return trace.ids[: ends[0]], trace.ids[ends[0] : ends[1]]
