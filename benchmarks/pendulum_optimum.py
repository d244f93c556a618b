"""Compute the highest possible mean return of Pendulum-v1, to judge published returns by.

    python benchmarks/pendulum_optimum.py

Backward induction over a grid of angles, velocities and torques gives the value of each state for
each number of steps left. The best actions by these values are then simulated in gymnax, from its
distribution of starts, so the grid only has to be fine enough to choose good actions.
"""

from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ANGLES, VELOCITIES, TORQUES = 361, 321, 33
STEPS, EPISODES = 200, 20_000
ENV, PARAMS = gymnax.make("Pendulum-v1")


def outcomes(
    table: Float[Array, "A V"], states: Any
) -> tuple[Float[Array, "U B"], Float[Array, " U"]]:
    """The return with each torque, if the values after one step are `table`; and the torques."""
    torques = jnp.linspace(-PARAMS.max_torque, PARAMS.max_torque, TORQUES)

    def one(torque: Array) -> Array:
        after, reward = moved(states, jnp.full(states.theta.shape, torque))
        return reward + interpolated(table, after)

    return jax.lax.map(one, torques), torques


def moved(states: Any, torques: Float[Array, " B"]) -> tuple[Any, Float[Array, " B"]]:
    """The next states and the rewards."""

    def one(state: Any, torque: Array) -> tuple[Any, Array]:
        _, after, reward, _, _ = ENV.step_env(jax.random.key(0), state, torque[None], PARAMS)
        return after.replace(last_u=torque), reward

    return jax.vmap(one)(states, torques)


def interpolated(table: Float[Array, "A V"], states: Any) -> Float[Array, " B"]:
    """Bilinear interpolation between the values of the grid's points."""
    x = states.theta % (2 * jnp.pi) / (2 * jnp.pi) * (ANGLES - 1)
    y = (states.theta_dot / PARAMS.max_speed + 1) / 2 * (VELOCITIES - 1)
    i = jnp.clip(x.astype(int), 0, ANGLES - 2)
    j = jnp.clip(y.astype(int), 0, VELOCITIES - 2)
    low = (1 - y + j) * table[i, j] + (y - j) * table[i, j + 1]
    high = (1 - y + j) * table[i + 1, j] + (y - j) * table[i + 1, j + 1]
    return (1 - x + i) * low + (x - i) * high


@jax.jit
def induction() -> Float[Array, "T A V"]:
    """Values of the grid's points with 0, 1, ..., STEPS - 1 steps left."""
    theta = jnp.linspace(0, 2 * jnp.pi, ANGLES).repeat(VELOCITIES)
    speed = jnp.linspace(-PARAMS.max_speed, PARAMS.max_speed, VELOCITIES)
    keys = jax.random.split(jax.random.key(0), theta.size)
    points = jax.vmap(lambda key: ENV.reset_env(key, PARAMS)[1])(keys)
    points = points.replace(theta=theta, theta_dot=jnp.tile(speed, ANGLES))

    def longer(table: Array, _: None) -> tuple[Array, Array]:
        best = outcomes(table, points)[0].max(0)
        return best.reshape(table.shape), table

    return jax.lax.scan(longer, jnp.zeros((ANGLES, VELOCITIES)), length=STEPS)[1]


@jax.jit
def returns(tables: Float[Array, "T A V"]) -> Float[Array, " E"]:
    """Returns of simulated episodes."""
    keys = jax.random.split(jax.random.key(1), EPISODES)
    states = jax.vmap(lambda key: ENV.reset_env(key, PARAMS)[1])(keys)

    def step(states: Any, table: Array) -> tuple[Any, Array]:
        found, torques = outcomes(table, states)
        return moved(states, torques[found.argmax(0)])

    return jax.lax.scan(step, states, tables[::-1])[1].sum(0)


if __name__ == "__main__":
    found = np.asarray(returns(induction()))
    error = found.std() / np.sqrt(EPISODES)
    print(f"mean return {found.mean():.1f} +- {1.96 * error:.1f} over {EPISODES:,} episodes")
