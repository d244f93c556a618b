"""Conversion and checks of the arguments of public functions.

All checks read types and shapes only: they work on traced values and add nothing to the compiled
program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.checks import is_traced
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.types import LearnerState, PyTree, TrainState


def vmap_axes(hparams: HParams) -> HParams:
    """Make the `in_axes` of `jax.vmap` for hyperparameters, some of which are arrays `[K, ...]`.

    Arrays are mapped over their leading axis; plain numbers, scalar arrays and None are shared:

        hparams = ppo.HParams(learning_rate=jnp.array([1e-4, 1e-3]), gamma=0.99)
        states, metrics = jax.vmap(train, (None, ppo.vmap_axes(hparams)))(key, hparams)

    Returns:
        an `HParams` that holds 0 for each mapped field and None for all others.

    Raises:
        ConfigError: if `hparams` is not an `HParams`, or its arrays have different leading lengths.
    """
    _check_is_hparams(hparams, "vmap_axes")
    lengths = {name: shape[0] for name, shape in _shapes_of(hparams).items() if shape}
    first = next(iter(lengths), "")
    for name, length in lengths.items():
        if length != lengths[first]:
            raise ConfigError(
                f"{first} has length {lengths[first]} and {name} has length {length}: arrays are "
                "mapped together, so their lengths must be equal; for all combinations, nest two "
                "jax.vmap"
            )
    # Built as a pytree: axes are not hyperparameter values, so the checks must not see them.
    names = [f.name for f in dataclasses.fields(hparams)]
    structure = jax.tree.structure(hparams, is_leaf=lambda x: x is None)
    return jax.tree.unflatten(structure, [0 if name in lengths else None for name in names])


def as_key(key: Any, function: str, hint: str) -> Key[Array, ""]:
    """Return one typed key. An old-style `uint32[2]` key of `jax.random.PRNGKey` is converted and
    gives the same random numbers.

    Args:
        function: the function that was given the key, for the error message.
        hint: how to call it with a batch of keys, for the error message.

    Raises:
        ConfigError: if `key` is not one key.
    """
    if not isinstance(key, jax.Array | np.ndarray):
        seed = key if isinstance(key, int | np.integer) else 0
        raise ConfigError(
            f"{_text_of('key', key)}: {function} takes a JAX random key; use jax.random.key({seed})"
        )
    batch = ConfigError(f"key has shape {key.shape}: {function} takes one key; {hint}")
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape:
            raise batch
        return key
    words = jax.eval_shape(_key_words).shape
    if key.dtype == jnp.uint32 and key.shape == words:
        return jax.random.wrap_key_data(jnp.asarray(key))
    if key.dtype == jnp.uint32 and key.shape[1:] == words:
        raise batch
    raise ConfigError(
        f"{_text_of('key', key)}: {function} takes a JAX random key; use jax.random.key(seed) or "
        "jax.random.PRNGKey(seed)"
    )


def _key_words() -> Array:
    """An old-style key of JAX's default generator: `uint32[2]` unless another is configured."""
    return jax.random.key_data(jax.random.key(0))


def check_config(config: Any, function: str) -> None:
    """Raise `ConfigError` if `config` is not a `Config`, with a hint how to make one."""
    if isinstance(config, Config):
        return
    use = "ppo.Config()"
    if isinstance(config, str):
        use = f"ppo.Config(env_id={config!r})"
    elif isinstance(config, dict):
        use = "ppo.Config(**config)"
    raise ConfigError(f"{_text_of('config', config)}: {function} takes a ppo.Config; use {use}")


def check_hparams(hparams: Any, function: str, hint: str) -> None:
    """Check that `hparams` holds one number per field.

    Args:
        function: the function that was given them, for the error message.
        hint: how to call it with arrays of hyperparameters, for the error message.

    Raises:
        ConfigError: if it is not an `HParams`, or a field is an array.
    """
    _check_is_hparams(hparams, function)
    for name, shape in _shapes_of(hparams).items():
        if shape:
            raise ConfigError(
                f"{name} has shape {shape}: {function} takes one number per hyperparameter; {hint}"
            )


def _check_is_hparams(hparams: Any, function: str) -> None:
    if isinstance(hparams, HParams):
        return
    use = "ppo.HParams()"
    if isinstance(hparams, dict):
        use = "ppo.HParams(**hparams)"
    elif isinstance(hparams, int | float | jax.Array | np.ndarray):
        use = "for example ppo.HParams(learning_rate=hparams)"
    raise ConfigError(f"{_text_of('hparams', hparams)}: {function} takes ppo.HParams; use {use}")


def _text_of(name: str, value: Any) -> str:
    """Describe an argument for an error message: by its value if that is short, else its type."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{name} is {value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str | dict | np.generic):
        return f"{name} = {' '.join(repr(value).split())}"
    return f"{name} is of type {type(value).__name__}"


def _shapes_of(hparams: HParams) -> dict[str, tuple[int, ...]]:
    values = {f.name: getattr(hparams, f.name) for f in dataclasses.fields(hparams)}
    return {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}


def check_state(state: Any, function: str, hint: str) -> None:
    """Raise `ConfigError` if `state` is not the `TrainState` of one seed; `hint` says what to do
    with several."""
    if not isinstance(state, TrainState):
        returned = "; train returns (state, metrics)" if isinstance(state, tuple) else ""
        raise ConfigError(
            f"{_text_of('state', state)}: {function} takes the TrainState that train or "
            f"learner.init returns{returned}"
        )
    if isinstance(state.learner, LearnerState) and state.learner.updates.ndim:
        raise ConfigError(
            f"state: its leaves have a leading axis of {len(state.learner.updates)} seeds; {hint}"
        )


def check_fits(name: str, given: PyTree, expected: PyTree) -> None:
    """Check that a state, or a part of one, has the leaves and shapes that its config requires.

    Args:
        name: name of `given`, for the error message.
        expected: a tree with the right shapes, such as the result of `jax.eval_shape`.

    Raises:
        ConfigError: naming the first leaf that differs.
    """
    found, wanted = _leaf_shapes(given), _leaf_shapes(expected)
    for path in {**wanted, **found}:
        if found.get(path) != wanted.get(path):
            has = f"has shape {found[path]}" if path in found else "is missing"
            needs = f"needs shape {wanted[path]}" if path in wanted else "has no such array"
            raise ConfigError(
                f"{name}{path} {has}, but this config {needs}; pass the config and env that the "
                "state was trained with"
            )


def _leaf_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}


def check_obs(obs: PyTree, shapes: Any, function: str) -> Any:
    """Check `obs`, leaves `[n, *shape]`, and return n: an int, or a symbol during an export.

    Raises:
        ConfigError: if a leaf has a different shape, or there are no rows.
    """
    if isinstance(obs, dict) and isinstance(shapes, dict) and set(obs) != set(shapes):
        raise ConfigError(
            f"obs has the entries {', '.join(sorted(obs))}: {function} takes the entries "
            f"{', '.join(sorted(shapes))}, as the environment returns them"
        )
    given, wanted = jax.tree.leaves(obs), jax.tree.leaves(shapes, is_leaf=_is_shape)
    for leaf, shape in zip(given, wanted, strict=False):
        if leaf.ndim == 1 + len(shape) and leaf.shape[1:] == shape and leaf.shape[0] != 0:
            continue
        batch = ", ".join(["n", *map(str, shape)])
        fix = "pass one observation of the environment per row"
        if leaf.shape == shape:
            fix = "add an axis with obs[None]"
        elif leaf.ndim > 1 + len(shape):
            fix = "use jax.vmap over the other axes"
        raise ConfigError(f"obs has shape {leaf.shape}: {function} takes a batch [{batch}]; {fix}")
    if len(given) != len(wanted):
        raise ConfigError(
            f"obs has {len(given)} arrays: {function} takes {len(wanted)}, as the environment "
            "returns them"
        )
    return given[0].shape[0]


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def check_carry(carry: PyTree, one_row: PyTree, n: Any, function: str) -> None:
    """Raise `ConfigError` unless `carry` has the shapes of `one_row`, with n rows in place of 1."""
    given, wanted = jax.tree.leaves(carry), jax.tree.leaves(one_row)
    shapes = [(n, *x.shape[1:]) for x in wanted]
    if [np.shape(x) for x in given] != shapes:
        raise ConfigError(
            f"carry has arrays of shapes {[np.shape(x) for x in given]}: {function} takes {shapes} "
            f"for {n} observations; start from agent.initial_carry({n})"
        )


def check_start(start: Array, n: Any, function: str) -> None:
    """Raise `ConfigError` unless `start` is `[n]`."""
    if start.shape != (n,):
        raise ConfigError(
            f"start has shape {start.shape}: {function} takes one flag per observation, [{n}]; "
            "leave it out if no episode starts"
        )


def whole_number(name: str, value: Any, low: int) -> int:
    """`value` as a Python integer.

    Raises:
        ConfigError: if it is not a whole number, or less than `low`.
    """
    if is_traced(value):
        raise ConfigError(
            f"{name} is traced: must be a Python integer, since shapes or loops depend on it; make "
            f"it static: jax.jit(..., static_argnames={name!r})"
        )
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} = {value!r}: must be a whole number, at least {low}")
    if value < low:
        raise ConfigError(f"{name} = {value}: must be at least {low}")
    return int(value)
