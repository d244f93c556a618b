"""`Objective`: everything that differs between policy-gradient objectives, as one value."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purejaxppo.config import Config


@dataclass(frozen=True)
class KLController:
    """How the weight of a KL penalty is set. The state is part of the `LearnerState`."""

    init: Callable[[Any], Any]
    """`hparams -> state`."""
    value: Callable[[Any, Any], Any]
    """`(state, hparams) -> weight` for the next update."""
    update: Callable[[Any, Any, Any], Any]
    """`(state, kl, hparams) -> state`, from the mean KL(pi_old, pi) after the update."""
    read_once: frozenset[str] = frozenset()
    """Hyperparameters that only `init` reads."""


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective. To change one, use `dataclasses.replace`:

    dataclasses.replace(ppo.OBJECTIVES["ppo_clip"], name="mine", loss=my_loss)
    """

    name: str
    loss: Callable[..., Any]
    """`(Terms, hparams) -> loss[T, B]`, per sample."""
    maximises: str = ""
    """What it maximises, in words."""
    step: Callable[..., Any] | None = None
    """`improve.make_improve`, or what takes its place, with the same arguments: how parameters are
    improved, if not by minibatch epochs of gradient descent."""
    kl: KLController | None = None
    """Of objectives with a KL penalty: the divergence is measured after each update."""
    has_critic: bool = True
    """Whether the value is learned."""
    needs_kl: bool = False
    """Whether the loss reads `Terms.kl`, which is 0 otherwise; it is then logged as `kl`."""
    needs_policy_outputs: bool = False
    """Whether the advantage reads `Rollout.policy_outputs`."""
    whole_episodes: bool = False
    """Whether rollouts start with new episodes and only whole episodes count."""
    several_epochs: bool = True
    """Whether a rollout may be used for more than one gradient step."""
    stops_at_kl: bool = True
    """Whether `target_kl` ends an update early."""
    fixed_critic: bool = False
    """Whether the critic is fitted after the policy's step, so that they cannot share layers."""
    reads: frozenset[str] = frozenset()
    """Settings that not every objective reads, and this one does."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values of the settings that are left at auto."""
    extra_losses: Mapping[str, Callable[..., Any]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    """Further loss terms by the name under which their means are logged:
    `(params, network, batch, hparams) -> loss[T, B]`, added to the loss as they are."""
    variant: "Callable[[Objective, Config], Objective] | None" = None
    """How other settings change these facts."""

    def of(self, config: "Config") -> "Objective":
        """The objective with the settings of `config`."""
        return self if self.variant is None else self.variant(self, config)


def imported(module: str, name: str) -> Callable[..., Any]:
    """A function of this package that is imported when it is first called: settings are checked
    without importing JAX."""

    def call(*args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module(f"purejaxppo.{module}"), name)
        return function(*args, **kwargs)

    return call


def with_baseline(objective: Objective, config: "Config") -> Objective:
    """`reinforce_baseline` learns a value only as its baseline."""
    return dataclasses.replace(
        objective,
        has_critic=config.baseline == "value",
        needs_policy_outputs=config.baseline == "optimal",
    )
