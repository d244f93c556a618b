"""Train the waves of a sweep on a Ray cluster, each as a separate task.

A task trains a wave as a local sweep does, in the same directory. If its machine is lost, another
one continues from the wave's newest checkpoint.
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
"""Number of times a wave is started before the sweep gives up because of lost machines."""
SAVE_SECONDS = 60.0
"""Seconds that a wave may keep writing after it was asked to stop or its machine was lost."""
ANSWER_SECONDS = 30.0
"""Timeout for an answer from a cluster's address."""
PACKAGES = ("purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax")


class _Task(NamedTuple):
    """What a machine needs to know about a sweep."""

    work: Work
    cache: bool
    versions: dict[str, str]


class Slots(NamedTuple):
    """Number of waves that a cluster runs at a time."""

    total: int
    max_per_node: int


class OnRay:
    """`Workers` on the cluster that this process has joined."""

    def __init__(self, work: Work, progress: SweepProgress):
        directory = None if work.directory is None else work.directory.absolute()
        cache = jax.config.jax_compilation_cache_dir is not None  # pyright: ignore[reportAttributeAccessIssue]
        self._task = _Task(work._replace(directory=directory), cache, _versions())
        self._progress, self._ray = progress, importlib.import_module("ray")
        self._resources = wave_resources(work.definition.sweep)
        try:
            self._ray.cloudpickle.dumps(self._task)
        except (TypeError, ValueError, pickle.PicklingError) as error:
            raise ConfigError(
                f"env: cannot be sent to the machines of a cluster ({error}); pass one that can be "
                "pickled, or use engine = local"
            ) from error

    def split(self, group: Group) -> tuple[list[Wave], int]:
        """Split on a machine of the cluster, into at least as many waves as run at a time."""
        slots = count_slots(self._ray.nodes(), self._resources)
        with self._progress.compiling():
            size, needed = self._run_with_retries(_split, group, slots)
        return group.waves(size), needed

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        running = {self._submit(_train, job): job for job in jobs}
        tries = Counter(job.index for job in jobs)
        with stop_requests() as stop, self._progress.training() as status:
            try:
                while running and not stop:
                    self._progress.waves_left(status, len(running))
                    done, _ = self._ray.wait(list(running), timeout=0.2)
                    for job, task in [(running.pop(task), task) for task in done]:
                        found = self._result(task)
                        if isinstance(found, _Lost):
                            self._count_retry(found, job, tries)
                            running[self._submit(_train, job)] = job
                        else:
                            summary, where = found
                            self._progress.trained(job.index, job.planned, job.wave, summary, where)
                            yield job, summary
            finally:
                self._cancel(list(running))
            if stop:
                directory = self._task.work.directory
                self._progress.stopped(resume_command(directory) if directory else "")
                stop.leave()

    def _run_with_retries(self, function: Any, *arguments: Any) -> Any:
        tries = 1
        while isinstance(found := self._result(self._submit(function, *arguments)), _Lost):
            if tries == TRIES:
                raise _lost_error("planning", found, self._task.work.directory)
            tries += 1
        return found

    def _count_retry(self, lost: "_Lost", job: Job, tries: Counter[int]) -> None:
        if tries[job.index] == TRIES:
            raise _lost_error(f"wave {job.index}", lost, self._task.work.directory)
        try:
            count_slots(self._ray.nodes(), self._resources)
        except ConfigError as error:
            why = _lost_error(
                f"wave {job.index}", lost, self._task.work.directory, tries[job.index]
            )
            raise LostError(f"{why} ({error})") from error
        tries[job.index] += 1
        self._progress.wave_restarted(job.index, lost.why)

    def _submit(self, function: Any, *arguments: Any) -> Any:
        # JAX fixes the number of devices when it starts, so a process serves only one number.
        count = str(self._task.work.definition.sweep.wave_cpus)
        fresh = {"env_vars": {"JAX_NUM_CPU_DEVICES": count}}
        remote = self._ray.remote(max_retries=0, runtime_env=fresh, **self._resources)(
            _run_in_worker
        )
        return remote.remote(function, self._task, *arguments)

    def _result(self, task: Any) -> Any:
        """What a task returned; `_Lost` if its process or machine was lost first.

        Raises:
            whatever the task raised.
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

    def _cancel(self, tasks: Sequence[Any]) -> None:
        """Tell tasks to save and stop, and wait until they have."""
        for task in tasks:
            self._ray.cancel(task)
        self._ray.wait(tasks, num_returns=len(tasks), timeout=SAVE_SECONDS) if tasks else None


class _Lost(NamedTuple):
    why: str


def _lost_error(what: str, lost: _Lost, directory: Path | None, count: int = TRIES) -> LostError:
    how = f"; when machines are back: {resume_command(directory)}" if directory else ""
    return LostError(f"{what}: lost its machine {count} times, last by {lost.why}{how}")


@contextmanager
def cluster(sweep: SweepSettings) -> Iterator[None]:
    """Join a Ray cluster for the block; do nothing for a local sweep.

    The cluster is the one at RAY_ADDRESS, else one running on this machine, else a new one on this
    machine that ends with the block.

    Raises:
        ConfigError: if Ray is not installed or does not answer, or no machine has the resources
            of a wave.
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
        count_slots(ray.nodes(), wave_resources(sweep))
        yield
    finally:
        if not joined:
            ray.shutdown()


def disable_preallocation(sweep: SweepSettings) -> None:
    """Stop JAX from preallocating most of a GPU's memory, which waves on this machine may need.

    Call it before JAX starts.
    """
    if sweep.engine == "ray":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _join(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _check_address(address)
        with _keep_signal_handlers(), warnings.catch_warnings():
            # JAX warns about its threads, which the processes that Ray starts do not need.
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (
        OSError, RuntimeError, ValueError, subprocess.SubprocessError, ray.exceptions.RayError
    ) as error:  # fmt: skip
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"engine = ray: RAY_ADDRESS = {address!r} cannot be joined ({first}); check it with "
            "`ray status`, or use engine = local"
        ) from error


def _check_address(address: str) -> None:
    """Raise `OSError` if nothing listens at an address, `subprocess.TimeoutExpired` if it is not a
    cluster. Ray itself takes minutes to report that, and cannot be interrupted meanwhile."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        trial = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False)"]
        subprocess.run(trial, timeout=ANSWER_SECONDS, check=True, capture_output=True)


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers afterwards, since Ray installs its own for SIGTERM."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):  # not in the main thread, where Ray installs none either
                signal.signal(number, handler)


def wave_resources(sweep: SweepSettings) -> dict[str, Any]:
    """Resources of one wave, as arguments of `ray.remote`."""
    found: dict[str, Any] = {"num_cpus": sweep.wave_cpus, "num_gpus": sweep.wave_gpus}
    return found | ({"resources": {"TPU": sweep.wave_tpus}} if sweep.wave_tpus else {})


def count_slots(nodes: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> Slots:
    """Count the waves that fit on the machines of `ray.nodes()` at a time.

    Args:
        wanted: resources of one wave.

    Raises:
        ConfigError: if no machine has them.
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
            f"has that (available: {most or 'none'}); ask for less, or add a machine"
        )
    return Slots(sum(fits), max(fits))


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


_process: dict[tuple[Definition, Path | None], Local] = {}


def _run_in_worker(function: Any, task: _Task, *arguments: Any) -> Any:
    """Call `function` in a process of the cluster; return errors that tell the user what to do."""
    try:
        return function(_worker_state(task), task, *arguments)
    except (ConfigError, StorageError) as error:
        return error


def _worker_state(task: _Task) -> Local:
    """State that this process keeps between its tasks, such as compiled programs."""
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
                f"started with {wanted}; install the same versions on all machines"
            )
    if directory is not None and not holds(directory, SWEEP):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: machine {machine} of the cluster finds no {SWEEP} "
            "there; use a directory on a disk that all machines share"
        )


def _split(local: Local, task: _Task, group: Group, slots: Slots) -> tuple[int, int]:
    waves, needed = local.split(group, slots.total, 1 / slots.max_per_node)
    return len(waves[0].settings.trials), needed


def _train(local: Local, task: _Task, job: Job) -> tuple[dict[str, Any], str]:
    give_up = time.monotonic() + SAVE_SECONDS
    while True:
        try:
            return local.train_one(job), platform.node()
        except BusyError:
            # The process that was reported lost may still be alive for a while.
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
