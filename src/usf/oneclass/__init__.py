"""Deep one-class classification: Deep SVDD, monitors of its collapse, and the map that inverts a density.

========================  ==============================================================================================
`usf.oneclass.svdd`       `DeepSVDD`, `fit_deep_svdd`, `one_class_loss`, `decreasing_schedule`
`usf.oneclass.collapse`   `collapse_report`: latent spread, effective rank, distinct scores
`usf.oneclass.inversion`  Proposition 1 of the paper: `inversion_map`, its exact loss, its Monte-Carlo loss
========================  ==============================================================================================
"""

from usf.oneclass.collapse import CollapseReport, collapse_report, distinct, effective_rank
from usf.oneclass.inversion import (
    HomogeneousLimit,
    MonteCarlo,
    expected_inverse_square,
    homogeneous_limit,
    inversion_loss,
    inversion_map,
    monte_carlo_loss,
    running_loss,
    standard_normal_log_prob,
    truncated_loss,
)
from usf.oneclass.svdd import DeepSVDD, SVDDHistory, decreasing_schedule, fit_deep_svdd, one_class_loss

__all__ = [
    "CollapseReport",
    "DeepSVDD",
    "HomogeneousLimit",
    "MonteCarlo",
    "SVDDHistory",
    "collapse_report",
    "decreasing_schedule",
    "distinct",
    "effective_rank",
    "expected_inverse_square",
    "fit_deep_svdd",
    "homogeneous_limit",
    "inversion_loss",
    "inversion_map",
    "monte_carlo_loss",
    "one_class_loss",
    "running_loss",
    "standard_normal_log_prob",
    "truncated_loss",
]
