"""PPO in JAX: the whole training loop as one pure function, to `jit`, `vmap` and shard."""

from purejaxppo.agent import Agent, make_agent
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.envs import MultiDiscrete, available_environments
from purejaxppo.evaluate import evaluate
from purejaxppo.export import export_policy
from purejaxppo.learner import make_learner
from purejaxppo.load import Loaded, load
from purejaxppo.run import Result, resume, run
from purejaxppo.rundir import LostError, StorageError
from purejaxppo.sweeps.engine import SweepResult, resume_sweep, sweep
from purejaxppo.sweeps.settings import SweepSettings
from purejaxppo.sweeps.space import choice, loguniform, uniform
from purejaxppo.train import make_train, train_chunk
from purejaxppo.types import Learner, TrainState

__all__ = [
    "Agent",
    "Config",
    "ConfigError",
    "HParams",
    "Learner",
    "Loaded",
    "LostError",
    "MultiDiscrete",
    "Result",
    "StorageError",
    "SweepResult",
    "SweepSettings",
    "TrainState",
    "available_environments",
    "choice",
    "evaluate",
    "export_policy",
    "load",
    "loguniform",
    "make_agent",
    "make_learner",
    "make_train",
    "resume",
    "resume_sweep",
    "run",
    "sweep",
    "train_chunk",
    "uniform",
]
