"""Faults put into the self-test from outside, and `launcher/selftest.py` with one of them.

As a script: FAULT names the fault, in the environment; all ranks have it, or FAULT_RANK alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Break this process for a while."""
    import torch.nn.functional as F
    from transformers import AttentionInterface

    from nmar_ds.acceptance import bandwidth, resume, selftest, step
    from nmar_ds.model.attention import ATTENTION_NAME, register
    from nmar_ds.training import loop

    def leaking(  # noqa: PLR0917 (the signature of what it replaces)
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        """Causal over the whole row: every trace sees those before it."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    class WithoutWorldFactor(step.Recording):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.world_size = 1

    right_denominator, right_reduce, right_start = (
        loop.denominator,
        bandwidth.all_reduce,
        resume.start,
    )

    def always_trained(kind: str, *rest: Any) -> float:
        return float(right_denominator("trained", *rest))

    def wrong_sum(tensor: Any, op: str = "sum") -> Any:
        right_reduce(tensor, op)
        tensor[-1] += 1
        return tensor

    def corrupting(folder: Path, name: str, attempt: int, **more: Any) -> Any:
        if attempt == 2 and more["rank"] == 0:
            (victim,) = sorted((folder / name / "checkpoints").glob("step-*/*"))[-1:]
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        return right_start(folder, name, attempt, **more)

    def raising(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted: the device\nis gone")

    faults: dict[str, Any] = {
        "none": contextlib.nullcontext,
        "leak": contextlib.nullcontext,
        "world": lambda: mock.patch.object(step, "Recording", WithoutWorldFactor),
        "trained": lambda: mock.patch.object(loop, "denominator", always_trained),
        "sum": lambda: mock.patch.object(bandwidth, "all_reduce", wrong_sum),
        "corrupt": lambda: mock.patch.object(resume, "start", corrupting),
        "raise": lambda: mock.patch.object(selftest, "check_isolation", raising),
    }  # fmt: skip
    if fault == "leak":
        AttentionInterface.register(ATTENTION_NAME, leaking)
    try:
        with faults[fault]():
            yield
    finally:
        if fault == "leak":
            register()


def phases(output: str, names: list[str], *, fault: str) -> list[Any]:
    """Run phases on the ranks of a pool; rank 0 returns their results."""
    import torch
    import torch.distributed as dist

    from nmar_ds.acceptance.selftest import run_phases
    from nmar_ds.acceptance.verdict import PhaseResult
    from nmar_ds.training.ranks import discover_ranks

    os.environ["TORCHELASTIC_RESTART_COUNT"] = output  # a meeting place of its own for each call
    with planted(fault):
        run_phases(
            names, discover_ranks(os.environ), torch.device("cpu"), output=Path(output),
            dtype="float32", min_bandwidth=0.0, timeout_seconds=60,
        )  # fmt: skip
    dist.barrier()
    return [PhaseResult.load(Path(output), name) for name in names]


def safety_gap(*, fault: str) -> list[Any]:
    """Proof 3 alone, on the ranks of a pool."""
    from nmar_ds.acceptance import proofs
    from nmar_ds.training.engine import ProcessPeers

    with planted(fault):
        return proofs.check_safety_gap(ProcessPeers())


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    from launcher import selftest as launched

    here = os.environ.get("FAULT_RANK", os.environ["RANK"]) == os.environ["RANK"]
    with planted(os.environ["FAULT"] if here else "none"):
        code = launched.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
