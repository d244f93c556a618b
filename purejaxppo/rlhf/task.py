"""The `Task` of training a language model to maximise a score."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from purejaxppo.checks import ConfigError
from purejaxppo.collectives import masked_mean
from purejaxppo.config import Chosen
from purejaxppo.distributions import categorical
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.rundir import CONFIG
from purejaxppo.improve import make_improve
from purejaxppo.inputs import check_fits
from purejaxppo.learner import make_learner
from purejaxppo.objectives.base import KLController
from purejaxppo.optimizer import ADAM
from purejaxppo.references import called
from purejaxppo.rlhf.actor import TokenParts, make_token_actor, told
from purejaxppo.rlhf.advantages import estimate
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.config import RLHFConfig, RLHFHParams
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.functions import TextFunction, Weighted
from purejaxppo.rlhf.generation import Prompts, Responses, observe
from purejaxppo.rlhf.host_score import held_out_sample, host_calls
from purejaxppo.rlhf.kl import current, make_controller
from purejaxppo.rlhf.losses import make_token_loss
from purejaxppo.rlhf.plots import frontier_plots
from purejaxppo.rlhf.prepare import prepared
from purejaxppo.rlhf.problem import Problem, Sample, problem_of
from purejaxppo.rlhf.samples import Failures, Samples
from purejaxppo.rlhf.starts import check_unused, decoder_of, start_of
from purejaxppo.rlhf.tokenizer import Vocabulary
from purejaxppo.task import Task
from purejaxppo.types import (
    Batch,
    Improve,
    KeyLike,
    Learner,
    LearnerState,
    Metrics,
    Network,
    PyTree,
    TrainState,
)


def make_rlhf_task(
    config: RLHFConfig,
    problem: Problem | None = None,
    *,
    reward: TextFunction | Sequence[TextFunction] = (),
) -> Task:
    """Make the task that trains a decoder on a problem.

    The learner is the same as for environments: tokens are actions, and a rollout is a batch of
    generated responses. The prompts, the extras of the score and the reference's parameters are the
    task's `data`.

    Args:
        problem: None uses the one that `config.task` names.
        reward: a function of decoded texts, `(prompts, completions, **columns) -> list of numbers`,
            or several; their sum is added to the scores of `config.reward`. They run in Python
            between two compiled parts of an update. `columns` are the other keys of the lines of a
            prompts file.

    Raises:
        ConfigError: if the config and the problem do not fit each other.
    """
    functions = [reward] if callable(reward) else list(reward)
    passed = () if problem is None and not functions else ("task",)
    again = partial(make_rlhf_task, problem=problem, reward=reward)
    if problem is None:
        problem = problem_of(config)
    else:
        config = dataclasses.replace(config, task=problem.name)
    named = [Weighted(1.0, getattr(f, "__name__", "reward"), f) for f in functions]
    problem = prepared(config, problem, named)
    config = _with_room_for_answers(config, problem)
    _check(config, problem)
    architecture = architecture_of(config, problem)
    network = make_decoder(architecture)
    reference = called(f"reference of {problem.name}", problem.reference, architecture)
    check_fits(f"reference of {problem.name}", reference, _shapes(network))
    data = _data_of(config, problem, network, reference)
    parts = TokenParts(config, problem, network)
    update_call, evaluation_call = host_calls(parts)
    return Task(
        config=config,
        learner=partial(_make_learner, parts),
        evaluate=partial(_evaluate, parts),
        with_config=again if passed else make_rlhf_task,
        hparams=RLHFHParams(),
        passed=passed,
        curve="score",
        progress=("reference_kl", "entropy", "response_length", "stopped"),
        rank="score",
        data=data,
        why_not_divided=partial(_why_not_divided, parts),
        update_call=update_call,
        evaluation_call=evaluation_call,
        costs=partial(_costs, parts),
        results=partial(_results, problem),
        samples=Samples(parts, data),
        plots=partial(frontier_plots, config.batch_size, problem.gold is not None),
        explain=Failures(parts, data),
    )


def _data_of(
    config: RLHFConfig, problem: Problem, network: Network, reference: PyTree
) -> dict[str, PyTree]:
    held_out = problem.held_out
    data = {
        "prompts": problem.prompts,
        "extras": problem.extras,
        "shared": problem.shared,
        "reference": reference,
        "held_out": problem.prompts if held_out is None else held_out,
        "held_out_extras": problem.extras if held_out is None else problem.held_out_extras,
    }
    if config.start:
        data["start"] = _params_to_start_from(config, problem, network)
    return data


def _params_to_start_from(config: RLHFConfig, problem: Problem, network: Network) -> PyTree:
    found = start_of(config.start)
    vocabulary = Vocabulary(problem.text, problem.vocab_size, problem.stop_token)
    found.check_vocabulary(vocabulary, problem.name)
    check_fits(f"start = {config.start}", found.params, _shapes(network))
    return found.params


def _shapes(network: Network) -> PyTree:
    return jax.eval_shape(network.init, jax.random.key(0))


def architecture_of(config: RLHFConfig, problem: Problem) -> Architecture:
    """The decoder's architecture for a problem. Its context is `config.context`, or the longest
    prompt plus `response_length`. With `config.init`, the architecture of that run, with the critic
    that the objective needs."""
    needed = problem.prompt_length + config.response_length
    own = config.architecture(problem.vocab_size, config.context or needed)
    if not config.init:
        return own
    first, _ = decoder_of(load_settings(Path(config.init) / CONFIG), config.init)
    if first.context < needed:
        raise ConfigError(
            f"init = {config.init}: its decoder has a context of {first.context} tokens, but "
            f"prompt and response have up to {needed}; use shorter responses, or train it with a "
            "larger context"
        )
    check_unused(config, first, config.init)
    return dataclasses.replace(first, critic=own.critic)


def _with_room_for_answers(config: RLHFConfig, problem: Problem) -> RLHFConfig:
    """Shorten the default of `overlong_buffer` so that exact answers lose nothing. Raises
    `ConfigError` if they do not fit, or a buffer that was given takes up their room."""
    longest, room = problem.longest_answer, config.response_length - config.overlong_buffer
    if longest > config.response_length:
        raise ConfigError(
            f"response_length = {config.response_length}: the longest answer of {problem.name} has "
            f"{longest} tokens; use at least {longest}"
        )
    if longest <= room or not config.overlong_buffer:
        return config
    shorter = config.response_length - longest
    if not isinstance(config.overlong_buffer, Chosen):
        raise ConfigError(
            f"overlong_buffer = {config.overlong_buffer}: would lower the score of right answers, "
            f"which have up to {longest} of response_length = {config.response_length} tokens; use "
            f"at most {shorter}, or a larger response_length"
        )
    return dataclasses.replace(config, overlong_buffer=shorter)


def _check(config: RLHFConfig, problem: Problem) -> None:
    needed = problem.prompt_length + config.response_length
    if 0 < config.context < needed:
        raise ConfigError(
            f"context = {config.context}: the longest prompt of {problem.name} has "
            f"{problem.prompt_length} tokens and response_length = {config.response_length}, "
            f"together {needed}; use at least {needed}, or shorter responses"
        )
    if not -1 <= problem.stop_token < problem.vocab_size:
        raise ConfigError(
            f"stop_token = {problem.stop_token}: must be a token below vocab_size = "
            f"{problem.vocab_size}, or -1 for none"
        )
    _check_prompts("prompts", problem.prompts, problem.extras, problem.vocab_size)
    _check_score(config, problem, problem.prompts, problem.extras)
    if problem.held_out is not None:
        _check_prompts("held_out", problem.held_out, problem.held_out_extras, problem.vocab_size)
        _check_score(config, problem, problem.held_out, problem.held_out_extras)
    for token in range(problem.vocab_size):
        called("tokenizer", problem.text.decode, [token])


def _check_prompts(name: str, prompts: Prompts, extras: PyTree, vocab_size: int) -> None:
    """Raise `ConfigError` unless all tokens, padding included, and all lengths are valid."""
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    whole = all(np.issubdtype(x.dtype, np.integer) for x in (tokens, lengths))
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not whole or not lengths.size:
        raise ConfigError(
            f"{name}: tokens are {tokens.dtype}{list(tokens.shape)}, lengths "
            f"{lengths.dtype}{list(lengths.shape)}; must be integers [P, L] and [P], with P at "
            "least 1"
        )
    if lengths.min() < 1:
        raise ConfigError(f"{name}: one is empty; each needs at least one token")
    if lengths.max() > tokens.shape[1]:
        raise ConfigError(
            f"{name}: has a length of {lengths.max()} in rows of {tokens.shape[1]} tokens; lengths "
            "count the tokens without padding"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ConfigError(
            f"{name}: tokens from {tokens.min()} to {tokens.max()}, but vocab_size = {vocab_size}; "
            "all tokens, padding included, must be from 0 to vocab_size - 1"
        )
    if any(np.shape(x)[:1] != tokens.shape[:1] for x in jax.tree.leaves(extras)):
        raise ConfigError(
            f"{name}: the extras must be arrays with one row per prompt, {len(tokens)} rows"
        )


def _check_score(config: RLHFConfig, problem: Problem, prompts: Prompts, extras: PyTree) -> None:
    """Raise `ConfigError` unless the score is one number per response."""
    rows = min(2, prompts.lengths.shape[0])
    shape = rows, config.response_length
    responses = Responses(
        jnp.zeros(shape, jnp.int32), jnp.ones(rows, jnp.int32), jnp.zeros(rows, bool),
        jnp.zeros(shape),
    )  # fmt: skip
    sample = Sample(
        prompts.take(jnp.arange(rows)),
        responses,
        jax.tree.map(lambda x: x[:rows], extras),
        problem.shared,
    )
    found: Any = called(f"score of {problem.name}", jax.eval_shape, problem.score, sample)
    if getattr(found, "shape", None) != (rows,):
        raise ConfigError(
            f"score of {problem.name}: returned shape {getattr(found, 'shape', None)} for {rows} "
            f"responses; it must return one number per response, ({rows},)"
        )


def _make_learner(parts: TokenParts, axis: str | None) -> Learner:
    config, problem, network = parts
    policy = categorical(problem.vocab_size)
    objective, loss = make_token_loss(config, network, policy)
    improve = make_improve(config, objective, network, policy, loss=loss, axis=axis)
    controller = make_controller(config)

    def init_learner(key: Key[Array, ""], hparams: Any) -> LearnerState:
        params = network.init(key)
        return LearnerState(
            key=key, params=params, opt_state=ADAM.init(hparams, params), obs_stats=(),
            reward_stats=(), updates=jnp.zeros((), jnp.int32),
            objective_state=controller.init(hparams),
        )  # fmt: skip

    learner = make_learner(
        config,
        actor=make_token_actor(parts, axis),
        advantage=partial(estimate, config),
        improve=_and_adapt_kl(improve, controller, axis),
        init_learner=init_learner,
        axis=axis,
    )
    own = _TokenLearner(config, controller, learner)
    return Learner(own.init, own.update)


class _TokenLearner(NamedTuple):
    """The learner, with the policy initialised to the reference, or to the parameters of
    `config.start`, and the current `kl_coef`."""

    config: RLHFConfig
    controller: KLController
    learner: Learner

    def init(self, key: KeyLike, hparams: Any, data: PyTree = ()) -> TrainState:
        self.config.check_hparams(hparams)
        state = self.learner.init(key, hparams, data)
        params = jax.tree.map(jnp.asarray, data.get("start", data["reference"]))
        return state._replace(learner=state.learner._replace(params=params))

    def update(
        self, state: TrainState, hparams: Any, data: PyTree = ()
    ) -> tuple[TrainState, Metrics]:
        """One update. Drops the metrics of episodes, which would count prompts as steps."""
        hparams = current(self.config, self.controller, state.learner, hparams)
        state, metrics = self.learner.update(state, hparams, data)
        dropped = ("episodes", "episode_return", "episode_length")
        dropped += () if self.config.has_critic else ("explained_variance", "value_loss")
        return state, {name: x for name, x in metrics.items() if name not in dropped}


def _and_adapt_kl(improve: Improve, controller: KLController, axis: str | None) -> Improve:
    """Add the metrics of responses, and update the weight of the KL penalty."""

    def improved(
        learner: LearnerState, batch: Batch, hparams: Any, data: PyTree = ()
    ) -> tuple[LearnerState, Metrics]:
        learner, metrics = improve(learner, batch, hparams, data)
        metrics |= token_metrics(batch, axis)
        metrics["kl_coef"] = jnp.asarray(hparams.kl_coef, jnp.float32)
        state = controller.update(learner.objective_state, metrics["reference_kl"], hparams)
        return learner._replace(objective_state=state), metrics

    return improved


def token_metrics(batch: Batch, axis: str | None) -> Metrics:
    """Metrics of responses: means over responses, except `decoding_gap`, a mean over tokens."""
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
        "groups_differ": masked_mean(extras.differ, ends, axis),
        "decoding_gap": masked_mean(gap, mask, axis),
    }


def _evaluate(
    parts: TokenParts,
    state: TrainState,
    key: Key[Array, ""],
    num_episodes: int,
    *,
    deterministic: Any = False,
    max_steps: int | None = None,
    data: PyTree,
) -> Float[Array, " num_episodes"]:
    """Scores of responses to the held-out prompts, used in turn, at temperature 1."""
    problem = parts.problem
    if max_steps is not None:
        raise ConfigError(
            f"max_steps = {max_steps}: responses end after response_length = "
            f"{parts.config.response_length} tokens; leave it out"
        )
    if problem.host_judge is None:
        sample = held_out_sample(parts, state, key, num_episodes, deterministic, data)
        added = None
    else:
        sample, added = told(data)
    sample = sample._replace(shared=data["shared"])
    score = jnp.asarray(problem.judge(sample), jnp.float32)
    if added is not None:
        score += added
    return jnp.where(jnp.isfinite(score), score, jnp.nan)


def _results(
    problem: Problem, metrics: Mapping[str, Any], evaluated: Mapping[str, Any], states: TrainState
) -> dict[str, Any]:
    """Further entries of `summary.json`: score and KL divergence of the last update, and the share
    of exact answers to held-out prompts, greedy (`exact`) and sampled (`exact_sampled`)."""
    found: dict[str, Any] = {}
    for name in ("score", "reference_kl"):
        last = metrics[name][:, -1]
        found[name] = float(np.mean(last[np.isfinite(last)])) if np.isfinite(last).any() else None
    if problem.exact_score is not None:
        for name, scores in evaluated.items():
            suffix = "" if name == "deterministic" else f"_{name}"
            found[f"exact{suffix}"] = float(np.mean(scores >= problem.exact_score - 1e-6))
    return found


def _costs(parts: TokenParts) -> tuple[float, int]:
    """Floating-point operations of the decoder per generated token, by XLA's count, and its number
    of parameters."""
    config, problem, network = parts
    rows, steps = 8, problem.prompt_length + config.response_length - 1

    def arguments(key: Key[Array, ""]) -> Any:
        start = jnp.zeros((steps, rows), bool)
        return network.init(key), (), observe(start.astype(jnp.int32), 1.0), start

    shapes = jax.eval_shape(arguments, jax.random.key(0))
    counted: Any = jax.jit(network.apply).lower(*shapes).cost_analysis()
    per_token = counted["flops"] / (rows * config.response_length * config.oversampling)
    return per_token, sum(x.size for x in jax.tree.leaves(shapes[0]))


def _why_not_divided(parts: TokenParts, devices: int) -> str | None:
    config = parts.config
    if parts.problem.host_score is not None and devices > 1:
        return (
            f"devices = {devices}: the run calls a Python function in each update, so it works on "
            "one device only; use devices = 1"
        )
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
