"""Environments of Gymnasium and EnvPool, which are stepped in Python.

Those of Gymnasium are vectorised in this process. The names have a prefix:
`gymnasium/LunarLander-v3`, `envpool/Pong-v5`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.checks import nearest, reason_of
from purejaxppo.config import ConfigError
from purejaxppo.envs import envpool
from purejaxppo.envs.base import MultiDiscrete, named_parts, parts_of
from purejaxppo.envs.spaces import box, discrete
from purejaxppo.types import Environment, PyTree, TimeStep


def python_names(prefix: str) -> list[str]:
    """Names with the prefix: Gymnasium's, including those registered at run time, or EnvPool's,
    none if it is not installed."""
    if prefix == "envpool":
        return [f"envpool/{name}" for name in envpool.names()] if envpool.installed() else []
    import gymnasium

    return [f"{prefix}/{name}" for name in gymnasium.registry if "/" not in name]


def make_python_environment(env_id: str, params: Mapping[str, float | int | bool]) -> Environment:
    """Make an environment that is stepped in Python. `reset` and `step` only give shapes.

    Args:
        params: keyword arguments of the environment.

    Raises:
        ConfigError: if there is no such environment, it cannot be made, or its spaces are not
            supported.
    """
    prefix, _, name = env_id.partition("/")
    if prefix == "envpool" and not envpool.installed():
        raise ConfigError(
            f"env_id = {env_id!r}: envpool is not installed; pip install 'purejaxppo[envpool]'"
        )
    make: Any = envpool.Pool if prefix == "envpool" else _make
    envs = make(env_id, name, params, 1)
    observation_space = _space(env_id, envs.single_observation_space)
    action_space = _space(env_id, envs.single_action_space)
    limit = None if envs.spec is None else envs.spec.max_episode_steps
    like = named_parts(_empty(envs.single_observation_space))
    envs.close()

    def reset(keys: Key[Array, " N"]) -> tuple[PyTree, PyTree]:
        rows = keys.shape[0]
        obs = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), _dtype(x)), like)
        return jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys), obs

    def step(keys: Key[Array, " N"], state: PyTree, action: Array) -> tuple[PyTree, TimeStep]:
        obs, zeros = reset(keys)[1], jnp.zeros(keys.shape, jnp.float32)
        return state, TimeStep(obs, zeros, zeros > 0, zeros > 0, obs)

    return Environment(
        name=env_id, observation_space=observation_space, action_space=action_space,
        max_episode_steps=limit, reset=reset, step=step,
        in_python=functools.partial(make, env_id, name, params),
    )  # fmt: skip


def _make(env_id: str, name: str, params: Mapping[str, Any], count: int, **more: Any) -> Any:
    import gymnasium

    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    if name not in gymnasium.registry and ":" not in name:
        near = nearest(name, gymnasium.registry, 0.4)
        hint = f"; did you mean gymnasium/{near}?" if near else ""
        raise ConfigError(f"env_id = {env_id!r}: no such environment{hint}")
    try:
        return gymnasium.make_vec(
            name, count, "sync", vector_kwargs={"autoreset_mode": same_step}, **params, **more
        )
    except Exception as error:  # a missing dependency, or an argument that does not exist
        raise ConfigError(f"env_id = {env_id!r}: cannot be made: {reason_of(error)}") from error


def _empty(space: Any) -> Any:
    import gymnasium

    return gymnasium.vector.utils.create_empty_array(space)


def _dtype(x: np.ndarray) -> Any:
    return jax.dtypes.canonicalize_dtype(x.dtype)


def _space(env_id: str, space: Any) -> Any:
    import gymnasium

    spaces = gymnasium.spaces
    if isinstance(space, spaces.Box):
        return box(space.shape, space.low, space.high, jax.dtypes.canonicalize_dtype(space.dtype))
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return discrete(space.n)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return MultiDiscrete(tuple(int(n) for n in space.nvec))
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return {name: _space(env_id, part) for name, part in parts_of(space).items()}
    raise ConfigError(
        f"env_id = {env_id!r}: its space {space} is not supported; supported are Box, Discrete "
        "from 0, MultiDiscrete, Dict and Tuple"
    )
