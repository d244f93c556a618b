"""Evaluation of trained policies over values of a parameter of the environment."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from purejaxppo.config import Config, ConfigError
from purejaxppo.draws import Draw, parse_draws
from purejaxppo.host.hostcalls import Returns
from purejaxppo.host.plots import bare_axes
from purejaxppo.host.rundir import StorageError
from purejaxppo.host.stats import bootstrap_mean_interval, episode_mean, mean_interval
from purejaxppo.task import Task
from purejaxppo.types import TrainState


class Grid(NamedTuple):
    """A parameter of the environment and values to evaluate."""

    name: str
    values: tuple[float, ...]


def parse_grid(text: str) -> Grid:
    """Parse `masspole=0.05,0.1,0.5`. Raises `ConfigError` if it has another form."""
    name, _, numbers = text.partition("=")
    try:
        values = tuple(float(x) for x in numbers.split(","))
    except ValueError:
        values = ()
    if not name or not values:
        raise ConfigError(f"grid = {text!r}: must be NAME=V1,V2,..., as in masspole=0.05,0.1,0.5")
    return Grid(name, tuple(sorted(set(values))))


def grid_returns(
    task: Task,
    states: TrainState,
    keys: jax.Array,
    grid: Grid,
    *,
    episodes: int,
    deterministic: bool,
) -> Float[np.ndarray, "V S"]:
    """Mean returns of S states with each of V values; the other parameters keep their values, and
    none is drawn at random.

    Raises:
        ConfigError: if the environment has no such parameter.
    """
    config = task.config
    if not isinstance(config, Config):
        raise ConfigError(f"grid = {grid.name}: {config.label} is not an environment")
    rows = []
    for value in grid.values:
        whole = value.is_integer() and isinstance(_default(config, grid.name), int)
        params = {**config.env_params, grid.name: int(value) if whole else value}
        changed = dataclasses.replace(config, env_params=params, randomize=())
        returns = Returns(task.with_config(changed), episodes)
        rows.append(episode_mean(returns(states, keys, np.full(len(keys), deterministic))))
    return np.stack(rows)


def _default(config: Config, name: str) -> Any:
    from purejaxppo.envs.registry import parameters_of

    return parameters_of(config.env_id).get(name)


def draw_grid(path: Path, config: Config, grid: Grid, returns: Float[np.ndarray, "V S"]) -> None:
    """Draw the mean return over seeds for each value, and the range of training.

    Raises:
        StorageError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    mean, _, _ = mean_interval(returns)
    axes.plot(grid.values, mean, "o-", color="C0")
    if returns.shape[1] > 1:
        low, high = bootstrap_mean_interval(returns)
        axes.fill_between(grid.values, low, high, color="C0", alpha=0.2, lw=0)
    trained = next((x for x in parse_draws(config.randomize) if x.name == grid.name), None)
    if trained is not None:
        axes.axvspan(*_range(trained), color="C1", alpha=0.15, lw=0, label="values of training")
        axes.legend()
    bare_axes(axes, grid.name, "return")
    axes.set_title(config.env_id)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise StorageError(f"{str(path)!r}: cannot be written: {error.strerror}") from error


def _range(draw: Draw) -> Sequence[float]:
    return min(draw.values), max(draw.values)
