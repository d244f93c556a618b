"""The objectives by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from purejaxppo.checks import ConfigError, is_reference
from purejaxppo.objectives.base import KLController, Objective, imported, with_baseline

DEFAULTS: dict[str, Any] = {
    "advantage": "gae", "num_envs": 4, "num_steps": 128, "update_epochs": 4, "num_minibatches": 4,
}  # fmt: skip
"""Defaults of the settings at auto for which an objective may have its own values."""
_ONE_STEP = {"update_epochs": 1, "num_minibatches": 1}
_EPISODES = {"advantage": "monte_carlo", "num_steps": 1024, **_ONE_STEP}
_RETURNS = frozenset({"causality", "discount_weight"})
_BOOTSTRAP = frozenset({"bootstrap_time_limits"})

FIXED_KL = KLController(
    init=lambda hparams: (),
    value=lambda state, hparams: hparams.kl_beta,
    update=lambda state, kl, hparams: state,
)
ADAPTIVE_KL = KLController(
    init=imported("objectives.kl", "initial_beta"),
    value=lambda state, hparams: state,
    update=imported("objectives.kl", "next_beta"),
    read_once=frozenset({"kl_beta"}),
)

_ALL = (
    Objective(
        "reinforce",
        imported("losses", "policy_gradient"),
        "log pi(a|s) G, the policy gradient of whole episodes' returns",
        has_critic=False,
        whole_episodes=True,
        several_epochs=False,
        reads=_RETURNS,
        defaults=_EPISODES,
    ),
    Objective(
        "reinforce_baseline",
        imported("losses", "policy_gradient"),
        "log pi(a|s) (G - b), the same minus a baseline",
        whole_episodes=True,
        several_epochs=False,
        reads=_RETURNS | {"baseline"},
        defaults=_EPISODES,
        variant=with_baseline,
    ),
    Objective(
        "a2c",
        imported("losses", "policy_gradient"),
        "log pi(a|s) A, one step per rollout",
        several_epochs=False,
        reads=_BOOTSTRAP,
        defaults={"num_envs": 16, "num_steps": 16, **_ONE_STEP},
    ),
    Objective(
        "trpo",
        imported("losses", "surrogate"),
        "r A within KL <= trpo_delta, by the natural gradient",
        step=imported("objectives.trpo", "make_trpo"),
        needs_kl=True,
        stops_at_kl=False,
        fixed_critic=True,
        reads=_BOOTSTRAP | {"cg_iterations", "line_search_steps", "trpo_delta", "cg_damping"},
        defaults={"num_envs": 16},
    ),
    Objective(
        "ppo_kl",
        imported("losses", "penalized_surrogate"),
        "r A - kl_beta KL(old, new)",
        kl=FIXED_KL,
        needs_kl=True,
        reads=_BOOTSTRAP | {"target_kl", "kl_beta"},
    ),
    Objective(
        "ppo_kl_adaptive",
        imported("losses", "penalized_surrogate"),
        "the same, with kl_beta adapted to keep the divergence near target_kl",
        kl=ADAPTIVE_KL,
        needs_kl=True,
        stops_at_kl=False,
        reads=_BOOTSTRAP | {"target_kl", "kl_beta"},
    ),
    Objective(
        "ppo_clip",
        imported("losses", "clipped_surrogate"),
        "min(r A, clip(r, 1 - clip_eps, 1 + clip_eps) A)",
        reads=_BOOTSTRAP | {"target_kl", "clip_eps", "clip_higher", "dual_clip"},
    ),
)
OBJECTIVES: Mapping[str, Objective] = MappingProxyType({x.name: x for x in _ALL})
"""The built-in objectives by name (`Config.objective`)."""

READ_BY_SOME = frozenset().union(*(x.reads for x in _ALL))
"""Settings that not every objective reads."""


def objective_of(config: Any) -> Objective:
    """The objective that a config names, adjusted to its other settings. A reference
    (`package.module:name`) counts as `ppo_clip` until it is imported."""
    name = "ppo_clip" if is_reference(config.objective) else config.objective
    return OBJECTIVES[name].of(config)


def readers_of(name: str) -> list[str]:
    """The objectives that read a setting."""
    return [x.name for x in _ALL if name not in READ_BY_SOME or name in x.reads]


def check_objective(config: Any, objective: Objective) -> None:
    """Raise `ConfigError` if the settings do not fit the objective."""
    name = f"objective = {objective.name}"
    epochs = (config.update_epochs, config.num_minibatches)
    if not objective.several_epochs and epochs != (1, 1):
        raise ConfigError(
            f"{name} takes one gradient step per rollout, but update_epochs, num_minibatches = "
            f"{epochs[0]}, {epochs[1]}; set both to 1 or auto, or use an objective with a "
            "probability ratio (ppo_kl, ppo_clip)"
        )
    if objective.whole_episodes and config.advantage != "monte_carlo":
        raise ConfigError(
            f"{name} with advantage = {config.advantage}: it weights actions by returns of "
            "whole episodes, without bootstrapping; use monte_carlo, or objective = a2c"
        )
    if config.discount_weight and not config.causality:
        raise ConfigError(
            "discount_weight = true with causality = false: the return of a whole episode is "
            "already discounted from its first step; use one of the two"
        )
    if config.discount_weight and config.advantage_normalization != "none":
        raise ConfigError(
            f"discount_weight = true with advantage_normalization = "
            f"{config.advantage_normalization}: normalisation would undo the weights; use none"
        )
    from_others = "baseline" in objective.reads and config.baseline in ("mean", "optimal")
    if from_others and config.num_envs == 1:
        raise ConfigError(
            f"baseline = {config.baseline} with num_envs = 1: the baseline is computed from the "
            "other environments' returns; use more environments"
        )
    if objective.fixed_critic and config.shared_trunk:
        raise ConfigError(
            f"{name} with shared_trunk = true: fitting the critic after the policy's step would "
            "change the policy through the shared layers; use shared_trunk = false"
        )
