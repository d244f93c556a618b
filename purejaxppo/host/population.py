"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846) inside the compiled loop."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.config import ConfigError, HParams
from purejaxppo.host.parallel import SEEDS, each_seed
from purejaxppo.types import Learner, LearnerState, Metrics, PyTree, TrainState

TRUNCATION = 0.2
"""Share of the population that is replaced at each exchange, and share that may be copied."""
FACTORS = (0.8, 1.2)
"""Each copied hyperparameter is multiplied by one of these."""


class Population(NamedTuple):
    """Settings of population-based training with K members."""

    size: int
    """Number of members (K); rows beyond it only pad the devices."""
    interval: int
    """Rounds between exchanges."""
    ranges: tuple[tuple[str, float, float], ...]
    """(name, low, high) of the hyperparameters that an exchange may change."""
    seed: int
    num_updates: int
    """Total number of rounds; no exchange follows the last."""


class Member(NamedTuple):
    """State of one member, which replaces its `LearnerState`."""

    learner: LearnerState
    """Its `updates` fall behind `rounds` while updates are discarded (see `failed`)."""
    hparams: HParams
    """Current hyperparameters."""
    returned: Float[Array, ""]
    """Sum of the returns of episodes since the last exchange."""
    episodes: Float[Array, ""]
    """Number of those episodes."""
    rounds: Int[Array, ""]
    """Updates tried. The same for all members, so every device agrees on when to exchange."""

    @property
    def failed(self) -> Bool[Array, ""]:
        """Whether the last update was discarded because its loss was not finite."""
        return self.learner.updates != self.rounds


def member_learner(learner: Learner, rank: str) -> Learner:
    """Wrap a learner to use `Member`s as states, which hold their own hyperparameters.

    Args:
        rank: the metric by which members are ranked: `episode_return`, which counts as often as
            episodes ended, or one that every update has.
    """

    def init(key: Array, hparams: HParams, data: PyTree = ()) -> TrainState:
        state = learner.init(key, hparams, data)
        numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hparams)
        zero = jnp.zeros(())
        member = Member(state.learner, numbers, zero, zero, jnp.zeros((), jnp.int32))
        return TrainState(member, state.actors)

    def update(
        state: TrainState, hparams: HParams, data: PyTree = ()
    ) -> tuple[TrainState, Metrics]:
        member: Member = state.learner
        inner = TrainState(member.learner, state.actors)
        new, metrics = learner.update(inner, member.hparams, data)
        if rank not in metrics:
            raise ConfigError(
                f"strategy = pbt ranks members by {rank}, which this task does not have; use "
                "another strategy"
            )
        ended = metrics["episodes"].astype(jnp.float32) if "episodes" in metrics else jnp.ones(())
        returned = jnp.where(ended > 0, metrics[rank] * ended, 0.0)
        member = Member(
            new.learner, member.hparams, member.returned + returned, member.episodes + ended,
            member.rounds + 1,
        )  # fmt: skip
        return TrainState(member, new.actors), metrics

    return Learner(init, update)


def without_members(states: TrainState) -> TrainState:
    """Replace the `Member`s in states by plain `LearnerState`s."""
    return TrainState(states.learner.learner, states.actors)


def train_population(
    learner: Learner,
    population: Population,
    states: TrainState,
    hparams: HParams,
    count: Int[Array, ""],
    *,
    capacity: int,
    data: PyTree = (),
) -> tuple[TrainState, Metrics]:
    """Train the members `[S, ...]` on one device for `count` rounds (at most `capacity`), with an
    exchange between all devices every `population.interval` rounds.

    Returns:
        states, and metrics `[capacity, S]`, of which the first `count` rows are filled.
    """

    def update(states: TrainState) -> tuple[TrainState, Metrics]:
        return each_seed(lambda row: learner.update(row[0], row[1], data), (states, hparams))

    def body(i: Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        states, rows = carry
        states, metrics = update(states)
        members: Any = states.learner
        done = members.rounds[0]
        due = (done % population.interval == 0) & (done < population.num_updates)
        members = jax.lax.cond(due, lambda x: exchange(population, x), lambda x: x, members)
        rows = jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)
        return TrainState(members, states.actors), rows

    shapes = jax.eval_shape(update, states)[1]
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (states, rows))


def exchange(population: Population, members: Any) -> Any:
    """Exploit and explore (Jaderberg et al. 2017, section 3), for the members `[S, ...]` on one
    device: the worst members copy learner states from better ones, and their hyperparameters with
    a perturbation.

    A copied state includes its `updates`, so schedules continue from there and a failed member
    trains again. Each member keeps its own key and environments.
    """
    count = members.episodes.shape[0]
    first = jax.lax.axis_index(SEEDS) * count

    def gather(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, SEEDS, tiled=True), tree)

    def own_rows(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), tree)

    root = jax.random.fold_in(jax.random.key(population.seed), 2**31)
    parent_key, explore_key = jax.random.split(jax.random.fold_in(root, members.rounds[0]))
    score = jnp.where(members.failed, -jnp.inf, members.returned / members.episodes)
    scores, hparams = gather((score, members.hparams))
    parents = choose_parents(parent_key, population.size, scores)
    replaced = parents != jnp.arange(parents.shape[0])
    explored = explore(
        explore_key, population, jax.tree.map(lambda x: x[parents], hparams), replaced
    )

    learned = gather(members.learner._replace(key=()))
    inherited = jax.tree.map(lambda x: x[own_rows(parents)], learned)
    return Member(
        inherited._replace(key=members.learner.key),
        own_rows(explored),
        jnp.zeros_like(members.returned),
        jnp.zeros_like(members.episodes),
        members.rounds,
    )


def choose_parents(key: Array, size: int, score: Float[Array, " K"]) -> Int[Array, " K"]:
    """Choose the parent of each member: one of the best for each of the worst, else itself.

    Only members with a finite score become parents; if there are none, all members keep their
    states.

    Args:
        size: number of members; rows beyond it only pad the devices.
        score: NaN for members without an episode, which rank last except for failed ones, whose
            score is -inf.
    """
    count = score.shape[0]
    low = jnp.finfo(score.dtype).min
    order = jnp.argsort(-jnp.where(jnp.isnan(score), low, score)[:size], stable=True)
    cut = max(1, int(TRUNCATION * size))
    drawn = order[jax.random.randint(key, (cut,), 0, cut)]
    better = jnp.where(jnp.isfinite(score[drawn]), drawn, order[0])
    worst = order[size - cut :]
    better = jnp.where(jnp.isfinite(score[better]), better, worst)
    return jnp.arange(count).at[worst].set(better)


def explore(key: Array, population: Population, hparams: HParams, replaced: Array) -> HParams:
    """For the members that were `replaced`, multiply each hyperparameter that has a range by one of
    `FACTORS`, and clip it to the range."""
    changed = {}
    for index, (name, low, high) in enumerate(population.ranges):
        value = getattr(hparams, name)
        factor = jax.random.choice(
            jax.random.fold_in(key, index), jnp.asarray(FACTORS), value.shape
        )
        changed[name] = jnp.where(replaced, jnp.clip(value * factor, low, high), value)
    return dataclasses.replace(hparams, **changed)
