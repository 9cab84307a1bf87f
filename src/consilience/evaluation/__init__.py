"""Can an explanation be trusted? Metrics over a run's pictures, beside controls, with intervals and tests."""

from consilience.evaluation.job import Asked, evaluate_pictures, evaluate_run
from consilience.evaluation.kept import Evaluation
from consilience.evaluation.suites import SUITES, asked_metrics

__all__ = ["SUITES", "Asked", "Evaluation", "asked_metrics", "evaluate_pictures", "evaluate_run"]
