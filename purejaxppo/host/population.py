"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846) inside the compiled loop."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from purejaxppo.config import HParams
from purejaxppo.host.parallel import SEEDS, each_seed
from purejaxppo.types import Learner, LearnerState, Metrics, PyTree, TrainState

TRUNCATION = 0.2
"""The worst of which the best take the place, as a part of the population."""
FACTORS = (0.8, 1.2)
"""By one of which each number is multiplied when it is taken over."""


class Population(NamedTuple):
    """How K trainings learn from each other."""

    size: int
    interval: int
    """Updates between two times that they do."""
    ranges: tuple[tuple[str, float, float], ...]
    """Hyperparameters that change, and within which bounds they stay."""
    seed: int
    num_updates: int
    """After which nothing is taken over any more."""


class Member(NamedTuple):
    """What a training of a population has in place of a `LearnerState`."""

    learner: LearnerState
    hparams: HParams
    """Its own, as they are now."""
    returned: Float[Array, ""]
    """The sum of the returns of episodes since the last exchange."""
    episodes: Float[Array, ""]


def member_learner(learner: Learner) -> Learner:
    """The same learner, whose states are of `Member`s and hold their hyperparameters."""

    def init(key: Array, hparams: HParams) -> TrainState:
        state = learner.init(key, hparams)
        numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hparams)
        member: Any = Member(state.learner, numbers, jnp.zeros(()), jnp.zeros(()))
        return TrainState(member, state.actors)

    def update(state: TrainState, _: HParams) -> tuple[TrainState, Metrics]:
        member: Any = state.learner
        new, metrics = learner.update(TrainState(member.learner, state.actors), member.hparams)
        ended = metrics["episodes"].astype(jnp.float32)
        returned = jnp.where(ended > 0, metrics["episode_return"] * ended, 0.0)
        member = Member(
            new.learner, member.hparams, member.returned + returned, member.episodes + ended
        )
        return TrainState(member, new.actors), metrics

    return Learner(init, update)


def without_members(states: TrainState) -> TrainState:
    """States as any learner has them."""
    member: Any = states.learner
    return TrainState(member.learner, states.actors)


def train_population(
    learner: Learner,
    population: Population,
    states: TrainState,
    hparams: HParams,
    count: Int[Array, ""],
    *,
    capacity: int,
) -> tuple[TrainState, Metrics]:
    """`count` updates, at most `capacity`, of a device's own members `[S, ...]`, all of which learn
    from each other.

    Returns:
        states, and metrics `[capacity, S]` of which the first `count` rows are filled.
    """

    def update(states: TrainState) -> tuple[TrainState, Metrics]:
        return each_seed(lambda row: learner.update(*row), (states, hparams))

    def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        states, rows = carry
        states, metrics = update(states)
        done = states.learner.learner.updates[0]  # pyright: ignore[reportAttributeAccessIssue]
        due = (done % population.interval == 0) & (done < population.num_updates)
        members = jax.lax.cond(
            due, lambda x: exchange(population, x, done), lambda x: x, states.learner
        )
        rows = jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)
        return TrainState(members, states.actors), rows

    shapes = jax.eval_shape(update, states)[1]
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (states, rows))


def exchange(population: Population, members: Any, updates: Int[Array, ""]) -> Any:
    """Exploit and explore: the worst members take over what better ones have learned, and their
    hyperparameters, somewhat changed. Keys and environments stay everyone's own."""
    own = members.episodes.shape[0]
    first = jax.lax.axis_index(SEEDS) * own

    def everyone(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, SEEDS, tiled=True), tree)

    def mine(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, own), tree)

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(population.seed), 2**31), updates)
    parent_key, explore_key = jax.random.split(key)
    returned, episodes, hparams = everyone((members.returned, members.episodes, members.hparams))
    parents = choose_parents(parent_key, population.size, returned / episodes)
    taken = parents != jnp.arange(parents.shape[0])
    explored = explore(explore_key, population, jax.tree.map(lambda x: x[parents], hparams), taken)

    learned = members.learner._replace(key=(), updates=())
    inherited = jax.tree.map(lambda x: x[mine(parents)], everyone(learned))
    return Member(
        inherited._replace(key=members.learner.key, updates=members.learner.updates),
        mine(explored),
        jnp.zeros_like(members.returned),
        jnp.zeros_like(members.episodes),
    )


def choose_parents(key: Array, size: int, score: Float[Array, " K"]) -> Int[Array, " K"]:
    """Whose place each of the first `size` members is taken by: its own, or for the worst one of
    the best. Members without a score are the worst; those beyond `size` only fill the devices."""
    count = score.shape[0]
    score = jnp.where(jnp.isfinite(score), score, -jnp.inf)
    order = jnp.argsort(-score[:size], stable=True)
    cut = max(1, int(TRUNCATION * size))
    better = order[jax.random.randint(key, (cut,), 0, cut)]
    return jnp.arange(count).at[order[size - cut :]].set(better)


def explore(key: Array, population: Population, hparams: HParams, taken: Array) -> HParams:
    """Each number of a range, where it was `taken` over, multiplied by one of `FACTORS` and held in
    the range."""
    changed = {}
    for index, (name, low, high) in enumerate(population.ranges):
        value = getattr(hparams, name)
        factor = jax.random.choice(
            jax.random.fold_in(key, index), jnp.asarray(FACTORS), value.shape
        )
        changed[name] = jnp.where(taken, jnp.clip(value * factor, low, high), value)
    return dataclasses.replace(hparams, **changed)
