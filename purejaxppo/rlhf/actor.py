"""Collects rollouts of generated tokens: the `Actor` of a language model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.checks import ConfigError
from purejaxppo.collect import in_parts
from purejaxppo.collectives import masked_mean, own_rows
from purejaxppo.distributions import categorical
from purejaxppo.envs.base import split_each
from purejaxppo.networks import parts_in_cache
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.generation import generate, observe
from purejaxppo.rlhf.losses import kl_estimate
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.shuffle import rows_without_replacement
from purejaxppo.types import Actor, ActorState, LearnerState, Network, PyTree, Rollout


class Draws(NamedTuple):
    """State of the prompt sampler, one entry per row, so that rows can be divided over devices."""

    order_key: Key[Array, " M"]
    """The same key for all rows; the order of the prompts in each epoch is derived from it."""
    row: Int[Array, " M"]
    """Index of the row in the whole batch."""
    drawn: Int[Array, " M"]
    """Number of prompts drawn by all rows so far."""


class TokenExtras(NamedTuple):
    """The `Rollout.extras` of token rollouts, `[T, N]`."""

    reference: Float[Array, "T N"]
    """Log-probability of the token under the reference."""
    score: Float[Array, "T N"]
    """Unmodified score of the response, at its last token; 0 elsewhere. With oversampling, a mean
    over `oversampling` generated responses, so that means over the batch include discarded ones."""
    stopped: Bool[Array, "T N"]
    """Whether the response ended with the stop token, at its last token."""
    decoded: Float[Array, "T N"]
    """Log-probability of the token as computed during generation."""
    differ: Float[Array, "T N"]
    """1 if the scores of the response's group differ, at its last token; 0 elsewhere. With
    oversampling, a mean as for `score`."""
    kept: Float[Array, "T N"]
    """1 for responses to learn from, 0 for those that only fill the batch."""


class TokenParts(NamedTuple):
    """The parts that generate and score responses."""

    config: RLHFConfig
    problem: Problem
    network: Network


def make_token_actor(parts: TokenParts, axis: str | None = None) -> Actor:
    """Make the actor that generates `group_size` responses to each of `num_prompts` prompts.

    A rollout has T = L + R - 1 steps: the token at t is the observation, and the token at t + 1 is
    the action. Steps in the prompt and after the end of the response are masked out. The prompt is
    part of the sequence, so the loss processes it with the current parameters.

    With oversampling, the actor generates responses to more prompts (M rows instead of N) and keeps
    the first groups whose scores differ. If there are too few, other groups with weight 0 fill the
    batch. On several devices, each device chooses among its own groups.

    `data` has the entries `prompts` (a `Prompts` `[P, L]`), `extras` (a pytree with leaves
    `[P, ...]` for the score) and `reference` (parameters).
    """
    actor = TokenActor(*parts, axis)
    return Actor(actor.init, actor.collect)


class TokenActor(NamedTuple):
    """The functions of `make_token_actor`, and the steps of `collect`."""

    config: RLHFConfig
    problem: Problem
    network: Network
    axis: str | None = None

    def init(self, key: Key[Array, ""], hparams: Any, data: PyTree) -> ActorState:
        rows = self.config.num_sequences
        generated = rows * self.config.oversampling
        order_key, row_key = jax.random.split(key)
        draws = Draws(
            jnp.broadcast_to(order_key, (generated,)),
            jnp.arange(generated),
            jnp.zeros(generated, jnp.int32),
        )
        keys, draws = own_rows((jax.random.split(row_key, generated), draws), self.axis)
        zeros = own_rows(jnp.zeros(rows, jnp.float32), self.axis)
        return ActorState(
            keys=keys, env_state=draws, obs=zeros, start=jnp.ones(zeros.shape, bool), carry=(),
            episode_return=zeros, episode_length=zeros.astype(jnp.int32), discounted_return=zeros,
        )  # fmt: skip

    def collect(
        self, learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Rollout]:
        actors, sample, score = self.sample(learner.params, actors, hparams, data)
        differ = groups_differ(score, self.config.group_size)
        rows, kept = self.choose(score, differ)
        each = sample._replace(shared=())
        chosen = jax.tree.map(lambda x: x[rows], each)
        rollout = self.rollout(learner.params, data["reference"], chosen, score[rows], hparams)
        extras, shape = rollout.extras, (self.config.oversampling, -1)
        mean_score = jnp.mean(score.reshape(shape), axis=0)
        share = jnp.mean(jnp.repeat(differ, self.config.group_size).reshape(shape) * 1.0, axis=0)
        extras = extras._replace(
            score=jnp.where(rollout.terminated, mean_score, 0.0),
            differ=jnp.where(rollout.terminated, share, 0.0),
            kept=jnp.broadcast_to(kept, rollout.mask.shape),
        )
        return actors, rollout._replace(extras=extras)

    def sample(
        self, params: PyTree, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Sample, Float[Array, " M"]]:
        """Generate and score M responses; scores that are not finite become NaN.

        If the problem has a `host_score`, `data["told"]` has the results of `respond` and the
        scores.
        """
        if self.problem.host_score is None:
            actors, sample = self.respond(params, actors, hparams, data)
            added = None
        else:
            (actors, sample), added = told(data)
        sample = sample._replace(shared=data["shared"])
        score = jnp.asarray(self.problem.score(sample), jnp.float32)
        if added is not None:
            score += added
        return actors, sample, jnp.where(jnp.isfinite(score), score, jnp.nan)

    def respond(
        self, params: PyTree, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Sample]:
        """Generate M responses; the sample is without `shared`."""
        config = self.config
        chosen, draws = draw_prompts(config, actors.env_state, data["prompts"].lengths.shape[0])
        prompts = data["prompts"].take(chosen)
        keys, noise_keys = split_each(actors.keys)
        responses = generate(
            self.network, params, noise_keys, prompts, max_tokens=config.response_length,
            stop_token=self.problem.stop_token, temperature=hparams.temperature,
        )  # fmt: skip
        extras = jax.tree.map(lambda x: x[chosen], data["extras"])
        sample = Sample(prompts, responses, extras)
        return actors._replace(keys=keys, env_state=draws), sample

    def choose(
        self, score: Float[Array, " M"], differ: Bool[Array, " G"]
    ) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
        """Return the rows to keep and their weights: 1, or 0 for rows that only fill the batch.

        Without oversampling, all rows are kept. Groups with a score that is not finite come first,
        so that the update fails.
        """
        size, groups = self.config.group_size, len(differ) // self.config.oversampling
        if self.config.oversampling == 1:
            return jnp.arange(groups * size), jnp.ones(groups * size)
        failed = jnp.any(jnp.isnan(score.reshape(-1, size)), axis=1)
        order = jnp.argsort(jnp.where(failed, 0, jnp.where(differ, 1, 2)))[:groups]
        rows = order[:, None] * size + jnp.arange(size)
        return rows.reshape(-1), jnp.repeat(differ[order], size).astype(jnp.float32)

    def rollout(
        self,
        params: PyTree,
        reference_params: PyTree,
        sample: Sample,
        score: Float[Array, " N"],
        hparams: Any,
    ) -> Rollout:
        """Evaluate whole sequences under the policy and the reference, and compute rewards."""
        prompts, responses = sample.prompts, sample.responses
        width = prompts.tokens.shape[1]
        tokens = jnp.concatenate([prompts.tokens, responses.tokens], axis=1).T
        step = jnp.arange(len(tokens) - 1)[:, None] - (width - 1)
        counts = (step >= 0) & (step < responses.lengths)
        last = step == responses.lengths - 1
        obs, action = observe(tokens[:-1], hparams.temperature), tokens[1:]
        start = step == 1 - prompts.lengths

        log_prob, value = self.read(params, obs, start, action)
        reference, _ = self.read(reference_params, obs, start, action)
        reward = jnp.where(last, shaped_score(self.config, sample, score, hparams), 0.0)
        if self.config.kl_in == "reward":
            log_ratio = jnp.where(counts, log_prob - reference, 0.0)
            reward -= hparams.kl_coef * kl_estimate(self.config.kl_estimator, log_ratio)
        mask = counts.astype(jnp.float32)
        if self.config.whiten_rewards:
            reward /= _standard_deviation(reward, mask, self.axis)
        in_prompt = jnp.zeros((width - 1, len(score)), jnp.float32)
        decoded = jnp.concatenate([in_prompt, responses.log_prob.T])
        following = jnp.concatenate([value[1:], value[-1:]])
        return Rollout(
            obs=obs,
            start=start,
            action=action,
            log_prob=log_prob,
            value=value,
            next_value=following,
            reward=reward,
            terminated=last,
            truncated=jnp.zeros_like(last),
            mask=mask,
            carry=(),
            extras=TokenExtras(
                reference, jnp.where(last, score, 0.0), last & responses.stopped, decoded,
                jnp.zeros_like(reference), jnp.ones_like(reference),
            ),
        )  # fmt: skip

    def read(
        self, params: PyTree, obs: PyTree, start: Bool[Array, "T N"], action: Int[Array, "T N"]
    ) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
        """Log-probabilities and values of whole sequences."""

        def of_part(steps: Any) -> tuple[Array, Array]:
            obs, start, action = steps
            _, logits, value = self.network.apply(params, (), obs, start)
            distribution = categorical(logits.shape[-1]).distribution(logits)
            return jnp.asarray(distribution.log_prob(action)), value

        parts = parts_in_cache(self.network, start.size, start.shape[1])
        return in_parts(of_part, (obs, start, action), parts, axis=1)


def told(data: PyTree) -> tuple[Any, Float[Array, " M"]]:
    """The responses and the scores that were computed in Python for them. Raises `ConfigError` if
    there are none."""
    if "told" not in data:
        raise ConfigError(
            "reward: a Python function runs between compiled calls, so it cannot be part of one "
            "compiled function; train with ppo.run, and evaluate with `purejaxppo eval` or "
            "rlhf.load_generator"
        )
    return data["told"]


def groups_differ(score: Float[Array, " M"], group_size: int) -> Bool[Array, " G"]:
    """Whether the scores of each group differ; true if one is NaN, so that the update fails."""
    groups = score.reshape(-1, group_size)
    return ~(jnp.max(groups, axis=1) == jnp.min(groups, axis=1))


def shaped_score(
    config: RLHFConfig, sample: Sample, score: Float[Array, " N"], hparams: Any
) -> Float[Array, " N"]:
    """The score used for training: clipped, then lowered or replaced where the stop token is
    missing, and lowered for overlong responses.

    With a buffer of b tokens at the end of the maximum length R, a response of n tokens loses
    clip((n - (R - b)) / b, 0, 1) (Yu et al. 2025, arXiv:2503.14476, eq. 13).
    """
    stopped = sample.responses.stopped
    if hparams.score_clip is not None:
        score = jnp.clip(score, -hparams.score_clip, hparams.score_clip)
    if hparams.missing_stop_score is not None:
        score = jnp.where(stopped, score, hparams.missing_stop_score)
    score = jnp.where(stopped, score, score - hparams.missing_stop_penalty)
    if config.overlong_buffer:
        into = sample.responses.lengths - (config.response_length - config.overlong_buffer)
        score -= jnp.clip(into / config.overlong_buffer, 0.0, 1.0)
    return score


def _standard_deviation(values: Array, mask: Array, axis: str | None) -> Array:
    """Standard deviation over the unmasked steps of all devices; 1 if all values are equal."""
    mean = masked_mean(values, mask, axis)
    std = jnp.sqrt(masked_mean(jnp.square(values - mean), mask, axis))
    return jnp.where(std > 1e-6 * jnp.abs(mean), std, 1.0)


def draw_prompts(
    config: RLHFConfig, draws: Draws, num_prompts: int
) -> tuple[Int[Array, " M"], Draws]:
    """Draw the next prompt of each row, without replacement within an epoch over the prompts. The
    rows of a group share their prompt."""
    per_update = config.num_prompts * config.oversampling
    number = draws.drawn[0] + draws.row // config.group_size
    chosen = rows_without_replacement(draws.order_key[0], number, per_update, num_prompts)
    return chosen, draws._replace(drawn=draws.drawn + per_update)
