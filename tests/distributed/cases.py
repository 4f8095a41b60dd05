"""What the ranks of a pool run: the training step itself, on tiny models, with gradients kept.

The step and its independent reference live in `nmar_ds.acceptance`, where the self-test that
users run on their own nodes takes them from too; here they are broken on purpose.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch

from nmar_ds.acceptance import step as core
from nmar_ds.acceptance.reference import (  # noqa: F401 (tests reach them through this module)
    combine,
    gap,
    reference_gradients,
    reference_objective,
    stock_model,
)
from nmar_ds.acceptance.step import Quiet, Unsaved, settings, undo_row_norms
from nmar_ds.acceptance.tiny import LENGTH, UNDO, VOCAB, ListSource, make_traces, model_keys


class WithAccumulationScaling(core.Recording):
    """DeepSpeed's default: divide by the accumulation steps as well."""

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)


class WithoutWorldFactor(core.Recording):
    """The factor W is lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_size = 1


BROKEN = {"gas": WithAccumulationScaling, "world": WithoutWorldFactor, None: core.Recording}


def train_step(*, break_it: str | None = None, **arguments: Any) -> dict[str, Any]:
    """One optimizer step of the real loop over a global batch of 4 rows."""
    with mock.patch.object(core, "Recording", BROKEN[break_it]):
        return core.train_step(**arguments)


def safety_gap_figures(*, break_it: str | None = None) -> dict[str, Any]:
    """What the Safety Gap study takes on its ranks."""
    from nmar_ds.theory.on_ranks import figures_under_zero3
    from nmar_ds.training.engine import ProcessPeers

    with mock.patch.object(core, "Recording", BROKEN[break_it]):
        return figures_under_zero3(ProcessPeers())


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
    from nmar_ds.data.packing import pack
    from nmar_ds.errors import DivergenceError
    from nmar_ds.model.loading import load_model
    from nmar_ds.model.training_model import UndoTrainingModel
    from nmar_ds.training.engine import Engine, make_optimizer
    from nmar_ds.training.loop import TrainingLoop

    config, _ = settings(2, global_rows=4, persistence=0, learning_rate=0.05)
    section = ModelSection(config=model_keys(True), dtype=dtype)
    config = config.model_copy(update={"model": section})
    ds_settings = deepspeed_config(config, world_size=2, device="cpu")
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    loaded = load_model(section, ds_settings, tokenizer_size=VOCAB, undo_id=UNDO, ids=ids, seed=3)
    model = UndoTrainingModel(loaded.model)
    engine = Engine(model, ds_settings, make_optimizer(model, config.optimizer))
    traces = make_traces()
    source = ListSource(traces)
    loader = RowLoader(
        source,
        pack([len(i) for i, _ in traces], LENGTH),
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
    saver = Unsaved()
    loop = TrainingLoop(
        engine,
        loader,
        weights=np.array([0.0, 1.0, 0.0, 1.0, 1.0]),
        denominator_kind="common",
        optimizer=config.optimizer,
        training=config.training,
        total_steps=6,
        monitor=monitor,  # type: ignore[arg-type]
        saver=saver,
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
        "saved": saver.steps,
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
    ds_settings = deepspeed_config(config, world_size=dist.get_world_size(), device="cpu")
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
    found = deepspeed_config(
        config.model_copy(update={"model": section}), world_size=2, device="cpu"
    )
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


def heldout_figures(*, measuring: bool, num_steps: int = 3) -> dict[str, Any]:
    """Held-out values and decodes before, between and after steps of the real loop.

    Without `measuring` the same steps alone. The weights come at the end.
    """
    from types import SimpleNamespace

    import torch.distributed as dist

    from nmar_ds.data.loader import count_targets
    from nmar_ds.traces.reduction import Machine
    from nmar_ds.traces.schema import Role
    from nmar_ds.training import decodes, heldout
    from nmar_ds.training.engine import all_reduce
    from nmar_ds.training.loop import TrainingLoop, forward_arguments

    tiny = core.tiny_run()
    engine, loader, source = tiny.engine, tiny.loader, tiny.loader.source
    weights = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    num_traces = len(make_traces())
    traces = SimpleNamespace(
        ids=source.ids, roles=source.roles, role_counts=count_targets(num_traces, source.roles)
    )
    chosen = decodes.choose(traces, 3, Machine(UNDO))  # type: ignore[arg-type]
    loop = TrainingLoop(
        engine, loader, weights=weights, denominator_kind="common", optimizer=tiny.config.optimizer,
        training=tiny.config.training, total_steps=4, monitor=Quiet(),  # type: ignore[arg-type]
        saver=Unsaved(), save_every=None, measure_heldout=dict, stop_requested=lambda: False,
    )  # fmt: skip

    def onsets(trace: int) -> np.ndarray[Any, Any]:
        wrong = source.roles(trace) == Role.DEVIATION
        return np.flatnonzero(wrong & ~np.concatenate([[False], wrong[:-1]])).astype(np.int32)

    def measure() -> tuple[dict[str, float], list[list[int]]]:
        values = heldout.measure(
            engine, loader, num_rows=5, undo_id=UNDO, onsets=onsets, reduce=all_reduce,
            arguments=lambda batch: forward_arguments(batch, weights, engine.device),
        )  # fmt: skip
        found = decodes.decode_exercises(
            engine, chosen, machine=Machine(UNDO), eos_id=1, num_known=VOCAB, max_length=LENGTH,
            max_forwards=9, rank=dist.get_rank(), world_size=dist.get_world_size(), sum_over_ranks=all_reduce,
        )  # fmt: skip
        return values, [decoded.raw_ids.tolist() for decoded in found]

    measured = [measure()] if measuring else []
    for step in range(num_steps):
        loop.forward_backward(step, also_untrained=False)
        measured += [measure()] if measuring else []
    return {
        "measured": measured,
        "forced": [len(exercise.forced_ids) for exercise in chosen],
        "weights": {n: v.float().numpy() for n, v in engine.full_weights().items()},
    }


def kernels_of_nodes(*, kernel: str | None, on_rank: int) -> tuple[str, str, bool] | None:
    """What ranks say of which one finds another kernel behind attention, or none. Collective."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from nmar_ds.errors import ConfigError, NmarError
    from nmar_ds.training import parts
    from nmar_ds.training.engine import ProcessPeers

    def found(config: Any) -> str:
        if dist.get_rank() != on_rank:
            return "segments"
        if kernel is None:
            raise ConfigError("model.attention: this node has no such kernel")
        return kernel

    config, _ = settings(2, global_rows=4, persistence=0, learning_rate=0.05)
    plan: Any = SimpleNamespace(facts={"seed": 1})
    with mock.patch.object(parts, "attention_backend", found):
        try:
            parts.check_ranks_agree(config, plan, ProcessPeers())
        except NmarError as error:
            return type(error).__name__, str(error), error.shared
    return None
