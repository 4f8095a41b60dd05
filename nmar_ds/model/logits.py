"""What some models do to their logits after the head: a factor, a soft cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# C rows, V vocabulary


@dataclass(frozen=True)
class LogitMap:
    """z -> cap * tanh(scale * z / cap), or scale * z without a cap.

    Attributes:
        scale: Cohere's `logit_scale`, or 1 over Granite's `logits_scaling`.
        cap: Gemma's `final_logit_softcapping` (2408.00118, section 2).
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of_config(cls, config: Any) -> LogitMap:
        """As transformers names them; the canary compares the outcome with the model's own."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = getattr(config, "logit_scale", None)
        scale = 1.0 if scale is None else float(scale)
        divisor = getattr(config, "logits_scaling", None)
        scale = scale if divisor is None else scale / float(divisor)
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Mapped logits, of the same shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def apply_(self, logits_CV: Tensor) -> Tensor | None:
        """Map in place.

        Returns:
            The derivative without `scale`, [C, V], for a cap; None where that is 1. A block more
            memory, for models with a cap alone.
        """
        if self.scale != 1.0:
            logits_CV.mul_(self.scale)
        if self.cap is None:
            return None
        logits_CV.div_(self.cap).tanh_()
        slope_CV = 1 - logits_CV.square()
        logits_CV.mul_(self.cap)
        return slope_CV


AS_THEY_ARE = LogitMap()
