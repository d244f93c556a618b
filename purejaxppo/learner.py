"""Wires the parts into `Learner(init, update)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.advantages import make_advantage
from purejaxppo.collect import init_actors, make_collect
from purejaxppo.collectives import all_sum, masked_mean
from purejaxppo.config import Config, HParams
from purejaxppo.distributions import make_policy
from purejaxppo.envs import make_environment
from purejaxppo.envs.base import check_contract, is_box
from purejaxppo.episodes import collect_episodes, make_episode_advantage
from purejaxppo.improve import init_optimizer, make_improve
from purejaxppo.inputs import as_key, check_config, check_fits, check_hparams, check_state
from purejaxppo.networks import make_network
from purejaxppo.normalize import (
    discounted_returns,
    init_stats,
    scale_reward,
    update_stats,
)
from purejaxppo.trpo import make_trpo
from purejaxppo.types import (
    ActorState,
    Advantage,
    Collect,
    Environment,
    Improve,
    KeyLike,
    Learner,
    LearnerState,
    Metrics,
    Network,
    Policy,
    Rollout,
    RunningStats,
    TrainState,
)

# `fold_in(key, i)` is row i of `split(key)`; this index is beyond any split.
FIRST_STATISTICS = 2**31
MUST_BE_FINITE = ("policy_loss", "value_loss", "entropy", "grad_norm")


def make_learner(
    config: Config, env: Any = None, env_params: Any = None, *, axis: str | None = None
) -> Learner:
    """The learner for a config.

    An update whose loss is not finite leaves the state as it was.

    Args:
        env: an object that keeps gymnax 1.x's contract, in place of the one that
            `config.env_id` names.
        env_params: its parameters; None takes its defaults.
        axis: a mesh axis over which the environments are spread, for use under `jax.shard_map`:
            each device steps `num_envs / devices` of them and all learn the same.

    Raises:
        ConfigError: if the environment does not exist, or its spaces do not fit the config. From
            `init` and `update`, if they are given a batch of keys or hyperparameters, or a state
            of several seeds or of a config that makes other shapes.
    """
    check_config(config, "make_learner")
    environment = make_environment(config, env, env_params)
    policy = make_policy(config, environment.action_space)
    network = make_network(config, environment.observation_space, policy)
    check_contract(environment, policy)
    collect, estimate, improve = _parts(config, environment, network, policy, axis)
    init_state = _make_init(config, environment, network, collect, axis)
    made: list[TrainState] = []
    """The shapes of this learner's states, once `init` was traced."""

    def init(key: KeyLike, hparams: HParams) -> TrainState:
        key = as_key(key, "init", "use jax.vmap(learner.init, (0, None))(keys, hparams)")
        hint = "use jax.vmap(learner.init, (None, ppo.vmap_axes(hparams)))(key, hparams)"
        check_hparams(hparams, "init", hint)
        state = init_state(key, hparams)
        made[:] = [jax.tree.map(jax.typeof, state)]
        return state

    def update(state: TrainState, hparams: HParams) -> tuple[TrainState, Metrics]:
        check_state(state, "update", "use jax.vmap(learner.update, (0, None))(states, hparams)")
        hint = "use jax.vmap(learner.update, (0, ppo.vmap_axes(hparams)))(states, hparams)"
        check_hparams(hparams, "update", hint)
        if axis is None:  # else each device has its own rows
            if not made:
                jax.eval_shape(lambda: init(jax.random.key(0), HParams()))
            check_fits("state", state, made[0])
        learner, actors = state
        actors, rollout, raw_obs = collect(learner, actors)
        raw_reward = rollout.reward
        rollout = rollout._replace(reward=scale_reward(learner.reward_stats, raw_reward))
        advantage, target = estimate(rollout, hparams)
        learner, metrics = improve(learner, rollout, advantage, target, hparams)

        raw = rollout._replace(obs=raw_obs, reward=raw_reward)
        learner, actors = refresh_statistics(learner, actors, raw, hparams, axis)
        learner = learner._replace(updates=learner.updates + 1)
        done = (rollout.terminated | rollout.truncated) & (rollout.mask > 0)
        actors, episodes = count_episodes(actors, raw_reward * rollout.mask, done, axis)
        explained = explained_variance(rollout.value, target, rollout.mask, axis)
        steps = env_steps(config, learner.updates)
        metrics |= {"env_steps": steps, "explained_variance": explained}
        kept = keep_if_finite(metrics, TrainState(learner, actors), state)
        return kept, metrics | episodes

    return Learner(init, update)


def _make_init(
    config: Config, env: Environment, network: Network, collect: Collect, axis: str | None
) -> Callable[[Key[Array, ""], HParams], TrainState]:
    adaptive = config.objective == "ppo_kl_adaptive"
    normalizes = config.normalize_obs and is_box(env.observation_space)
    obs_shape = tuple(env.observation_space.shape)

    def init(key: Key[Array, ""], hparams: HParams) -> TrainState:
        params_key, learner_key, envs_key = jax.random.split(key, 3)
        params = network.init(params_key)
        learner = LearnerState(
            key=learner_key,
            params=params,
            opt_state=init_optimizer(hparams, params),
            obs_stats=init_stats(obs_shape) if normalizes else (),
            reward_stats=init_stats(()) if config.normalize_reward else (),
            updates=jnp.zeros((), jnp.int32),
            objective_state=jnp.asarray(hparams.kl_beta, jnp.float32) if adaptive else (),
        )
        if normalizes or config.normalize_reward:
            actors_key = jax.random.fold_in(key, FIRST_STATISTICS)
            actors = init_actors(config, env, network, actors_key, axis)
            learner = first_statistics(learner, actors, collect, hparams, axis)
        return TrainState(learner, init_actors(config, env, network, envs_key, axis))

    return init


def _parts(
    config: Config, env: Environment, network: Network, policy: Policy, axis: str | None
) -> tuple[Collect, Advantage, Improve]:
    """What the objective is made of."""
    collect, estimate = make_collect(config, env, network, policy), make_advantage(config)
    if config.whole_episodes:
        collect = collect_episodes(config, env, network, collect)
        estimate = make_episode_advantage(config, policy, env.observation_space, axis)
    make = make_trpo if config.objective == "trpo" else make_improve
    return collect, estimate, make(config, network, policy, axis)


def first_statistics(
    learner: LearnerState,
    actors: ActorState,
    collect: Collect,
    hparams: HParams,
    axis: str | None = None,
) -> LearnerState:
    """Initial statistics, from one rollout with the initial parameters. Its N * T environment steps
    are not counted. Non-finite statistics are discarded."""
    plain = learner._replace(obs_stats=())
    _, rollout, raw_obs = collect(plain, actors)
    measured, _ = refresh_statistics(learner, actors, rollout._replace(obs=raw_obs), hparams, axis)
    new, old = ((each.obs_stats, each.reward_stats) for each in (measured, learner))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
    obs_stats, reward_stats = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
    return learner._replace(obs_stats=obs_stats, reward_stats=reward_stats)


def refresh_statistics(
    learner: LearnerState,
    actors: ActorState,
    raw: Rollout,
    hparams: HParams,
    axis: str | None = None,
) -> tuple[LearnerState, ActorState]:
    """Take a rollout, its observations and rewards as the environment gave them, into the running
    statistics that the config asks for."""
    if isinstance(learner.obs_stats, RunningStats):
        stats = update_stats(learner.obs_stats, raw.obs, raw.mask, axis)
        learner = learner._replace(obs_stats=stats)
    if isinstance(learner.reward_stats, RunningStats):
        done = raw.terminated | raw.truncated
        running, returns = discounted_returns(
            actors.discounted_return, raw.reward, done, hparams.gamma
        )
        actors = actors._replace(discounted_return=running)
        learner = learner._replace(
            reward_stats=update_stats(learner.reward_stats, returns, raw.mask, axis)
        )
    return learner, actors


def keep_if_finite(metrics: Metrics, new: TrainState, old: TrainState) -> TrainState:
    """`new`, or `old` where the loss, or anything learned, is not finite.

    From there on the update is repeated to the same end: the state stays the last good one.
    Where it was not the loss but what was learned (statistics of an infinite observation, say),
    the loss is reported as NaN.
    """
    numbers = [x for x in jax.tree.leaves(new.learner) if jnp.issubdtype(x.dtype, jnp.floating)]
    checked = [metrics[name] for name in MUST_BE_FINITE] + numbers
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in checked]))
    metrics["policy_loss"] = jnp.where(finite, metrics["policy_loss"], jnp.nan)
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)


def count_episodes(
    actors: ActorState,
    reward: Float[Array, "T N"],
    done: Bool[Array, "T N"],
    axis: str | None = None,
) -> tuple[ActorState, Metrics]:
    """Means over the episodes that ended in this rollout, NaN where none did.

    The steps up to an environment's last `done` belong to finished episodes, together with what
    was carried into the rollout; those after it are carried on.
    """
    count = partial(jnp.sum, dtype=jnp.int32)  # in 64-bit mode sums of integers are int64
    under_way = jnp.cumsum(done[::-1], axis=0)[::-1] == 0
    any_done = jnp.any(done, axis=0)
    finished_return = jnp.sum(reward * ~under_way, axis=0) + any_done * actors.episode_return
    finished_length = count(~under_way, axis=0) + any_done * actors.episode_length
    actors = actors._replace(
        episode_return=jnp.sum(reward * under_way, axis=0) + ~any_done * actors.episode_return,
        episode_length=count(under_way, axis=0) + ~any_done * actors.episode_length,
    )
    sums = (count(done), jnp.sum(finished_return), count(finished_length))
    episodes, returns, lengths = all_sum(sums, axis)
    return actors, {
        "episodes": episodes,
        "episode_return": returns / episodes,
        "episode_length": lengths.astype(jnp.float32) / episodes,
    }


def env_steps(config: Config, updates: Array) -> Array:
    """Environment steps done after `updates`: an integer, or a float where it would overflow."""
    fits = config.num_updates * config.batch_size < 2**31
    return updates.astype(jnp.int32 if fits else jnp.float32) * config.batch_size


def explained_variance(
    value: Array, target: Array, mask: Array, axis: str | None = None
) -> Float[Array, ""]:
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for a constant one; NaN
    where targets are equal but for rounding, since there is nothing to explain."""
    # Held apart, or XLA fuses it with what training computes, and rounds that otherwise.
    value, target, mask = jax.lax.optimization_barrier((value, target, mask))
    mean = masked_mean(target, mask, axis)

    def variance(x: Array) -> Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask, axis)), mask, axis)

    total = variance(target)
    constant = total <= jnp.square(1e-6 * mean)
    explained = 1.0 - variance(target - value) / jnp.where(constant, 1.0, total)
    return jnp.where(constant, jnp.nan, explained)
