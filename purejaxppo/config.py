"""The two kinds of settings: `Config` (static, hashable) and `HParams` (traced).

`Config` holds the settings that fix shapes and code paths; changing one recompiles. `HParams` holds
the traced hyperparameters, so that a whole run can be `vmap`ped over them.
"""

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from purejaxppo.checks import FLOAT_MAX, ConfigError, EnvParams, check_fields, is_reference
from purejaxppo.combinations import check_combinations
from purejaxppo.draws import parse_draws
from purejaxppo.encoders import parse_encoders
from purejaxppo.objectives.base import Objective
from purejaxppo.objectives.table import DEFAULTS, READ_BY_SOME, objective_of

if TYPE_CHECKING:
    import jax

    Scalar = float | jax.Array
else:
    Scalar = float


MAX_WIDTH = 2**16


AUTO: Any = "auto"
"""Value of a setting whose default depends on the objective."""


class Chosen:
    """A value that an objective chose for a setting left at auto; another objective replaces it."""


class _ChosenNumber(Chosen, int):
    pass


class _ChosenText(Chosen, str):
    pass


def fill_auto(config: Any, chosen: Mapping[str, Any]) -> None:
    """Set fields that are, or were, at auto to the values that an objective chose."""
    for name, value in chosen.items():
        given = getattr(config, name)
        if isinstance(given, Chosen) or given == AUTO:
            kind = _ChosenText if isinstance(value, str) else _ChosenNumber
            object.__setattr__(config, name, kind(value))


def bounded(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    **only_with: tuple[Any, ...],
) -> Any:
    """A dataclass field whose value must lie in `[low, high]`, or `(low, high]` if `open_low`.
    `only_with` gives the values of other settings for which the field has an effect."""
    rule = {"low": low, "high": high, "open_low": open_low, "only_with": only_with}
    return field(default=default, metadata=rule)


class Words(NamedTuple):
    """Names of a task's samples and results, for progress and reports."""

    samples: str = "environment steps"
    rate: str = "steps"
    """Name of the samples in a speed, as in steps/s."""
    result: str = "return"
    evaluations: tuple[str, str] = ("return, sampled actions", "return, deterministic actions")
    """What the two final evaluations measure."""
    episodes: str = "episodes"
    unfinished: str = (
        "did not end within the environment's time limit, or 10,000 steps if it states none; give "
        "the environment a time limit (max_steps_in_episode)"
    )
    """What is wrong with a result that is NaN, and what to do."""


class TaskConfig(ABC):
    """Base class of a task's config (a frozen dataclass): what the host reads."""

    total_timesteps: int
    """Samples to train on, rounded up to whole updates."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of samples per update."""

    @property
    def num_updates(self) -> int:
        """Number of updates of a run: total_timesteps / batch_size, rounded up."""
        return -(-self.total_timesteps // self.batch_size)

    @property
    def label(self) -> str:
        """Name of the environment or data, for titles and directories."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """Title of the run."""
        return self.label

    @property
    def batch_in_words(self) -> str:
        """Description of the data of one update."""
        return f"{self.batch_size} samples"

    @property
    def words(self) -> Words:
        """Names of samples and results, for progress and reports."""
        return Words()

    @property
    def read_once(self) -> frozenset[str]:
        """Hyperparameters that only the first update reads."""
        return frozenset()

    def make_task(self, **given: Any) -> Any:
        """Make the `Task` that this config describes; for a `Config`, use `ppo.make_task`. Raises
        `ConfigError` if the task can only be made in Python."""
        raise ConfigError(
            f"types.config = {type(self).__name__}: belongs to a custom task; make the task in "
            "Python"
        )

    def check_hparams(self, hparams: Any) -> None:  # noqa: B027 (nothing to check by default)
        """Raise `ConfigError` if the hyperparameters contradict the config."""

    def why_unread(self, name: str) -> str | None:
        """Return why a hyperparameter has no effect, or None if it has an effect."""
        return None


class UpdateConfig(TaskConfig):
    """The settings that every policy-gradient update reads."""

    update_epochs: int
    num_minibatches: int
    advantage_normalization: Any
    """`minibatch`, `batch` or `none`."""
    lr_schedule: Any
    """`linear`, `cosine` or `constant`."""
    clip_schedule: Any


@dataclass(frozen=True)
class Config(UpdateConfig):
    """The settings that fix the shapes and code paths of a run. Static and hashable.

    Raises `ConfigError` on construction if a value has the wrong type, is out of range, or
    contradicts another setting.
    """

    env_id: str = "CartPole-v1"
    """Environment to train on; `purejaxppo envs` lists them. Or package.module:name of your own
    environment, or of a function that makes one. Only a label if `env` is passed."""
    env_params: EnvParams = EnvParams()
    """Parameters of the environment by name, such as max_steps_in_episode; the others keep their
    defaults."""
    randomize: tuple[str, ...] = ()
    """Parameters of the environment to draw for each episode, such as
    masspole=uniform:0.05,0.5 (or loguniform:LOW,HIGH, or choice:A,B,C)."""
    frame_stack: int = bounded(1, 1, 1024)
    """Join this many of the last observations of an episode along their last axis."""
    action_repeat: int = bounded(1, 1, 1024)
    """Carry out each action this many times; the rewards are added up."""
    sticky_actions: float = bounded(0.0, 0.0, 1.0)
    """Probability that the last action is repeated instead of the chosen one."""
    time_limit: int = bounded(0, 0)
    """Truncate episodes after this many steps; 0: only at the environment's own limit."""
    obs_clip: float = bounded(math.inf, 0.0, open_low=True)
    """Clip the numbers of observations to +- this bound."""
    reward_clip: float = bounded(math.inf, 0.0, open_low=True)
    """Clip rewards to +- this bound for learning, after their normalisation. Reported returns are
    not clipped."""
    opponent: Literal["self", "pool"] = "self"
    """In games of two players: the policy itself plays the other side, or a pool of its earlier
    versions."""
    opponent_pool: int = bounded(4, 1, 1024, opponent=("pool",))
    """Number of opponents in the pool; a divisor of num_envs."""
    opponent_every: int = bounded(10, 1, opponent=("pool",))
    """Replace the oldest opponent by the policy every this many updates."""
    total_timesteps: int = bounded(500_000, 1)
    """Environment steps of the run, rounded up to whole updates."""
    num_envs: int = bounded(AUTO, 1)
    """Number of environments stepped in parallel (N); auto: 4, or 16 with a2c and trpo."""
    num_steps: int = bounded(AUTO, 1)
    """Steps of each environment in one rollout (T); auto: 128, or 16 with a2c and 1024 with the
    REINFORCE objectives."""
    objective: (
        Literal[
            "reinforce", "reinforce_baseline", "a2c", "trpo", "ppo_kl", "ppo_kl_adaptive",
            "ppo_clip",
        ]
        | str
    ) = "ppo_clip"  # fmt: skip
    """Policy objective. reinforce, reinforce_baseline: Monte Carlo policy gradient of whole
    episodes; a2c: actor-critic policy gradient; trpo: natural gradient within trpo_delta; ppo_kl:
    surrogate minus kl_beta times the KL divergence; ppo_kl_adaptive: the same, with kl_beta adapted
    to keep the divergence near target_kl; ppo_clip: clipped surrogate."""
    advantage: Literal["auto", "monte_carlo", "td0", "n_step", "gae", "lambda_return"] | str = (
        "auto"
    )
    """Advantage estimator; auto uses monte_carlo for the REINFORCE objectives, gae for others."""
    bootstrap_steps: int = bounded(5, 1, advantage=("n_step",))
    """n of n_step: number of rewards summed before bootstrapping from the value."""
    bootstrap_time_limits: bool = True
    """Bootstrap from the value of the last observation where a time limit ends an episode; false
    treats time limits as terminations. Use false if the limit is part of the task, or with a memory
    and a fixed limit, since a memory can count steps and never sees a step beyond the limit."""
    baseline: Literal["none", "mean", "value", "optimal"] = "value"
    """Baseline of reinforce_baseline: none, the mean return of the other environments, the critic's
    value, or the minimum-variance baseline (optimal; discrete observations only)."""
    causality: bool = True
    """REINFORCE objectives: weight an action by the rewards after it; false uses the return of the
    whole episode."""
    discount_weight: bool = False
    """REINFORCE objectives: weight step t by gamma^t, as in the exact gradient of the discounted
    return. Most implementations leave it out."""
    update_epochs: int = bounded(AUTO, 1)
    """Epochs over each rollout; with trpo, of the critic only. auto: 4, or 1 with a2c and the
    REINFORCE objectives."""
    num_minibatches: int = bounded(AUTO, 1)
    """Gradient steps per epoch (with trpo, of the critic). Must divide num_envs * num_steps, or
    num_envs with a memory. auto: 4, or 1 with a2c and the REINFORCE objectives."""
    optimizer: Literal["adam"] | str = "adam"
    """Optimiser: adam, or package.module:name of a function that makes an optax transformation from
    HParams. It then replaces gradient clipping, Adam and critic_learning_rate."""
    network: Literal["auto"] | str = "auto"
    """Network: auto builds one from the settings below; or package.module:name of a Flax module, or
    of a function that makes one for a number of policy outputs."""
    encoder: str = "auto"
    """Observation encoder: auto, mlp or cnn; auto uses cnn for [height, width, channels], mlp for
    others. Or encoders of entries of the observation, such as view=cnn,direction=mlp."""
    memory: Literal["none", "gru", "lstm", "gtrxl"] = "none"
    """Memory after the encoder, for partially observed environments: a recurrent cell, or gtrxl, a
    gated transformer over the last memory_window steps of the episode."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the dense layers (after the convolutions of a cnn)."""
    memory_size: int = bounded(64, 1, MAX_WIDTH)
    """Width of the memory; no effect if memory = none."""
    memory_window: int = bounded(32, 1, 4096, memory=("gtrxl",))
    """Steps of the episode that gtrxl attends to."""
    memory_layers: int = bounded(1, 1, 64, memory=("gtrxl",))
    """Blocks of gtrxl."""
    memory_heads: int = bounded(4, 1, 1024, memory=("gtrxl",))
    """Attention heads of gtrxl; a divisor of memory_size."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Activation function of the hidden layers."""
    shared_trunk: bool = False
    """Share all layers but the last between actor and critic."""
    action_distribution: Literal["auto", "normal", "tanh_normal"] = "auto"
    """Distribution of continuous actions; auto uses normal, clipped to the bounds. Discrete actions
    are always categorical."""
    log_std_init: float = bounded(0.0, -10.0, 10.0)
    """Initial log standard deviation of continuous actions; no effect on discrete ones."""
    advantage_normalization: Literal["minibatch", "batch", "none"] = "minibatch"
    """Normalise advantages to mean 0 and standard deviation 1 per minibatch, per batch, or not at
    all. With trpo, which takes one policy step per batch, minibatch means batch."""
    normalize_obs: bool = False
    """Normalise observations by their running mean and standard deviation, clipped to +-10. No
    effect on discrete observations, which are always one-hot."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return, clipped to +-10.
    Reported returns stay unscaled."""
    cg_iterations: int = bounded(10, 1)
    """With trpo: conjugate gradient iterations."""
    line_search_steps: int = bounded(10, 1)
    """With trpo: maximum line-search trials, each half as long as the one before."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule over the run: decay to 0 (linear, cosine) or constant."""
    clip_schedule: Literal["linear", "cosine", "constant"] = "constant"
    """Schedule of clip_eps, clip_higher and vf_clip_eps: decay to 0, or constant."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "env_params", EnvParams(self.env_params))
        self._choose()
        check_fields(self)
        parse_draws(self.randomize)
        parse_encoders(self.encoder)
        if self.memory == "gtrxl" and self.memory_size % self.memory_heads:
            raise ConfigError(
                f"memory_size = {self.memory_size}: must be a multiple of memory_heads = "
                f"{self.memory_heads}"
            )
        if any(not 1 <= size <= MAX_WIDTH for size in self.hidden_sizes):
            raise ConfigError(
                f"hidden_sizes = {list(self.hidden_sizes)}: each width must be at least 1 and at "
                f"most {MAX_WIDTH}; use for example [64, 64], or [] for a linear network"
            )
        check_combinations(self)

    def with_defaults_of(self, objective: Objective) -> "Config":
        """Set what was left at auto to the defaults of an objective passed from Python."""
        chosen = {**DEFAULTS, **objective.defaults}
        left = {n: v for n, v in chosen.items() if isinstance(getattr(self, n), Chosen)}
        changed = {n: v for n, v in left.items() if getattr(self, n) != v}
        return dataclasses.replace(self, **changed) if changed else self

    def _choose(self) -> None:
        """Set what is left at auto to the objective's defaults."""
        try:
            chosen = {**DEFAULTS, **objective_of(self).defaults}
        except (KeyError, TypeError):  # unknown objective; check_fields raises
            chosen = DEFAULTS
        fill_auto(self, chosen)

    @property
    def encoders(self) -> dict[str, str]:
        """The encoders of entries of the observation by name; empty if there is one for all."""
        return parse_encoders(self.encoder)

    @property
    def batch_size(self) -> int:
        """Environment steps of one update, N * T."""
        return self.num_envs * self.num_steps

    @property
    def read_once(self) -> frozenset[str]:
        """Hyperparameters that only the first update reads."""
        controller = objective_of(self).kl
        return frozenset() if controller is None else controller.read_once

    def why_unread(self, name: str) -> str | None:
        """Return why a hyperparameter has no effect, or None if it has an effect."""
        if is_reference(self.objective) or is_reference(self.optimizer):
            return None
        if name in READ_BY_SOME and name not in objective_of(self).reads:
            return f"objective = {self.objective}"
        found = {f.name: f for f in dataclasses.fields(HParams)}.get(name)
        for other, choices in {} if found is None else found.metadata.get("only_with", {}).items():
            if (chosen := getattr(self, other)) not in choices:
                no_critic = f"objective = {self.objective}, which has no critic here"
                return no_critic if other == "has_critic" else f"{other} = {chosen}"
        return None

    @property
    def whole_episodes(self) -> bool:
        """Whether rollouts start with new episodes and only whole episodes count."""
        return objective_of(self).whole_episodes

    @property
    def has_critic(self) -> bool:
        """Whether a value function is learned."""
        return objective_of(self).has_critic

    @property
    def label(self) -> str:
        """Name of the environment."""
        return self.env_id

    @property
    def title(self) -> str:
        """The environment and the objective."""
        return f"{self.env_id}, {self.objective}"

    @property
    def batch_in_words(self) -> str:
        """Description of the data of one update."""
        epochs = f"{self.update_epochs} epoch{'s' if self.update_epochs > 1 else ''}"
        parts = f"{self.num_minibatches} minibatch{'es' if self.num_minibatches > 1 else ''}"
        return f"{self.num_envs} environments x {self.num_steps} steps ({epochs} of {parts})"


@dataclass(frozen=True)
class HParams:
    """The traced hyperparameters of a run. Each may be batched and `vmap`ped over.

    Raises `ConfigError` on construction if a concrete value is out of range; traced values pass
    unchecked. For arrays, `vmap_axes` makes the `in_axes` of `jax.vmap`.
    """

    learning_rate: Scalar = bounded(2.5e-4, 0, FLOAT_MAX)
    """Initial learning rate (Adam); with trpo, of the critic only."""
    critic_learning_rate: Scalar | None = bounded(None, 0, FLOAT_MAX, has_critic=(True,))
    """Learning rate of the critic's own parameters; None uses learning_rate."""
    gamma: Scalar = bounded(0.99, 0, 1)
    """Discount factor per step."""
    gae_lambda: Scalar = bounded(0.95, 0, 1, advantage=("gae", "lambda_return"))
    """Lambda of generalised advantage estimation: 0 is one-step TD, 1 is Monte Carlo."""
    clip_eps: Scalar = bounded(0.2, 0, open_low=True)
    """With ppo_clip: clip the probability ratio to [1 - clip_eps, 1 + clip_eps]. Other objectives
    only log the fraction of ratios outside."""
    clip_higher: Scalar | None = bounded(None, 0, open_low=True)
    """With ppo_clip: clip ratios above 1 + clip_higher instead; None uses clip_eps."""
    dual_clip: Scalar | None = bounded(None, 1, open_low=True)
    """With ppo_clip: lower bound dual_clip * A of the objective for negative advantages A, which
    limits the effect of large ratios; None disables it."""
    vf_clip_eps: Scalar | None = bounded(None, 0, open_low=True, has_critic=(True,))
    """Clip range of the value loss; None disables value clipping."""
    ent_coef: Scalar = bounded(0.01, 0, FLOAT_MAX)
    """Weight of the entropy bonus."""
    vf_coef: Scalar = bounded(0.5, 0, FLOAT_MAX, has_critic=(True,))
    """Weight of the value loss."""
    max_grad_norm: Scalar = bounded(0.5, 0, open_low=True)
    """Clip gradients to this global norm; inf disables clipping."""
    target_kl: Scalar | None = bounded(None, 0, open_low=True)
    """With ppo_clip and ppo_kl: skip the remaining epochs of an update once the mean approximate KL
    of an epoch exceeds this; None never stops. With ppo_kl_adaptive: the divergence to aim for
    (None: 0.01)."""
    kl_beta: Scalar = bounded(1.0, 0, FLOAT_MAX)
    """Weight of the KL penalty of ppo_kl; initial weight with ppo_kl_adaptive."""
    trpo_delta: Scalar = bounded(0.01, 1e-6, 1e3)
    """With trpo: maximum KL divergence of one update. Much smaller values are lost to float32
    rounding."""
    cg_damping: Scalar = bounded(0.1, 0, FLOAT_MAX)
    """With trpo: damping added to the diagonal of the Fisher matrix."""
    adam_eps: Scalar = bounded(1e-5, 0, FLOAT_MAX, open_low=True)
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __init_subclass__(cls) -> None:
        """Fields that a subclass adds are traced, mapped and swept like the others."""
        super().__init_subclass__()
        if (pytrees := sys.modules.get("purejaxppo.pytrees")) is not None:
            pytrees.register_hparams(cls)
