"""What the optimizer of a run is."""

from __future__ import annotations

import pytest
import torch

from nmar_ds.config import OptimizerSection
from nmar_ds.training.engine import make_optimizer

torch.set_num_threads(1)


@pytest.mark.parametrize("offloaded", [False, True])
def test_adamw_runs_fused_in_host_memory(offloaded):
    """What every engine gets, and by the operator that a step then runs."""
    model = torch.nn.Linear(4, 3)
    optimizer = make_optimizer(model, OptimizerSection(learning_rate=0.1), offloaded=offloaded)
    model(torch.ones(2, 4)).sum().backward()
    with torch.profiler.profile() as found:
        optimizer.step()
    names = {event.name for event in found.events()}
    assert "aten::_fused_adamw_" in names
    assert "aten::addcdiv_" not in names


def test_matrices_decay_and_biases_do_not():
    model = torch.nn.Linear(4, 3)
    section = OptimizerSection(learning_rate=0.1, weight_decay=0.2)
    groups = make_optimizer(model, section).param_groups
    found = [(group["weight_decay"], [p.shape for p in group["params"]]) for group in groups]
    assert found == [(0.2, [(3, 4)]), (0.0, [(3,)])]
