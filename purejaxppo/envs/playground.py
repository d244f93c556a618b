"""MuJoCo Playground, computed by MJX in JAX (`impl = "jax"`)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from purejaxppo.checks import reason_of
from purejaxppo.config import ConfigError
from purejaxppo.envs.brax import counted
from purejaxppo.envs.params import changed_values, numbers_of
from purejaxppo.envs.single import Single
from purejaxppo.types import PyTree


def names() -> list[str]:
    from mujoco_playground import registry  # pyright: ignore[reportMissingImports]

    return list(registry.ALL_ENVS)


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    from mujoco_playground import registry  # pyright: ignore[reportMissingImports]

    defaults = registry.get_default_config(name)
    numbers = numbers_of(defaults)
    changed = changed_values(f"playground/{name}", numbers, params)
    try:
        env = registry.load(name, config_overrides={"impl": "jax", **changed})
    except Exception as error:  # the models of robots are downloaded with git
        raise ConfigError(
            f"env_id = 'playground/{name}': cannot be made, perhaps because its models must be "
            f"downloaded: {reason_of(error)}"
        ) from error
    limit = int(changed.get("episode_length", defaults.episode_length))
    return counted(env, limit, partial(_render, env))._replace(slow_reset=True, parameters=numbers)


def _render(env: Any, state: PyTree) -> np.ndarray:
    return np.asarray(env.render([state[0]], height=240, width=320)[0])
