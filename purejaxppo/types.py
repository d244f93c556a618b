"""The pytrees that flow through one update, and the functions that pass them on.

Axis letters, used on every array in this package:

    T  time steps of one rollout (`Config.num_steps`)
    N  environments stepped side by side (`Config.num_envs`)
    B  samples, or whole sequences, of one minibatch
    A  action dimensions          P  outputs of the policy head
    S  seeds (added by `vmap`; no function here knows of it)
    U  updates (the scan over a whole training)

A trailing `...` stands for the shape of one observation or action.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from purejaxppo.config import HParams

PyTree = Any
KeyLike = Key[Array, ""] | UInt32[Array, "_"]
"""One random key: typed, of `jax.random.key`, or old-style, of `jax.random.PRNGKey`."""
Metrics = dict[str, Array]
"""Scalars of one update, reduced on the device; `[U]` after a scan."""


class TimeStep(NamedTuple):
    """What `Environment.step` returns for N environments, after auto-reset."""

    obs: Array
    """`[N, ...]` the observation to act on next: of the new episode where one ended."""
    reward: Float[Array, " N"]
    terminated: Bool[Array, " N"]
    """The task itself ended: no reward can follow."""
    truncated: Bool[Array, " N"]
    """The episode was cut off (a time limit): reward would have followed."""
    final_obs: Array
    """`[N, ...]` the observation before auto-reset; equals `obs` where nothing ended."""


class Environment(NamedTuple):
    """N environments stepped side by side, resetting themselves."""

    name: str
    observation_space: Any
    action_space: Any
    max_episode_steps: Any
    """The time limit in steps where the environment states one, else None."""
    reset: Callable[[Key[Array, " N"]], tuple[PyTree, Array]]
    """`keys[N] -> (state[N], obs[N, ...])`."""
    step: Callable[[Key[Array, " N"], PyTree, Array], tuple[PyTree, TimeStep]]
    """`(keys[N], state[N], action[N, ...]) -> (state[N], TimeStep)`."""


class Policy(NamedTuple):
    """How outputs of the network's policy head become actions.

    `action` is what the log-probability is taken of and what a rollout stores; `to_env`
    turns it into what the environment is given (clipped, squashed to bounds).
    """

    num_outputs: int
    """Outputs that depend on the observation."""
    num_free: int
    """Further outputs that are parameters of their own (log standard deviations); P is the
    sum of both."""
    distribution: Callable[[Float[Array, "*batch P"]], Any]
    """`outputs[..., P]` to a distribution with `log_prob`, `entropy`, `mode` and
    `kl_divergence(other)`, KL(this, other)."""
    noise: Callable[[Key[Array, ""]], Array]
    """One action's worth of noise, independent of the parameters."""
    sample: Callable[[Float[Array, "*batch P"], Array], Array]
    """`(outputs[..., P], noise[..., ...]) -> action[..., ...]`."""
    to_env: Callable[[Array], Array]


class Network(NamedTuple):
    """An actor-critic over sequences; `carry` is `()` for feed-forward networks."""

    init: Callable[[Key[Array, ""]], PyTree]
    initial_carry: Callable[[int], PyTree]
    """`n -> carry[n, ...]` at the start of an episode."""
    apply: Callable[[PyTree, PyTree, Array, Bool[Array, "T B"]], tuple[PyTree, Array, Array]]
    """`(params, carry[B], obs[T, B, ...], start[T, B]) -> (carry[B], outputs[T, B, P],
    value[T, B])`. Where `start` is set the carry is reset before the step is read."""
    width: int = 1
    """The most numbers that any layer makes of one observation."""


class Rollout(NamedTuple):
    """What N environments did in T steps."""

    obs: Array
    """`[T, N, ...]` as the network reads it (normalised, where the config asks for it)."""
    start: Bool[Array, "T N"]
    """The first step of an episode."""
    action: Array
    """`[T, N, ...]` the sampled action, before `Policy.to_env`."""
    log_prob: Float[Array, "T N"]
    value: Float[Array, "T N"]
    next_value: Float[Array, "T N"]
    """The value of the true successor: of `final_obs` where an episode was truncated.
    Meaningless where it terminated, so weigh it by `1 - terminated`."""
    reward: Float[Array, "T N"]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    mask: Float[Array, "T N"]
    """1 for steps that count, 0 for padding."""
    carry: PyTree
    """`[N, ...]` the network's memory before the first step."""
    outputs: PyTree = ()
    """`[T, N, P]` of the policy's head, where the objective needs them."""


class RunningStats(NamedTuple):
    """Moments of all samples seen so far; mean 0 and variance 1 before the first."""

    total: Float[Array, ""]
    mean: Array
    var: Array


class LearnerState(NamedTuple):
    """What learning changes: the same on every device."""

    key: Key[Array, ""]
    params: PyTree
    opt_state: PyTree
    obs_stats: RunningStats | tuple[()]
    reward_stats: RunningStats | tuple[()]
    updates: Int[Array, ""]
    """Updates done, from which schedules are computed."""
    objective_state: PyTree = ()
    """What the objective itself learns: the coefficient of an adaptive KL penalty."""


class ActorState(NamedTuple):
    """What acting changes: one row per environment."""

    keys: Key[Array, " N"]
    env_state: PyTree
    obs: Array
    """`[N, ...]` as the environment gave it."""
    start: Bool[Array, " N"]
    carry: PyTree
    episode_return: Float[Array, " N"]
    """Undiscounted, of the episode under way."""
    episode_length: Int[Array, " N"]
    discounted_return: Float[Array, " N"]
    """Of the episode under way; what reward scaling measures."""


class TrainState(NamedTuple):
    """Everything a run needs to go on."""

    learner: LearnerState
    actors: ActorState


class Learner(NamedTuple):
    """A policy-gradient learner: a pair of pure functions."""

    init: Callable[[KeyLike, Any], TrainState]
    """`(key, hparams) -> TrainState`."""
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """`(state, hparams) -> (state, metrics)`: collect, advantages, improve."""


Collect = Callable[[LearnerState, ActorState], tuple[ActorState, Rollout, Array]]
Advantage = Callable[[Rollout, Any], tuple[Array, Array]]
"""`(rollout, hparams) -> (advantage[T, N], target[T, N])`."""
Improve = Callable[[LearnerState, Rollout, Array, Array, Any], tuple[LearnerState, Metrics]]
"""`(learner, rollout, advantage[T, N], target[T, N], hparams) -> (learner, metrics)`."""


# Here rather than beside HParams, so that settings can be read without importing JAX.
def _flatten_hparams(hparams: HParams) -> tuple[list[Any], None]:
    return [getattr(hparams, f.name) for f in dataclasses.fields(HParams)], None


def _flatten_hparams_with_keys(hparams: HParams) -> tuple[list[Any], None]:
    names = [f.name for f in dataclasses.fields(HParams)]
    return [(jax.tree_util.GetAttrKey(n), getattr(hparams, n)) for n in names], None


def _unflatten_hparams(_: None, values: Any) -> HParams:
    """Past `__post_init__`: what transforms put into a pytree (gradients, axes) needs no check."""
    hparams = object.__new__(HParams)
    for f, value in zip(dataclasses.fields(HParams), values, strict=True):
        object.__setattr__(hparams, f.name, value)
    return hparams


jax.tree_util.register_pytree_with_keys(
    HParams, _flatten_hparams_with_keys, _unflatten_hparams, _flatten_hparams
)
