"""The module that is given to the engine: a causal language model and its role-weighted loss.

Everything that touches a parameter happens inside this `forward`: ZeRO-3 gathers weights only
there (a loss computed outside sees an empty head; huggingface/trl#3368, #5891, #6372).
"""

# B rows, T tokens per row, N = B*T, M selected targets, H hidden, V vocabulary, K known rows

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmar_ds.errors import ConfigError
from nmar_ds.model.attention import (
    SegmentLayout,
    attention_name,
    check_supported,
    refuse_mask,
)
from nmar_ds.model.logits import LogitMap
from nmar_ds.model.objective import HeadLoss, role_sums, weighted_cross_entropy
from nmar_ds.model.row_norms import row_norms
from nmar_ds.model.weighting import PLAIN, LossOptions
from nmar_ds.traces.schema import NO_ROLE, Role


class MicroBatchLoss(NamedTuple):
    """What one micro-batch contributes. A tuple, so that the engine's hooks find the tensors.

    Attributes:
        loss_sum: scalar, differentiable, sum of w_n * nll_n and what the options add. Not
            divided by anything.
        role_sums: float64[NUM_ROLES] sums of nll, neither weighted nor clipped, detached.
        role_counts: int64[NUM_ROLES] targets in `role_sums`.
        unlikelihood_sum: float64 scalar, unweighted -log(1 - p) summed over the deviation targets,
            detached; 0 where the objective has no unlikelihood.
    """

    loss_sum: Tensor
    role_sums: Tensor
    role_counts: Tensor
    unlikelihood_sum: Tensor


class _WithHead(nn.Module):
    """Reads a model's head in a module of its own.

    What a module reads of another's parameters ZeRO-3 keeps gathered from then on for as long as
    that module's forward and backward last. Read by the training model itself, the head would lie
    whole through all layers, both ways.
    """

    def forward(
        self, hidden_NH: Tensor, *, head: Any, use: Callable[[Tensor, Tensor, Any], Any]
    ) -> Any:
        """What `use` makes of hidden states, weight [V, H], and bias [V] or None.

        Each is read once and here: under ZeRO-3 that access is the collective that gathers the
        head, and every rank must do it equally often whatever its targets (huggingface/trl#6696).
        """
        return use(hidden_NH, head.weight, getattr(head, "bias", None))


class _RowNorms(nn.Module):
    """Reads embedding and head, in a module of its own for the same reason."""

    def forward(self, *, lm: Any, known_K: Tensor, undo_id: int) -> Tensor:
        """See `row_norms`."""
        head, embedding_VH = lm.get_output_embeddings(), lm.get_input_embeddings().weight
        bias_V = getattr(head, "bias", None)
        return row_norms(embedding_VH, head.weight, bias_V, known_K=known_K, undo_id=undo_id)


class UndoTrainingModel(nn.Module):
    """Wraps a transformers causal language model for packed, role-weighted training.

    Args:
        lm: the model. Its attention is switched to ours and its cache is switched off.
        chunk_size: rows per chunk of the loss; None chooses by memory.
        options: clip and unlikelihood of the objective.
        backend: the kernel behind attention, of `backends.choose`.

    Raises:
        ConfigError: the architecture is not supported.
    """

    def __init__(
        self, lm: Any, *, chunk_size: int | None = None, options: LossOptions = PLAIN,
        backend: str = "segments",
    ) -> None:  # fmt: skip
        super().__init__()
        check_supported(lm.config)
        lm.set_attn_implementation(attention_name(backend))
        if lm.config._attn_implementation != attention_name(backend):
            raise ConfigError(
                f"model: {type(lm).__name__} does not take attention functions, expected an "
                "architecture that uses transformers' AttentionInterface"
            )
        lm.config.use_cache = False
        lm.get_decoder().register_forward_pre_hook(refuse_mask, with_kwargs=True)
        self.lm = lm
        self.with_head = _WithHead()
        self.row_norms = _RowNorms()
        self.chunk_size = chunk_size
        self.options = options
        self.logit_map = LogitMap.of_config(lm.config)

    def forward(  # noqa: PLR0917 (the batch)
        self,
        input_ids_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        layout: SegmentLayout | None = None,
        targets_N: Tensor | None = None,
        weights_N: Tensor | None = None,
        roles_N: Tensor | None = None,
        *,
        rows_M: Tensor | None = None,
        also_untrained: bool = False,
        mode: str = "loss",
        positions_M: Tensor | None = None,
        known_K: Tensor | None = None,
        undo_id: int = -1,
    ) -> MicroBatchLoss | Tensor:
        """Loss of a micro-batch, logits for the canary, next ids, or the norms of the undo row.

        Args:
            input_ids_BT: int64[B, T].
            position_ids_BT: int64[B, T], restarting at 0 in each trace.
            layout: segments of the flattened tokens.
            targets_N: int64[N] next id of the same trace, -1 where there is none.
            weights_N: float[N] loss weights, 0 where there is no target.
            roles_N: uint8[N] roles of the targets, `NO_ROLE` where there is none.
            rows_M: int64[M] flat positions of the trained targets, rising; None finds them, for
                which the host waits for a device.
            also_untrained: report the response targets of weight 0 too (a second pass through
                the head, without gradient).
            mode: "loss"; "nll", the loss of every response target whatever its weight, without
                gradient (with `undo_id`, that of `<UNDO>` at every such place as well);
                "logits" (this module's path) or "stock_logits" (the wrapped model's own forward
                and head), at `positions_M`; "greedy", the likeliest next id there out of `known_K`;
                "row_norms", which takes no batch but `known_K` and `undo_id` (see `row_norms`).
            positions_M: int64[M] flat positions, for the logits modes and "greedy".
            known_K: bool[K], the rows of real tokens.
            undo_id: row of `<UNDO>`.

        Returns:
            `MicroBatchLoss`; or for "nll" float[N], 0 where there is no response target (with
            `undo_id` float[2, N], the target's and that of `<UNDO>`); or
            logits [M, V]; both in float32 (float64 for a float64 model); or for "greedy" int64[M];
            or for "row_norms" float64[4 or 5].
        """
        if mode == "row_norms":
            assert known_K is not None
            norms: Tensor = self.row_norms(lm=self.lm, known_K=known_K, undo_id=undo_id)
            return norms
        assert input_ids_BT is not None and position_ids_BT is not None and layout is not None
        if mode == "stock_logits":
            logits_BTV = self.lm(
                input_ids=input_ids_BT,
                position_ids=position_ids_BT,
                use_cache=False,
                segment_layout=layout,
                # Of one row the head is applied where asked, or its logits would not fit beside
                # a large vocabulary.
                **({"logits_to_keep": positions_M} if len(input_ids_BT) == 1 else {}),
            ).logits
            if len(input_ids_BT) == 1:
                return _at_least_float(logits_BTV[0])
            return _at_least_float(logits_BTV.flatten(0, 1)[positions_M])
        hidden_NH = self._hidden(input_ids_BT, position_ids_BT, layout)

        def use_head(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Any:
            if mode in ("logits", "greedy"):
                logits_MV = F.linear(hidden_NH[positions_M], weight_VH, bias_V)
                logits_MV = self.logit_map(_at_least_float(logits_MV))
                return logits_MV if mode == "logits" else _likeliest(logits_MV, known_K)
            if mode == "nll":
                assert targets_N is not None and roles_N is not None
                asked = [targets_N]
                if undo_id >= 0:
                    asked.append(torch.where(targets_N >= 0, undo_id, targets_N))
                found = [
                    self._response_nll(hidden_NH, weight_VH, bias_V, each_N, roles_N)
                    for each_N in asked
                ]
                return found[0] if undo_id < 0 else torch.stack(found)
            if mode != "loss":
                raise ValueError(f"unknown mode {mode!r}")
            assert targets_N is not None and weights_N is not None and roles_N is not None
            return self._loss(
                hidden_NH, weight_VH, bias_V, targets_N, weights_N, roles_N, rows_M=rows_M,
                also_untrained=also_untrained,
            )  # fmt: skip

        found: MicroBatchLoss | Tensor = self.with_head(
            hidden_NH, head=self.lm.get_output_embeddings(), use=use_head
        )
        return found

    def _loss(  # noqa: PLR0917 (the batch)
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        roles_N: Tensor,
        *,
        rows_M: Tensor | None,
        also_untrained: bool,
    ) -> MicroBatchLoss:
        """The mode "loss" of `forward`, given the head."""
        penalties_N = None
        if self.options.unlikelihood:
            is_deviation_N = roles_N == Role.DEVIATION
            penalties_N = is_deviation_N.to(weights_N.dtype) * self.options.unlikelihood

        def head_loss(rows_M: Tensor, targets_M: Tensor, weights_M: Tensor) -> HeadLoss:
            return weighted_cross_entropy(
                hidden_NH.index_select(0, rows_M),
                weight_VH,
                bias_V,
                targets_M,
                weights_M,
                penalties_N=None if penalties_N is None else penalties_N[rows_M],
                nll_clip=self.options.nll_clip,
                logit_map=self.logit_map,
                chunk_size=self.chunk_size,
            )

        trained_N = weights_N != 0 if penalties_N is None else (weights_N != 0) | (penalties_N != 0)
        if rows_M is None:
            rows_M = torch.nonzero(trained_N)[:, 0]
        rows_M, targets_M, weights_M, roles_M = _or_one(rows_M, targets_N, weights_N, roles_N)
        loss_sum, nll_M, unlikelihood_M = head_loss(rows_M, targets_M, weights_M)
        sums, counts = role_sums(nll_M, roles_M)
        if also_untrained:
            rows_M = _untrained(trained_N, roles_N)
            with torch.no_grad():
                _, nll_M, _ = head_loss(rows_M, targets_N[rows_M], weights_N[rows_M])
            more_sums, more_counts = role_sums(nll_M, roles_N[rows_M])
            sums, counts = sums + more_sums, counts + more_counts
        return MicroBatchLoss(loss_sum, sums, counts, unlikelihood_M.double().sum())

    def _hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, layout: SegmentLayout
    ) -> Tensor:
        """Last hidden states [N, H], by the decoder without its head."""
        outputs = self.lm.get_decoder()(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            use_cache=False,
            segment_layout=layout,
        )
        hidden_BTH: Tensor = outputs[0]
        return hidden_BTH.flatten(0, 1)

    @torch.no_grad()
    def _response_nll(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        roles_N: Tensor,
    ) -> Tensor:
        """-log p of every target that is not of a prompt, in its place; 0 elsewhere."""
        rows_M = torch.nonzero((targets_N >= 0) & (roles_N != Role.PROMPT))[:, 0]
        _, nll_M, _ = weighted_cross_entropy(
            hidden_NH.index_select(0, rows_M),
            weight_VH,
            bias_V,
            targets_N[rows_M],
            torch.ones_like(rows_M, dtype=torch.float32),
            logit_map=self.logit_map,
            chunk_size=self.chunk_size,
        )
        return nll_M.new_zeros(len(targets_N)).index_copy(0, rows_M, nll_M)


def _or_one(
    rows_M: Tensor, targets_N: Tensor, weights_N: Tensor, roles_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the rows that are trained; if there are none, one row of weight 0.

    Under mSFT a good part of the tokens is masked, and the head is the dearest layer of a small
    model. The stand-in row keeps the backward, and so the collectives, equal on all ranks.
    """
    if len(rows_M):
        return rows_M, targets_N[rows_M], weights_N[rows_M], roles_N[rows_M]
    rows_1 = rows_M.new_zeros(1)
    no_role_1 = torch.full_like(roles_N[:1], NO_ROLE)
    return rows_1, targets_N.new_zeros(1), weights_N.new_zeros(1), no_role_1


def _untrained(trained_N: Tensor, roles_N: Tensor) -> Tensor:
    """Rows of the response targets that are not trained; there may be none."""
    response_N = (roles_N != NO_ROLE) & (roles_N != Role.PROMPT)
    return torch.nonzero(response_N & ~trained_N)[:, 0]


def _likeliest(logits_MV: Tensor, known_K: Tensor | None) -> Tensor:
    """int64[M] the likeliest id out of the known ones."""
    assert known_K is not None
    return logits_MV[:, : len(known_K)].masked_fill(~known_K, -torch.inf).argmax(dim=1)


def _at_least_float(logits_MV: Tensor) -> Tensor:
    return logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
