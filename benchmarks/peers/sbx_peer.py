"""The contestant SBX: Stable-Baselines3's loop around updates in JAX."""

import stable
import worker
from flax import linen
from sbx import PPO  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    worker.serve(
        lambda spec: stable.make(PPO, spec, activation_fn=linen.tanh),
        ["sbx-rl", "stable-baselines3", "jax", "jaxlib", "flax", "gymnasium", "numpy"],
    )
