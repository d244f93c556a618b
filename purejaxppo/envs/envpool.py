"""Environments of EnvPool, which steps them in parallel on threads of its own."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from purejaxppo.checks import nearest, reason_of
from purejaxppo.config import ConfigError


def _package() -> Any:
    return importlib.import_module("envpool")


def installed() -> bool:
    return importlib.util.find_spec("envpool") is not None


def names() -> list[str]:
    return _package().list_all_envs()


class Pool:
    """EnvPool's environments with Gymnasium's vector interface, made by `reset`. They are reset in
    the step that ends an episode, which returns the last observation in `info["final_obs"]`.

    Raises:
        ConfigError: if there is no such environment, or it cannot be made.
    """

    def __init__(self, env_id: str, name: str, params: Mapping[str, Any], count: int, **more: Any):
        if name not in names():
            near = nearest(name, names(), 0.4)
            hint = f"; did you mean envpool/{near}?" if near else ""
            raise ConfigError(f"env_id = {env_id!r}: no such environment{hint}")
        given = {"num_envs": count, "num_threads": min(count, os.cpu_count() or 1), **params}
        self._env_id = env_id
        self._pool: Any = None
        self._make = functools.partial(_package().make, name, env_type="gymnasium", **given, **more)
        # The specification is enough for a listing; some environments end the process when made.
        spec = self._tried(functools.partial(_package().make_spec, name, **given))
        self.single_observation_space = spec.gymnasium_observation_space
        self.single_action_space = spec.gymnasium_action_space
        self.spec = spec.config

    def _tried(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # an argument that does not exist, or a missing library
            reason = reason_of(error)
            raise ConfigError(f"env_id = {self._env_id!r}: cannot be made: {reason}") from error

    def reset(self, *, seed: int) -> tuple[Any, Any]:
        self.close()
        self._pool = self._tried(functools.partial(self._make, seed=seed))
        return self._pool.reset()

    def step(self, action: np.ndarray) -> Any:
        sent = np.asarray(action, self.single_action_space.dtype)
        obs, reward, terminated, truncated, info = self._pool.step(sent)
        ended = np.flatnonzero(terminated | truncated).astype(np.int32)
        if ended.size:
            info = info | {"final_obs": jax.tree.map(np.copy, obs)}
            fresh, _ = self._pool.reset(ended)
            obs = jax.tree.map(np.copy, obs)
            jax.tree.map(functools.partial(_write, ended), obs, fresh)
        return obs, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return self._pool.render()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _write(rows: np.ndarray, to: np.ndarray, new: np.ndarray) -> None:
    to[rows] = new
