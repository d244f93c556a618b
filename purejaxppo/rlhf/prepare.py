"""Problems with the reference, the scores and the critic that a config takes from other runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from purejaxppo.checks import ConfigError
from purejaxppo.inputs import check_fits
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig, weighted
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.rlhf.reward import RewardModel, load_reward
from purejaxppo.rlhf.starts import Start, start_of
from purejaxppo.rlhf.tokenizer import Vocabulary
from purejaxppo.types import PyTree


def prepared(config: RLHFConfig, problem: Problem) -> Problem:
    """The problem with the reference of `config.init`, the scores of `config.reward` and the critic
    of `config.critic_init`.

    Raises:
        ConfigError: if these runs cannot be used with the problem.
    """
    vocabulary = Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
    start = start_of(config.init) if config.init else None
    if start is not None:
        start.check_vocabulary(vocabulary, problem.name)
    pairs = [weighted(text) for text in config.reward]
    models = [load_reward(run_dir, config.reward_combine) for _, run_dir in pairs]
    for model in models:
        _check_model(config, problem, model, vocabulary)
    if start is not None or config.critic_init != "random":
        reference = _reference(config, problem.reference, start, models)
        problem = dataclasses.replace(problem, reference=reference)
    if models:
        problem = _scored(problem, [weight for weight, _ in pairs], models)
    return problem


def _check_model(
    config: RLHFConfig, problem: Problem, model: RewardModel, vocabulary: Vocabulary
) -> None:
    Start(
        model.run_dir, model.architecture, model.vocabulary, (), 1
    ).check_vocabulary(vocabulary, problem.name)  # fmt: skip
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


def _scored(problem: Problem, weights: list[float], models: list[RewardModel]) -> Problem:
    """The problem with the weighted sum of the models' scores; its own score is the gold score."""

    def score(sample: Sample) -> Float[Array, " N"]:
        each = zip(weights, models, sample.shared["rewards"], strict=True)
        return sum((w * scores_of(model, params, sample) for w, model, params in each), start=0.0)  # pyright: ignore

    def gold(sample: Sample) -> Any:
        return problem.judge(sample._replace(shared=sample.shared["task"]))

    shared = {"task": problem.shared, "rewards": tuple(model.params for model in models)}
    return dataclasses.replace(problem, score=score, gold=gold, shared=shared)


def scores_of(model: RewardModel, params: PyTree, sample: Sample) -> Float[Array, " N"]:
    """The model's scores of responses."""
    prompts, responses = sample.prompts, sample.responses
    width = prompts.tokens.shape[1]
    tokens = jnp.concatenate([prompts.tokens, responses.tokens], axis=1)
    start = jnp.arange(tokens.shape[1])[:, None] == width - prompts.lengths
    last = width + responses.lengths - 1
    return model.combined(model.members(params, tokens.T, start, last))
