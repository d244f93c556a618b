"""Train with purejaxppo until the environment is solved."""

import json
import sys
from typing import Any

import jax
import numpy as np

import purejaxppo as ppo
from purejaxppo.host.program import enable_compilation_cache

CHUNK = 20
EPISODES = 100


def main(spec: dict[str, Any]) -> None:
    enable_compilation_cache()
    config = ppo.Config(
        spec["env"],
        total_timesteps=spec["limit"],
        num_envs=spec["num_envs"],
        num_steps=spec["num_steps"],
        lr_schedule="constant",
    )
    hparams = ppo.HParams(learning_rate=spec["learning_rate"])
    learner = ppo.make_learner(config)
    state = jax.jit(learner.init)(jax.random.key(spec["seed"]), hparams)
    counts, sums, solved = np.zeros(0), np.zeros(0), None
    while len(counts) < config.num_updates and solved is None:
        state, metrics = ppo.train_chunk(learner, state, hparams, CHUNK)
        episodes = np.asarray(metrics["episodes"])
        returned = np.where(episodes > 0, np.asarray(metrics["episode_return"]), 0.0) * episodes
        counts, sums = np.append(counts, episodes), np.append(sums, returned)
        if mean_of_last(counts, sums) >= spec["threshold"]:
            solved = len(counts) * config.batch_size
    print(json.dumps({"solved_after_steps": solved}))


def mean_of_last(counts: np.ndarray, sums: np.ndarray) -> float:
    """Mean return over the last updates that contain `EPISODES`; 0 if there are too few."""
    enough = np.flatnonzero(np.cumsum(counts[::-1]) >= EPISODES)
    if not len(enough):
        return 0.0
    last = enough[0] + 1
    return float(sums[-last:].sum() / counts[-last:].sum())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
