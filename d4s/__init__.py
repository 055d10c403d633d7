"""d4s: edits facts in large language models, one after another, thousands of times, without breaking the model."""

from d4s import methods
from d4s.architectures import ARCHITECTURES, Architecture
from d4s.covariance import Covariance, estimate_covariance
from d4s.datasets import load_edits, save_edits
from d4s.edits import Edit, Question, without_contradictions
from d4s.errors import (
    ConfigError,
    CovarianceError,
    D4SError,
    DataError,
    EditError,
    ExtensionError,
    ModelError,
    NotPositiveDefiniteError,
    TokenizerError,
)
from d4s.kept_targets import KeptTargets
from d4s.loading import load_model
from d4s.methods import METHODS, Method
from d4s.metrics import Baseline, Evaluation, evaluate, take_baseline
from d4s.questions import question_forms
from d4s.sequence import Result, edit_sequence
from d4s.targets import TargetConfig

__version__ = "0.1.0"


__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "Architecture",
    "Baseline",
    "ConfigError",
    "Covariance",
    "CovarianceError",
    "D4SError",
    "DataError",
    "Edit",
    "EditError",
    "Evaluation",
    "ExtensionError",
    "KeptTargets",
    "Method",
    "ModelError",
    "NotPositiveDefiniteError",
    "Question",
    "Result",
    "TargetConfig",
    "TokenizerError",
    "edit_sequence",
    "estimate_covariance",
    "evaluate",
    "load_edits",
    "load_model",
    "methods",
    "question_forms",
    "save_edits",
    "take_baseline",
    "without_contradictions",
]
