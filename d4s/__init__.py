"""d4s: edits facts in large language models, one after another, thousands of times, without breaking the model."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4s.errors import ExtensionError

try:
    from d4s import ops as _ops  # noqa: F401
except ExtensionError as error:
    # As a command one line says it; whoever imports d4s gets the error.
    if Path(sys.argv[0]).stem == "d4s" or (sys.argv[0] == "-m" and "d4s" in sys.orig_argv):
        sys.exit(f"d4s: {error}")
    raise

from d4s import methods
from d4s.edits import Edit, Question, without_contradictions
from d4s.edits.formats import load_edits, save_edits
from d4s.edits.questions import question_forms
from d4s.errors import (
    ConfigError,
    CovarianceError,
    D4SError,
    DataError,
    EditError,
    EditingFailed,
    EditingInterrupted,
    EditingStopped,
    ModelError,
    NotPositiveDefiniteError,
    TokenizerError,
)
from d4s.locate.covariance import Covariance, estimate_covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.targets import TargetConfig
from d4s.measure.metrics import Baseline, Evaluation, evaluate, take_baseline
from d4s.methods import METHODS, Method
from d4s.models.architectures import ARCHITECTURES, Architecture
from d4s.models.loading import load_model
from d4s.sequence.observers import Observer
from d4s.sequence.run import Result, consolidate, edit_sequence
from d4s.sequence.schedule import Schedule
from d4s.sequence.target_search import search_targets

if TYPE_CHECKING:
    from d4s.measure.downstream import run_tasks
    from d4s.sequence.compare import compare
    from d4s.sequence.comparison import Comparison
    from d4s.study.data_view import analyze_data
    from d4s.study.model_view import analyze_model

__version__ = "0.2.0"

# Loaded when they are first asked for: they bring matplotlib, which most runs do without.
_LATER = {
    "Comparison": "d4s.sequence.comparison",
    "analyze_data": "d4s.study.data_view",
    "analyze_model": "d4s.study.model_view",
    "compare": "d4s.sequence.compare",
    "run_tasks": "d4s.measure.downstream",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'd4s' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "Architecture",
    "Baseline",
    "Comparison",
    "ConfigError",
    "Covariance",
    "CovarianceError",
    "D4SError",
    "DataError",
    "Edit",
    "EditError",
    "EditingFailed",
    "EditingInterrupted",
    "EditingStopped",
    "Evaluation",
    "ExtensionError",
    "KeptTargets",
    "Method",
    "ModelError",
    "NotPositiveDefiniteError",
    "Observer",
    "Question",
    "Result",
    "Schedule",
    "TargetConfig",
    "TokenizerError",
    "analyze_data",
    "analyze_model",
    "compare",
    "consolidate",
    "edit_sequence",
    "estimate_covariance",
    "evaluate",
    "load_edits",
    "load_model",
    "methods",
    "question_forms",
    "run_tasks",
    "save_edits",
    "search_targets",
    "take_baseline",
    "without_contradictions",
]
