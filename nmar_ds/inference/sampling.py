"""Drawing the next token so that a sample depends on its own sequence alone."""

# B sequences in a batch, N draws per sequence, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def uniform_draws(seed: int, indices: Sequence[int], num: int) -> npt.NDArray[np.float32]:
    """float32[B, N] in [0, 1): one stream per sequence index, so batching changes no sample."""
    return np.stack(
        [
            np.random.Generator(np.random.Philox(key=[seed, index])).random(num, dtype=np.float32)
            for index in indices
        ]
    )


def sample(
    logits_BV: torch.Tensor, draws_B: torch.Tensor, *, temperature: float, top_p: float
) -> torch.Tensor:
    """Draw from the nucleus by inverting its distribution function.

    Args:
        logits_BV: float32[B, V]; minus infinity where a token is banned.
        draws_B: float32[B] uniform in [0, 1).
        temperature: positive.
        top_p: mass of the nucleus, in (0, 1].

    Returns:
        int64[B] token ids.

    Source: nucleus sampling, Holtzman et al., arXiv 1904.09751.
    """
    probs_BV, ids_BV = (logits_BV / temperature).softmax(dim=1).sort(dim=1, descending=True)
    cumulative_BV = probs_BV.cumsum(dim=1)
    # A token belongs to the nucleus if the mass before it is still below top_p.
    size_B = ((cumulative_BV - probs_BV) < top_p).sum(dim=1).clamp(min=1)
    mass_B = cumulative_BV.gather(1, (size_B - 1)[:, None])[:, 0]
    place_B = (cumulative_BV <= (draws_B * mass_B)[:, None]).sum(dim=1)
    # A draw is at most 1 - 2^-24, so its product with the mass rounds to less than the mass, and
    # `place` stays within the nucleus and off tokens of probability 0 (a banned undo).
    return ids_BV.gather(1, place_B[:, None])[:, 0]
