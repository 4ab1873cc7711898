"""Figures and samples of a run on their way to its log."""

from imagine_opd.metrics.clock import make_clock
from imagine_opd.metrics.completions import CompletionLogger, CompletionSample
from imagine_opd.metrics.sampling import note_mismatch
from imagine_opd.metrics.step import StepMetrics, describe_times
from imagine_opd.metrics.thumbnails import make_thumbnails
from imagine_opd.metrics.token_classes import ANSWER, TokenClassifier, classify_tokens, note_kl

__all__ = [
    "ANSWER",
    "CompletionLogger",
    "CompletionSample",
    "StepMetrics",
    "TokenClassifier",
    "classify_tokens",
    "describe_times",
    "make_clock",
    "make_thumbnails",
    "note_kl",
    "note_mismatch",
]
