"""Train with SBX until the environment is solved."""

import stable
from flax import linen
from sbx import PPO  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    stable.solve(PPO, activation_fn=linen.tanh)
