"""PPO in JAX: the whole training loop as one pure function, to `jit`, `vmap` and shard.

Public names are imported when first used, so that the command line can answer without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from purejaxppo.agent import Agent, make_agent
    from purejaxppo.config import Config, ConfigError, HParams
    from purejaxppo.curves import curve
    from purejaxppo.envs import MultiDiscrete, available_environments
    from purejaxppo.evaluation import evaluate
    from purejaxppo.export import export_policy
    from purejaxppo.host.load import Loaded, load
    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.host.run import Result, resume, run
    from purejaxppo.host.rundir import LostError, StorageError
    from purejaxppo.inputs import vmap_axes
    from purejaxppo.learner import make_learner
    from purejaxppo.sweeps.engine import resume_sweep, sweep
    from purejaxppo.sweeps.outcomes import SweepResult
    from purejaxppo.sweeps.settings import SweepSettings
    from purejaxppo.sweeps.space import choice, loguniform, uniform
    from purejaxppo.sweeps.trials import load_trial
    from purejaxppo.train import make_train, train_chunk
    from purejaxppo.types import Learner, TrainState

_HOMES = {
    "agent": "Agent make_agent",
    "config": "Config ConfigError HParams",
    "curves": "curve",
    "envs": "MultiDiscrete available_environments",
    "evaluation": "evaluate",
    "export": "export_policy",
    "host.load": "Loaded load",
    "host.program": "enable_compilation_cache",
    "host.run": "Result resume run",
    "host.rundir": "LostError StorageError",
    "inputs": "vmap_axes",
    "learner": "make_learner",
    "sweeps.engine": "resume_sweep sweep",
    "sweeps.outcomes": "SweepResult",
    "sweeps.settings": "SweepSettings",
    "sweeps.space": "choice loguniform uniform",
    "sweeps.trials": "load_trial",
    "train": "make_train train_chunk",
    "types": "Learner TrainState",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

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
    "curve",
    "enable_compilation_cache",
    "evaluate",
    "export_policy",
    "load",
    "load_trial",
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
    "vmap_axes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("purejaxppo.types")  # makes HParams a pytree
    value = getattr(importlib.import_module(f"purejaxppo.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
