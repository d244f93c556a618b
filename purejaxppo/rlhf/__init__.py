"""Language models: tokens are actions, and a rollout is generated text."""

from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
from purejaxppo.rlhf.decoder import Architecture, make_decoder
from purejaxppo.rlhf.generate import Prompts, Responses, generate
from purejaxppo.rlhf.objectives import TOKEN_OBJECTIVES, TokenObjective
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.rlhf.task import make_rlhf_task

__all__ = [
    "TOKEN_OBJECTIVES",
    "Architecture",
    "Problem",
    "Prompts",
    "RLHFConfig",
    "RLHFHParams",
    "Responses",
    "Sample",
    "TokenObjective",
    "generate",
    "make_decoder",
    "make_rlhf_task",
]
