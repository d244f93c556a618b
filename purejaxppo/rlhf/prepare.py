"""Problems with the reference, the scores and the critic that a config takes from other runs."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.checks import ConfigError, is_reference
from purejaxppo.inputs import check_fits
from purejaxppo.references import resolve
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig, weighted
from purejaxppo.rlhf.functions import Weighted, text_rewards
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.rlhf.prompts_file import unscored
from purejaxppo.rlhf.reward import RewardModel, load_reward
from purejaxppo.rlhf.starts import Start, alphabet_of, start_of
from purejaxppo.rlhf.tokenizer import Vocabulary
from purejaxppo.types import PyTree


def prepared(config: RLHFConfig, problem: Problem, functions: Sequence[Weighted] = ()) -> Problem:
    """The problem with the reference of `config.init`, the scores of `config.reward` and the critic
    of `config.critic_init`.

    Args:
        functions: reward functions passed from Python, in addition to those of `config.reward`.

    Raises:
        ConfigError: if these runs or functions cannot be used with the problem.
    """
    vocabulary = Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
    start = _from(f"init = {config.init}", start_of, config.init) if config.init else None
    if start is not None:
        start.check_vocabulary(vocabulary, problem.name)
    pairs = [weighted(text) for text in config.reward]
    named = [Weighted(w, name, resolve("reward", name)) for w, name in pairs if is_reference(name)]
    models = [
        Model(w, _from(f"reward = {name}", load_reward, name, config.reward_combine))
        for w, name in pairs
        if not is_reference(name)
    ]
    converted = [x for x in models if config.retokenize and not x.has(vocabulary)]
    compiled = [x for x in models if x not in converted]
    for model in compiled:
        _check_model(config, problem, model.model, vocabulary)
    if config.critic_init == "reward" and not compiled:
        raise ConfigError(
            "critic_init = reward: needs a reward model with the policy's tokenizer in reward"
        )
    if start is not None or config.critic_init != "random":
        first = [model.model for model in compiled]
        reference = _reference(config, problem.reference, start, first)
        problem = dataclasses.replace(problem, reference=reference)
    on_host = [*functions, *named, *(x.function for x in converted)]
    if compiled or on_host:
        return _scored(problem, compiled, on_host)
    if problem.score is unscored:
        raise ConfigError(
            f"task = {config.task}: has no score; give reward, the directory of a reward model or "
            "package.module:function"
        )
    return problem


def _from(setting: str, load: Callable[..., Any], run_dir: str, *rest: Any) -> Any:
    """Load a run; an error names the setting that names its directory."""
    if not Path(run_dir).is_dir():
        raise ConfigError(
            f"{setting}: there is no such directory in {str(Path.cwd())!r}; relative paths need "
            "the working directory of the command that made the run"
        )
    return load(run_dir, *rest)


class Model(NamedTuple):
    """A reward model and its weight in the sum."""

    weight: float
    model: RewardModel

    def has(self, vocabulary: Vocabulary) -> bool:
        return alphabet_of(self.model.vocabulary) == alphabet_of(vocabulary)

    @property
    def function(self) -> Weighted:
        """The model as a function of texts."""
        return Weighted(self.weight, self.model.run_dir, partial(self.model.score, empty=True))


def _check_model(
    config: RLHFConfig, problem: Problem, model: RewardModel, vocabulary: Vocabulary
) -> None:
    if alphabet_of(model.vocabulary) != alphabet_of(vocabulary):
        raise ConfigError(
            f"reward = {model.run_dir}: was trained with another tokenizer than {problem.name!r}, "
            "so its tokens have other meanings; use the same tokenizer, or retokenize = true, "
            "which decodes and encodes all texts"
        )
    needed = problem.prompt_length + config.response_length
    if model.architecture.context < needed:
        raise ConfigError(
            f"reward = {model.run_dir}: scores at most {model.architecture.context} tokens, but "
            f"prompt and response have up to {needed}; train it with row_length = {needed} or more"
        )


def _reference(
    config: RLHFConfig,
    own: Callable[[Architecture], PyTree],
    start: Start | None,
    models: list[RewardModel],
) -> Callable[[Architecture], PyTree]:
    def reference(architecture: Architecture) -> PyTree:
        params = dict(own(architecture))
        if start is not None:
            params |= {k: x for k, x in start.params.items() if k.startswith("actor")}
        if config.critic_init == "reference":
            check_fits("critic_init = reference", params["actor"], params["critic"])
            params["critic"] = params["actor"]
        if config.critic_init == "reward":
            params |= _critic_of(models[0], params)
        return params

    return reference


def _critic_of(model: RewardModel, params: PyTree) -> dict[str, PyTree]:
    """A critic whose values are the scores of the reward model's first member."""
    first = jax.tree.map(lambda x: x[0], model.params)
    trunk, head = first["model"]["actor"], first["model"]["critic_head"]
    shapes = jax.eval_shape(lambda: params["critic"])
    if jax.tree.map(jnp.shape, trunk) != jax.tree.map(jnp.shape, shapes):
        raise ConfigError(
            f"critic_init = reward: the decoder of {model.run_dir} has another shape than the "
            "policy's; train it with the same decoder settings and with row_length = the policy's "
            "context"
        )
    kernel = head["kernel"] / first["std"]
    bias = (head["bias"] - first["mean"]) / first["std"]
    return {"critic": trunk, "critic_head": {"kernel": kernel, "bias": bias}}


def _scored(problem: Problem, models: Sequence[Model], functions: Sequence[Weighted]) -> Problem:
    """The problem with the weighted sum of the scores; its own score is the gold score."""

    def score(sample: Sample) -> Float[Array, " N"]:
        total = jnp.zeros(sample.prompts.lengths.shape)
        for (weight, model), params in zip(models, sample.shared["rewards"], strict=True):
            total += weight * scores_of(model, params, sample)
        return total

    def gold(sample: Sample) -> Any:
        return problem.judge(sample._replace(shared=sample.shared["task"]))

    shared = {"task": problem.shared, "rewards": tuple(x.model.params for x in models)}
    return dataclasses.replace(
        problem,
        score=score,
        host_score=text_rewards(problem, functions) if functions else None,
        gold=None if problem.score is unscored else gold,
        exact_score=None if problem.score is unscored else problem.exact_score,
        shared=shared,
    )


def scores_of(model: RewardModel, params: PyTree, sample: Sample) -> Float[Array, " N"]:
    """The model's scores of responses."""
    prompts, responses = sample.prompts, sample.responses
    width = prompts.tokens.shape[1]
    tokens = jnp.concatenate([prompts.tokens, responses.tokens], axis=1)
    start = jnp.arange(tokens.shape[1])[:, None] == width - prompts.lengths
    last = width + responses.lengths - 1
    return model.combined(model.members(params, tokens.T, start, last))
