"""Games of two players against a pool of the policy's earlier versions.

The pool holds K networks, and each plays against an equal share of the N environments. It is part
of the environments' state, so checkpoints contain it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from purejaxppo.config import Config
from purejaxppo.distributions import draw_noise
from purejaxppo.envs.base import select_rows
from purejaxppo.types import (
    Actor,
    ActorState,
    Environment,
    LearnerState,
    Network,
    Policy,
    PyTree,
    TimeStep,
)


class Match(NamedTuple):
    """The state of N games."""

    games: PyTree
    """Leaves `[N, ...]`; the policy is to move."""
    pool: PyTree
    """Leaves `[K, ...]`: parameters of the opponents."""


def against_pool(env: Environment, network: Network, policy: Policy, config: Config) -> Environment:
    """The game seen by one player. The opponent's move belongs to the step, and who begins is
    random. At first the opponents are networks with random parameters."""
    assert env.game is not None
    table = _Table(env.game, network, policy, config.opponent_pool)
    return env._replace(reset=table.reset, step=table.step, alternating=False)


class _Table(NamedTuple):
    """N games between the policy and the pool."""

    game: Any
    """The rules, as an `envs.single.Single`."""
    network: Network
    policy: Policy
    size: int

    def reset(self, keys: Key[Array, " N"]) -> tuple[Match, PyTree]:
        key = jax.random.fold_in(keys[0], self.size)
        new = jax.vmap(self.network.init)(jax.random.split(key, self.size))
        pool = jax.tree.map(jnp.asarray, new)
        games, obs = self.begin(keys, pool)
        return Match(games, pool), obs

    def step(self, keys: Key[Array, " N"], state: Match, action: Array) -> tuple[Match, TimeStep]:
        own, other, fresh = _split(keys, 3)
        games, view, reward, won, cut = jax.vmap(self.game.step)(own, state.games, action)
        going = ~(won | cut)
        replied, seen, lost, over, limit = self.reply(other, games, view, state.pool)
        games, final_obs = select_rows(going, (replied, seen), (games, view))
        terminated = jnp.where(going, over, won)
        truncated = jnp.where(going, limit, cut)
        done = terminated | truncated
        games, obs = jax.lax.cond(
            jnp.any(done),
            lambda: select_rows(done, self.begin(fresh, state.pool), (games, final_obs)),
            lambda: (games, final_obs),
        )
        reward = jnp.asarray(reward - jnp.where(going, lost, 0.0), jnp.float32)
        return Match(games, state.pool), TimeStep(obs, reward, terminated, truncated, final_obs)

    def begin(self, keys: Key[Array, " N"], pool: PyTree) -> tuple[PyTree, PyTree]:
        """New games, in half of which the opponent has moved."""
        coin, fresh, other = _split(keys, 3)
        games, obs = jax.vmap(self.game.reset)(fresh)
        second: Bool[Array, " N"] = jax.vmap(jax.random.bernoulli)(coin)
        replied, seen, *_ = self.reply(other, games, obs, pool)
        return select_rows(second, (replied, seen), (games, obs))

    def reply(self, keys: Key[Array, " N"], games: PyTree, obs: PyTree, pool: PyTree) -> Any:
        """The results of the opponents' moves in all games."""
        draw, move = _split(keys, 2)
        rows = keys.shape[0]
        groups = math.gcd(rows, self.size)
        start = jnp.zeros((1, rows // groups), bool)

        def outputs(params: PyTree, obs: PyTree) -> Array:
            one_step = jax.tree.map(lambda x: x[None], obs)
            return self.network.apply(params, (), one_step, start)[1][0]

        each = jax.tree.map(lambda x: x.reshape((groups, -1, *x.shape[1:])), obs)
        chosen = jax.vmap(outputs)(jax.tree.map(lambda x: x[:groups], pool), each)
        chosen = chosen.reshape((rows, -1))
        action = self.policy.sample(chosen, draw_noise(self.policy, draw))
        return jax.vmap(self.game.step)(move, games, self.policy.to_env(action))


def _split(keys: Key[Array, " N"], count: int) -> list[Key[Array, " N"]]:
    return list(jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, count))(keys), 1, 0))


def with_pool(actor: Actor, config: Config) -> Actor:
    """The actor that, before every `opponent_every`-th rollout, replaces the oldest opponent by the
    policy."""
    every, size = config.opponent_every, config.opponent_pool
    collect: Callable[..., Any] = actor.collect

    def collected(
        learner: LearnerState, actors: ActorState, hparams: Any, data: PyTree
    ) -> tuple[ActorState, Any]:
        match = actors.env_state
        slot = learner.updates // every % size
        due = learner.updates % every == 0

        def write(old: Array, new: Array) -> Array:
            return old.at[slot].set(jnp.where(due, new, old[slot]))

        pool = jax.tree.map(write, match.pool, learner.params)
        now = actors._replace(env_state=match._replace(pool=pool))
        return collect(learner, now, hparams, data)

    return Actor(actor.init, collected)
