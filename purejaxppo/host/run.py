"""`run` and `resume`: train a task, evaluate it, and write the results to a run directory."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np

from purejaxppo.config import ConfigError, HParams, TaskConfig, check_fields
from purejaxppo.host.checkpoint import (
    Checkpoint,
    Position,
    check_same_data,
    check_same_run,
    data_digests,
)
from purejaxppo.host.checkpoints import has_any
from purejaxppo.host.conduct import Extras, Result, compile_run, conduct
from purejaxppo.host.configfile import RunSettings, Settings, load_settings
from purejaxppo.host.load import newest_or_none, restore_states, task_of
from purejaxppo.host.loggers import (
    Logger,
    read_metrics,
    require,
)
from purejaxppo.host.loop import Callback
from purejaxppo.host.parallel import choose_spread, use_all_cores, with_devices
from purejaxppo.host.processes import is_first
from purejaxppo.host.program import (
    Prepared,
)
from purejaxppo.host.progress import Progress
from purejaxppo.host.rundir import (
    CONFIG,
    CURVE,
    SUMMARY,
    DamagedError,
    locked,
    new_run,
    old_run,
    resume_command,
    unsealed,
    write_settings,
)
from purejaxppo.host.session import Session, Start
from purejaxppo.host.summary import draw_curve
from purejaxppo.inputs import check_hparams
from purejaxppo.task import PartArguments, Task, as_task, own_class
from purejaxppo.types import Learner, TrainState


def run(
    config: TaskConfig | Task,
    hparams: HParams | None = None,
    *,
    seed: int = 0,
    num_seeds: int = 1,
    devices: int = 0,
    run_dir: str | Path | None = None,
    eval_episodes: int = 128,
    eval_every: float = math.inf,
    eval_unit: Literal["updates", "seconds"] = "updates",
    checkpoint_every: float = 300.0,
    checkpoint_unit: Literal["seconds", "updates"] = "seconds",
    keep: int = 3,
    tensorboard: bool = False,
    wandb: bool = False,
    loggers: Sequence[Logger] = (),
    callback: Callback | None = None,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Result:
    """Train `num_seeds` seeds in parallel, evaluate them, and write the results.

    On SIGTERM or SIGINT it finishes the current chunk of updates (about half a second), saves, and
    raises `SystemExit(143)` or `KeyboardInterrupt`; `resume` continues from there.

    If `jax.distributed` connects several processes, all of them must call this with the same
    arguments. The first process evaluates and writes; the others get no returns.

    Args:
        run_dir: directory for `config.toml`, `metrics.csv`, `eval.csv`, `summary.json`,
            `learning_curve.png` and `checkpoints/`; None writes nothing.
        devices: number of devices. Seeds are spread over them, each with the results it would have
            alone. If there are more devices than seeds, the environments of each seed are spread
            too; each minibatch then has an equal share from each device. 0 chooses the number.
        eval_episodes: episodes of each evaluation, per seed.
        eval_every: interval between evaluations, in `eval_unit`s; each also saves a checkpoint, of
            which the best is kept. inf evaluates each checkpoint and the end of the run.
        checkpoint_every: checkpoint interval, in `checkpoint_unit`s; inf saves only when the run
            ends or is stopped.
        keep: number of newest checkpoints to keep, in addition to the best by evaluation.
        tensorboard: also write event files under `run_dir/tensorboard/`.
        wandb: also log to Weights & Biases.
        loggers: objects with `write(update, metrics)`, called once per update with metrics `[S]`,
            and `close()`.
        callback: `(update, metrics[u, S], states[S, ...])`, called after every chunk of updates
            (about half a second); if it returns True, training stops and the run is evaluated.
        compilation_cache: keep compiled programs in the user's cache folder, for the rest of this
            process. A cache folder that is already configured in JAX is kept.
        progress: show progress on standard output.
        env: an object with gymnax 1.x's interface, which replaces the one that
            `config.env_id` names.
        env_params: its parameters; None uses its defaults.
        **parts: see `make_task`.

    Raises:
        ConfigError: before anything is compiled or written, if a setting cannot work, or
            `run_dir` already holds a run, is written by another process or cannot be written.
        StorageError: if metrics or the last checkpoint cannot be written (a full disk).
    """
    _check_extras(loggers, callback)
    task = as_task(
        config, "run", env=env, env_params=env_params, hparams=own_class(hparams), **parts
    )
    host = RunSettings(
        seed=seed, num_seeds=num_seeds, devices=devices, eval_episodes=eval_episodes,
        eval_every=eval_every, eval_unit=eval_unit, checkpoint_every=checkpoint_every,
        checkpoint_unit=checkpoint_unit, keep=keep, tensorboard=tensorboard, wandb=wandb,
        passed=task.passed,
    )  # fmt: skip
    settings = Settings(task.config, task.hparams if hparams is None else hparams, host)
    extras = Extras(loggers, callback, compilation_cache, progress)
    return run_settings(settings, run_dir, task, extras)


def run_settings(
    settings: Settings,
    run_dir: str | Path | None,
    task: Task | None = None,
    extras: Extras = Extras(),  # noqa: B008
) -> Result:
    """`run`, with settings in the form of a config file.

    Args:
        task: the task to train; None makes the one that the config describes.
    """
    check_scalars(settings.hparams, "run")
    if settings.trials:
        raise ConfigError("trials: this file is part of a sweep; use the sweep's sweep.toml")
    _check_outputs(run_dir, settings.run)
    use_all_cores()
    task = task_of(settings, None, {}) if task is None else task
    task.config.check_hparams(settings.hparams)
    # A named objective may have other defaults for settings left at auto.
    settings = with_devices(dataclasses.replace(settings, config=task.config), task)
    with ExitStack() as stack:
        directory = None if run_dir is None else Path(run_dir)
        held = None
        if directory is not None and is_first():
            held = stack.enter_context(new_run(directory, settings))
        progress = Progress(settings, 0, enabled=extras.progress and is_first())
        last = settings.config.num_updates
        session = Session(
            settings, task, held, directory, Start(Position(0)), last, progress,
            data_digests(task.data),
        )  # fmt: skip
        return conduct(session, partial(compile_run, session), extras)


def _check_extras(loggers: Any, callback: Any) -> None:
    for logger in loggers:
        if not (hasattr(logger, "write") and hasattr(logger, "close")):
            raise ConfigError(
                f"loggers: {type(logger).__name__} is not a logger; it needs write(update, "
                "metrics) and close()"
            )
    if callback is not None and not callable(callback):
        raise ConfigError(
            f"callback is of type {type(callback).__name__}: must be a function (update, metrics, "
            "states)"
        )


class Leg(NamedTuple):
    """The updates that a wave trains."""

    first: int
    last: int
    states: Callable[[], TrainState] | None = None
    """Returns the states of all runs after `first` updates; None initialises new ones."""


def run_wave(
    settings: Settings, directory: Path | None, prepared: Prepared, leg: Leg, progress: Progress
) -> Result:
    """Train the trials of `settings` in parallel, with a program compiled for their number.
    Continues if `directory` already holds part of the wave.

    Metrics are written as `metrics.f32`, and checkpoints are not evaluated.

    Raises:
        ConfigError: as `resume`.
        StorageError: as `run`.
    """
    task, start = prepared.task, Start(Position(leg.first))
    with ExitStack() as stack:
        held = None
        if directory is not None and has_any(directory) and not (directory / CONFIG).exists():
            with locked(directory) as own:
                write_settings(own, settings)
        if directory is not None and (directory / CONFIG).exists():
            held = stack.enter_context(old_run(directory))
            start = _restore(directory, settings, task, prepared.learner)
        elif directory is not None:
            held = stack.enter_context(new_run(directory, settings))
        if start.states is None and leg.states is not None:
            start = Start(Position(leg.first), leg.states())
        session = Session(
            settings, task, held, directory, start, leg.last, progress, data_digests(task.data)
        )
        return conduct(session, lambda: prepared, Extras(compilation_cache=False))


def resume(
    run_dir: str | Path,
    task: Task | None = None,
    *,
    total_timesteps: int | None = None,
    loggers: Sequence[Logger] = (),
    callback: Callback | None = None,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Result:
    """Continue a run that was stopped or killed, from its newest complete checkpoint.

    It ends with the results of an undisturbed run, bit for bit. A run killed before its first
    checkpoint starts from the beginning; a finished one is left as it is, and its results are
    returned.

    Args:
        task: the task passed to `run`, if one was.
        total_timesteps: new length of the run, which may be finished. From then on, schedules run
            over the new length, so a linear schedule raises the learning rate again.
        loggers: as in `run`.
        callback: as in `run`.
        compilation_cache: as in `run`.
        progress: as in `run`.
        env: the environment passed to `run`, if one was.
        env_params: its parameters, if they were passed.
        **parts: other parts passed to `run`.

    Raises:
        ConfigError: if there is no run, another process writes there, no checkpoint is complete, or
            `config.toml` was changed to that of a different run.
        StorageError: as `run`.
    """
    directory = Path(run_dir)
    _check_extras(loggers, callback)
    use_all_cores()
    given = {"env": env, "env_params": env_params, **parts}
    with old_run(directory) if is_first() else nullcontext() as held:
        settings = _settings_to_resume(directory, total_timesteps)
        task = task_of(settings, task, given)
        _check_outputs(directory, settings.run)
        choose_spread(settings, task)
        start = _restore(directory, settings, task, task.learner(None))
        if total_timesteps is not None and start.checkpoint is not None:
            _check_not_all_failed(start.checkpoint)
        reporter = Progress(settings, start.position.updates, enabled=progress and is_first())
        if (summary := _summary_if_finished(directory, start, settings)) is not None:
            if start.metrics is not None and not (directory / CURVE).exists():
                draw_curve(directory, settings, task, start.metrics[task.curve].T)
            reporter.already_finished(summary, resume_command(directory))
            return _finished_result(start, summary)
        if held is not None:
            write_settings(held, settings)
        last = settings.config.num_updates
        session = Session(
            settings, task, held, directory, start, last, reporter, data_digests(task.data)
        )
        extras = Extras(loggers, callback, compilation_cache, progress)
        return conduct(session, partial(compile_run, session), extras)


def _settings_to_resume(directory: Path, total_timesteps: int | None) -> Settings:
    settings = load_settings(directory / CONFIG)
    if settings.trials:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: is part of a sweep; to resume the sweep: "
            f"{resume_command(directory)}"
        )
    if total_timesteps is None:
        return settings
    config = dataclasses.replace(settings.config, total_timesteps=total_timesteps)
    return dataclasses.replace(settings, config=config)


def _check_not_all_failed(found: Checkpoint) -> None:
    if len(found.position.failed) == found.settings.num_runs:
        raise ConfigError(
            f"{str(found.path)!r}: the loss of every seed became non-finite, so no seed can be "
            "trained longer; start a new run with a lower learning_rate or max_grad_norm"
        )


def _restore(directory: Path, settings: Settings, task: Task, learner: Learner) -> Start:
    """Restore the newest checkpoint that belongs to this run and whose metrics are complete."""
    config, metrics, digests = settings.config, {}, data_digests(task.data)

    def check(found: Checkpoint) -> None:
        check_same_run(found, settings)
        check_same_data(found, digests)
        if config.num_updates >= found.position.updates:
            metrics[found.path] = read_metrics(directory, found.position, settings)

    found = newest_or_none(directory, check)
    if found is None:
        return Start(Position(0), resumed=True)
    position = found.position
    if config.num_updates < position.updates:
        done = position.updates * config.batch_size
        raise ConfigError(
            f"total_timesteps = {config.total_timesteps}: the run has already trained "
            f"{done} environment steps; give at least {done}"
        )
    if config.total_timesteps != found.settings.config.total_timesteps:
        change = (position.updates, config.total_timesteps)
        position = dataclasses.replace(position, extended=(*position.extended, change))
    states = restore_states(found, learner, task)
    return Start(position, states, metrics[found.path], found, resumed=True)


def _summary_if_finished(
    directory: Path, start: Start, settings: Settings
) -> dict[str, Any] | None:
    """The content of `summary.json`, if the run is finished and the summary is up to date."""
    try:
        summary = unsealed(directory / SUMMARY)
        done, planned = int(summary["env_steps"]), int(summary["env_steps_planned"])
        len(summary["failed_seeds"])
    except (DamagedError, ValueError, TypeError, LookupError, OverflowError):
        return None
    config, position = settings.config, start.position
    ended = position.updates == config.num_updates or (len(position.failed) == settings.num_runs)
    current = done == position.updates * config.batch_size
    complete = planned == config.num_updates * config.batch_size
    return summary if start.states is not None and ended and current and complete else None


def _finished_result(start: Start, summary: dict[str, Any]) -> Result:
    assert start.states is not None
    assert start.metrics is not None
    metrics = {name: values.T for name, values in start.metrics.items()}
    no_returns = np.zeros((len(next(iter(metrics.values()))), 0))
    return Result(start.states, metrics, no_returns, no_returns, summary, start.position.failed)


def check_scalars(hparams: Any, function: str) -> None:
    """Raise `ConfigError` if `hparams` is not an `HParams`, or if a field is an array (for use
    with `vmap` only)."""
    check_hparams(
        hparams,
        function,
        "to train hyperparameters in parallel, use sweep, or vmap the function that make_train "
        "returns",
    )
    check_fields(hparams)


def _check_outputs(run_dir: Any, settings: RunSettings) -> None:
    if run_dir is None and (settings.tensorboard or settings.wandb):
        raise ConfigError("tensorboard and wandb write into the run directory: give run_dir")
    if run_dir is None and math.isfinite(settings.eval_every):
        raise ConfigError(
            f"eval_every = {settings.eval_every}: evaluations are written to the run directory; "
            "give run_dir"
        )
    if settings.tensorboard:
        require("tensorboard", "tensorboardX")
    if settings.wandb:
        require("wandb", "wandb")
