"""What the ranks of a pool run: the training step itself, on tiny models, with gradients kept.

The reference (`reference_gradients`) shares no code with it: one trace at a time, the stock
model, naive log-softmax, autograd, one process.
"""

# W ranks, D denominator

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nmar_ds.traces.schema import Role

VOCAB = 61
UNDO = 60
LENGTH = 24


class ListSource:
    """Traces held in memory, as the loader wants them."""

    def __init__(self, traces: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.traces = traces

    def ids(self, index: int) -> np.ndarray:
        return self.traces[index][0]

    def roles(self, index: int) -> np.ndarray:
        return self.traces[index][1]


def make_traces(seed: int = 0, *, num: int = 9) -> list[tuple[np.ndarray, np.ndarray]]:
    """Traces of uneven lengths and uneven shares of deviation; one is a prompt and one token."""
    rng = np.random.default_rng(seed)
    traces = []
    for index in range(num):
        prompt, prefix, wrong = rng.integers(1, 4), rng.integers(1, 5), rng.integers(1, 5)
        if index % 4 == 3:
            wrong = 0
        right = rng.integers(1, 6) if wrong else 0
        roles = np.repeat(
            [Role.PROMPT, Role.PREFIX, Role.DEVIATION, Role.UNDO, Role.CORRECTION],
            [prompt, prefix, wrong, wrong, right],
        ).astype(np.uint8)
        ids = rng.integers(0, UNDO, size=len(roles)).astype(np.int32)
        ids[roles == Role.UNDO] = UNDO
        traces.append((ids, roles))
    # Nothing of this one is trained under any preset: a whole micro-batch of it stays silent.
    ids = rng.integers(0, UNDO, size=LENGTH).astype(np.int32)
    traces.append((ids, np.full(LENGTH, Role.PROMPT, dtype=np.uint8)))
    return traces


def model_keys(tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }


def settings(world_size: int, *, global_rows: int, persistence: int, learning_rate: float) -> Any:
    from nmar_ds.config import RunConfig, deepspeed_config

    config = RunConfig.model_validate(
        {
            "name": "test",
            "output": "unused",
            "tokenizer": {"path": "unused"},
            "data": {"train": ["x"], "heldout": ["x"], "store": "x", "sequence_length": LENGTH},
            "model": {"config": model_keys(True), "dtype": "float32"},
            "optimizer": {
                "name": "sgd",
                "learning_rate": learning_rate,
                "max_grad_norm": 0.0,
                "final_learning_rate_ratio": 1.0,
            },
            "training": {"steps": 4, "global_batch_rows": global_rows},
            "zero": {"param_persistence_threshold": persistence},
        }
    )
    return config, deepspeed_config(config, world_size=world_size)


def train_step(
    *,
    tied: bool,
    weights: list[float],
    denominator: str = "common",
    persistence: int = 0,
    learning_rate: float = 0.05,
    gradient_checkpointing: bool = False,
    whole_layers: bool = True,
    break_it: str | None = None,
    options: dict[str, float] | None = None,
    folder: str | None = None,
) -> dict[str, Any]:
    """One optimizer step of the real loop over a global batch of 4 rows.

    With `folder` the model is loaded from there, else it is random.

    Returns:
        Unclipped full gradients, weights before and after, and the loss over all ranks.
    """
    import torch.distributed as dist

    from nmar_ds.config import ModelSection
    from nmar_ds.data.loader import RowLoader, count_targets
    from nmar_ds.data.packing import best_fit_decreasing
    from nmar_ds.model.loading import load_model
    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.model.weighting import LossOptions
    from nmar_ds.training.engine import Engine, ProcessPeers, make_optimizer
    from nmar_ds.training.loop import TrainingLoop

    loss_options = LossOptions(**(options or {}))
    world_size, rank = dist.get_world_size(), dist.get_rank()
    config, ds_settings = settings(
        world_size, global_rows=4, persistence=persistence, learning_rate=learning_rate
    )
    section = ModelSection(
        **({"config": model_keys(tied)} if folder is None else {"path": folder}),
        dtype="float32",
        activation_checkpointing=gradient_checkpointing,
    )
    loaded = load_model(
        section,
        ds_settings,
        tokenizer_size=VOCAB,
        undo_id=UNDO,
        ids={"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        seed=3,
        peers=ProcessPeers(),
    )
    model = UndoTrainingModel(loaded.model, options=loss_options)
    kept: dict[str, torch.Tensor] = {}

    class Recording(Engine):
        """The engine, which keeps the gradients it is about to apply."""

        def step(self) -> None:
            if self._engine.is_gradient_accumulation_boundary():
                kept.update(self.full_gradients())
            super().step()

    engine = Recording(
        model,
        ds_settings,
        make_optimizer(model, config.optimizer),
        whole_modules=["LlamaDecoderLayer"] if whole_layers else [],
    )
    if break_it == "gas":  # DeepSpeed's default: divide by the accumulation steps as well
        engine.backward = engine._engine.backward  # type: ignore[method-assign]
    if break_it == "world":
        engine.world_size = 1
    traces = make_traces()
    source = ListSource(traces)
    plan = best_fit_decreasing([len(ids) for ids, _ in traces], LENGTH)
    assert plan.num_rows >= 4
    loader = RowLoader(
        source,
        plan,
        count_targets(len(traces), source.roles),
        seed=1,
        global_batch_rows=4,
        micro_batch_rows=1,
        rank=rank,
        world_size=world_size,
        pad_id=0,
    )
    monitor = Quiet()
    loop = TrainingLoop(
        engine,
        loader,
        weights=np.array(weights),
        denominator_kind=denominator,
        options=loss_options,
        optimizer=config.optimizer,
        training=config.training,
        total_steps=4,
        monitor=monitor,  # type: ignore[arg-type]
        save=lambda step: None,
        save_every=None,
        measure_heldout=dict,
        stop_requested=lambda: False,
    )
    before = engine.full_weights()
    engine.train()
    # Between steps, as evaluations do: it must not disturb what ZeRO-3 gathers and when.
    norms = [undo_row_norms(engine)]
    sums = loop.forward_backward(0, also_untrained=rank == 0)
    norms.append(undo_row_norms(engine))
    loop._pace = np.ones(4)
    loop._log(1, sums)
    after = engine.full_weights()
    loss = torch.tensor([sums.loss], dtype=torch.float64)
    dist.all_reduce(loss)
    rows = loader.rows_of_step(0)
    return {
        "gradients": {name: value.numpy() for name, value in kept.items()},
        "before": {name: value.numpy() for name, value in before.items()},
        "after": {name: value.numpy() for name, value in after.items()},
        "loss": float(loss),
        "norms": norms,
        "logged": monitor.values,
        "norm": engine.gradient_norm(),
        "traces": [int(t) for row in rows if row >= 0 for t in plan.row(int(row))],
        "micro_batches": loader.accumulation_steps,
    }


def undo_row_norms(
    engine: Any, num_rows: int = VOCAB, excluded: tuple[int, ...] = ()
) -> list[float]:
    """Norms of the undo row as the run takes them."""
    from nmar_ds.model.vocabulary import known_rows

    with torch.no_grad():
        known_K = known_rows(num_rows, num_rows - 1, excluded)
        return engine(mode="row_norms", known_K=known_K, undo_id=num_rows - 1).tolist()


def stock_model(state: dict[str, np.ndarray], *, tied: bool, dtype: torch.dtype) -> Any:
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
    state: dict[str, np.ndarray],
    *,
    tied: bool,
    traces: list[int],
    weights: list[float],
    nll_clip: float = float("inf"),
    unlikelihood: float = 0.0,
) -> dict[str, Any]:
    """The loss sum with its options, target by target in plain Python, and its gradient."""
    model = stock_model(state, tied=tied, dtype=torch.float64)
    everything = make_traces()
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
    loss.backward()
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
    state: dict[str, np.ndarray], *, tied: bool, traces: list[int], dtype: torch.dtype
) -> tuple[dict[int, dict[str, np.ndarray]], np.ndarray, np.ndarray]:
    """Gradient of S_k for every role k, trace by trace, on the stock model.

    Returns:
        gradients[role][name], S_k as float64[5], N_k as int64[5].
    """
    model = stock_model(state, tied=tied, dtype=dtype)
    everything = make_traces()
    sums, counts = np.zeros(5), np.zeros(5, dtype=np.int64)
    gradients: dict[int, dict[str, np.ndarray]] = {}
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
            total.backward()
        sums[role] = float(total.detach())
        gradients[role] = {
            f"lm.{name}": (
                np.zeros(tuple(p.shape)) if p.grad is None else p.grad.double().numpy().copy()
            )
            for name, p in model.named_parameters()
        }
    return gradients, sums, counts


class Quiet:
    """A monitor that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, float] = {}

    def say(self, text: str) -> None:
        self.lines.append(text)

    def measured(self, step: int, values: dict[str, float]) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.values |= values

    def progress(self, step: int, values: dict[str, float]) -> None:
        pass

    def advance(self) -> None:
        pass


def poisoned_run(
    *,
    bad_steps: list[int],
    kind: str,
    on_rank: int,
    dtype: str,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Run 6 steps in which one rank's loss is not finite at some; report what the loop did.

    With `stop_at` that rank, and no other, is told to stop during that step.
    """
    import torch.distributed as dist

    from nmar_ds.config import ModelSection, deepspeed_config
    from nmar_ds.data.loader import RowLoader, count_targets
    from nmar_ds.data.packing import best_fit_decreasing
    from nmar_ds.errors import DivergenceError
    from nmar_ds.model.loading import load_model
    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.training.engine import Engine, make_optimizer
    from nmar_ds.training.loop import TrainingLoop

    config, _ = settings(2, global_rows=4, persistence=0, learning_rate=0.05)
    section = ModelSection(config=model_keys(True), dtype=dtype)
    config = config.model_copy(update={"model": section})
    ds_settings = deepspeed_config(config, world_size=2)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    loaded = load_model(section, ds_settings, tokenizer_size=VOCAB, undo_id=UNDO, ids=ids, seed=3)
    model = UndoTrainingModel(loaded.model)
    engine = Engine(model, ds_settings, make_optimizer(model, config.optimizer))
    traces = make_traces()
    source = ListSource(traces)
    loader = RowLoader(
        source,
        best_fit_decreasing([len(i) for i, _ in traces], LENGTH),
        count_targets(len(traces), source.roles),
        seed=1,
        global_batch_rows=4,
        micro_batch_rows=1,
        rank=dist.get_rank(),
        world_size=2,
        pad_id=0,
    )
    monitor = Quiet()
    weights_at: list[float] = []
    saved_after: list[int] = []
    loop = TrainingLoop(
        engine,
        loader,
        weights=np.array([0.0, 1.0, 0.0, 1.0, 1.0]),
        denominator_kind="common",
        optimizer=config.optimizer,
        training=config.training,
        total_steps=6,
        monitor=monitor,  # type: ignore[arg-type]
        save=saved_after.append,
        save_every=None,
        measure_heldout=dict,
        stop_requested=lambda: dist.get_rank() == on_rank and state["step"] == stop_at,
    )
    plain = engine.backward
    state = {"step": 0, "micro": 0}

    def poisoned(loss: torch.Tensor) -> None:
        if state["step"] in bad_steps and dist.get_rank() == on_rank and state["micro"] == 0:
            loss = loss * float(kind)
        plain(loss)
        state["micro"] = (state["micro"] + 1) % loader.accumulation_steps
        if state["micro"] == 0:
            state["step"] += 1

    engine.backward = poisoned  # type: ignore[method-assign]

    def checksum() -> float:
        return sum(float(value.double().sum()) for value in engine.full_weights().values())

    agreed = loop._agree

    def watching(done: int, sums: Any, applied: bool) -> bool:
        weights_at.append(checksum())
        return agreed(done, sums, applied)

    loop._agree = watching  # type: ignore[method-assign]
    error, complete = None, None
    try:
        complete = loop.run(0)
    except DivergenceError as caught:
        error = str(caught)
    return {
        "error": error,
        "complete": complete,
        "saved": saved_after,
        "total": loop.nonfinite_total,
        "lines": monitor.lines,
        "weights": weights_at,
    }


def save_pretrained_folder(folder: str, *, rows: int, tied: bool, family: str = "llama") -> None:
    """A tiny model folder with `rows` embedding rows, on the calling process alone."""
    import transformers

    keys = model_keys(tied)
    keys.pop("model_type")
    torch.manual_seed(7)
    kind = {"llama": transformers.LlamaConfig, "phi": transformers.PhiConfig}[family]
    model = transformers.AutoModelForCausalLM.from_config(kind(**keys, vocab_size=rows))
    if family == "phi":
        model.lm_head.bias.data.normal_()
    model.save_pretrained(folder)


def load_folder(
    folder: str, *, undo_id: int, dtype: str, init: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Load a folder under ZeRO-3 with ranks seeded differently; the weights the engine holds."""
    import torch.distributed as dist

    from nmar_ds.config import ModelSection, deepspeed_config
    from nmar_ds.model.loading import load_model
    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.model.undo_init import UndoInit
    from nmar_ds.training.engine import Engine, ProcessPeers, make_optimizer

    config, _ = settings(2, global_rows=4, persistence=0, learning_rate=0.05)
    undo_init = UndoInit(**(init or {}))
    section = ModelSection(path=folder, dtype=dtype)
    config = config.model_copy(update={"model": section})
    ds_settings = deepspeed_config(config, world_size=dist.get_world_size())
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    loaded = load_model(
        section,
        ds_settings,
        tokenizer_size=undo_id + 1,
        undo_id=undo_id,
        ids=ids,
        seed=100 + dist.get_rank(),  # new rows sampled per rank would differ
        undo_init=undo_init,
        peers=ProcessPeers(),
    )
    model = UndoTrainingModel(loaded.model)
    engine = Engine(model, ds_settings, make_optimizer(model, config.optimizer))
    return {
        "weights": {n: v.float().numpy() for n, v in engine.full_weights().items()},
        "vocab_size": engine.module.lm.config.vocab_size,  # type: ignore[union-attr]
        "report": loaded.undo_row,
        "norms": undo_row_norms(engine, undo_id + 1, undo_init.excluded_ids),
    }


def stream_folder(folder: str, *, dtype: str) -> dict[str, Any]:
    """Parameters, gathered, and buffers of a folder just after loading: (dtype, float32 value)."""
    import deepspeed

    model = _stream(folder, dtype)

    def kept(named: Any) -> dict[str, tuple[str, np.ndarray]]:
        return {n: (str(v.dtype), v.detach().float().numpy().copy()) for n, v in named}

    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        parameters = kept(model.named_parameters())
    return {"parameters": parameters, "buffers": kept(model.named_buffers())}


def _ds_settings(dtype: str) -> dict[str, Any]:
    """DeepSpeed's settings for two ranks, also made known to transformers."""
    from transformers.integrations import HfDeepSpeedConfig

    from nmar_ds.config import ModelSection, deepspeed_config
    from nmar_ds.model import loading

    config, _ = settings(2, global_rows=4, persistence=0, learning_rate=0.05)
    section = ModelSection(path="unused", dtype=dtype)  # type: ignore[arg-type]
    found = deepspeed_config(config.model_copy(update={"model": section}), world_size=2)
    loading._KEPT_ALIVE[:] = [HfDeepSpeedConfig(found)]
    return found


def _stream(folder: str, dtype: str) -> Any:
    from pathlib import Path

    import transformers

    from nmar_ds.model.attention import ATTENTION_NAME
    from nmar_ds.model.streaming import load_streaming, plan_filling
    from nmar_ds.training.engine import ProcessPeers

    peers = ProcessPeers()
    kind = getattr(torch, dtype)
    with peers.share_errors():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        plan = plan_filling(config, Path(folder), dtype=kind, peers=peers)
    return load_streaming(
        config,
        plan,
        dtype=kind,
        attention=ATTENTION_NAME,
        deepspeed_settings=_ds_settings(dtype),
        peers=peers,
    )


def refused_folder(folders: list[str], *, cut: bool) -> str:
    """Load a folder of this rank's own and return the error; `cut` truncates rank 0's at work."""
    import torch.distributed as dist

    from nmar_ds.errors import NmarError
    from nmar_ds.model import streaming

    plain = streaming._check_same

    def then_cut(plan: Any, peers: Any) -> None:
        plain(plan, peers)
        if cut and peers.rank == 0:
            file = plan.parameters[len(plan.parameters) // 2][1].file
            file.write_bytes(file.read_bytes()[:-4])

    streaming._check_same = then_cut
    try:
        _stream(folders[dist.get_rank()], "float32")
    except NmarError as error:
        return str(error)
    finally:
        streaming._check_same = plain
    return "loaded"


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        found = next(line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


def loading_memory(folder: str, tiny: str, *, loader: str) -> dict[str, int]:
    """Growth of this rank's peak resident memory while a folder is loaded, in bytes."""
    import gc

    import transformers

    def load(path: str) -> Any:
        if loader == "streaming":
            return _stream(path, "float32")
        _ds_settings("float32")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )

    load(tiny)
    gc.collect()
    before = _status("VmRSS")
    model = load(folder)
    return {
        "growth": _status("VmHWM") - before,
        "partitions": sum(4 * -(-p.ds_numel // 2) for p in model.parameters()),
    }
