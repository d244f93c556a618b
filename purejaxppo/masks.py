"""Action masks: an entry of the observation that says which actions are allowed."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.config import ConfigError
from purejaxppo.types import Network, Policy, PyTree

ACTION_MASK = "action_mask"
"""The entry of an observation that holds one flag per action, true if it is allowed."""


def honour_mask(network: Network, policy: Policy) -> Network:
    """Wrap `network` to set the outputs of forbidden actions to the lowest float, so that they are
    never sampled and do not contribute to log-probabilities, entropies, modes and KL divergences.
    The network reads the rest of the observation.

    Raises:
        ConfigError: for continuous actions.
    """
    if policy.num_free:
        raise ConfigError(
            f"{ACTION_MASK}: works with discrete actions, but these are continuous; leave it out "
            "of the observation"
        )

    def apply(params: PyTree, carry: PyTree, obs: PyTree, start: Array) -> Any:
        carry, policy_outputs, value = network.apply(params, carry, without_mask(obs), start)
        allowed = jnp.asarray(obs[ACTION_MASK], bool)
        return carry, jnp.where(allowed, policy_outputs, jnp.finfo(policy_outputs.dtype).min), value

    return network._replace(apply=apply)


def is_masked(obs: PyTree) -> bool:
    return isinstance(obs, Mapping) and ACTION_MASK in obs


def without_mask(obs: PyTree) -> PyTree:
    """Return an observation or space without the mask; if one entry remains, that entry itself."""
    rest = {name: x for name, x in obs.items() if name != ACTION_MASK}
    return next(iter(rest.values())) if len(rest) == 1 else rest


def check_mask(shapes: Any, policy: Policy) -> None:
    """Check the mask of an observation, if it has one, given the shapes of its leaves.

    Raises:
        ConfigError: if it does not have one flag per policy output, or is not at the top level.
    """
    wanted = (policy.num_outputs,)
    if is_masked(shapes) and shapes[ACTION_MASK] != wanted:
        raise ConfigError(
            f"{ACTION_MASK} has the shape {shapes[ACTION_MASK]}: must be {wanted}, one flag per "
            "action (for multi-discrete actions, the flags of all dimensions concatenated)"
        )
    inner = shapes.values() if isinstance(shapes, Mapping) else ()
    if any(_has_mask(x) for x in inner):
        raise ConfigError(
            f"{ACTION_MASK} lies inside another dictionary: must be at the top level of the "
            "observation"
        )


def _has_mask(shapes: Any) -> bool:
    inner = isinstance(shapes, Mapping) and any(map(_has_mask, shapes.values()))
    return is_masked(shapes) or inner
