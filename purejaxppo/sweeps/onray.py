"""Trains the waves of a sweep on the machines of a Ray cluster, each as a task of its own.

A task does what a local sweep does with a wave, in the same directory: if its machine is lost,
another one goes on from the wave's newest checkpoint.
"""

import importlib
import logging
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purejaxppo.config import ConfigError
from purejaxppo.host.loggers import require
from purejaxppo.host.program import enable_compilation_cache
from purejaxppo.host.rundir import SWEEP, BusyError, LostError, StorageError, holds, resume_command
from purejaxppo.host.signals import STOPPING, stop_requests
from purejaxppo.sweeps.plan import Group, Wave
from purejaxppo.sweeps.progress import SweepProgress
from purejaxppo.sweeps.settings import Definition, SweepSettings
from purejaxppo.sweeps.waves import Job, Local, Work

TRIES = 4
"""How often a wave is begun, before a sweep ends because its machines are lost."""
SAVE_SECONDS = 60.0
"""How long waves that are asked to stop, or whose machine was lost, may go on writing."""
ANSWER_SECONDS = 30.0
"""How long a cluster's address may take to answer."""
PACKAGES = ("purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax")


class _Task(NamedTuple):
    """What a machine has to know of a sweep."""

    work: Work
    cache: bool
    versions: dict[str, str]


class Places(NamedTuple):
    """How many waves a cluster runs at a time."""

    total: int
    most_on_one: int


class OnRay:
    """`Workers` on the cluster that was joined."""

    def __init__(self, work: Work, shown: SweepProgress):
        directory = None if work.directory is None else work.directory.absolute()
        cache = jax.config.jax_compilation_cache_dir is not None  # pyright: ignore[reportAttributeAccessIssue]
        self._task = _Task(work._replace(directory=directory), cache, _versions())
        self._shown, self._ray = shown, importlib.import_module("ray")
        self._needs = needs(work.definition.sweep)
        try:
            self._ray.cloudpickle.dumps(self._task)
        except (TypeError, ValueError, pickle.PicklingError) as error:
            raise ConfigError(
                f"env: cannot be sent to the machines of a cluster ({error}); pass one that can be "
                "pickled, or choose engine = local"
            ) from error

    def cut(self, group: Group) -> tuple[list[Wave], int]:
        """On a machine as waves will have it, into as many waves at least as run at a time."""
        places = places_of(self._ray.nodes(), self._needs)
        with self._shown.compiling():
            size, needed = self._one(_cut, group, places)
        return group.waves(size), needed

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        running = {self._begin(_train, job): job for job in jobs}
        tries = Counter(job.index for job in jobs)
        with stop_requests() as stop, self._shown.waves() as status:
            try:
                while running and not stop:
                    self._shown.waves_left(status, len(running))
                    done, _ = self._ray.wait(list(running), timeout=0.2)
                    for job, task in [(running.pop(task), task) for task in done]:
                        found = self._found(task)
                        if isinstance(found, _Lost):
                            self._again(found, job, tries)
                            running[self._begin(_train, job)] = job
                        else:
                            summary, where = found
                            self._shown.trained(job.index, job.planned, job.wave, summary, where)
                            yield job, summary
            finally:
                self._end(list(running))
            if stop:
                directory = self._task.work.directory
                self._shown.stopped(resume_command(directory) if directory else "")
                stop.leave()

    def _one(self, function: Any, *arguments: Any) -> Any:
        tries = 1
        while isinstance(found := self._found(self._begin(function, *arguments)), _Lost):
            if tries == TRIES:
                raise _given_up("planning", found, self._task.work.directory)
            tries += 1
        return found

    def _again(self, lost: "_Lost", job: Job, tries: Counter[int]) -> None:
        if tries[job.index] == TRIES:
            raise _given_up(f"wave {job.index}", lost, self._task.work.directory)
        try:
            places_of(self._ray.nodes(), self._needs)
        except ConfigError as error:
            why = _given_up(f"wave {job.index}", lost, self._task.work.directory, tries[job.index])
            raise LostError(f"{why} ({error})") from error
        tries[job.index] += 1
        self._shown.begun_again(job.index, lost.why)

    def _begin(self, function: Any, *arguments: Any) -> Any:
        # Processes serve one number of devices alone: JAX takes no other once it has started.
        count = str(self._task.work.definition.sweep.wave_cpus)
        fresh = {"env_vars": {"JAX_NUM_CPU_DEVICES": count}}
        remote = self._ray.remote(max_retries=0, runtime_env=fresh, **self._needs)(_guarded)
        return remote.remote(function, self._task, *arguments)

    def _found(self, task: Any) -> Any:
        """What a task returned; `_Lost` if its process or machine went before that.

        Raises:
            what the task raised.
        """
        errors = self._ray.exceptions
        try:
            found = self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause from error
        except (errors.RaySystemError, errors.GetTimeoutError, errors.TaskCancelledError):
            raise
        except errors.RayError as error:
            return _Lost(type(error).__name__)
        if isinstance(found, Exception):
            raise found
        return found

    def _end(self, tasks: Sequence[Any]) -> None:
        """Have them save, and wait for that."""
        for task in tasks:
            self._ray.cancel(task)
        self._ray.wait(tasks, num_returns=len(tasks), timeout=SAVE_SECONDS) if tasks else None


class _Lost(NamedTuple):
    why: str


def _given_up(what: str, lost: _Lost, directory: Path | None, count: int = TRIES) -> LostError:
    how = f"; once there are machines again: {resume_command(directory)}" if directory else ""
    return LostError(f"{what}: lost {count} of its machines, the last by {lost.why}{how}")


@contextmanager
def cluster(sweep: SweepSettings) -> Iterator[None]:
    """Joined to the cluster that RAY_ADDRESS names, or that of this machine, or one of this machine
    alone that ends with the block; for a sweep that runs here, nothing.

    Raises:
        ConfigError: if Ray is not installed or does not answer, or no machine has what a wave
            takes.
    """
    if sweep.engine != "ray":
        yield
        return
    require("ray", "ray")
    import ray

    joined = ray.is_initialized()
    if not joined:
        _join(ray)
    try:
        places_of(ray.nodes(), needs(sweep))
        yield
    finally:
        if not joined:
            ray.shutdown()


def leave_memory(sweep: SweepSettings) -> None:
    """Before JAX starts: have it not take most of a GPU's memory, which waves need that may run on
    this machine."""
    if sweep.engine == "ray":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _join(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _knock(address)
        with _signals_kept(), warnings.catch_warnings():
            # Of JAX, whose threads the processes that Ray starts do not need.
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (
        OSError, RuntimeError, ValueError, subprocess.SubprocessError, ray.exceptions.RayError
    ) as error:  # fmt: skip
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"engine = ray: RAY_ADDRESS = {address!r} cannot be joined ({first}); see to it by "
            "`ray status`, or choose engine = local"
        ) from error


def _knock(address: str) -> None:
    """Raise `OSError` if nobody listens there, and `subprocess.TimeoutExpired` if it is no cluster:
    Ray takes minutes to say so, in which it cannot be stopped."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        trial = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False)"]
        subprocess.run(trial, timeout=ANSWER_SECONDS, check=True, capture_output=True)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Undoes that Ray takes SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):  # not the main thread, where Ray takes none either
                signal.signal(number, handler)


def needs(sweep: SweepSettings) -> dict[str, Any]:
    """What a wave takes of a machine, as `ray.remote` has it."""
    found: dict[str, Any] = {"num_cpus": sweep.wave_cpus, "num_gpus": sweep.wave_gpus}
    return found | ({"resources": {"TPU": sweep.wave_tpus}} if sweep.wave_tpus else {})


def places_of(nodes: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> Places:
    """For `ray.nodes()` and what a wave takes.

    Raises:
        ConfigError: if no machine has that.
    """
    amounts = {"CPU": wanted["num_cpus"], "GPU": wanted["num_gpus"]} | wanted.get("resources", {})
    amounts = {name: amount for name, amount in amounts.items() if amount}
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    fits = [min(int(have.get(name, 0) // n) for name, n in amounts.items()) for have in alive]
    if not any(fits):
        asked = ", ".join(f"{n} {name}" for name, n in amounts.items())
        most = "; ".join(
            ", ".join(f"{int(have.get(name, 0))} {name}" for name in amounts) for have in alive
        )
        raise ConfigError(
            f"wave_cpus, wave_gpus and wave_tpus ask for {asked}, and no machine of the cluster "
            f"has that (there are {most or 'none'}); choose less, or add a machine"
        )
    return Places(sum(fits), max(fits))


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


_process: dict[tuple[Definition, Path | None], Local] = {}


def _guarded(function: Any, task: _Task, *arguments: Any) -> Any:
    """In a process of the cluster: what `function` returns; the error, if it is one that says what
    to do."""
    try:
        return function(_local(task), task, *arguments)
    except (ConfigError, StorageError) as error:
        return error


def _local(task: _Task) -> Local:
    """What this process keeps, since it serves many tasks: programs that it compiled."""
    key = (task.work.definition, task.work.directory)
    if key not in _process:
        _check_machine(task)
        sweep = task.work.definition.sweep
        if not sweep.wave_gpus and not sweep.wave_tpus:
            jax.config.update("jax_platforms", "cpu")
        if task.cache:
            enable_compilation_cache()
        _process.clear()
        silent = SweepProgress(task.work.definition, enabled=False)
        _process[key] = Local(task.work, silent)
    return _process[key]


def _check_machine(task: _Task) -> None:
    here, machine, directory = _versions(), platform.node(), task.work.directory
    for package, wanted in task.versions.items():
        if here[package] != wanted:
            raise ConfigError(
                f"engine = ray: machine {machine} has {package} {here[package]}, and the sweep was "
                f"begun with {wanted}; install the same versions on all machines"
            )
    if directory is not None and not holds(directory, SWEEP):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: machine {machine} of the cluster finds no {SWEEP} "
            "there; choose a directory on a disk that all of its machines share"
        )


def _cut(local: Local, task: _Task, group: Group, places: Places) -> tuple[int, int]:
    waves, needed = local.cut(group, places.total, 1 / places.most_on_one)
    return len(waves[0].settings.trials), needed


def _train(local: Local, task: _Task, job: Job) -> tuple[dict[str, Any], str]:
    give_up = time.monotonic() + SAVE_SECONDS
    while True:
        try:
            return local.train_one(job), platform.node()
        except BusyError:
            # Whose machine was lost may still be alive for a while.
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
