"""Role-weighted loss sums and the head they come from, as plain tensor maths (SPEC section 3).

Nothing here knows a rank: sums go out, the caller divides by the denominator of the whole global
batch.
"""

# N target rows, H hidden, V vocabulary, C rows of a chunk

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmar_ds.errors import VocabularyError
from nmar_ds.model.weighting import FloatArray, denominator, role_weights  # noqa: F401
from nmar_ds.traces.schema import NUM_ROLES

# Bytes of one chunk's logits in the loss dtype; about three such blocks live at a time.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def token_weights(roles_N: Tensor, weights: FloatArray, dtype: torch.dtype) -> Tensor:
    """Look up each target's weight by its role; 0 where it has none (`NO_ROLE`).

    Args:
        roles_N: uint8[N] target roles.
        weights: float64[NUM_ROLES].
        dtype: of the result.

    Returns:
        dtype[N].
    """
    table = torch.zeros(256, dtype=dtype, device=roles_N.device)
    table[:NUM_ROLES] = torch.from_numpy(weights).to(table)
    return table[roles_N.long()]


def role_sums(nll_N: Tensor, roles_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count the losses of each role.

    Masked sums rather than a scatter: deterministic on every device, and an infinite loss of one
    role does not become NaN in another.

    Args:
        nll_N: float[N].
        roles_N: uint8[N]; rows of other values (`NO_ROLE`) count nowhere.

    Returns:
        float64[NUM_ROLES] sums and int64[NUM_ROLES] counts.
    """
    member_RN = roles_N[None, :] == torch.arange(NUM_ROLES, device=roles_N.device)[:, None]
    sums_R = torch.where(member_RN, nll_N.detach().double(), 0.0).sum(dim=1)
    return sums_R, member_RN.sum(dim=1)


def default_chunk_size(num_classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk so that one chunk's logits stay within the device's budget, at least 16."""
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(16, budget // (dtype.itemsize * num_classes))


class LinearCrossEntropy(torch.autograd.Function):
    """Head, softmax and weighted sum in one, without ever holding all N x V logits.

    The gradients are formed in the forward, chunk by chunk, while a chunk's softmax is at hand;
    the backward only scales them. Cost: the head's weight gradient lives (in fp32) from
    forward to backward; gained: no logits kept, none recomputed, and the weight is needed in the
    forward only, where ZeRO-3 has it gathered.
    Source: the chunked loss of Liger Kernel (arXiv 2410.10989), with fp32 accumulation.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 (apply takes no keywords)
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        chunk_size: int,
        want_grads: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss_sum, nll_N); see `weighted_cross_entropy`."""
        for_hidden, for_weight, for_bias = (
            bool(need) and want_grads for need in ctx.needs_input_grad[:3]
        )
        exact = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        grad_hidden = torch.zeros_like(hidden_NH) if for_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=exact) if for_weight else None
        grad_bias = torch.zeros_like(weight_VH[:, 0], dtype=exact) if for_bias else None
        nll_N = torch.empty(len(targets_N), dtype=exact, device=hidden_NH.device)
        for start in range(0, len(targets_N), chunk_size):
            rows = slice(start, start + chunk_size)
            dead_C1 = (weights_N[rows] == 0)[:, None]
            # a row of weight 0 must give exactly no gradient, whatever is in it
            hidden_CH = hidden_NH[rows].masked_fill(dead_C1, 0)
            logits_CV = F.linear(hidden_NH[rows], weight_VH, bias_V).to(exact)
            lse_C = torch.logsumexp(logits_CV, dim=1)
            targets_C1 = targets_N[rows, None]
            nll_N[rows] = lse_C - logits_CV.gather(1, targets_C1)[:, 0]
            if not (for_hidden or for_weight or for_bias):
                continue
            # in place: logits become softmax - onehot, times the row's weight
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()
            grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full(targets_C1.shape, -1.0))
            grad_CV.mul_(weights_N[rows, None].to(exact)).masked_fill_(dead_C1, 0)
            if grad_bias is not None:
                grad_bias += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_CV @ weight_VH).masked_fill_(dead_C1, 0)
            if grad_weight is not None:
                if grad_CV.dtype == exact:
                    grad_weight.addmm_(grad_CV.t(), hidden_CH)
                else:
                    grad_weight += grad_CV.t() @ hidden_CH
        weights_N = weights_N.to(exact)
        loss_sum = torch.where(weights_N == 0, 0.0, weights_N * nll_N).sum()
        # saved the regular way, so that the backward frees them
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (
            hidden_NH.dtype,
            weight_VH.dtype,
            bias_V.dtype if bias_V is not None else None,
        )
        ctx.mark_non_differentiable(nll_N)
        return loss_sum, nll_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor, _grad_nll: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Scale the gradients formed in the forward."""
        scaled = [
            None if grad is None else (grad * grad_loss.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def weighted_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted negative log-likelihood summed over rows: sum_n w_n * -log p(target_n | hidden_n).

    Args:
        hidden_NH: last hidden states of the rows that predict.
        weight_VH: head weight, of the same dtype. Read it once per call, outside (ZeRO-3).
        bias_V: head bias or None.
        targets_N: int64[N], each in [0, V).
        weights_N: float[N]; a row of weight 0 contributes exactly nothing.
        chunk_size: rows whose logits are held at a time; None chooses by memory.

    Returns:
        `loss_sum`, a differentiable scalar, and `nll_N`, detached, both float32 (float64 for
        float64 inputs).

    Raises:
        VocabularyError: a target outside the head's rows.
    """
    num_classes = weight_VH.shape[0]
    if len(targets_N):
        low, high = (int(bound) for bound in torch.aminmax(targets_N))
        if low < 0 or high >= num_classes:
            raise VocabularyError(
                f"target id {low if low < 0 else high}: outside the model's head, expected an id "
                f"from 0 to {num_classes - 1}"
            )
    if chunk_size is None:
        exact = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        chunk_size = default_chunk_size(num_classes, exact, hidden_NH.device)
    # inside a Function's forward the grad mode is always off, so it is read here
    result = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH,
        weight_VH,
        bias_V,
        targets_N,
        weights_N,
        chunk_size,
        torch.is_grad_enabled(),
    )
    return cast(tuple[Tensor, Tensor], result)
