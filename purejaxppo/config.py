"""The two kinds of setting: `Config` (static, hashable) and `HParams` (traced numbers).

`Config` holds what fixes shapes and code paths; changing it recompiles. `HParams` holds every
number that can be traced, so that a whole run can be `vmap`ped over it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from purejaxppo.checks import FLOAT_MAX, ConfigError, check_fields

if TYPE_CHECKING:
    import jax

    Scalar = float | jax.Array
else:
    Scalar = float


MAX_WIDTH = 2**16


EPISODIC = ("reinforce", "reinforce_baseline")
PENALIZED = ("ppo_kl", "ppo_kl_adaptive")
BOOTSTRAPPING = ("a2c", "trpo", *PENALIZED, "ppo_clip")


def _bounded(
    default: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    **only_with: tuple[Any, ...],
) -> Any:
    """A dataclass field whose value must lie in `[low, high]`, or `(low, high]` if `open_low`, and
    that has an effect only where other settings have certain values."""
    rule = {"low": low, "high": high, "open_low": open_low, "only_with": only_with}
    return field(default=default, metadata=rule)


def _only_with(default: Any, **only_with: tuple[Any, ...]) -> Any:
    """A dataclass field that has an effect only where other settings have certain values."""
    return field(default=default, metadata={"only_with": only_with})


class EnvParams(Mapping[str, float | int | bool]):
    """Numbers by name: hashable, and never changed.

    Raises `ConfigError` if `values` is no mapping of names to numbers, true or false.
    """

    def __init__(self, values: Mapping[str, float | int | bool] = MappingProxyType({})):
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"env_params = {values!r}: must be a table of names and numbers, such as "
                "{'max_steps_in_episode': 200}"
            )
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, bool | int | float):
                raise ConfigError(
                    f"env_params.{name} = {value!r}: must be a number, true or false; pass other "
                    "parameters from Python as env_params=..."
                )
        self._values = {name: values[name] for name in sorted(values)}

    def __getitem__(self, name: str) -> float | int | bool:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class Config:
    """What fixes the shapes and code paths of a run. Static and hashable.

    Raises `ConfigError` on construction if a value has the wrong type, is out of range, or does
    not fit the others.
    """

    env_id: str = "CartPole-v1"
    """Environment to train on; `purejaxppo envs` lists them. Only a label if `env` is passed."""
    env_params: EnvParams = EnvParams()
    """Parameters of the environment by name, such as max_steps_in_episode; the others keep their
    defaults."""
    total_timesteps: int = _bounded(500_000, 1)
    """Environment steps of the run, rounded up to whole updates."""
    num_envs: int = _bounded(4, 1)
    """Number of environments stepped in parallel (N)."""
    num_steps: int = _bounded(128, 1)
    """Steps of each environment in one rollout (T)."""
    objective: Literal[
        "reinforce", "reinforce_baseline", "a2c", "trpo", "ppo_kl", "ppo_kl_adaptive", "ppo_clip"
    ] = "ppo_clip"
    """Policy objective. reinforce, reinforce_baseline: Monte Carlo policy gradient of whole
    episodes; a2c: actor-critic policy gradient; trpo: natural gradient within trpo_delta; ppo_kl:
    surrogate minus kl_beta times the KL divergence; ppo_kl_adaptive: the same, with kl_beta adapted
    to keep the divergence near target_kl; ppo_clip: clipped surrogate."""
    advantage: Literal["auto", "monte_carlo", "td0", "n_step", "gae", "lambda_return"] = "auto"
    """Advantage estimator; auto uses monte_carlo for the REINFORCE objectives, gae for others."""
    bootstrap_steps: int = _bounded(5, 1, advantage=("n_step",))
    """n of n_step: number of rewards summed before bootstrapping from the value."""
    bootstrap_time_limits: bool = _only_with(True, objective=BOOTSTRAPPING)
    """Bootstrap from the value of the last observation where a time limit ends an episode; false
    treats time limits as terminations. Use false if the limit is part of the task, or with a memory
    and a fixed limit, since a memory can tell the time and never sees what follows the limit."""
    baseline: Literal["none", "mean", "value", "optimal"] = _only_with(
        "value", objective=("reinforce_baseline",)
    )
    """Baseline of reinforce_baseline: none, the mean return of the other environments, the critic's
    value, or the baseline of least variance (optimal; discrete observations only)."""
    causality: bool = _only_with(True, objective=EPISODIC)
    """REINFORCE objectives: weight an action by the rewards after it, or else by the return of the
    whole episode."""
    discount_weight: bool = _only_with(False, objective=EPISODIC)
    """REINFORCE objectives: weight step t by gamma^t, as in the exact gradient of the discounted
    return. Most implementations leave it out."""
    update_epochs: int = _bounded(4, 1)
    """Epochs over each rollout; with trpo, of the critic only."""
    num_minibatches: int = _bounded(4, 1)
    """Gradient steps per epoch (with trpo, of the critic). Must divide num_envs * num_steps, or
    num_envs with a memory."""
    encoder: Literal["auto", "mlp", "cnn"] = "auto"
    """Observation encoder; auto uses cnn for [height, width, channels], mlp for others."""
    memory: Literal["none", "gru", "lstm"] = "none"
    """Recurrent cell after the encoder, for partially observed environments."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the dense layers (after the convolutions of a cnn)."""
    memory_size: int = _bounded(64, 1, MAX_WIDTH)
    """Width of the recurrent cell; no effect if memory = none."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Activation function of the hidden layers."""
    shared_trunk: bool = False
    """Share all layers but the last between actor and critic."""
    action_distribution: Literal["auto", "normal", "tanh_normal"] = "auto"
    """Distribution of continuous actions; auto uses normal, clipped to the bounds. Discrete actions
    are always categorical."""
    log_std_init: float = _bounded(0.0, -10.0, 10.0)
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
    cg_iterations: int = _bounded(10, 1, objective=("trpo",))
    """With trpo: conjugate gradient iterations."""
    line_search_steps: int = _bounded(10, 1, objective=("trpo",))
    """With trpo: maximum line-search trials, each half as long as the one before."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule over the run: decay to 0 (linear, cosine) or constant."""
    clip_schedule: Literal["linear", "cosine", "constant"] = "constant"
    """Schedule of clip_eps, clip_higher and vf_clip_eps: decay to 0, or constant."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "env_params", EnvParams(self.env_params))
        check_fields(self)
        if any(not 1 <= size <= MAX_WIDTH for size in self.hidden_sizes):
            raise ConfigError(
                f"hidden_sizes = {list(self.hidden_sizes)}: each width must be at least 1 and at "
                f"most {MAX_WIDTH}; use for example [64, 64], or [] for a linear network"
            )
        _check_sizes(self)
        _check_minibatches(self)
        _check_objective(self)

    @property
    def batch_size(self) -> int:
        """Environment steps of one update, N * T."""
        return self.num_envs * self.num_steps

    @property
    def estimator(self) -> str:
        """The advantage estimator that `auto` stands for, or the one that was named."""
        if self.advantage != "auto":
            return self.advantage
        return "monte_carlo" if self.whole_episodes else "gae"

    @property
    def whole_episodes(self) -> bool:
        """Whether rollouts begin with new episodes, and only whole ones count."""
        return self.objective in EPISODIC

    @property
    def needs_outputs(self) -> bool:
        """Whether the objective reads what the policy's head said when it acted."""
        optimal = self.objective == "reinforce_baseline" and self.baseline == "optimal"
        return optimal or self.objective in ("trpo", *PENALIZED)

    @property
    def has_critic(self) -> bool:
        """Whether the value is learned."""
        by_mean = self.objective == "reinforce_baseline" and self.baseline != "value"
        return self.objective != "reinforce" and not by_mean

    @property
    def num_updates(self) -> int:
        """Updates of the whole training: total_timesteps / batch_size, rounded up."""
        return -(-self.total_timesteps // self.batch_size)


@dataclass(frozen=True)
class HParams:
    """The traced hyperparameters of a run. Each may be batched and `vmap`ped over.

    Raises `ConfigError` on construction if a concrete value is out of range; traced values pass
    unchecked. For arrays, `vmap_axes` makes the `in_axes` of `jax.vmap`.
    """

    learning_rate: Scalar = _bounded(2.5e-4, 0, FLOAT_MAX)
    """Initial learning rate (Adam); with trpo, of the critic only."""
    critic_learning_rate: Scalar | None = _bounded(None, 0, FLOAT_MAX, has_critic=(True,))
    """Learning rate of the critic's own parameters; None uses learning_rate."""
    gamma: Scalar = _bounded(0.99, 0, 1)
    """Discount factor per step."""
    gae_lambda: Scalar = _bounded(0.95, 0, 1, estimator=("gae", "lambda_return"))
    """Lambda of generalised advantage estimation: 0 is one-step TD, 1 is Monte Carlo."""
    clip_eps: Scalar = _bounded(0.2, 0, open_low=True, objective=("ppo_clip",))
    """With ppo_clip: clip the probability ratio to [1 - clip_eps, 1 + clip_eps]. Other objectives
    only log the fraction of ratios outside."""
    clip_higher: Scalar | None = _bounded(None, 0, open_low=True, objective=("ppo_clip",))
    """With ppo_clip: clip ratios above 1 + clip_higher instead; None uses clip_eps."""
    dual_clip: Scalar | None = _bounded(None, 1, open_low=True, objective=("ppo_clip",))
    """With ppo_clip: lower bound dual_clip * A of the objective for negative advantages A, which
    limits the effect of large ratios; None disables it."""
    vf_clip_eps: Scalar | None = _bounded(None, 0, open_low=True, has_critic=(True,))
    """Clip range of the value loss; None disables value clipping."""
    ent_coef: Scalar = _bounded(0.01, 0, FLOAT_MAX)
    """Weight of the entropy bonus."""
    vf_coef: Scalar = _bounded(0.5, 0, FLOAT_MAX, has_critic=(True,))
    """Weight of the value loss."""
    max_grad_norm: Scalar = _bounded(0.5, 0, open_low=True)
    """Clip gradients to this global norm; inf disables clipping."""
    target_kl: Scalar | None = _bounded(
        None, 0, open_low=True, objective=("ppo_clip", "ppo_kl", "ppo_kl_adaptive")
    )
    """With ppo_clip and ppo_kl: skip the remaining epochs of an update once the mean approximate KL
    of an epoch exceeds this; None never stops. With ppo_kl_adaptive: the divergence to aim for
    (None: 0.01)."""
    kl_beta: Scalar = _bounded(1.0, 0, FLOAT_MAX, objective=PENALIZED)
    """Weight of the KL penalty of ppo_kl; initial weight with ppo_kl_adaptive."""
    trpo_delta: Scalar = _bounded(0.01, 1e-6, 1e3, objective=("trpo",))
    """With trpo: maximum KL divergence of one update. Much smaller values are lost to float32
    rounding."""
    cg_damping: Scalar = _bounded(0.1, 0, FLOAT_MAX, objective=("trpo",))
    """With trpo: damping added to the diagonal of the Fisher matrix."""
    adam_eps: Scalar = _bounded(1e-5, 0, FLOAT_MAX, open_low=True)
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        check_fields(self)


def why_unread(config: Config, name: str) -> str | None:
    """What makes a hyperparameter useless to a training, in words; None if it has an effect."""
    (found,) = (f for f in dataclasses.fields(HParams) if f.name == name)
    for other, choices in found.metadata["only_with"].items():
        if (chosen := getattr(config, other)) not in choices:
            no_critic = f"objective = {config.objective}, which learns no value here"
            return no_critic if other == "has_critic" else f"{other} = {chosen}"
    return None


def _check_sizes(config: Config) -> None:
    """Samples of a batch and updates of a training are counted by 32-bit integers."""
    if config.batch_size >= 2**31:
        raise ConfigError(
            f"num_envs * num_steps = {config.num_envs} * {config.num_steps} = "
            f"{config.batch_size}: must be below 2^31; choose fewer of either"
        )
    if config.num_updates >= 2**31:
        raise ConfigError(
            f"total_timesteps / (num_envs * num_steps) = {config.total_timesteps} / "
            f"{config.batch_size} = {config.num_updates} updates: must be below 2^31; choose a "
            "smaller total_timesteps, or more num_envs or num_steps"
        )


def _check_objective(config: Config) -> None:
    """Combinations that make no sense."""
    objective = f"objective = {config.objective}"
    passes = (config.update_epochs, config.num_minibatches)
    if config.objective in (*EPISODIC, "a2c") and passes != (1, 1):
        raise ConfigError(
            f"{objective} with update_epochs, num_minibatches = {passes[0]}, {passes[1]}: its "
            "gradient is that of the policy that acted, for one step; choose 1 and 1, or an "
            "objective with a ratio of policies (ppo_kl, ppo_clip)"
        )
    if config.whole_episodes and config.estimator != "monte_carlo":
        raise ConfigError(
            f"{objective} with advantage = {config.advantage}: it weighs actions by whole returns, "
            "without a value in place of rewards; choose monte_carlo, or objective = a2c"
        )
    if config.discount_weight and not config.causality:
        raise ConfigError(
            "discount_weight = true with causality = false: rewards of a whole episode are "
            "discounted from its first step on already; choose one of the two"
        )
    if config.discount_weight and config.advantage_normalization != "none":
        raise ConfigError(
            f"discount_weight = true with advantage_normalization = "
            f"{config.advantage_normalization}: would be standardised after it is weighed, and a "
            "late step, which is to count for little, for as much as any; choose none"
        )
    by_others = config.objective == "reinforce_baseline" and config.baseline in ("mean", "optimal")
    if by_others and config.num_envs == 1:
        raise ConfigError(
            f"baseline = {config.baseline} with num_envs = 1: is made of the other environments' "
            "returns; choose more environments"
        )
    if config.objective == "trpo" and config.shared_trunk:
        raise ConfigError(
            "objective = trpo with shared_trunk = true: its critic is fitted after the policy's "
            "step, which it would undo through layers that both share; choose shared_trunk = false"
        )


def _check_standardized(config: Config) -> None:
    """Advantages must not be standardised over one sample: the result is always 0."""
    if config.advantage_normalization == "none":
        return
    if config.batch_size == 1:
        raise ConfigError(
            f"advantage_normalization = {config.advantage_normalization} with num_envs * num_steps "
            "= 1: the normalised advantage of a single sample is always 0; use none, or more "
            "num_envs or num_steps"
        )
    per_minibatch = config.advantage_normalization == "minibatch" and config.objective != "trpo"
    if per_minibatch and config.batch_size == config.num_minibatches:
        raise ConfigError(
            f"num_minibatches = {config.num_minibatches} leaves one sample in each, whose "
            "normalised advantage is always 0; use fewer, or advantage_normalization = batch or "
            "none"
        )


def _check_minibatches(config: Config) -> None:
    if config.memory == "none":
        size, formula = config.batch_size, "num_envs * num_steps"
        values = f"{config.num_envs} * {config.num_steps} = {size}"
    else:
        size, formula = config.num_envs, f"num_envs (whole sequences, for memory = {config.memory})"
        values = f"{size}"
    _check_standardized(config)
    if size % config.num_minibatches == 0:
        return
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*small, *(size // d for d in small)})
    near = sorted(sorted(divisors, key=lambda d: abs(d - config.num_minibatches))[:5])
    raise ConfigError(
        f"{formula} = {values} does not divide into num_minibatches = {config.num_minibatches}; "
        f"choose num_minibatches from {', '.join(map(str, near))}"
    )
