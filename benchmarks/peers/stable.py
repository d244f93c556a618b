"""Code shared by the contestants of the Stable-Baselines family, sb3 and sbx."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import worker
from stable_baselines3.common.callbacks import (  # pyright: ignore[reportMissingImports]
    BaseCallback,
)
from stable_baselines3.common.env_util import (  # pyright: ignore[reportMissingImports]
    make_vec_env,
)
from stable_baselines3.common.evaluation import (  # pyright: ignore[reportMissingImports]
    evaluate_policy,
)
from stable_baselines3.common.vec_env import (  # pyright: ignore[reportMissingImports]
    DummyVecEnv,
)

EVALUATION_EPISODES = 32


def build(algorithm: Any, spec: dict[str, Any], **policy_kwargs: Any) -> Any:
    """Build the model of a specification, with the hyperparameters that all contestants share."""
    env = make_vec_env(spec["env"], spec["num_envs"], seed=spec["seed"], vec_env_cls=DummyVecEnv)
    return algorithm(
        "MlpPolicy",
        env,
        learning_rate=spec["learning_rate"],
        n_steps=spec["num_steps"],
        batch_size=spec["num_envs"] * spec["num_steps"] // 4,
        n_epochs=4,
        clip_range=0.2,
        **worker.SHARED,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}, **policy_kwargs},
        seed=spec["seed"],
        device="cpu",
    )


def make(
    algorithm: Any, spec: dict[str, Any], **policy_kwargs: Any
) -> tuple[float, dict[str, Callable[[], Any]]]:
    """Build the requests for `worker.serve`.

    The first update, which includes compilation, counts as `compile_seconds`; each `go` trains the
    same model further.
    """
    model = build(algorithm, spec | {"seed": 0, "learning_rate": 2.5e-4}, **policy_kwargs)
    began = time.perf_counter()
    model.learn(spec["num_envs"] * spec["num_steps"])
    compile_seconds = time.perf_counter() - began
    trained = [model.num_timesteps]

    def train() -> worker.Outcome:
        model.learn(spec["total"])
        trained.append(model.num_timesteps)
        late = [episode["r"] for episode in model.ep_info_buffer]
        return model.num_timesteps, float(np.mean(late)) if late else None

    def evaluate() -> dict[str, float]:
        mean, _ = evaluate_policy(model, model.get_env(), EVALUATION_EPISODES, deterministic=False)
        return {"mean": float(np.mean(mean)), "after_steps": sum(trained)}

    return compile_seconds, {"go": train, "return": evaluate}


def solve(algorithm: Any, **policy_kwargs: Any) -> None:
    """Train until the mean of the last 100 training episodes reaches the threshold."""
    spec = json.loads(sys.argv[1])
    model = build(algorithm, spec, **policy_kwargs)

    class UntilSolved(BaseCallback):
        solved_after = None

        def _on_step(self) -> bool:
            return self.solved_after is None

        def _on_rollout_end(self) -> None:
            late = [episode["r"] for episode in self.model.ep_info_buffer]
            if len(late) == 100 and np.mean(late) >= spec["threshold"]:
                self.solved_after = self.num_timesteps

    callback = UntilSolved()
    model.learn(spec["limit"], callback=callback)
    print(json.dumps({"solved_after_steps": callback.solved_after}))
