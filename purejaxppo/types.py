"""The pytrees of one update, and the types of the functions that pass them on.

Axis letters, used on every array in this package:

    T  time steps of one rollout (`Config.num_steps`)
    N  environments stepped in parallel (`Config.num_envs`)
    B  samples, or whole sequences, of one minibatch
    A  action dimensions          P  outputs of the policy head
    S  seeds (added by `vmap`; functions of one run do not see it)
    U  updates (the scan over a whole run)

A trailing `...` stands for the shape of one observation or action.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key, UInt32

import purejaxppo.pytrees  # noqa: F401 (makes HParams a pytree)

PyTree = Any
KeyLike = Key[Array, ""] | UInt32[Array, "_"]
"""One random key: typed (`jax.random.key`) or old-style (`jax.random.PRNGKey`)."""
Metrics = dict[str, Array]
"""Scalars of one update, reduced on the device; `[U]` after a scan."""
MUST_BE_FINITE = ("loss", "policy_loss", "value_loss", "entropy", "grad_norm")
"""An update has failed if one of these metrics is not finite; the learner then keeps the previous
state."""


class TimeStep(NamedTuple):
    """What `Environment.step` returns for N environments, after auto-reset."""

    obs: PyTree
    """Leaves `[N, ...]`: the observation to act on next, of the new episode if one ended. An entry
    `action_mask` has one flag per action, true if it is allowed."""
    reward: Float[Array, " N"]
    terminated: Bool[Array, " N"]
    """The task itself ended: no reward can follow."""
    truncated: Bool[Array, " N"]
    """The episode was cut off (a time limit): reward would have followed."""
    final_obs: PyTree
    """The observation before auto-reset; equals `obs` if no episode ended."""


class Environment(NamedTuple):
    """N environments that are stepped in parallel and reset themselves."""

    name: str
    observation_space: Any
    action_space: Any
    max_episode_steps: Any
    """The time limit in steps if the environment states one, else None."""
    reset: Callable[[Key[Array, " N"]], tuple[PyTree, PyTree]]
    """`keys[N] -> (state[N], obs[N, ...])`."""
    step: Callable[[Key[Array, " N"], PyTree, Array], tuple[PyTree, TimeStep]]
    """`(keys[N], state[N], action[N, ...]) -> (state[N], TimeStep)`."""
    render: Callable[[PyTree], Any] | None = None
    """`state of one environment -> image [H, W, 3]`, 8-bit, or None; not compiled."""
    alternating: bool = False
    """Whether two players with opposite rewards take turns. Rewards and values are then those of
    the player who moves."""
    evaluation: "Environment | None" = None
    """The environment of evaluations, if it is another one, such as a game against an opponent."""
    game: Any = None
    """The game of two players as an `envs.single.Single`, or None."""
    in_python: Callable[..., Any] | None = None
    """`(N, **arguments) -> environments` with Gymnasium's vector interface, if they are stepped in
    Python; `reset` and `step` then only give shapes."""


class Policy(NamedTuple):
    """How outputs of the network's policy head become actions.

    A rollout stores `action`, and log-probabilities are those of `action`; `to_env` converts it for
    the environment (clipped, or squashed to bounds).
    """

    num_outputs: int
    """Outputs that depend on the observation."""
    num_free: int
    """Outputs that do not depend on it but are parameters (log standard deviations); P is the sum
    of both."""
    distribution: Callable[[Float[Array, "*batch P"]], Any]
    """`policy_outputs[..., P]` to a distribution with `log_prob`, `entropy`, `mode` and
    `kl_divergence(other)`, KL(this, other)."""
    noise: Callable[[Key[Array, ""]], Array]
    """One action's worth of noise, independent of the parameters."""
    sample: Callable[[Float[Array, "*batch P"], Array], Array]
    """`(policy_outputs[..., P], noise[..., ...]) -> action[..., ...]`."""
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
    """Size of the largest layer output for one observation."""
    sequential: bool = False
    """Whether the network is recurrent, so that minibatches consist of whole sequences."""
    steps_at_once: bool = False
    """Whether a sequential network reads all steps of a sequence at once. A large batch is then
    divided into parts that fit into a CPU core's cache, as for feed-forward networks."""


class Rollout(NamedTuple):
    """T steps of N environments."""

    obs: PyTree
    """Leaves `[T, N, ...]`: as the environment gave them when `collect` returns them, normalised
    for the advantage and the loss."""
    start: Bool[Array, "T N"]
    """The first step of an episode."""
    action: Array
    """`[T, N, ...]` the sampled action, before `Policy.to_env`."""
    log_prob: Float[Array, "T N"]
    value: Float[Array, "T N"]
    next_value: Float[Array, "T N"]
    """The value of the next observation; of `final_obs` where an episode was truncated. Undefined
    where it terminated, so multiply it by `1 - terminated`."""
    reward: Float[Array, "T N"]
    terminated: Bool[Array, "T N"]
    truncated: Bool[Array, "T N"]
    mask: Float[Array, "T N"]
    """1 for steps that count, 0 for those to ignore."""
    carry: PyTree
    """`[N, ...]` the recurrent state before the first step; `()` for feed-forward networks."""
    policy_outputs: PyTree = ()
    """`[T, N, P]` if the objective needs them."""
    extras: PyTree = ()
    """Leaves `[T, N, ...]`: further data from `collect` for the advantage or the loss."""


class Batch(NamedTuple):
    """Input of the loss: sequences `[T, B, ...]` for a sequential network, else steps
    `[1, B, ...]`."""

    rollout: Rollout
    advantage: Float[Array, "T B"]
    target: Float[Array, "T B"]
    """The target of the value."""
    weight: Float[Array, "T B"]
    """The weight of each sample in all means; 0 for steps that do not count."""


class RunningStats(NamedTuple):
    """Running mean and variance of all samples so far; 0 and 1 before the first."""

    total: Float[Array, ""]
    mean: Array
    var: Array


class LearnerState(NamedTuple):
    """The state that learning changes; identical on every device."""

    key: Key[Array, ""]
    params: PyTree
    opt_state: PyTree
    obs_stats: PyTree
    """A `RunningStats`; for dictionaries, one per entry, or `()` where it is not normalised."""
    reward_stats: RunningStats | tuple[()]
    updates: Int[Array, ""]
    """Number of updates done; schedules depend on it."""
    objective_state: PyTree = ()
    """The state of the objective: the coefficient of an adaptive KL penalty."""


class ActorState(NamedTuple):
    """The state that acting changes: one row per environment."""

    keys: Key[Array, " N"]
    env_state: PyTree
    obs: Array
    """`[N, ...]` as the environment gave it."""
    start: Bool[Array, " N"]
    carry: PyTree
    episode_return: Float[Array, " N"]
    """Undiscounted return so far of the current episode."""
    episode_length: Int[Array, " N"]
    discounted_return: Float[Array, " N"]
    """Discounted return so far of the current episode; reward scaling divides by its standard
    deviation."""


class TrainState(NamedTuple):
    """Everything a run needs to continue."""

    learner: Any
    """A `LearnerState`, or the state that a custom task learns."""
    actors: Any
    """An `ActorState`, or `()` if nothing acts."""


class Init(Protocol):
    """Signature of `Learner.init`."""

    def __call__(self, key: KeyLike, hparams: Any, data: PyTree = ...) -> TrainState: ...


class Update(Protocol):
    """Signature of `Learner.update`."""

    def __call__(
        self, state: TrainState, hparams: Any, data: PyTree = ...
    ) -> tuple[TrainState, Metrics]: ...


class Learner(NamedTuple):
    """A pair of pure functions. `data` holds arrays that are not learned, differentiated or saved:
    prompts, frozen networks, a data set."""

    init: Init
    """`(key, hparams, data=()) -> TrainState`."""
    update: Update
    """`(state, hparams, data=()) -> (state, metrics)`."""


class Actor(NamedTuple):
    """Two functions that collect rollouts."""

    init: Callable[[Key[Array, ""], Any, PyTree], Any]
    """`(key, hparams, data) -> ActorState`, one row per environment."""
    collect: Callable[[LearnerState, Any, Any, PyTree], tuple[Any, Rollout]]
    """`(LearnerState, ActorState, hparams, data) -> (ActorState, Rollout)`, with observations and
    rewards as the environment gave them."""


Advantage = Callable[[Rollout, Any], tuple[Array, ...]]
"""`(rollout, hparams) -> (advantage[T, N], target[T, N])`, optionally with a third array: the
weight of each sample `[T, N]`."""
Improve = Callable[[LearnerState, Batch, Any, PyTree], tuple[LearnerState, Metrics]]
"""`(learner, batch, hparams, data) -> (learner, metrics)`."""
Loss = Callable[[PyTree, Batch, Any, Array, PyTree], tuple[Array, Metrics]]
"""`(params, batch, hparams, count, data) -> (loss, metrics)`: sums over the batch divided by
`count`. The losses, metrics and gradients of a minibatch's parts therefore add up to those of the
minibatch."""
