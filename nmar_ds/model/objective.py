"""Role-weighted loss sums and the head they come from, as plain tensor maths (SPEC section 3).

Nothing here knows a rank: sums go out, the caller divides by the denominator of the whole global
batch.
"""

# N target rows, H hidden, V vocabulary, C rows of a chunk, K penalised rows among them

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmar_ds.errors import VocabularyError
from nmar_ds.model.logits import AS_THEY_ARE, LogitMap
from nmar_ds.model.weighting import CHUNK_BYTES, FloatArray, denominator, role_weights  # noqa: F401
from nmar_ds.traces.schema import NUM_ROLES


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
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
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
        penalties_N: Tensor | None,
        nll_clip: float | None,
        logit_map: LogitMap,
        chunk_size: int,
        want_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss_sum, nll_N, unlikelihood_N); see `weighted_cross_entropy`."""
        for_hidden, for_weight, for_bias = (
            bool(need) and want_grads for need in ctx.needs_input_grad[:3]
        )
        exact = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        grads = _HeadGrads(hidden_NH, weight_VH, (for_hidden, for_weight, for_bias), exact)
        nll_N = torch.empty(len(targets_N), dtype=exact, device=hidden_NH.device)
        unlikelihood_N = torch.zeros_like(nll_N)
        weights_N = weights_N.to(exact)
        # one block for all chunks: on a CPU fresh memory costs as much as a pass over it
        chunk_size = min(chunk_size, len(targets_N))
        block_CV = hidden_NH.new_empty(chunk_size, weight_VH.shape[0])
        exact_CV = block_CV if block_CV.dtype == exact else block_CV.to(exact)
        for start in range(0, len(targets_N), chunk_size or 1):
            rows = slice(start, start + chunk_size)
            hidden_CH, targets_C1 = hidden_NH[rows], targets_N[rows, None]
            narrow_CV, logits_CV = block_CV[: len(hidden_CH)], exact_CV[: len(hidden_CH)]
            torch.mm(hidden_CH, weight_VH.t(), out=narrow_CV)
            if bias_V is not None:
                narrow_CV += bias_V
            if narrow_CV is not logits_CV:
                logits_CV.copy_(narrow_CV)
            slope_CV = logit_map.apply_(logits_CV)
            push = None
            if penalties_N is not None:
                push = _Push.away(logits_CV, targets_C1, penalties_N[rows])
            softmax_CV, lse_C, nll_N[rows] = _softmax_(logits_CV, targets_C1)
            if push is not None:
                push.finish(lse_C, nll_N[rows])
                unlikelihood_N[rows] = push.values_C
            if not (for_hidden or for_weight or for_bias):
                continue
            # The row's weight goes to the narrow side of the two products, not over V columns.
            pulls_C1 = _unclipped(weights_N[rows], nll_N[rows], nll_clip)[:, None]
            # in place: softmax becomes softmax - onehot; 1 - p without its cancellation
            grad_CV = softmax_CV.scatter_(1, targets_C1, torch.expm1(-nll_N[rows])[:, None])
            # a row of weight 0 must give exactly no gradient, whatever is in it
            dead_C1 = pulls_C1 == 0
            if push is not None:
                push.add_to(grad_CV, pulls_C1)
                pulls_C1 = pulls_C1.index_fill(0, push.rows_K, 1.0)
                dead_C1[push.rows_K] = False
            if _may_hold(dead_C1):
                grad_CV.masked_fill_(dead_C1, 0)
                hidden_CH = hidden_CH.masked_fill(dead_C1, 0)
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            if grad_CV.dtype != narrow_CV.dtype:
                grad_CV = narrow_CV.copy_(grad_CV)
            grads.add(rows, grad_CV, hidden_CH, weight_VH, pulls_C1 * logit_map.scale)
        loss_sum = _loss_sum(nll_N, unlikelihood_N, weights_N, penalties_N, nll_clip)
        # saved the regular way, so that the backward frees them
        ctx.save_for_backward(grads.hidden_NH, grads.weight_VH, grads.bias_V)
        ctx.dtypes = (
            hidden_NH.dtype,
            weight_VH.dtype,
            bias_V.dtype if bias_V is not None else None,
        )
        ctx.mark_non_differentiable(nll_N, unlikelihood_N)
        return loss_sum, nll_N, unlikelihood_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the gradients formed in the forward, in place where they are not needed again."""
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = []
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if grad is not None:
                factor = grad_loss.to(grad.dtype)
                grad = (grad * factor if kept else grad.mul_(factor)).to(dtype)  # noqa: PLW2901
            scaled.append(grad)
        return (*scaled, *[None] * 7)


def _softmax_(logits_CV: Tensor, targets_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into probabilities, in their own memory on a CPU.

    Returns:
        Probabilities [C, V]; log-sum-exp [C]; -log p of the targets [C].
    """
    target_C = logits_CV.gather(1, targets_C1)[:, 0]
    if logits_CV.device.type != "cpu":
        lse_C = torch.logsumexp(logits_CV, dim=1)
        return logits_CV.sub_(lse_C[:, None]).exp_(), lse_C, lse_C - target_C
    # A third of the time of the above. The largest probability is 1 / sum, at least 1 / V, so the
    # log-sum-exp comes back from it without loss.
    top_C = logits_CV.amax(dim=1)
    softmax_CV = torch.softmax(logits_CV, dim=1, out=logits_CV)
    log_sum_C = softmax_CV.amax(dim=1).log_().neg_()
    return softmax_CV, top_C + log_sum_C, (top_C - target_C) + log_sum_C


def _may_hold(mask: Tensor) -> bool:
    """Whether any element is True; on a device always, because asking it would wait for it."""
    return mask.device.type != "cpu" or bool(mask.numpy().any())


class _HeadGrads:
    """The gradients of the head, chunk after chunk; None where not wanted.

    Args:
        hidden_NH: inputs of the head.
        weight_VH: its weight.
        wanted: of hidden, weight and bias.
        exact: dtype that sums over chunks are kept in.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        wanted: tuple[bool, bool, bool],
        exact: torch.dtype,
    ) -> None:
        for_hidden, for_weight, for_bias = wanted
        make = torch.empty_like if len(hidden_NH) else torch.zeros_like
        self.hidden_NH = torch.empty_like(hidden_NH) if for_hidden else None
        self.weight_VH = make(weight_VH, dtype=exact) if for_weight else None
        self.bias_V = torch.zeros_like(weight_VH[:, 0], dtype=exact) if for_bias else None
        self._part_VH: Tensor | None = None

    def add(
        self, rows: slice, grad_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, pulls_C1: Tensor
    ) -> None:
        """Add one chunk; `grad_CV` times `pulls_C1` is the gradient of its logits.

        Weights (and a model's logit factor) are rounded to the head's dtype here: to apply them
        before the gradient is, would cost a pass over C x V, on a device for exact ones too.
        """
        pulls_C1 = pulls_C1.to(grad_CV.dtype)
        if self.bias_V is not None:
            self.bias_V += (grad_CV.t() @ pulls_C1)[:, 0]
        if self.hidden_NH is not None:
            product = torch.mm(grad_CV, weight_VH, out=self.hidden_NH[rows])
            product.mul_(pulls_C1).masked_fill_(pulls_C1 == 0, 0)
        if self.weight_VH is None:
            return
        pulled_CH = hidden_CH * pulls_C1
        if grad_CV.dtype == self.weight_VH.dtype:
            self.weight_VH.addmm_(grad_CV.t(), pulled_CH, beta=int(rows.start > 0))
            return
        if self._part_VH is None:
            self._part_VH = torch.empty_like(weight_VH)
        torch.mm(grad_CV.t(), pulled_CH, out=self._part_VH)
        if rows.start:
            self.weight_VH += self._part_VH
        else:
            self.weight_VH.copy_(self._part_VH)


class _Push:
    """The unlikelihood of one chunk's penalised rows: u * -log(1 - p), p the target's probability.

    1 - p is taken from the log-sum-exp of the *other* logits, which needs no clamp as p -> 1:
    the value is then the lead of the target's logit, finite wherever the logits are, and
    the gradient, u * p * (onehot - softmax over the others), has a 1-norm of at most 2u.
    A clamped 1 - p (1908.04319's code has 1e-5) gives no gradient just where p is worst.

    Attributes:
        values_C: -log(1 - p), without u; 0 where a row is not penalised.
        rows_K: int64, the penalised rows.
        grad_KV: with respect to their logits, u in it.
    """

    values_C: Tensor
    grad_KV: Tensor

    def __init__(self, rows_K: Tensor, targets_K1: Tensor, others_KV: Tensor, u_K: Tensor) -> None:
        self.rows_K = rows_K
        self._targets_K1, self._others_KV, self._u_K = targets_K1, others_KV, u_K

    @classmethod
    def away(cls, logits_CV: Tensor, targets_C1: Tensor, penalties_C: Tensor) -> _Push:
        """Take what it needs of the logits, which are left as they are."""
        rows_K = torch.nonzero(penalties_C)[:, 0]
        targets_K1 = targets_C1[rows_K]
        others_KV = logits_CV[rows_K].scatter_(1, targets_K1, -torch.inf)
        return cls(rows_K, targets_K1, others_KV, penalties_C[rows_K])

    def finish(self, lse_C: Tensor, nll_C: Tensor) -> None:
        """Form values and gradient, once the targets' own losses are known."""
        others_KV, rows_K, penalties_K = self._others_KV, self.rows_K, self._u_K
        others_K = torch.logsumexp(others_KV, dim=1)
        p_K = torch.exp(-nll_C[rows_K])
        # each form where it is exact: a small p is lost in the difference of two large numbers
        value_K = torch.where(p_K < 0.5, -torch.log1p(-p_K), lse_C[rows_K] - others_K)
        grad_KV = others_KV.sub_(others_K[:, None]).exp_().scatter_(1, self._targets_K1, -1.0)
        self.grad_KV = grad_KV.mul_(-(penalties_K.to(p_K) * p_K)[:, None])
        self.values_C = torch.zeros_like(nll_C).index_copy(0, rows_K, value_K)

    def add_to(self, grad_CV: Tensor, pulls_C1: Tensor) -> None:
        """Pull the penalised rows by their weight, and push them: both are then in `grad_CV`."""
        pulls_K1 = pulls_C1[self.rows_K]
        # where, not a product: a row of weight 0 has only the push, whatever else is in it
        pulled_KV = torch.where(pulls_K1 == 0, 0.0, grad_CV[self.rows_K] * pulls_K1)
        grad_CV.index_copy_(0, self.rows_K, pulled_KV.add_(self.grad_KV))


def _unclipped(weights_N: Tensor, nll_N: Tensor, nll_clip: float | None) -> Tensor:
    """The weights, 0 where a negatively weighted target lies beyond the clip."""
    if nll_clip is None:
        return weights_N
    return weights_N.masked_fill((weights_N < 0) & (nll_N > nll_clip), 0)


def _loss_sum(
    nll_N: Tensor,
    unlikelihood_N: Tensor,
    weights_N: Tensor,
    penalties_N: Tensor | None,
    nll_clip: float | None,
) -> Tensor:
    """Weighted sum in which a weight of 0 makes exactly nothing of any value."""
    if nll_clip is not None:
        nll_N = torch.where(weights_N < 0, nll_N.clamp(max=nll_clip), nll_N)
    loss_sum = torch.where(weights_N == 0, 0.0, weights_N * nll_N).sum()
    if penalties_N is None:
        return loss_sum
    pushed_N = penalties_N.to(nll_N) * unlikelihood_N
    return loss_sum + torch.where(penalties_N == 0, 0.0, pushed_N).sum()


class HeadLoss(NamedTuple):
    """What `weighted_cross_entropy` returns, in float32 (float64 for float64 inputs).

    Attributes:
        loss_sum: scalar, differentiable.
        nll_N: -log p of each target, neither weighted nor clipped, detached.
        unlikelihood_N: -log(1 - p) of each penalised target, 0 elsewhere, unweighted, detached.
    """

    loss_sum: Tensor
    nll_N: Tensor
    unlikelihood_N: Tensor


def _check_targets(targets_N: Tensor, num_classes: int) -> None:
    """Refuse ids outside the head. On a device without waiting for it, so without the id's name."""
    if targets_N.device.type != "cpu":
        inside_N = (targets_N >= 0) & (targets_N < num_classes)
        torch._assert_async(inside_N.all(), "a target id lies outside the model's head")
    elif len(targets_N):
        ids = targets_N.numpy()
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_classes:
            raise VocabularyError(
                f"target id {low if low < 0 else high}: outside the model's head, expected an id "
                f"from 0 to {num_classes - 1}"
            )


def weighted_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    penalties_N: Tensor | None = None,
    nll_clip: float | None = None,
    logit_map: LogitMap = AS_THEY_ARE,
    chunk_size: int | None = None,
) -> HeadLoss:
    """Sum over rows of w_n * nll_n + u_n * -log(1 - p_n), with nll_n = -log p_n of the target.

    Args:
        hidden_NH: last hidden states of the rows that predict.
        weight_VH: head weight, of the same dtype. Read it once per call, outside (ZeRO-3).
        bias_V: head bias or None.
        targets_N: int64[N], each in [0, V).
        weights_N: float[N]; a row of weight 0 (and no penalty) contributes exactly nothing.
        penalties_N: float[N], u_n; None where there are none.
        nll_clip: rows of negative weight count with min(nll, nll_clip), and give exactly no
            gradient beyond it.
        logit_map: what the model does to its logits after the head.
        chunk_size: rows whose logits are held at a time; None chooses by memory.

    Raises:
        VocabularyError: a target outside the head's rows.
    """
    num_classes = weight_VH.shape[0]
    _check_targets(targets_N, num_classes)
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
        penalties_N,
        nll_clip,
        logit_map,
        chunk_size,
        torch.is_grad_enabled(),
    )
    return HeadLoss(*result)
