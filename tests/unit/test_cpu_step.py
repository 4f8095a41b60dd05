"""What DeepSpeed's optimizer is given in place of copies: views where tensors are neighbours."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nmar_ds.training.cpu_step import flatten_in_place, take_norms_in_blocks


def test_neighbours_are_seen_as_one_tensor_and_others_are_copied() -> None:
    def copied(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in tensors])

    zero = SimpleNamespace(flatten=copied)
    flatten_in_place(zero)
    memory = np.arange(24, dtype=np.float32)
    buffer = torch.from_numpy(memory)
    neighbours = [buffer[4:10], buffer[10:16].view(2, 3), buffer[16:17]]
    flat = zero.flatten(neighbours)
    assert flat.data_ptr() == neighbours[0].data_ptr() and torch.equal(flat, buffer[4:17])
    apart = [
        [buffer[0:3], buffer[4:6]],  # a gap
        [buffer[4:6], buffer[0:4]],  # the wrong way round
        [buffer[0:2], torch.ones(3)],
        [torch.from_numpy(memory[:4]), torch.from_numpy(memory[4:9])],  # two buffers, side by side
        [buffer[0:12].view(3, 4).t(), buffer[12:14]],  # neighbours, but not in this order inside
    ]
    for tensors in apart:
        flat = zero.flatten(tensors)
        assert torch.equal(flat, copied(tensors))
        flat.zero_()
    assert torch.equal(buffer, torch.arange(24.0))  # they were copies


@pytest.mark.parametrize("numel", [0, 1, 1 << 18, (1 << 18) + 1, 700_001])
def test_the_norm_of_blocks_is_the_norm(numel: int) -> None:
    seen: list[torch.Tensor] = []

    def whole(gradients: list[torch.Tensor], params: object, norm_type: float) -> torch.Tensor:
        seen.extend(gradients)
        return torch.stack([part.double().norm(norm_type) for part in gradients]).norm()

    zero = SimpleNamespace(get_grad_norm_direct=whole)
    take_norms_in_blocks(zero)
    parts = [torch.randn(numel) * 1e3, torch.full((3, 5), 1e-3)]
    expected = torch.cat([part.double().reshape(-1) for part in parts]).norm()
    found = zero.get_grad_norm_direct(parts, None)
    assert found.dtype == torch.float64 and float(found) == pytest.approx(float(expected), 1e-12)
    assert max(part.numel() for part in seen) <= 3 and all(p.dtype == torch.float64 for p in seen)
