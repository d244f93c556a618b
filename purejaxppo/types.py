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

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key, UInt32

import purejaxppo.pytrees  # noqa: F401 (makes HParams a pytree)

PyTree = Any
KeyLike = Key[Array, ""] | UInt32[Array, "_"]
"""One random key: typed, of `jax.random.key`, or old-style, of `jax.random.PRNGKey`."""
Metrics = dict[str, Array]
"""Scalars of one update, reduced on the device; `[U]` after a scan."""
MUST_BE_FINITE = ("loss", "policy_loss", "value_loss", "entropy", "grad_norm")
"""Metrics that mark a failed update where one of them is not finite; the learner then keeps the
state from before it."""


class TimeStep(NamedTuple):
    """What `Environment.step` returns for N environments, after auto-reset."""

    obs: PyTree
    """Leaves `[N, ...]`: the observation to act on next, of the new episode where one ended. A leaf
    named `action_mask` holds the allowed actions."""
    reward: Float[Array, " N"]
    terminated: Bool[Array, " N"]
    """The task itself ended: no reward can follow."""
    truncated: Bool[Array, " N"]
    """The episode was cut off (a time limit): reward would have followed."""
    final_obs: PyTree
    """The observation before auto-reset; equals `obs` where nothing ended."""


class Environment(NamedTuple):
    """N environments stepped side by side, resetting themselves."""

    name: str
    observation_space: Any
    action_space: Any
    max_episode_steps: Any
    """The time limit in steps where the environment states one, else None."""
    reset: Callable[[Key[Array, " N"]], tuple[PyTree, PyTree]]
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
    apply: Callable[[PyTree, PyTree, PyTree, Bool[Array, "T B"]], tuple[PyTree, Array, Array]]
    """`(params, carry[B], obs[T, B, ...], start[T, B]) -> (carry[B], policy_outputs[T, B, P],
    value[T, B])`. Where `start` is set the carry is reset before the step is read."""
    width: int = 1
    """The most numbers that any layer makes of one observation."""
    sequential: bool = False
    """Whether the carry holds a memory, so that minibatches are made of whole sequences."""


class Rollout(NamedTuple):
    """What N environments did in T steps."""

    obs: PyTree
    """Leaves `[T, N, ...]`: from `collect` as the environment gave them, or normalised."""
    start: Bool[Array, "T N"]
    """The first step of an episode."""
    action: Array
    """`[T, N, ...]` the sampled action, before `Policy.to_env`."""
    log_prob: Float[Array, "T N"]
    value: Float[Array, "T N"]
    next_value: Float[Array, "T N"]
    """The value of the true successor: of `final_obs` where an episode was truncated.
    Meaningless where it terminated, so weight it by `1 - terminated`."""
    reward: Float[Array, "T N"]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    mask: Float[Array, "T N"]
    """1 for steps that count, 0 for padding."""
    carry: PyTree
    """`[N, ...]` the network's memory before the first step."""
    policy_outputs: PyTree = ()
    """`[T, N, P]` if the objective needs them."""
    extras: PyTree = ()
    """Leaves `[T, N, ...]`: whatever else `collect` has for the advantage or the loss."""


class Batch(NamedTuple):
    """What the loss reads: sequences `[T, B, ...]` of a sequential network, else steps
    `[1, B, ...]`."""

    rollout: Rollout
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]
    """Of the value."""
    weight: Float[Array, "T B"]
    """Of each sample in all means; 0 for steps that do not count."""


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
    """Everything a run needs to continue."""

    learner: Any
    """A `LearnerState`, or whatever else a task learns."""
    actors: Any
    """An `ActorState`, or `()` if nothing acts."""


class Init(Protocol):
    """`Learner.init`."""

    def __call__(self, key: KeyLike, hparams: Any, data: PyTree = ...) -> TrainState: ...


class Update(Protocol):
    """`Learner.update`."""

    def __call__(
        self, state: TrainState, hparams: Any, data: PyTree = ...
    ) -> tuple[TrainState, Metrics]: ...


class Learner(NamedTuple):
    """A pair of pure functions. `data` is what is neither learned, differentiated nor saved:
    prompts, frozen networks, a data set."""

    init: Init
    """`(key, hparams, data=()) -> TrainState`."""
    update: Update
    """`(state, hparams, data=()) -> (state, metrics)`."""


class Actor(NamedTuple):
    """How rollouts are made."""

    init: Callable[[Key[Array, ""], Any, PyTree], Any]
    """`(key, hparams, data) -> ActorState`, a row per environment."""
    collect: Callable[[LearnerState, Any, Any, PyTree], tuple[Any, Rollout]]
    """`(LearnerState, ActorState, hparams, data) -> (ActorState, Rollout)`, with observations and
    rewards as the environment gave them."""


Advantage = Callable[[Rollout, Any], tuple[Array, ...]]
"""`(rollout, hparams) -> (advantage[T, N], target[T, N])`, or a third array: the weight of each
sample `[T, N]`."""
Improve = Callable[[LearnerState, Batch, Any, PyTree], tuple[LearnerState, Metrics]]
"""`(learner, batch, hparams, data) -> (learner, metrics)`."""
Loss = Callable[[PyTree, Batch, Any, Array, PyTree], tuple[Array, Metrics]]
"""`(params, batch, hparams, count, data) -> (loss, metrics)`: sums over the batch divided by
`count`, so that those of a minibatch's parts, and their gradients, add up to the whole's."""
