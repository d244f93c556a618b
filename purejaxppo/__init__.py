"""PPO in JAX: the whole training loop as one pure function, to `jit`, `vmap` and shard."""

from purejaxppo.agent import Agent, make_agent
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.envs import MultiDiscrete, available_environments
from purejaxppo.evaluate import evaluate
from purejaxppo.learner import make_learner
from purejaxppo.run import Result, run
from purejaxppo.train import make_train, train_chunk
from purejaxppo.types import Learner, TrainState

__all__ = [
    "Agent",
    "Config",
    "ConfigError",
    "HParams",
    "Learner",
    "MultiDiscrete",
    "Result",
    "TrainState",
    "available_environments",
    "evaluate",
    "make_agent",
    "make_learner",
    "make_train",
    "run",
    "train_chunk",
]
