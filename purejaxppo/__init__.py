"""PPO in JAX: the whole training loop as one pure function, to `jit`, `vmap` and shard.

Public names are imported on first use, so that command-line help does not import JAX.
"""

from typing import TYPE_CHECKING

from purejaxppo.lazy import lazy_names

if TYPE_CHECKING:
    from purejaxppo.agent import Agent
    from purejaxppo.config import Config, ConfigError, HParams, TaskConfig
    from purejaxppo.curves import curve
    from purejaxppo.entry import evaluate, make_agent, make_learner, make_train
    from purejaxppo.envs import MultiDiscrete, available_environments
    from purejaxppo.export import export_policy
    from purejaxppo.host.load import Loaded, load
    from purejaxppo.host.loggers import Logger
    from purejaxppo.host.program import enable_compilation_cache
    from purejaxppo.host.render import render, render_policy
    from purejaxppo.host.run import Result, resume, run
    from purejaxppo.host.rundir import LostError, StorageError
    from purejaxppo.inputs import vmap_axes
    from purejaxppo.losses import Terms
    from purejaxppo.objectives import OBJECTIVES, KLController, Objective
    from purejaxppo.sweeps.engine import resume_sweep, sweep
    from purejaxppo.sweeps.outcomes import SweepResult
    from purejaxppo.sweeps.settings import SweepSettings
    from purejaxppo.sweeps.space import choice, loguniform, uniform
    from purejaxppo.sweeps.trials import load_trial
    from purejaxppo.task import Parts, Task, make_task
    from purejaxppo.train import train_chunk
    from purejaxppo.types import (
        Actor,
        ActorState,
        Batch,
        Learner,
        LearnerState,
        Rollout,
        TrainState,
    )

_NAMES = {
    "agent": "Agent",
    "config": "Config ConfigError HParams TaskConfig",
    "curves": "curve",
    "entry": "evaluate make_agent make_learner make_train",
    "envs": "MultiDiscrete available_environments",
    "export": "export_policy",
    "host.load": "Loaded load",
    "host.loggers": "Logger",
    "host.program": "enable_compilation_cache",
    "host.render": "render render_policy",
    "host.run": "Result resume run",
    "host.rundir": "LostError StorageError",
    "inputs": "vmap_axes",
    "losses": "Terms",
    "objectives": "OBJECTIVES KLController Objective",
    "sweeps.engine": "resume_sweep sweep",
    "sweeps.outcomes": "SweepResult",
    "sweeps.settings": "SweepSettings",
    "sweeps.space": "choice loguniform uniform",
    "sweeps.trials": "load_trial",
    "task": "Parts Task make_task",
    "train": "train_chunk",
    "types": "Actor ActorState Batch Learner LearnerState Rollout TrainState",
}
__getattr__ = lazy_names(__name__, _NAMES)

__all__ = [
    "OBJECTIVES",
    "Actor",
    "ActorState",
    "Agent",
    "Batch",
    "Config",
    "ConfigError",
    "HParams",
    "KLController",
    "Learner",
    "LearnerState",
    "Loaded",
    "Logger",
    "LostError",
    "MultiDiscrete",
    "Objective",
    "Parts",
    "Result",
    "Rollout",
    "StorageError",
    "SweepResult",
    "SweepSettings",
    "Task",
    "TaskConfig",
    "Terms",
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
    "make_task",
    "make_train",
    "render",
    "render_policy",
    "resume",
    "resume_sweep",
    "run",
    "sweep",
    "train_chunk",
    "uniform",
    "vmap_axes",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
