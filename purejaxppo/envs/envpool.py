"""Environments of EnvPool, which steps them in parallel on threads of its own."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from purejaxppo.checks import nearest
from purejaxppo.config import ConfigError


def _package() -> Any:
    return importlib.import_module("envpool")


def installed() -> bool:
    return importlib.util.find_spec("envpool") is not None


def names() -> list[str]:
    return _package().list_all_envs()


class Pool:
    """EnvPool's environments with Gymnasium's vector interface. They are reset in the step that
    ends an episode, which returns the last observation in `info["final_obs"]`.

    Raises:
        ConfigError: if there is no such environment, or it cannot be made.
    """

    def __init__(self, env_id: str, name: str, params: Mapping[str, Any], count: int):
        if name not in names():
            near = nearest(name, names(), 0.4)
            hint = f"; did you mean envpool/{near}?" if near else ""
            raise ConfigError(f"env_id = {env_id!r}: no such environment{hint}")
        given = {"num_envs": count, "num_threads": min(count, os.cpu_count() or 1), **params}
        self._make = functools.partial(_package().make, name, env_type="gymnasium", **given)
        try:
            self._pool: Any = self._make(seed=0)
        except Exception as error:  # an argument that does not exist
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"env_id = {env_id!r}: cannot be made: {reason}") from error
        self.single_observation_space = self._pool.observation_space
        self.single_action_space = self._pool.action_space
        self.spec = self._pool.spec.config

    def reset(self, *, seed: int) -> tuple[Any, Any]:
        self._pool.close()
        self._pool = self._make(seed=seed)
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
        self._pool.close()


def _write(rows: np.ndarray, to: np.ndarray, new: np.ndarray) -> None:
    to[rows] = new
