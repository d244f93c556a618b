"""The contestant purejaxppo: the program that `purejaxppo.run` runs by default."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import worker

import purejaxppo as ppo
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.parallel import use_all_cores, with_devices
from purejaxppo.host.program import (
    CHUNK_CAPACITY,
    compile_program,
    enable_compilation_cache,
    stacked_hparams,
)

LATE = 0.1
"""Fraction of the run, at its end, whose episodes give the training return."""


def make(spec: dict[str, Any]) -> tuple[float, dict[str, Callable[[], Any]]]:
    enable_compilation_cache()
    config = ppo.Config(
        spec["env"],
        total_timesteps=spec["total"],
        num_envs=spec["num_envs"],
        num_steps=spec["num_steps"],
        encoder=spec["encoder"],
        lr_schedule="constant",
    )
    use_all_cores()
    task = ppo.make_task(config)  # imports gymnax, as `run` does before it compiles
    run = RunSettings(num_seeds=spec["seeds"])
    settings = with_devices(Settings(config, ppo.HParams(), run), task)
    hparams = stacked_hparams(settings)
    began = time.perf_counter()
    program = compile_program(settings, task)
    compile_seconds = time.perf_counter() - began
    last: list[ppo.TrainState] = []

    def train() -> worker.Outcome:
        states, episode_returns, left = program.begin(hparams), [], config.num_updates
        while left:
            count = min(left, CHUNK_CAPACITY)
            states, metrics = program.chunk(states, hparams, count)
            episode_returns.append(np.asarray(metrics["episode_return"])[:count])
            left -= count
        last[:] = [jax.block_until_ready(states)]
        late = np.concatenate(episode_returns)[-max(1, round(LATE * config.num_updates)) :]
        mean = None if np.isnan(late).all() else float(np.nanmean(late))
        return config.num_updates * config.batch_size * spec["seeds"], mean

    def evaluate() -> dict[str, float]:
        keys = jax.random.split(jax.random.key(1), spec["seeds"])
        returns = jax.jit(jax.vmap(lambda state, key: ppo.evaluate(config, state, key)))
        return {
            "mean": float(np.mean(returns(program.gather(last[0]), keys))),
            "after_steps": config.num_updates * config.batch_size,
        }

    return compile_seconds, {
        "go": train,
        "return": evaluate,
        "xla_mb": xla_mb,
        "devices": lambda: program.spread.mesh.size,
    }


def xla_mb() -> float:
    """XLA's memory estimate of the largest program: arguments, results and temporaries."""
    stats = [x.get_compiled_memory_stats() for x in jax.devices()[0].client.live_executables()]
    return max(
        x.argument_size_in_bytes
        + x.output_size_in_bytes
        + x.temp_size_in_bytes
        - x.alias_size_in_bytes
        for x in stats
    ) / 1e6  # fmt: skip


if __name__ == "__main__":
    worker.serve(
        make,
        ["purejaxppo", "jax", "jaxlib", "flax", "gymnax", "numpy"],
        lambda: jax.devices()[0].device_kind,
    )
