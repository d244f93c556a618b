"""The optimiser: from gradients to updates of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from purejaxppo.config import ConfigError, HParams
from purejaxppo.types import PyTree


class Optimizer(NamedTuple):
    """An optax transformation, applied to the tree of parameters or to one flat vector."""

    transform: Callable[[Any, PyTree], optax.GradientTransformation]
    """`(hparams, params) -> transformation`, which is applied to `pack(params)`."""
    as_vector: bool
    """Flatten parameters into one vector if all have the same type; faster for small networks."""

    def pack(self, params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
        """Return the parameters as the transformation receives them, and the inverse function."""
        types = {leaf.dtype for leaf in jax.tree.leaves(params)}
        if self.as_vector and len(types) == 1:
            return ravel_pytree(params)
        return params, lambda params: params

    def init(self, hparams: HParams, params: PyTree) -> PyTree:
        """The initial state of the transformation."""
        return self.transform(hparams, params).init(self.pack(params)[0])


def clipped_adam(hparams: HParams, params: PyTree) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam with the learning rates of `step_sizes`."""
    rates = step_sizes(params, hparams)
    vector = rates if isinstance(rates, jax.Array) else ravel_pytree(rates)[0]
    tree = jax.tree.map(lambda _: rates, params) if isinstance(rates, jax.Array) else rates

    def step(directions: PyTree, packed: PyTree | None = None) -> PyTree:
        if isinstance(directions, jax.Array):
            return -vector * directions
        return jax.tree.map(lambda rate, x: (-rate * x).astype(x.dtype), tree, directions)

    return optax.chain(
        optax.clip_by_global_norm(hparams.max_grad_norm),
        optax.scale_by_adam(eps=hparams.adam_eps),
        optax.stateless(step),
    )


ADAM = Optimizer(clipped_adam, as_vector=True)


def step_sizes(params: PyTree, hparams: HParams) -> PyTree:
    """The learning rate of each parameter: `critic_learning_rate` for modules whose names begin
    with `critic`, `learning_rate` for all others. A scalar if `critic_learning_rate` is None."""
    critic_rate = hparams.critic_learning_rate
    if critic_rate is None:
        return jnp.asarray(hparams.learning_rate, jnp.float32)

    if not any(name.startswith("critic") for name in params):
        raise ConfigError(
            "critic_learning_rate: has no effect, since the network has no modules whose names "
            "begin with critic; leave it out"
        )

    def size(path: Any, leaf: Array) -> Array:
        critic = path[0].key.startswith("critic")
        rate = jnp.asarray(critic_rate if critic else hparams.learning_rate, jnp.float32)
        return jnp.full(leaf.shape, rate)

    return jax.tree_util.tree_map_with_path(size, params)
