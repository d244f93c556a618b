"""Communication between devices that share one run; the identity if `axis` is None.

`axis` names a mesh axis over which environments are spread. The learner's state is the same on
every device, so anything that changes it must first be summed over all devices.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key

from purejaxppo.types import PyTree


def all_sum(tree: PyTree, axis: str | None) -> PyTree:
    """Sum each leaf over the devices, all leaves in one exchange."""
    if axis is None:
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, axis))


def own_key(key: Key[Array, ""], axis: str | None) -> Key[Array, ""]:
    """Derive a separate key for each device from one that all devices hold."""
    return key if axis is None else jax.random.fold_in(key, jax.lax.axis_index(axis))


def own_rows(tree: PyTree, axis: str | None) -> PyTree:
    """Select the device's own `N / devices` rows of leaves `[N, ...]` that all devices hold."""
    if axis is None:
        return tree

    def take(x: Array) -> Array:
        rows = x.shape[0] // jax.lax.axis_size(axis)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * rows, rows)

    return jax.tree.map(take, tree)


def masked_mean(values: Array, mask: Array, axis: str | None = None) -> Array:
    """Mean over the samples of all devices whose `mask` is 1; 0 if there are none."""
    total, count = all_sum((jnp.sum(values * mask), jnp.sum(mask)), axis)
    return total / jnp.where(count > 0, count, 1.0)
