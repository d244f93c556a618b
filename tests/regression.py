"""A task other than reinforcement learning: a line fitted by gradient descent."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import purejaxppo as ppo
from purejaxppo.collectives import all_sum, own_rows
from purejaxppo.config import TaskConfig
from purejaxppo.types import Learner


@dataclass(frozen=True)
class LineConfig(TaskConfig):
    total_timesteps: int = 20 * 8
    rows: int = 8
    degree: int = 1

    @property
    def batch_size(self) -> int:
        return self.rows


@dataclass(frozen=True)
class LineHParams(ppo.HParams):
    weight_decay: Any = 0.0


class Fit(NamedTuple):
    key: jax.Array
    params: jax.Array
    updates: jax.Array


def data_of(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    x = jax.random.uniform(jax.random.key(seed), (64,), minval=-1.0)
    return x, 2.0 * x - 1.0


def make_learner(config: LineConfig, axis: str | None) -> Learner:
    def init(key: Any, hparams: Any, data: Any = ()) -> ppo.TrainState:
        fit = Fit(key, jnp.zeros(config.degree + 1), jnp.zeros((), jnp.int32))
        return ppo.TrainState(fit, ())

    def update(state: ppo.TrainState, hparams: Any, data: Any = ()) -> Any:
        fit: Fit = state.learner
        key, draw = jax.random.split(fit.key)
        x, y = jax.tree.map(
            lambda rows: own_rows(rows[jax.random.randint(draw, (config.rows,), 0, 64)], axis), data
        )

        def loss(params: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(predict(params, x) - y)) / config.rows

        value, gradient = all_sum(jax.value_and_grad(loss)(fit.params), axis)
        decay = getattr(hparams, "weight_decay", 0.0)
        params = fit.params - hparams.learning_rate * (gradient + decay * fit.params)
        fit = Fit(key, params, fit.updates + 1)
        return ppo.TrainState(fit, ()), {"loss": value, "slope": params[1]}

    return Learner(init, update)


def predict(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.polyval(params[::-1], x)


def evaluate(state: Any, key: Any, num_episodes: int, *, data: Any, **_: Any) -> jax.Array:
    """Negative squared errors of samples drawn at random."""
    x, y = jax.tree.map(lambda rows: rows[jax.random.randint(key, (num_episodes,), 0, 64)], data)
    return -jnp.square(predict(state.learner.params, x) - y)


def line_task(config: LineConfig = LineConfig()) -> ppo.Task:
    return ppo.Task(
        config=config,
        learner=partial(make_learner, config),
        evaluate=evaluate,
        with_config=line_task,
        data=data_of(),
        curve="loss",
        why_not_divided=lambda n: (
            f"rows = {config.rows}: not divisible" if config.rows % n else None
        ),
    )


def peaked_task(config: LineConfig = LineConfig(), *, best: int) -> ppo.Task:
    """Its returns are highest after `best` updates."""

    def evaluate(state: Any, key: Any, num_episodes: int, **_: Any) -> jax.Array:
        distance = jnp.abs(state.learner.updates - best).astype(jnp.float32)
        return -distance - jax.random.uniform(key, (num_episodes,))

    with_config = partial(peaked_task, best=best)
    return dataclasses.replace(line_task(config), evaluate=evaluate, with_config=with_config)


def fitted(learning_rate: float, seed: int, config: LineConfig = LineConfig()) -> Any:
    """The parameters fitted by a plain loop."""
    key, x, y = jax.random.split(jax.random.key(seed), 1)[0], *data_of()
    params = jnp.zeros(config.degree + 1)
    for _ in range(config.num_updates):
        key, draw = jax.random.split(key)
        rows = jax.random.randint(draw, (config.rows,), 0, 64)
        slope = jax.grad(lambda p, r=rows: jnp.mean(jnp.square(predict(p, x[r]) - y[r])))(params)
        params = params - learning_rate * slope
    return params


longer = partial(dataclasses.replace, LineConfig())
