"""What a micro-batch costs, in counts that do not depend on the machine: products, reads, waits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, Traces, build, pack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nmar_ds.model.segments import SegmentLayout
from nmar_ds.model.training_model import UndoTrainingModel
from nmar_ds.model.weighting import PLAIN, LossOptions, trained_roles
from nmar_ds.traces.schema import NO_ROLE
from nmar_ds.training.loop import StepSums, forward_arguments

torch.set_num_threads(1)
WEIGHTS = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
CPU = torch.device("cpu")
LENGTHS, LENGTH = [40, 40, 7, 40, 19, 40], 100
ROWS = [[0, 1, 2], [3, 4]]
# What makes the host wait until the device has come so far.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")


def _batch():
    return pack(Traces(LENGTHS), ROWS, LENGTH)


def _run(model, batch, **more):
    result = model(**forward_arguments(batch, WEIGHTS, CPU, options=PLAIN), **more)
    result.loss_sum.backward()
    return result


class _Ops(TorchDispatchMode):
    """Counts operators by name, those of the backward too."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _matmul_flops(m, k, n):
    return 2 * m * k * n


def test_products_are_those_of_the_trained_targets_and_the_layers():
    """Layers on all tokens, the head on trained targets alone; forward, and twice in backward."""
    batch, lm = _batch(), build()
    model = UndoTrainingModel(lm, chunk_size=8)
    config = lm.config
    size, heads = config.hidden_size, config.num_attention_heads
    kv = size // heads * config.num_key_value_heads
    per_token = 2 * size * size + 2 * size * kv + 3 * size * config.intermediate_size
    tokens = batch.input_ids.size
    trained = int((trained_roles(WEIGHTS)[batch.target_roles.clip(max=4)]
                   & (batch.target_roles != NO_ROLE)).sum())  # fmt: skip
    assert 0 < trained < (batch.targets >= 0).sum() < tokens

    def in_place(into, a, b, *_, out_shape=None, **__):
        return _matmul_flops(a[0], a[1], b[1])

    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place}
    )  # fmt: skip
    with counter:
        _run(model, batch)
    counts = {op.__name__: num for op, num in counter.get_flop_counts()["Global"].items()}
    products = sum(num for op, num in counts.items() if "attention" not in op and op != "bmm")
    layers = 3 * config.num_hidden_layers * _matmul_flops(tokens, 1, per_token)
    head = 3 * _matmul_flops(trained, size, VOCAB)
    rotary = counts.get("bmm", 0)
    assert products == layers + head
    assert rotary < layers / 100
    assert counts["addmm_"] == head // 3


def test_attention_costs_the_squares_of_the_traces_and_little_padding():
    """Pairs of the kernel calls against the sum of squares, by the lengths that data has."""
    rng = np.random.default_rng(7)
    for capacity, num in [(2048, 5), (8192, 19)]:
        lengths = np.clip(rng.lognormal(np.log(435) - 0.32, 0.8, num), 8, 2048).astype(int)
        borders = np.concatenate([[0], np.cumsum(lengths), [lengths.sum() + 100]])
        padding = np.arange(num + 1) == num
        layout = SegmentLayout.from_cu_seqlens(borders, padding=padding)
        pairs = sum(b.num_segments * b.padded_length**2 for b in layout.buckets)
        assert pairs <= 1.1 * (lengths**2).sum(), capacity
        assert len(layout.buckets) <= num


@pytest.mark.parametrize("case", ["trained", "nothing trained", "logged", "one chunk a row"])
def test_the_head_is_read_once(case):
    """Under ZeRO-3 a read is a gather; see `UndoTrainingModel.forward`."""
    batch, lm = _batch(), build(tied=True)
    model = UndoTrainingModel(lm, chunk_size=1 if case == "one chunk a row" else 8)
    head, reads = lm.get_output_embeddings(), []

    class Watched(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    head._parameters = Watched(head._parameters)
    weights = WEIGHTS * (case != "nothing trained")
    arguments = forward_arguments(batch, weights, CPU, options=PLAIN)
    model(**arguments, also_untrained=case == "logged").loss_sum.backward()
    assert reads.count("weight") == 1


def test_a_micro_batch_never_waits_for_the_device():
    """Forward, backward and the sums of a step: nothing is asked of the device on the way."""
    batch, model, sums = _batch(), UndoTrainingModel(build()), StepSums()
    with _Ops() as ops:
        for _ in range(2):
            sums.add(batch, _run(model, batch), trained_roles(WEIGHTS), 3.0)
    assert ops.seen["mm"] > 20, "nothing was watched"
    assert {name: num for name, num in ops.seen.items() if name in WAITS} == {}
    with _Ops() as ops:
        sums.settle()
    assert sums.loss > 0 and sums.roles[1].sum() > 0
    assert ops.seen["_local_scalar_dense"] == 0


def test_rows_found_on_the_host_are_those_found_on_the_device():
    batch = _batch()
    for options in (PLAIN, LossOptions(unlikelihood=0.3)):
        model = UndoTrainingModel(build(), options=options)
        with torch.no_grad():
            ours = model(**forward_arguments(batch, WEIGHTS, CPU, options=options))
            found = model(**forward_arguments(batch, WEIGHTS, CPU))
        assert all(torch.equal(a, b) for a, b in zip(ours, found, strict=True))


def test_the_loss_holds_one_block_of_logits(monkeypatch):
    """Of the largest tensors there is one: neither softmax nor gradient take memory of their own."""
    from nmar_ds.model.objective import weighted_cross_entropy

    rows, chunk, vocab = 64, 16, 5003
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    made: Counter[int] = Counter()

    class Blocks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= chunk * vocab:
                    made[tensor.untyped_storage().data_ptr()] += 1
            return out

    with Blocks():
        result = weighted_cross_entropy(
            hidden, weight, None, torch.randint(vocab, (rows,)), torch.ones(rows), chunk_size=chunk
        )
        (result.loss_sum * 0.5).backward()
    assert len(made) == 1, "more than one block of a chunk's logits"
    assert weight.grad is not None
