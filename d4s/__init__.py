"""d4s: edits facts in large language models, one after another, with sums of a size that the number does not change."""

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
from d4s.journal.changes import Change, changes_between, changes_of
from d4s.journal.edits_card import write_edits_card
from d4s.journal.lora import export_gguf_lora, export_lora
from d4s.journal.patch import apply_patch, export_patch, remove_patch
from d4s.locate.covariance import Covariance, covariance_at_subjects, estimate_covariance
from d4s.locate.kept_targets import KeptTargets
from d4s.locate.npz_statistics import covariance_from_npz
from d4s.locate.targets import TargetConfig
from d4s.measure.metrics import Baseline, Evaluation, evaluate, take_baseline
from d4s.methods import METHODS, Method, Preset
from d4s.methods.preset import load_preset
from d4s.models.architectures import ARCHITECTURES, Architecture
from d4s.models.chat import in_chat
from d4s.models.loading import load_model
from d4s.sequence.alone import edit_alone
from d4s.sequence.observers import Observer
from d4s.sequence.result import Result, consolidate
from d4s.sequence.run import edit_sequence
from d4s.sequence.schedule import Schedule
from d4s.sequence.target_search import search_targets
from d4s.version import __version__ as __version__

if TYPE_CHECKING:
    from d4s.journal.journal import Journal
    from d4s.journal.merge import merge
    from d4s.measure.downstream import run_tasks
    from d4s.sequence.compare import compare
    from d4s.sequence.comparison import Comparison
    from d4s.study.data_view import analyze_data
    from d4s.study.front import Front, front
    from d4s.study.model_view import analyze_model
    from d4s.study.tune import tune
    from d4s.study.tuning import Tuning

# Loaded when they are first asked for: they bring matplotlib, which most runs do without.
_LATER = {
    "Comparison": "d4s.sequence.comparison",
    "Front": "d4s.study.front",
    "Journal": "d4s.journal.journal",
    "Tuning": "d4s.study.tuning",
    "merge": "d4s.journal.merge",
    "analyze_data": "d4s.study.data_view",
    "analyze_model": "d4s.study.model_view",
    "compare": "d4s.sequence.compare",
    "front": "d4s.study.front",
    "run_tasks": "d4s.measure.downstream",
    "tune": "d4s.study.tune",
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
    "Change",
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
    "Front",
    "Journal",
    "KeptTargets",
    "Method",
    "ModelError",
    "NotPositiveDefiniteError",
    "Observer",
    "Preset",
    "Question",
    "Result",
    "Schedule",
    "TargetConfig",
    "TokenizerError",
    "Tuning",
    "analyze_data",
    "analyze_model",
    "apply_patch",
    "changes_between",
    "changes_of",
    "compare",
    "consolidate",
    "covariance_at_subjects",
    "covariance_from_npz",
    "edit_alone",
    "edit_sequence",
    "estimate_covariance",
    "evaluate",
    "export_gguf_lora",
    "export_lora",
    "export_patch",
    "front",
    "in_chat",
    "load_edits",
    "load_model",
    "load_preset",
    "merge",
    "methods",
    "question_forms",
    "remove_patch",
    "run_tasks",
    "save_edits",
    "search_targets",
    "take_baseline",
    "tune",
    "without_contradictions",
    "write_edits_card",
]
