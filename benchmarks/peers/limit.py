"""Print the rates of one core from which `benchmarks/speed.py` computes the limit.

They are the rate of environment steps alone, under a random policy with keys and actions drawn
beforehand; the rate of a large matrix multiplication; and the operations that the networks need
per environment step.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp

import purejaxppo as ppo
from purejaxppo.envs import make_environment

SECONDS = 2.0
MATRIX = 1024


def best_seconds(function: Callable[[], Any]) -> float:
    """Seconds of the fastest call in about two seconds of calls, after one to warm up."""
    jax.block_until_ready(function())
    seconds, until = [], time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def stepping_rate(spec: dict[str, Any]) -> float:
    """Environment steps per second under a random policy."""
    environment = make_environment(ppo.Config(spec["env"]))
    steps, envs = spec["num_steps"], spec["num_envs"]
    root = jax.random.key(0)
    keys = jax.random.split(root, (steps, envs))
    sample = jax.vmap(jax.vmap(environment.action_space.sample))
    state, _ = environment.reset(keys[0])

    @jax.jit
    def roll(state: Any, keys: jax.Array, actions: jax.Array) -> Any:
        def step(state: Any, draws: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            state, result = environment.step(draws[0], state, draws[1])
            return state, (result.obs, result.reward, result.terminated, result.truncated)

        return jax.lax.scan(step, state, (keys, actions))

    actions = sample(keys)
    return steps * envs / best_seconds(lambda: roll(state, keys, actions))


def matmul_gflops() -> float:
    a = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    dot = jax.jit(jnp.dot)
    return 2e-9 * MATRIX**3 / best_seconds(lambda: dot(a, a))


def flops_per_step(config: ppo.Config) -> int:
    """Multiplications and additions of a dense actor and critic, per environment step.

    The actor runs while acting, both run after the rollout, and both run forward and backward in
    each epoch, which costs three forward passes.
    """
    environment = make_environment(config)
    inputs = 1
    for size in environment.observation_space.shape:
        inputs *= size

    def forward(outputs: int) -> int:
        sizes = [inputs, *config.hidden_sizes, outputs]
        return sum(2 * a * b for a, b in itertools.pairwise(sizes))

    actor, critic = forward(environment.action_space.n), forward(1)
    return actor + (1 + 3 * config.update_epochs) * (actor + critic)


def main(spec: dict[str, Any]) -> None:
    rates = {
        "random_steps_per_second": stepping_rate(spec),
        "gflops": matmul_gflops(),
        "flops_per_step": flops_per_step(ppo.Config(spec["env"])),
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
