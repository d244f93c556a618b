"""A user's Flax module as a `Network`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.config import ConfigError
from purejaxppo.envs.base import select_rows
from purejaxppo.masks import honour_mask, is_masked, without_mask
from purejaxppo.types import Network, Policy, PyTree


def network_of_module(module: Any, obs: PyTree, policy: Policy) -> Network:
    """Wrap a user's Flax module as a `Network`. It receives raw observations, or normalised ones
    with `normalize_obs`.

    Args:
        module: a Flax module, or a function that takes the number of policy outputs and returns
            one.
        obs: shapes of one observation, leaves `[1, ...]`.

    Raises:
        ConfigError: if it is not a Flax module, or if the shapes of its outputs are not
            `(policy_outputs[B, P], value[B])`.
    """
    num_outputs = policy.num_outputs + policy.num_free
    if isinstance(module, type) or not isinstance(module, nn.Module):
        module = _make_module(module, num_outputs)
    sequential = hasattr(module, "initial_carry")
    masked = is_masked(obs)
    rows = without_mask(obs) if masked else obs

    def initial_carry(n: int) -> PyTree:
        return module.initial_carry(n) if sequential else ()

    def call(variables: Any, carry: PyTree, obs: PyTree, **more: Any) -> Any:
        return module.apply(variables, *([carry] if sequential else []), obs, **more)

    def first(key: Key[Array, ""]) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rows)
        carry = [initial_carry(1)] if sequential else []
        return module.init(key, *carry, zeros)

    # One initialisation at a time: batched QR factorisation on CPU can block forever.
    @jax.custom_batching.sequential_vmap
    def init(key: Key[Array, ""]) -> PyTree:
        return first(key)["params"]

    def apply(
        params: PyTree, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Array, Array]:
        variables = {"params": params}
        if not sequential:
            flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), obs)
            policy_outputs, value = call(variables, (), flat)
            return carry, *_floats(policy_outputs, value, start.shape)

        def step(carry: PyTree, inputs: tuple[PyTree, Array]) -> tuple[PyTree, Any]:
            obs, start = inputs
            fresh = initial_carry(start.shape[0])
            return call(variables, select_rows(start, fresh, carry), obs)

        carry, (policy_outputs, value) = jax.lax.scan(step, carry, (obs, start))
        return carry, *_floats(policy_outputs, value, start.shape)

    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), rows)
    width = _check_module(
        module, first, call, initial_carry=initial_carry, obs=two, num_outputs=num_outputs
    )
    network = Network(init, initial_carry, apply, width, sequential)
    return honour_mask(network, policy) if masked else network


def _floats(
    policy_outputs: Array, value: Array, shape: tuple[int, ...]
) -> tuple[Float[Array, "T B P"], Float[Array, "T B"]]:
    """Reshape to `shape`, and cast to float32, whatever type the module computes in."""
    policy_outputs = policy_outputs.reshape((*shape, -1))
    return policy_outputs.astype(jnp.float32), value.reshape(shape).astype(jnp.float32)


def _make_module(function: Any, num_outputs: int) -> nn.Module:
    """Call `function(num_outputs)`. Raises `ConfigError` if it does not return a module."""
    wanted = "a Flax Linen module, or a function num_outputs -> module"
    if not callable(function):
        raise ConfigError(f"network is of type {type(function).__name__}: must be {wanted}")
    try:
        module = function(num_outputs)
    except TypeError as error:
        raise ConfigError(f"network: cannot be called with num_outputs: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"network: returned {type(module).__name__}; must be {wanted}")
    return module


def _check_module(
    module: nn.Module,
    first: Any,
    call: Any,
    *,
    initial_carry: Any,
    obs: PyTree,
    num_outputs: int,
) -> int:
    """Check a module's shapes on two observations. Returns the size of its largest layer output
    for one observation."""
    given = jax.tree.map(lambda x: list(x.shape), obs)
    try:
        variables = jax.eval_shape(first, jax.random.key(0))
        carry = jax.eval_shape(lambda: initial_carry(2))
        found, layers = jax.eval_shape(
            lambda *x: call(*x, capture_intermediates=True, mutable=["intermediates"]),
            {"params": variables.get("params", {})}, carry, obs,
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's module raises
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"network: cannot be applied to observations of shape {given}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if "params" not in variables:
        raise ConfigError("network: has no parameters to learn")
    if set(variables) != {"params"}:
        others = ", ".join(sorted(set(variables) - {"params"}))
        raise ConfigError(f"network: has variables in {others}; only parameters are supported")
    if hasattr(module, "initial_carry"):
        found = _check_carry(found, carry)
    shapes = [np.shape(x) for x in found] if isinstance(found, tuple) else [np.shape(found)]
    if shapes != [(2, num_outputs), (2,)]:
        raise ConfigError(
            f"network: returned shapes {shapes} for observations of shape {given}; it must return "
            f"policy_outputs[B, {num_outputs}] and value[B], here [(2, {num_outputs}), (2,)]"
        )
    return max(1, *(x.size // 2 for x in jax.tree.leaves(layers)))


def _check_carry(found: Any, carry: PyTree) -> Any:
    """Check that a recurrent module keeps the shapes of its carry. Returns its outputs."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(
            "network: a recurrent module must return (carry, (policy_outputs, value)), but this "
            f"one returned {type(found).__name__}"
        )
    new, result = found
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (carry, new)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"network: its carry has leaves {shapes[1]}, but initial_carry returns {shapes[0]}; "
            "they must agree"
        )
    return result
