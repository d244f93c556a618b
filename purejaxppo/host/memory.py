"""Checks whether a run fits into memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.configfile import Settings
from purejaxppo.host.parallel import choose_spread
from purejaxppo.host.program import Program, stacked_hparams
from purejaxppo.task import Task
from purejaxppo.types import ActorState, TrainState

VALUES_PER_STEP = 8
"""Values that a rollout holds per environment step besides the observation: at least action,
log-probability, value, next value, reward, terminated, truncated and mask."""


def check_memory(settings: Settings, task: Task) -> None:
    """Raise `ConfigError` if the states and one rollout alone need more memory than is free."""
    used = len(choose_spread(settings, task).mesh.local_devices)
    needed, free = min_bytes(settings, task), free_bytes(used)
    if needed > free:
        raise ConfigError(_too_large(settings, f"at least {needed / 1e9:.2f} GB", free))


def check_program(settings: Settings, program: Program) -> None:
    """Raise `ConfigError` if XLA reports that the compiled program needs more memory than is free.

    If one of several devices failed to allocate, the program would hang.
    """
    free = free_bytes(len(program.spread.mesh.local_devices))
    if program.device_bytes > free:
        raise ConfigError(_too_large(settings, f"{program.device_bytes / 1e9:.2f} GB", free))


def min_bytes(settings: Settings, task: Task) -> int:
    """Bytes of the states `[S, ...]` and of one run's rollout, per device: a lower bound."""

    def init() -> TrainState:
        keys = jax.random.split(jax.random.key(0), settings.num_runs)
        learner = task.learner(None)
        start = jax.vmap(learner.init, in_axes=(0, 0, None))
        return start(keys, stacked_hparams(settings), task.data)

    states = jax.eval_shape(init)
    devices, rollout = choose_spread(settings, task).mesh.size, 0.0
    if isinstance(states.actors, ActorState):
        obs = sum(map(_bytes, jax.tree.leaves(states.actors.obs))) / settings.num_runs
        samples = settings.config.batch_size
        rollout = obs * samples / states.actors.start.shape[1] + samples * VALUES_PER_STEP * 4
    return int((sum(map(_bytes, jax.tree.leaves(states))) + rollout) / devices)


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize


@contextmanager
def explain_out_of_memory(settings: Settings) -> Iterator[None]:
    """Turn XLA's out-of-memory error into a `ConfigError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().partition("\n")[0]
        raise ConfigError(_too_large(settings, f"more ({reason})", free_bytes())) from error


def _too_large(settings: Settings, needed: str, free: int) -> str:
    return (
        f"{settings.config.batch_in_words}, num_seeds = {settings.run.num_seeds}: will not fit "
        f"into memory: training needs {needed} on each device, and {free / 1e9:.2f} GB are free; "
        "use fewer environments, steps or seeds"
    )


def free_bytes(used: int | None = None) -> int:
    """Free memory per device; on CPU the host's, divided by the number of devices used (all by
    default)."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _free_host_bytes() // (used or jax.local_device_count())


def _free_host_bytes() -> int:
    """The smaller of Linux's available memory and what the control group still allows."""
    info = Path("/proc/meminfo")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if info.exists():
        lines = dict(line.split(":") for line in info.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    return min(free, _group_bytes(Path("/sys/fs/cgroup")) or free)


def _group_bytes(group: Path) -> int | None:
    """Bytes that a control group (version 2) still allows; file cache, which is reclaimed when
    memory runs short, counts as free. None if it sets no limit."""
    limit = group / "memory.max"
    if not limit.exists() or not limit.read_text().strip().isdecimal():
        return None
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return int(limit.read_text()) - int((group / "memory.current").read_text()) + cache
