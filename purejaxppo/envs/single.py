"""From one environment to N that are stepped in parallel and reset themselves."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from purejaxppo.config import ConfigError
from purejaxppo.envs.base import select_rows, split_each
from purejaxppo.types import Environment, PyTree, TimeStep

ResetOne = Callable[[Key[Array, ""]], tuple[PyTree, PyTree]]
StepOne = Callable[[Key[Array, ""], PyTree, Array], tuple[PyTree, PyTree, Any, Any, Any]]


class Single(NamedTuple):
    """One environment, whose `step` does not reset it. Every adapter to a suite makes one."""

    name: str
    observation_space: Any
    action_space: Any
    max_episode_steps: Any
    """The time limit in steps if the environment states one, else None."""
    reset: ResetOne
    """`key -> (state, obs)`."""
    step: StepOne
    """`(key, state, action) -> (state, obs, reward, terminated, truncated)`."""
    render: Callable[[PyTree], np.ndarray] | None = None
    """`state -> image [H, W, 3]`, 8-bit; not compiled."""
    alternating: bool = False
    """Whether two players with opposite rewards take turns. Rewards and values are then those of
    the player who moves."""
    evaluation: "Single | None" = None
    """The environment of evaluations, if it is another one."""
    slow_reset: bool = False
    """Whether a reset takes longer than several steps."""
    parameters: Mapping[str, Any] = MappingProxyType({})
    """The parameters that `Config.env_params` can change, with their defaults."""
    with_values: Callable[[Mapping[str, Any]], tuple[ResetOne, StepOne]] | None = None
    """`values by name -> (reset, step)` with other values of parameters, which may be traced; None
    if they are fixed when the environment is made."""


RESETS_AT_ONCE = 16
"""With a slow reset, a sixteenth of the environments is reset at once."""


def vectorised(single: Single) -> Environment:
    """N copies of an environment. Values that `step` returns are cast to the types of `reset`.

    Raises:
        ConfigError: if a cast would lose information.
    """
    name = single.name
    obs_like = jax.eval_shape(lambda key: single.reset(key)[1], jax.random.key(0))

    def reset_one(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, obs = single.reset(key)
        return strong(state), like(name, "observation", obs, obs_like)

    def step_one(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        next_state, obs, reward, terminated, truncated = single.step(key, state, action)
        return (
            like(name, "state", next_state, state),
            like(name, "observation", obs, obs_like),
            number(reward, jnp.float32, "reward"),
            number(terminated, bool, "terminated"),
            number(truncated, bool, "truncated"),
        )

    return Environment(
        name=name,
        observation_space=single.observation_space,
        action_space=single.action_space,
        max_episode_steps=single.max_episode_steps,
        reset=jax.vmap(reset_one),
        step=reset_on_demand(reset_one, step_one, slow_reset=single.slow_reset),
        render=single.render,
        alternating=single.alternating,
        game=single if single.alternating else None,
        evaluation=None if single.evaluation is None else vectorised(single.evaluation),
    )


def reset_on_demand(
    reset_one: ResetOne, step_one: StepOne, *, slow_reset: bool = False
) -> Callable[[Key[Array, " N"], PyTree, Array], tuple[PyTree, TimeStep]]:
    """Add auto-reset to N environments.

    Fresh states are computed only in steps in which an episode ends: for all environments, or with
    `slow_reset` for a few at a time, until all that have ended are reset. A state depends only on
    the key of its environment, so both give the same, in physics up to rounding.
    """

    def step(keys: Key[Array, " N"], state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        state, final_obs, reward, terminated, truncated = jax.vmap(step_one)(
            split_each(keys)[0], state, action
        )
        done = terminated | truncated
        reset = _reset_few if slow_reset else _reset_all
        state, obs = reset(reset_one, keys, done, (state, final_obs))
        return state, TimeStep(obs, reward, terminated, truncated, final_obs)

    return step


def _reset_all(
    reset_one: ResetOne, keys: Key[Array, " N"], done: Bool[Array, " N"], now: PyTree
) -> PyTree:
    def reset() -> PyTree:
        # Split here: keys made outside would be computed in every step.
        return select_rows(done, jax.vmap(reset_one)(split_each(keys)[1]), now)

    return jax.lax.cond(jnp.any(done), reset, lambda: now)


def _reset_few(
    reset_one: ResetOne, keys: Key[Array, " N"], done: Bool[Array, " N"], now: PyTree
) -> PyTree:
    rows = keys.shape[0]
    few = -(-rows // RESETS_AT_ONCE)

    def reset(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        left, now = carry
        chosen = jnp.nonzero(left, size=few, fill_value=rows)[0]  # `rows` is out of range: dropped
        own = keys.at[chosen].get(mode="clip")
        fresh = jax.vmap(reset_one)(split_each(own)[1])

        def write(old: Array, new: Any) -> Array:
            return old.at[chosen].set(new, mode="drop")

        return write(left, False), jax.tree.map(write, now, fresh)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), reset, (done, now))[1]


def strong(tree: PyTree) -> PyTree:
    """Convert leaves to strongly typed arrays: a scan's carry must not change its types."""

    def convert(x: Any) -> Array:
        return x if is_key(x) else jax.lax.convert_element_type(x, jnp.asarray(x).dtype)

    return jax.tree.map(convert, tree)


def is_key(x: Any) -> bool:
    """Whether `x` is an array of random keys."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def like(name: str, what: str, new: PyTree, old: PyTree) -> PyTree:
    """Cast `new` to the types of `old`, since some environments' step returns other types than
    their reset (int32 instead of float32).

    Raises:
        ConfigError: if the cast could lose information (float32 to int32).
    """

    def cast(path: Any, x: Any, y: Any) -> Array:
        if is_key(y):
            return x
        x = jnp.asarray(x)
        if _loses(x, y.dtype):
            leaf = jax.tree_util.keystr(path)
            raise ConfigError(
                f"env {name}: step returns {x.dtype} but reset returns {y.dtype} as its {what}"
                f"{f' {leaf}' if leaf else ''}, so values are lost; make reset return {x.dtype}"
            )
        return jnp.asarray(x, y.dtype)

    return jax.tree_util.tree_map_with_path(cast, new, old)


def _loses(x: Array, dtype: Any) -> bool:
    """Whether a cast to `dtype` may lose information: floats to integers, either to bools, or to
    fewer bits than 32 unless `x` is weakly typed (a Python number)."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    before, after = (
        next((i for i, kind in enumerate(kinds) if jnp.issubdtype(each, kind)), -1)
        for each in (x.dtype, dtype)
    )
    narrower = not x.weak_type and dtype.itemsize < min(x.dtype.itemsize, 4)
    return after < before or (after == before and narrower)


def number(value: Any, dtype: Any, what: str) -> Array:
    if jnp.shape(value) != ():
        raise ConfigError(
            f"env: step returns a value of shape {jnp.shape(value)} as its {what}; return a single "
            "number, of shape ()"
        )
    return jnp.asarray(value, dtype)
