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
"""Each hyperparameter that is taken over is multiplied by one of these."""


class Population(NamedTuple):
    """How K members learn from each other."""

    size: int
    """K; rows beyond it only fill up the devices."""
    interval: int
    """Rounds between two exchanges."""
    ranges: tuple[tuple[str, float, float], ...]
    """(name, low, high) of the hyperparameters that an exchange may change."""
    seed: int
    num_updates: int
    """Rounds in total; there is no exchange after the last."""


class Member(NamedTuple):
    """State of one member, in place of its `LearnerState`."""

    learner: LearnerState
    """Its `updates` fall behind `rounds` while the member's updates are not kept (see `failed`)."""
    hparams: HParams
    """Current hyperparameters."""
    returned: Float[Array, ""]
    """Sum of the returns of the episodes since the last exchange."""
    episodes: Float[Array, ""]
    """Number of those episodes."""
    rounds: Int[Array, ""]
    """Updates tried. The same for all members, so every device agrees on when to exchange."""

    @property
    def failed(self) -> Bool[Array, ""]:
        """Whether the last update was not kept, since its loss was not finite."""
        return self.learner.updates != self.rounds


def member_learner(learner: Learner) -> Learner:
    """The same learner with `Member`s as states, which hold their own hyperparameters."""

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
        if not {"episodes", "episode_return"} <= set(metrics):
            raise ConfigError(
                "strategy = pbt ranks members by episode_return, which this task does not have; "
                "use another strategy"
            )
        ended = metrics["episodes"].astype(jnp.float32)
        returned = jnp.where(ended > 0, metrics["episode_return"] * ended, 0.0)
        member = Member(
            new.learner, member.hparams, member.returned + returned, member.episodes + ended,
            member.rounds + 1,
        )  # fmt: skip
        return TrainState(member, new.actors), metrics

    return Learner(init, update)


def without_members(states: TrainState) -> TrainState:
    """The same states with plain `LearnerState`s."""
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
    """Train a device's own members `[S, ...]` for `count` rounds, at most `capacity`, with an
    exchange between all devices every `population.interval` rounds.

    Returns:
        states, and metrics `[capacity, S]` of which the first `count` rows are filled.
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
    """Exploit and explore (Jaderberg et al. 2017, section 3), for a device's own members
    `[S, ...]`: the worst take over the learner states and the perturbed hyperparameters of better
    ones.

    A member that takes over a state takes over its `updates` too, so schedules continue from there
    and a member that had failed learns again. Keys and environments stay each member's own.
    """
    own = members.episodes.shape[0]
    first = jax.lax.axis_index(SEEDS) * own

    def everyone(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, SEEDS, tiled=True), tree)

    def mine(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, own), tree)

    root = jax.random.fold_in(jax.random.key(population.seed), 2**31)
    parent_key, explore_key = jax.random.split(jax.random.fold_in(root, members.rounds[0]))
    score = jnp.where(members.failed, -jnp.inf, members.returned / members.episodes)
    scores, hparams = everyone((score, members.hparams))
    parents = choose_parents(parent_key, population.size, scores)
    taken = parents != jnp.arange(parents.shape[0])
    explored = explore(explore_key, population, jax.tree.map(lambda x: x[parents], hparams), taken)

    learned = everyone(members.learner._replace(key=()))
    inherited = jax.tree.map(lambda x: x[mine(parents)], learned)
    return Member(
        inherited._replace(key=members.learner.key),
        mine(explored),
        jnp.zeros_like(members.returned),
        jnp.zeros_like(members.episodes),
        members.rounds,
    )


def choose_parents(key: Array, size: int, score: Float[Array, " K"]) -> Int[Array, " K"]:
    """Parent of each member: itself, or one of the best for each of the worst.

    Only members with a finite score become parents; if there are none, everyone keeps their own
    state.

    Args:
        size: members that count; those beyond it only fill up the devices.
        score: NaN for members without an episode, which rank last but for those that failed,
            whose score is -inf.
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


def explore(key: Array, population: Population, hparams: HParams, taken: Array) -> HParams:
    """Multiply each hyperparameter of a range by one of `FACTORS`, where it was `taken` over, and
    clip it to the range."""
    changed = {}
    for index, (name, low, high) in enumerate(population.ranges):
        value = getattr(hparams, name)
        factor = jax.random.choice(
            jax.random.fold_in(key, index), jnp.asarray(FACTORS), value.shape
        )
        changed[name] = jnp.where(taken, jnp.clip(value * factor, low, high), value)
    return dataclasses.replace(hparams, **changed)
