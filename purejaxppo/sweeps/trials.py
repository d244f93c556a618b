"""Load single trials of a finished sweep, or extract them as run directories."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.config import ConfigError, HParams
from purejaxppo.host import checkpoint
from purejaxppo.host.checkpoint import Position
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings
from purejaxppo.host.load import Loaded, task_of
from purejaxppo.host.loggers import SECONDS, CsvLogger, HostMetrics, binary_metrics, in_order
from purejaxppo.host.rundir import CONFIG, SWEEP, StorageError, locked, write_whole
from purejaxppo.host.summary import METRICS_COLUMNS
from purejaxppo.inputs import whole_number
from purejaxppo.metrics import env_steps
from purejaxppo.sweeps import files
from purejaxppo.sweeps.files import wave_directory
from purejaxppo.sweeps.settings import SweepSettings, load_definition
from purejaxppo.sweeps.waves import Work, trial_rows, wave_states
from purejaxppo.task import PartArguments, Task
from purejaxppo.types import TrainState

TRIALS = "trials"
"""Folder of the run directories that `extract_trial` creates."""


def load_trial(
    sweep_dir: str | Path,
    trial: Literal["best"] | int = "best",
    seed: int | None = None,
    task: Task | None = None,
    *,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Loaded:
    """Load the settings and trained states of a trial of a finished sweep.

    A member of a population (strategy = pbt) has its final hyperparameters.

    Args:
        trial: number of the trial, or `best`.
        seed: one seed, counted from 0; None loads all, with leaves `[S, ...]`.
        task: the task passed to `sweep`, if one was.
        env: the environment passed to `sweep`, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to `sweep`.

    Raises:
        ConfigError: if the sweep is not finished, the trial or seed does not exist, its loss
            turned non-finite, or the environment is a different one.
    """
    given = {"env": env, "env_params": env_params, **parts}
    source = _open_trial(Path(sweep_dir), trial, seed, lambda x: task_of(x, task, given))
    states = source.states
    if seed is not None:
        states = jax.tree.map(lambda x: x[0], states)
    return Loaded(source.settings.config, source.settings.hparams, states)


def extract_trial(
    sweep_dir: str | Path,
    trial: Literal["best"] | int = "best",
    seed: int | None = None,
    task: Task | None = None,
    *,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Path:
    """Extract a trial of a finished sweep as a run directory.

    The directory is `SWEEP_DIR/trials/NNNN`, or `NNNN-seed-K` for one seed. It works with `resume`,
    `load`, `eval` and `export`. If it already exists, it is left unchanged. Resuming all seeds of a
    trial that successive halving stopped early gives the results of `run` with the trial's
    settings, bit for bit on CPU.

    Args:
        trial, seed, task, env, env_params, parts: as in `load_trial`.

    Returns:
        the run directory.

    Raises:
        ConfigError: as `load_trial`, or if another process is writing to the sweep's directory.
        StorageError: if the directory cannot be written.
    """
    directory = Path(sweep_dir)
    files.check_finished(directory)
    with locked(directory):
        number = _trial_number(directory, trial)
        name = f"{number:04d}" if seed is None else f"{number:04d}-seed-{seed}"
        target = directory / TRIALS / name
        if target.exists():
            return target
        given = {"env": env, "env_params": env_params, **parts}
        source = _open_trial(directory, number, seed, lambda x: task_of(x, task, given))
        part = target.with_name(f"{name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _write_run(directory, source, part)
            part.replace(target)
        except OSError as error:
            raise StorageError(
                f"{str(target)!r}: cannot be written: {error.strerror}; free space and try again"
            ) from error
    return target


class _Leg(NamedTuple):
    """A wave that trained the trial."""

    wave: int
    columns: np.ndarray
    """Indices `[S]` of the trial's runs within the wave."""
    num_runs: int


class _Source(NamedTuple):
    """A trial of a finished sweep, or one seed of it."""

    settings: Settings
    """Settings of a run of only this trial."""
    states: TrainState
    """`[S, ...]`."""
    updates: int
    legs: list[_Leg]


def single_trial_settings(wave: Settings, hparams: HParams, num_seeds: int) -> Settings:
    """Settings of a run of one trial, with as many devices per run as in its wave."""
    run = wave.run
    each = run.devices // wave.num_runs
    whole = 1 if num_seeds == 1 else 0  # otherwise a single run might use more devices
    own = RunSettings(
        seed=run.seed, num_seeds=num_seeds, devices=num_seeds * each if each > 1 else whole,
        eval_episodes=run.eval_episodes, checkpoint_every=run.checkpoint_every,
        passed=run.passed,
    )  # fmt: skip
    return Settings(wave.config, hparams, own)


def final_hparams(
    sweep: SweepSettings, hparams: HParams, states: TrainState, position: int
) -> HParams:
    """Final hyperparameters of a trial; only those of a population differ from the initial ones.

    Args:
        hparams: the initial hyperparameters.
        states: states of the wave at its end.
        position: position of the trial within the wave.
    """
    if sweep.strategy != "pbt":
        return hparams
    member: Any = states.learner
    ended = {name: float(getattr(member.hparams, name)[position]) for name in sweep.space.names}
    return dataclasses.replace(hparams, **ended)


def _open_trial(
    directory: Path, trial: str | int, seed: int | None, make: Callable[[Settings], Task]
) -> _Source:
    """Read a trial. Raises `ConfigError` as `load_trial`."""
    files.check_finished(directory)
    definition = load_definition(directory / SWEEP)
    number, num_seeds = _trial_number(directory, trial), definition.settings.run.num_seeds
    task = make(definition.settings)
    if seed is not None and whole_number("seed", seed, 0) >= num_seeds:
        raise ConfigError(f"seed = {seed}: the trials have seeds 0 to {num_seeds - 1}")
    seeds = np.arange(num_seeds) if seed is None else np.array([seed])
    legs = _legs(directory, number, seeds, num_seeds)
    found, states = wave_states(Work(definition, directory, task), legs[-1].wave)
    for k, column in zip(seeds, legs[-1].columns, strict=True):
        if column in found.position.failed:
            raise ConfigError(
                f"trial = {number}: the loss of seed {k} was not finite at update "
                f"{found.position.failed[column]}; choose a trial, or a seed, that did not fail"
            )
    position = int(legs[-1].columns[0]) // num_seeds
    began = found.settings.trials[position]
    hparams = final_hparams(definition.sweep, began, states, position)
    mine = jax.tree.map(lambda x: x[seeds], trial_rows(states, position, num_seeds))
    settings = single_trial_settings(found.settings, hparams, len(seeds))
    return _Source(settings, mine, found.position.updates, legs)


def _trial_number(directory: Path, trial: str | int) -> int:
    """The number of a trial. Raises `ConfigError` if it does not exist."""
    if trial == "best":
        winner = files.read_winner(directory)
        if winner is None:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: every trial failed, so there is no best one"
            )
        return winner["trial"]
    if isinstance(trial, str):
        raise ConfigError(f"trial = {trial!r}: must be best, or the number of a trial")
    plan = files.read_plan(directory, load_definition(directory / SWEEP))
    count = 1 + max(max(w.numbers) for batch in plan for w in batch.waves)
    if whole_number("trial", trial, 0) >= count:
        raise ConfigError(f"trial = {trial}: the sweep has trials 0 to {count - 1}")
    return trial


def _legs(directory: Path, number: int, seeds: np.ndarray, num_seeds: int) -> list[_Leg]:
    """The waves that trained a trial, in order; successive halving has several."""
    plan = files.read_plan(directory, load_definition(directory / SWEEP))
    waves = [wave for batch in plan for wave in batch.waves]
    return [
        _Leg(index, wave.numbers.index(number) * num_seeds + seeds, wave.size * num_seeds)
        for index, wave in enumerate(waves)
        if number in wave.numbers
    ]


def _write_run(sweep_dir: Path, source: _Source, target: Path) -> None:
    """Write the files that `resume` needs. Raises `StorageError` or `OSError`."""
    settings, parts = source.settings, []
    seconds, returns = 0.0, np.empty(0)
    for leg in source.legs:
        wave = wave_directory(sweep_dir, leg.wave)
        summary = files.finished_summary(wave)
        if summary is None:
            raise files.damaged_wave(wave, "has changed since it was written")
        content, columns = files.metrics_content(wave, summary), summary[METRICS_COLUMNS]
        metrics = binary_metrics(content, columns, leg.num_runs)
        parts.append({name: column[:, leg.columns] for name, column in metrics.items()})
        seconds += summary["run_seconds"] * len(leg.columns) / leg.num_runs
        returns = np.asarray(summary["eval_return_per_seed"], float)[leg.columns]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kept = np.any([~np.isnan(column) for column in joined.values()], axis=0)
    write_whole(target / CONFIG, dump_settings(settings))
    logger = CsvLogger(target, in_order(joined))
    logger.write(1, _as_logged(joined, kept, settings.config), kept)
    size, digest = logger.sync()
    logger.close()
    position = Position(source.updates, size, digest, in_order(joined), seconds)
    saved = checkpoint.save(target, position, settings, source.states)
    checkpoint.record_evaluation(saved, float(returns.mean()))


def _as_logged(metrics: HostMetrics, kept: np.ndarray, config: Any) -> HostMetrics:
    """Metrics `[U, S]` with counts as integers, as the learner returns them.

    Waves log 32-bit floats, which are exact only for integers up to 2^24. The seconds of single
    rows are unknown.
    """
    updates = np.arange(1, len(kept) + 1, dtype=np.int32)[:, None]
    counts: HostMetrics = {}
    if "env_steps" in metrics:
        steps = np.asarray(env_steps(config, jnp.asarray(updates)))
        counts["env_steps"] = np.broadcast_to(steps, kept.shape)
    if "episodes" in metrics:
        counts["episodes"] = np.where(kept, metrics["episodes"], 0).astype(np.int64)
    return metrics | counts | {SECONDS: np.full(kept.shape, np.nan)}
