"""Rollouts: the student samples its own completions, one engine a file behind the same call."""

from imagine_opd.rollout.finish import finish_completions
from imagine_opd.rollout.hf import HFEngine
from imagine_opd.rollout.protocol import RolloutEngine
from imagine_opd.rollout.sampler import SamplingConfig

__all__ = ["HFEngine", "RolloutEngine", "SamplingConfig", "finish_completions"]
