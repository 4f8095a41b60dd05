"""(e): how the gradients of errors, undos and corrections lie to each other (N-MARS Prop. 2.1).

All are of loss sums of single held-out traces, by a stock model in float64. A cosine says nothing
where a gradient has vanished, so norms stand beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nmar_ds.acceptance.reference import gradients, reference_sums
from nmar_ds.data.loader import RowLoader
from nmar_ds.theory.formulas import alpha_hat, cosine, dot, norm, weighted
from nmar_ds.theory.material import in_float64
from nmar_ds.traces.schema import Role

NAMES = {"p": Role.PREFIX, "e": Role.DEVIATION, "b": Role.UNDO, "c": Role.CORRECTION}


def directions(lm: Any, probe: RowLoader) -> dict[str, Any]:
    """Alpha-hat over traces, and cosines and norms of the traces' mean gradients.

    Returns:
        `alpha` with g_bk the gradient of undos (`b`), corrections (`c`) and both (`bc`); `cosine`
        of the mean g_e with the mean g_b, g_c and g_p; `norm` of the means; `rms_norm`: the root
        of E||g||^2 over traces.
    """
    stock = in_float64(lm, "sdpa")
    num = len(probe.plan.order)
    means: dict[str, Any] = {}
    inner: dict[str, list[float]] = {"b": [], "c": [], "bc": []}
    squares: dict[str, list[float]] = {name: [] for name in NAMES}
    for index in range(num):
        sums = reference_sums(stock, probe.source, [index])
        found = {name: gradients(stock, sums[role]) for name, role in NAMES.items()}
        for name, g in found.items():
            squares[name].append(dot(g, g))
            means[name] = g if name not in means else weighted([1, 1], [means[name], g])
        inner["b"].append(dot(found["b"], found["e"]))
        inner["c"].append(dot(found["c"], found["e"]))
        inner["bc"].append(inner["b"][-1] + inner["c"][-1])
    means = {name: weighted([1 / num], [g]) for name, g in means.items()}
    return {
        "traces": num,
        "alpha": {name: alpha_hat(each, squares["e"]) for name, each in inner.items()},
        "cosine": {name: cosine(means["e"], means[name]) for name in ("b", "c", "p")},
        "norm": {name: norm(g) for name, g in means.items()},
        "rms_norm": {name: float(np.sqrt(np.mean(each))) for name, each in squares.items()},
    }
