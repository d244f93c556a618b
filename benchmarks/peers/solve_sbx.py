"""SBX until it has solved the environment."""

import stable
from flax import linen
from sbx import PPO  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    stable.solve(PPO, activation_fn=linen.tanh)
