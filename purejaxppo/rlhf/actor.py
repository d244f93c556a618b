"""Collects rollouts of generated tokens: the `Actor` of a language model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.collectives import own_rows
from purejaxppo.distributions import categorical
from purejaxppo.envs.base import split_each
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.rlhf.generate import generate, observe
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.shuffle import random_order
from purejaxppo.types import Actor, ActorState, LearnerState, Network, PyTree, Rollout


class Draws(NamedTuple):
    """Which prompts come next, one entry per row, so that rows can be divided over devices."""

    order_key: Key[Array, " N"]
    """The same key for all rows; the order of the prompts in each epoch is derived from it."""
    row: Int[Array, " N"]
    """Index of the row in the whole batch."""
    drawn: Int[Array, " N"]
    """Number of prompts drawn by all rows so far."""


class TokenExtras(NamedTuple):
    """What a token rollout has besides (`Rollout.extras`), `[T, N]`."""

    reference: Float[Array, "T N"]
    """Log-probability of the token under the reference."""
    score: Float[Array, "T N"]
    """Score of the response, at its last token; 0 elsewhere."""
    stopped: Bool[Array, "T N"]
    """Whether the response ended with the stop token, at its last token."""
    decoded: Float[Array, "T N"]
    """Log-probability of the token as computed while generating."""


def make_token_actor(
    config: RLHFConfig, problem: Problem, network: Network, axis: str | None = None
) -> Actor:
    """Make the actor that generates `group_size` responses to each of `num_prompts` prompts.

    A rollout has T = L + R - 1 steps: the token at t is the observation, and the token at t + 1 is
    the action. Steps in the prompt and after the end of the response do not count. The prompt is
    part of the sequence, so the loss reads it with the current parameters.

    `data` has the leaves `prompts` (a `Prompts` `[P, L]`), `extras` (a tree of `[P, ...]` for the
    score) and `reference` (parameters).
    """
    actor = _TokenActor(config, problem, network, axis)
    return Actor(actor.init, actor.collect)


class _TokenActor(NamedTuple):
    config: RLHFConfig
    problem: Problem
    network: Network
    axis: str | None

    def init(self, key: Key[Array, ""], hparams: Any, data: PyTree) -> ActorState:
        rows = self.config.num_sequences
        order_key, row_key = jax.random.split(key)
        draws = Draws(
            jnp.broadcast_to(order_key, (rows,)), jnp.arange(rows), jnp.zeros(rows, jnp.int32)
        )
        keys, draws = own_rows((jax.random.split(row_key, rows), draws), self.axis)
        zeros = jnp.zeros(keys.shape, jnp.float32)
        return ActorState(
            keys=keys, env_state=draws, obs=zeros, start=jnp.ones(keys.shape, bool), carry=(),
            episode_return=zeros, episode_length=zeros.astype(jnp.int32), discounted_return=zeros,
        )  # fmt: skip

    def collect(
        self, learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Rollout]:
        config = self.config
        chosen, draws = draw_prompts(config, actors.env_state, data["prompts"].lengths.shape[0])
        prompts = data["prompts"].take(chosen)
        keys, noise_keys = split_each(actors.keys)
        responses = generate(
            self.network, learner.params, noise_keys, prompts,
            max_tokens=config.response_length, stop_token=self.problem.stop_token,
            temperature=hparams.temperature,
        )  # fmt: skip
        extras = jax.tree.map(lambda x: x[chosen], data["extras"])
        sample = Sample(prompts, responses, extras)
        score = self.problem.score(sample)
        rollout = self.rollout(learner.params, data["reference"], sample, score, hparams)
        return actors._replace(keys=keys, env_state=draws), rollout

    def rollout(
        self,
        params: PyTree,
        reference_params: PyTree,
        sample: Sample,
        score: Float[Array, " N"],
        hparams: Any,
    ) -> Rollout:
        """Read the whole sequences, with the policy and with the reference."""
        prompts, responses, _ = sample
        width = prompts.tokens.shape[1]
        tokens = jnp.concatenate([prompts.tokens, responses.tokens], axis=1).T
        step = jnp.arange(len(tokens) - 1)[:, None] - (width - 1)
        counts = (step >= 0) & (step < responses.lengths)
        last = step == responses.lengths - 1
        obs, action = observe(tokens[:-1], hparams.temperature), tokens[1:]
        start = step == 1 - prompts.lengths

        def read(params: PyTree) -> tuple[Array, Array]:
            _, logits, value = self.network.apply(params, (), obs, start)
            distribution = categorical(logits.shape[-1]).distribution(logits)
            return jnp.asarray(distribution.log_prob(action)), value

        log_prob, value = read(params)
        reference, _ = read(reference_params)
        penalty = jnp.where(counts, hparams.kl_coef * (log_prob - reference), 0.0)
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
            reward=jnp.where(last, score, 0.0) - penalty,
            terminated=last,
            truncated=jnp.zeros_like(last),
            mask=counts.astype(jnp.float32),
            carry=(),
            extras=TokenExtras(
                reference, jnp.where(last, score, 0.0), last & responses.stopped, decoded
            ),
        )


def draw_prompts(
    config: RLHFConfig, draws: Draws, num_prompts: int
) -> tuple[Int[Array, " N"], Draws]:
    """The next prompt of each row, without replacement within an epoch.

    The rows of a group share their prompt. The order of epoch e is a permutation that the key and
    e determine, so nothing else has to be saved.
    """
    number = draws.drawn[0] + draws.row // config.group_size
    epoch, place = number // num_prompts, number % num_prompts
    first = draws.drawn[0] // num_prompts
    epochs = -(-config.num_prompts // num_prompts) + 1

    def order(offset: Int[Array, ""]) -> Int[Array, " P"]:
        return random_order(jax.random.fold_in(draws.order_key[0], first + offset), num_prompts)

    orders = jax.lax.map(order, jnp.arange(epochs))
    return orders[epoch - first, place], draws._replace(drawn=draws.drawn + config.num_prompts)
