"""`Objective`: a value that holds everything that differs between policy-gradient objectives."""

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
    """Sets the weight of a KL penalty. Its state is stored in `LearnerState.objective_state`."""

    init: Callable[[Any], Any]
    """`hparams -> state`."""
    value: Callable[[Any, Any], Any]
    """`(state, hparams) -> weight` for the next update."""
    update: Callable[[Any, Any, Any], Any]
    """`(state, kl, hparams) -> state`, from the mean KL(pi_old, pi) after the update."""
    read_once: frozenset[str] = frozenset()
    """Hyperparameters that only `init` reads, so that changing them later has no effect."""


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective. To change one, use `dataclasses.replace`:

    dataclasses.replace(ppo.OBJECTIVES["ppo_clip"], name="mine", loss=my_loss)
    """

    name: str
    loss: Callable[..., Any]
    """`(Terms, hparams) -> loss[T, B]`, per sample."""
    maximises: str = ""
    """The maximised quantity, in words."""
    step: Callable[..., Any] | None = None
    """A replacement for `improve.make_improve`, with the same arguments; None improves parameters
    by minibatch epochs of gradient descent."""
    kl: KLController | None = None
    """Controller of the KL penalty, if any; the divergence is measured after each update."""
    has_critic: bool = True
    """Whether a value function is learned."""
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
    """Whether the critic is fitted after the policy's step, so the two cannot share layers."""
    reads: frozenset[str] = frozenset()
    """The settings that this objective reads, of those that not every objective reads."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Values for settings left at auto."""
    extra_losses: Mapping[str, Callable[..., Any]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    """Further loss terms, by the name under which their means are logged:
    `(params, network, batch, hparams) -> loss[T, B]`, added to the loss without a coefficient."""
    variant: "Callable[[Objective, Config], Objective] | None" = None
    """`(objective, config) -> Objective`, if other settings change these fields."""

    def of(self, config: "Config") -> "Objective":
        """The objective after `variant` is applied for `config`."""
        return self if self.variant is None else self.variant(self, config)


def imported(module: str, name: str) -> Callable[..., Any]:
    """A function of this package that is imported when it is called, so that settings can be
    checked without importing JAX."""

    def call(*args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module(f"purejaxppo.{module}"), name)
        return function(*args, **kwargs)

    return call


def with_baseline(objective: Objective, config: "Config") -> Objective:
    """`reinforce_baseline` learns a value function only for `baseline = value`."""
    return dataclasses.replace(
        objective,
        has_critic=config.baseline == "value",
        needs_policy_outputs=config.baseline == "optimal",
    )
