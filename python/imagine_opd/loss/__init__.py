"""The objective: weights, divergences, advantages and the loss they make."""

from imagine_opd.loss.advantages import measure_advantages, shape_advantages
from imagine_opd.loss.config import ObjectiveConfig
from imagine_opd.loss.dense import DenseStats
from imagine_opd.loss.objective import Objective, objective
from imagine_opd.loss.token_weights import make_token_weights

__all__ = [
    "DenseStats",
    "Objective",
    "ObjectiveConfig",
    "make_token_weights",
    "measure_advantages",
    "objective",
    "shape_advantages",
]
