"""The contestant Stable-Baselines3."""

import stable
import torch  # pyright: ignore[reportMissingImports]
import worker
from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    worker.serve(
        lambda spec: stable.make(PPO, spec, activation_fn=torch.nn.Tanh),
        ["stable-baselines3", "torch", "gymnasium", "numpy"],
    )
