"""Language models: tokens are actions, and a rollout is generated text.

Public names are imported on first use, so that settings can be checked without importing JAX.
"""

from typing import TYPE_CHECKING

from purejaxppo.lazy import lazy_names

if TYPE_CHECKING:
    from purejaxppo.rlhf.architecture import Architecture
    from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
    from purejaxppo.rlhf.decoder import make_decoder
    from purejaxppo.rlhf.generation import Prompts, Responses, generate
    from purejaxppo.rlhf.problem import Problem, Sample
    from purejaxppo.rlhf.problems import PROBLEMS, checkable
    from purejaxppo.rlhf.table import TOKEN_OBJECTIVES, TokenObjective
    from purejaxppo.rlhf.task import make_rlhf_task
    from purejaxppo.rlhf.text import Completion, Generator, load_generator
    from purejaxppo.rlhf.tokenizer import Characters, TokenIds

_NAMES = {
    "architecture": "Architecture",
    "config": "RLHFConfig RLHFHParams",
    "decoder": "make_decoder",
    "generation": "Prompts Responses generate",
    "problem": "Problem Sample",
    "problems": "PROBLEMS checkable",
    "table": "TOKEN_OBJECTIVES TokenObjective",
    "task": "make_rlhf_task",
    "text": "Completion Generator load_generator",
    "tokenizer": "Characters TokenIds",
}
__getattr__ = lazy_names(__name__, _NAMES)

__all__ = [
    "PROBLEMS",
    "TOKEN_OBJECTIVES",
    "Architecture",
    "Characters",
    "Completion",
    "Generator",
    "Problem",
    "Prompts",
    "RLHFConfig",
    "RLHFHParams",
    "Responses",
    "Sample",
    "TokenIds",
    "TokenObjective",
    "checkable",
    "generate",
    "load_generator",
    "make_decoder",
    "make_rlhf_task",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
