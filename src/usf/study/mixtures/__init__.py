"""The study of section 4.3: does the latent norm rank Gaussian mixtures by density?

Three models (Deep SVDD, NonUSFlow, USFlow), four dimensions, ten Optuna trials each; both flows from **one** shared
search space. Run it::

    python -m usf.study.mixtures --profile smoke     # seconds, to a figure
    python -m usf.study.mixtures --profile full      # 120 trainings, within an hour on two cores

Each finished trial is one JSON file under ``build/mixtures/``, written at once; a killed run continues where it stopped
and runs nothing twice. A trial that diverges is a row with its reason. ``--publish`` gathers the records of a run into
``data/results/mixtures/``: ``trials.csv`` (one row a trial), ``oracle/`` (bounds and baselines), ``figures/points.csv``
(subsampled test points of the selected models) and ``provenance.json``.

=================================  ====================================================================================
`usf.study.mixtures.experiment`    `Study` (its sizes), `data`, `build_flow`, `negative_log_likelihood`
`usf.study.mixtures.search`        `Trial`, `search_space`, `suggest`, `train`, `evaluate`, `run`
`usf.study.mixtures.results`       `selected`, `bounds`, `baselines`, `summary`, `repeat`; the files: `write`, `load`
=================================  ====================================================================================
"""

from usf.study.mixtures.experiment import (
    MODELS,
    TAIL,
    Data,
    Study,
    build_flow,
    data,
    negative_log_likelihood,
    smooth_mlp,
    stable_seed,
    study,
)
from usf.study.mixtures.results import COLUMNS, baselines, bounds, load, repeat, selected, summary, write
from usf.study.mixtures.search import Trial, evaluate, finished, run, run_trial, search_space, suggest, train

__all__ = [
    "COLUMNS",
    "MODELS",
    "TAIL",
    "Data",
    "Study",
    "Trial",
    "baselines",
    "bounds",
    "build_flow",
    "data",
    "evaluate",
    "finished",
    "load",
    "negative_log_likelihood",
    "repeat",
    "run",
    "run_trial",
    "search_space",
    "selected",
    "smooth_mlp",
    "stable_seed",
    "study",
    "suggest",
    "summary",
    "train",
    "write",
]
