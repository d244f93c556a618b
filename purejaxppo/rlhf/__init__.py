"""Language models: tokens are actions, and a rollout is generated text.

Public names are imported on first use, so that settings can be checked without importing JAX.
"""

from typing import TYPE_CHECKING

from purejaxppo.lazy import lazy_names

if TYPE_CHECKING:
    from purejaxppo.rlhf.architecture import Architecture
    from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
    from purejaxppo.rlhf.decoder import make_decoder
    from purejaxppo.rlhf.estimates import Estimate, best_of_n, pass_at_k
    from purejaxppo.rlhf.evaluation import BestOfN, PolicyEvaluation, PolicyScores
    from purejaxppo.rlhf.generation import Prompts, Responses, generate
    from purejaxppo.rlhf.judging import evaluate_policy
    from purejaxppo.rlhf.letters import write_letters
    from purejaxppo.rlhf.problem import Problem, Sample
    from purejaxppo.rlhf.problems import PROBLEMS, checkable
    from purejaxppo.rlhf.records import (
        Demonstration,
        Pair,
        Preference,
        Prompt,
        read_demonstrations,
        read_preferences,
        read_prompts,
        write_records,
    )
    from purejaxppo.rlhf.reward import RewardModel, load_reward
    from purejaxppo.rlhf.rounds import LabelsNeededError, Round, refresh
    from purejaxppo.rlhf.table import TOKEN_OBJECTIVES, TokenObjective
    from purejaxppo.rlhf.task import make_rlhf_task
    from purejaxppo.rlhf.text import Completion, Generator, load_generator
    from purejaxppo.rlhf.text_config import DPOConfig, RewardConfig, SFTConfig, TextHParams
    from purejaxppo.rlhf.texts import make_text_task
    from purejaxppo.rlhf.tokenizer import Bytes, Characters, TokenIds

_NAMES = {
    "architecture": "Architecture",
    "config": "RLHFConfig RLHFHParams",
    "decoder": "make_decoder",
    "estimates": "Estimate best_of_n pass_at_k",
    "evaluation": "BestOfN PolicyEvaluation PolicyScores",
    "generation": "Prompts Responses generate",
    "judging": "evaluate_policy",
    "letters": "write_letters",
    "problem": "Problem Sample",
    "problems": "PROBLEMS checkable",
    "records": (
        "Demonstration Pair Preference Prompt read_demonstrations read_preferences read_prompts "
        "write_records"
    ),
    "reward": "RewardModel load_reward",
    "rounds": "LabelsNeededError Round refresh",
    "table": "TOKEN_OBJECTIVES TokenObjective",
    "task": "make_rlhf_task",
    "text": "Completion Generator load_generator",
    "text_config": "DPOConfig RewardConfig SFTConfig TextHParams",
    "texts": "make_text_task",
    "tokenizer": "Bytes Characters TokenIds",
}
__getattr__ = lazy_names(__name__, _NAMES)

__all__ = [
    "PROBLEMS",
    "TOKEN_OBJECTIVES",
    "Architecture",
    "BestOfN",
    "Bytes",
    "Characters",
    "Completion",
    "DPOConfig",
    "Demonstration",
    "Estimate",
    "Generator",
    "LabelsNeededError",
    "Pair",
    "PolicyEvaluation",
    "PolicyScores",
    "Preference",
    "Problem",
    "Prompt",
    "Prompts",
    "RLHFConfig",
    "RLHFHParams",
    "Responses",
    "RewardConfig",
    "RewardModel",
    "Round",
    "SFTConfig",
    "Sample",
    "TextHParams",
    "TokenIds",
    "TokenObjective",
    "best_of_n",
    "checkable",
    "evaluate_policy",
    "generate",
    "load_generator",
    "load_reward",
    "make_decoder",
    "make_rlhf_task",
    "make_text_task",
    "pass_at_k",
    "read_demonstrations",
    "read_preferences",
    "read_prompts",
    "refresh",
    "write_letters",
    "write_records",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
