"""Train with Stable-Baselines3 until the environment is solved."""

import stable
import torch  # pyright: ignore[reportMissingImports]
from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    stable.solve(PPO, activation_fn=torch.nn.Tanh)
