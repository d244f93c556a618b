"""The contestant rejax: whole runs under one `jit`, evaluated only on request."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import worker
from rejax import PPO  # pyright: ignore[reportMissingImports]


def make(spec: dict[str, Any]) -> tuple[float, dict[str, Callable[[], Any]]]:
    total, seeds = spec["total"], spec["seeds"]
    batch = spec["num_envs"] * spec["num_steps"]
    evaluating = PPO.create(
        env=spec["env"],
        num_envs=spec["num_envs"],
        num_steps=spec["num_steps"],
        num_epochs=4,
        num_minibatches=4,
        learning_rate=2.5e-4,
        clip_eps=0.2,
        **worker.SHARED,
        total_timesteps=total,
        eval_freq=total,
        agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
        skip_initial_evaluation=True,
    )
    algorithm = evaluating.replace(eval_callback=lambda *_: ())
    key = jax.random.key(0)
    keys = key if seeds == 1 else jax.random.split(key, seeds)
    began = time.perf_counter()
    compiled = _over(seeds, algorithm.train).lower(keys).compile()
    compile_seconds = time.perf_counter() - began

    def train() -> worker.Outcome:
        jax.block_until_ready(compiled(keys))
        return -(-total // batch) * batch * seeds, None

    def evaluate() -> dict[str, float]:
        _, (_, returns) = _over(seeds, evaluating.train)(keys)
        return {"mean": float(np.mean(returns)), "after_steps": -(-total // batch) * batch}

    return compile_seconds, {"go": train, "return": evaluate}


def _over(seeds: int, function: Callable[..., Any]) -> Any:
    return jax.jit(function if seeds == 1 else jax.vmap(function))


if __name__ == "__main__":
    worker.serve(
        make,
        ["rejax", "jax", "jaxlib", "flax", "gymnax", "numpy"],
        lambda: jax.devices()[0].device_kind,
    )
