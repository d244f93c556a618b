"""A language model tuned against a score, as a `Task`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from purejaxppo.checks import ConfigError
from purejaxppo.collectives import masked_mean
from purejaxppo.distributions import categorical
from purejaxppo.improve import make_improve
from purejaxppo.inputs import check_fits
from purejaxppo.learner import make_learner
from purejaxppo.optimizer import ADAM
from purejaxppo.rlhf.actor import make_token_actor
from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
from purejaxppo.rlhf.decoder import Architecture, make_decoder
from purejaxppo.rlhf.generate import Prompts, Responses, generate
from purejaxppo.rlhf.objectives import TOKEN_OBJECTIVES
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.task import Task
from purejaxppo.types import (
    Batch,
    Improve,
    Learner,
    LearnerState,
    Metrics,
    Network,
    PyTree,
    TrainState,
)


def make_rlhf_task(config: RLHFConfig, problem: Problem) -> Task:
    """Make the task that tunes a decoder for a problem.

    The learner is that of reinforcement learning: tokens are actions, and a rollout is generated
    text. The prompts, the reference and what the score reads are the task's `data`.

    Raises:
        ConfigError: if settings and problem do not fit each other.
    """
    _check(config, problem)
    architecture = architecture_of(config, problem)
    network, reference = make_decoder(architecture), problem.reference(architecture)
    check_fits(f"reference of {problem.name}", reference, _shapes(network))
    held_out = problem.held_out
    data = {
        "prompts": problem.prompts,
        "extras": problem.extras,
        "reference": reference,
        "held_out": problem.prompts if held_out is None else held_out,
        "held_out_extras": problem.extras if held_out is None else problem.held_out_extras,
    }
    return Task(
        config=config,
        learner=partial(_make_learner, config, problem, network),
        evaluate=_make_evaluate(config, problem, network),
        with_config=partial(make_rlhf_task, problem=problem),
        hparams=RLHFHParams(),
        curve="score",
        data=data,
        why_not_divided=partial(_why_not_divided, config),
    )


def _shapes(network: Network) -> PyTree:
    return jax.eval_shape(network.init, jax.random.key(0))


def architecture_of(config: RLHFConfig, problem: Problem) -> Architecture:
    """The decoder of a problem: its context is the longest prompt and response."""
    return config.architecture(problem.vocab_size, problem.prompt_length + config.response_length)


def _check(config: RLHFConfig, problem: Problem) -> None:
    if not -1 <= problem.stop_token < problem.vocab_size:
        raise ConfigError(
            f"stop_token = {problem.stop_token}: must be a token below vocab_size = "
            f"{problem.vocab_size}, or -1 for none"
        )
    sets = [("prompts", problem.prompts, problem.extras)]
    if problem.held_out is not None:
        sets.append(("held_out", problem.held_out, problem.held_out_extras))
    for name, prompts, extras in sets:
        _check_prompts(name, prompts, extras, problem.vocab_size)
    _check_score(config, problem)


def _check_prompts(name: str, prompts: Prompts, extras: PyTree, vocab_size: int) -> None:
    """Raise `ConfigError` unless all tokens, padding included, and lengths are possible."""
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    if lengths.min() < 1:
        raise ConfigError(f"{name}: one is empty; each needs at least one token")
    if lengths.max() > tokens.shape[1]:
        raise ConfigError(
            f"{name}: a length of {lengths.max()} for {tokens.shape[1]} tokens; lengths count the "
            "tokens without padding"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ConfigError(
            f"{name}: tokens from {tokens.min()} to {tokens.max()}, but vocab_size = {vocab_size}; "
            "all tokens, padding included, must be from 0 to vocab_size - 1"
        )
    if any(len(x) != len(tokens) for x in jax.tree.leaves(extras)):
        raise ConfigError(f"{name}: the extras need one row per prompt, {len(tokens)} rows")


def _check_score(config: RLHFConfig, problem: Problem) -> None:
    """Raise `ConfigError` unless the score is one number per response."""
    rows = min(2, problem.prompts.lengths.shape[0])
    prompts = problem.prompts.take(jnp.arange(rows))
    shape = rows, config.response_length
    responses = Responses(
        jnp.zeros(shape, jnp.int32), jnp.ones(rows, jnp.int32), jnp.zeros(rows, bool),
        jnp.zeros(shape),
    )  # fmt: skip
    extras = jax.tree.map(lambda x: x[:rows], problem.extras)
    found = jax.eval_shape(problem.score, Sample(prompts, responses, extras))
    if getattr(found, "shape", None) != (rows,):
        raise ConfigError(
            f"score of {problem.name}: returned shape {getattr(found, 'shape', None)} for {rows} "
            f"responses; it must return one number per response, ({rows},)"
        )


def _make_learner(
    config: RLHFConfig, problem: Problem, network: Network, axis: str | None
) -> Learner:
    chosen = TOKEN_OBJECTIVES[config.objective]
    policy = categorical(problem.vocab_size)

    def init_learner(key: Key[Array, ""], hparams: Any) -> LearnerState:
        params = network.init(key)
        return LearnerState(
            key=key, params=params, opt_state=ADAM.init(hparams, params), obs_stats=(),
            reward_stats=(), updates=jnp.zeros((), jnp.int32),
        )  # fmt: skip

    improve = make_improve(config, chosen.objective, network, policy, axis=axis)
    learner = make_learner(
        config,
        actor=make_token_actor(config, problem, network, axis),
        advantage=chosen.advantage(config.group_size),
        improve=_with_token_metrics(improve, axis),
        init_learner=init_learner,
        axis=axis,
    )

    def init(key: Key[Array, ""], hparams: Any, data: PyTree = ()) -> TrainState:
        state = learner.init(key, hparams, data)
        params = jax.tree.map(jnp.asarray, data["reference"])
        return state._replace(learner=state.learner._replace(params=params))

    return Learner(init, partial(_without_episodes, learner))


def _with_token_metrics(improve: Improve, axis: str | None) -> Improve:
    def improved(
        learner: LearnerState, batch: Batch, hparams: Any, data: PyTree = ()
    ) -> tuple[LearnerState, Metrics]:
        learner, metrics = improve(learner, batch, hparams, data)
        return learner, metrics | token_metrics(batch, axis)

    return improved


def token_metrics(batch: Batch, axis: str | None) -> Metrics:
    """Metrics of generated text; means over responses, `decoding_gap` over tokens."""
    rollout = batch.rollout
    extras, mask = rollout.extras, rollout.mask
    ends = rollout.terminated.astype(jnp.float32)
    per_response = partial(masked_mean, mask=jnp.ones(mask.shape[1]), axis=axis)
    difference = jnp.where(mask > 0, rollout.log_prob - extras.reference, 0.0)
    gap = jnp.where(mask > 0, jnp.abs(rollout.log_prob - extras.decoded), 0.0)
    return {
        "score": masked_mean(extras.score, ends, axis),
        "reference_kl": per_response(jnp.sum(difference, axis=0)),
        "response_length": per_response(jnp.sum(mask, axis=0)),
        "stopped": masked_mean(extras.stopped.astype(jnp.float32), ends, axis),
        "decoding_gap": masked_mean(gap, mask, axis),
    }


def _without_episodes(
    learner: Learner, state: Any, hparams: Any, data: PyTree = ()
) -> tuple[Any, Metrics]:
    """The learner's update without metrics of episodes, which count prompts as steps."""
    state, metrics = learner.update(state, hparams, data)
    dropped = ("episodes", "episode_return", "episode_length")
    return state, {name: x for name, x in metrics.items() if name not in dropped}


def _make_evaluate(config: RLHFConfig, problem: Problem, network: Network) -> Any:
    def evaluate(
        state: Any, key: Key[Array, ""], num_episodes: int, *, deterministic: Any = False,
        data: PyTree,
    ) -> Float[Array, " num_episodes"]:  # fmt: skip
        """Scores of responses to the held-out prompts, in turn, at temperature 1."""
        rows = jnp.arange(num_episodes) % data["held_out"].lengths.shape[0]
        prompts = data["held_out"].take(rows)
        responses = generate(
            network, state.learner.params, jax.random.split(key, num_episodes), prompts,
            max_tokens=config.response_length, stop_token=problem.stop_token,
            deterministic=deterministic,
        )  # fmt: skip
        extras = jax.tree.map(lambda x: x[rows], data["held_out_extras"])
        return problem.score(Sample(prompts, responses, extras))

    return evaluate


def _why_not_divided(config: RLHFConfig, devices: int) -> str | None:
    if config.num_prompts % devices:
        return (
            f"num_prompts = {config.num_prompts} is not divisible by devices = {devices}, so a "
            "group would be split; use a multiple"
        )
    own = config.num_sequences // devices
    if own % config.num_minibatches:
        return (
            f"each of devices = {devices} has {own} responses, not divisible by num_minibatches "
            f"= {config.num_minibatches}; use fewer devices or minibatches"
        )
    return None
