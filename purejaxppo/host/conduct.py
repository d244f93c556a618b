"""Conducts one run in this process: compiles, trains, evaluates and writes the results."""

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from purejaxppo.checks import HostCallError, RunWarning
from purejaxppo.config import ConfigError, Words
from purejaxppo.evaluation import FRESH_EVALUATION
from purejaxppo.host.checkpoint import (
    check_same_run,
)
from purejaxppo.host.checkpoints import ranked_by_return
from purejaxppo.host.configfile import RunSettings
from purejaxppo.host.evaluations import evaluation_curve
from purejaxppo.host.load import find_with_warnings, restore_states
from purejaxppo.host.loggers import (
    BinaryLogger,
    CsvLogger,
    Logger,
    RowLogger,
    TensorBoardLogger,
    UserLogger,
    WandbLogger,
    close_all,
)
from purejaxppo.host.loop import Callback, Loop, agreed
from purejaxppo.host.memory import check_memory, check_program, explain_out_of_memory
from purejaxppo.host.parallel import choose_spread, describe_devices
from purejaxppo.host.processes import is_first
from purejaxppo.host.program import (
    Evaluation,
    Prepared,
    compile_program,
    enable_compilation_cache,
)
from purejaxppo.host.progress import Progress
from purejaxppo.host.rundir import resume_command
from purejaxppo.host.saver import Saver
from purejaxppo.host.session import Session, cannot_log
from purejaxppo.host.signals import StopRequest, stop_requests
from purejaxppo.host.summary import Best, Final, Training, summarize, write_results
from purejaxppo.references import called, resolve
from purejaxppo.types import TrainState


@dataclass(frozen=True)
class Result:
    """The result of `run` and `resume`."""

    states: TrainState
    """Leaves `[S, ...]`; the last good state for a seed that failed."""
    metrics: dict[str, np.ndarray]
    """Arrays `[S, U]`; NaN after a seed has failed."""
    returns: np.ndarray
    """`[S, eval_episodes]` returns of the final evaluation with sampled actions, NaN for an episode
    that did not end; `[S, 0]` if nothing was evaluated (the run was already finished, or this is
    not the first of several processes)."""
    returns_deterministic: np.ndarray
    """Like `returns`, with the policy's most likely actions."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    failed: dict[int, int]
    """Seeds whose loss became non-finite, and the update at which it did."""


class Extras(NamedTuple):
    """Arguments of a run from Python, besides its settings and its task."""

    loggers: Sequence[Logger] = ()
    callback: Callback | None = None
    compilation_cache: bool = True
    progress: bool = True


def _saver(session: Session, evaluate: Any, stop: StopRequest) -> Saver | None:
    """What saves and evaluates checkpoints; those of a sweep's waves are not evaluated."""
    if session.directory is None:
        return None
    alone = not session.settings.trials
    return Saver(
        session.directory, session.settings, evaluate if alone else None, session.start.checkpoint,
        stop, held=session.held, sample=session.task.samples if alone else None,
    )  # fmt: skip


def conduct(session: Session, prepare: Callable[[], Prepared], extras: Extras) -> Result:
    """Compile the programs, train, evaluate, and write the results."""
    settings, directory, start = session.settings, session.directory, session.start
    assert session.task.config == settings.config
    if extras.compilation_cache:
        enable_compilation_cache()
    progress = session.progress
    with ExitStack() as stack, explain_out_of_memory(settings):
        stop = stack.enter_context(stop_requests())
        own = [*extras.loggers, *_named_loggers(settings.run, directory)]
        stack.callback(progress.close)
        spread = choose_spread(settings, session.task)
        progress.starting(start.checkpoint, start.resumed, describe_devices(settings, spread))
        prepared = prepare()
        loggers = _open_loggers(session, prepared.program.columns, own)
        stack.callback(close_all, loggers)
        saver = _saver(session, prepared.evaluation, stop)
        if saver is not None:
            stack.callback(saver.close)
        if agreed(stop):
            _exit_after_save(stop, progress, directory)
        progress.training(prepared.compile_seconds)
        loop = Loop(session, prepared, loggers, saver, stop, extras.callback)
        training = loop.train()
        progress.close()
        saved = None if saver is None else saver.finish(training.position, loop.states)
        if stop:
            _exit_after_save(stop, progress, directory)
        if loop.error is not None:
            raise _with_resume_command(loop.error, directory)
        with progress.working("evaluating"):
            final = _evaluate_at_end(session, prepared.evaluation, training.states, stop)
            if final is None:
                _exit_after_save(stop, progress, directory)
            best = None
            if saver is not None and saved is not None and is_first():
                saver.record(saved, final.sampled, final.deterministic)
                saver.sample(saved.position.updates, training.states)
                best = _best_checkpoint(session, prepared, training, stop)
        if stop:
            _exit_after_save(stop, progress, directory)
    summary = summarize(
        settings,
        session.task,
        spread,
        training,
        final,
        compile_seconds=prepared.compile_seconds,
        best=best,
    )
    _warn_of_unfinished_episodes(settings.config.words, summary, final)
    if directory is not None and session.held is not None:
        session.held.check()
        write_results(directory, settings, session.task, training, summary)
    progress.finished(summary, directory)
    return Result(
        training.states, training.metrics, final.sampled,
        np.zeros_like(final.sampled[:, :0]) if final.deterministic is None else final.deterministic,
        summary, training.position.failed,
    )  # fmt: skip


def _warn_of_unfinished_episodes(words: Words, summary: dict[str, Any], final: Final) -> None:
    unfinished = summary["unfinished_eval_episodes"]
    if unfinished:
        warnings.warn(
            f"{unfinished} of {final.sampled.size} evaluation {words.episodes} are left out of the "
            f"means: they {words.unfinished}",
            RunWarning,
            stacklevel=3,
        )


def compile_run(session: Session) -> Prepared:
    """Compile the programs of a run."""
    settings, task = session.settings, session.task
    began = time.perf_counter()
    check_memory(settings, task)
    evaluation = Evaluation(settings, task)
    with session.progress.working("compiling"):
        program = compile_program(
            settings, task, fresh=session.start.states is None,
            evaluation=evaluation if is_first() else None,
        )  # fmt: skip
    check_program(settings, program)
    seconds = time.perf_counter() - began
    return Prepared(task, task.learner(None), program, evaluation, seconds)


def _evaluate_at_end(
    session: Session, evaluation: Any, states: TrainState, stop: StopRequest
) -> Final | None:
    """Evaluate the final states; None if a stop was requested before the evaluation finished."""
    if not is_first():
        return Final(np.zeros((session.settings.num_runs, 0)), None)
    sampled = _unless_stopped(stop, partial(evaluation, states))
    if sampled is None or session.settings.trials:
        return sampled if sampled is None else Final(sampled, None)
    deterministic = _unless_stopped(stop, partial(evaluation, states, deterministic=True))
    return None if deterministic is None else Final(sampled, deterministic)


def _best_checkpoint(
    session: Session, prepared: Prepared, training: Training, stop: StopRequest
) -> Best | None:
    """Find the best checkpoint, and evaluate it on new episodes if it was chosen among several,
    since the highest of several estimates is biased upwards."""
    directory = session.directory
    if directory is None or session.settings.trials:
        return None
    if not ranked_by_return(directory):
        return None
    try:
        found = find_with_warnings(directory, "best", lambda x: check_same_run(x, session.settings))
    except ConfigError as error:
        warnings.warn(f"no best checkpoint is reported: {error}", RunWarning, stacklevel=3)
        return None
    if len(evaluation_curve(directory)[0]) == 1:
        return Best(found, None)
    same = found.position.updates == training.position.updates
    if not same and jax.process_count() > 1:  # all processes must take part in reading a checkpoint
        return Best(found, None)
    states = training.states
    if not same:
        states = restore_states(found, prepared.learner, session.task)
    fresh = partial(prepared.evaluation, states, purpose=FRESH_EVALUATION)
    return Best(found, _unless_stopped(stop, fresh))


def _unless_stopped(stop: StopRequest, evaluation: Callable[[], np.ndarray]) -> np.ndarray | None:
    """Evaluate in a thread; return None as soon as a stop is requested. The main thread must stay
    free, since Python handles signals only between calls into compiled code."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
    future = pool.submit(evaluation)
    pool.shutdown(wait=False)
    while not future.done():
        if stop:
            return None
        wait([future], timeout=0.05)
    return future.result()


def _exit_after_save(stop: StopRequest, progress: Progress, directory: Path | None) -> NoReturn:
    progress.stopped(directory and resume_command(directory))
    stop.leave()


def _with_resume_command(error: HostCallError, directory: Path | None) -> HostCallError:
    if directory is None:
        return error
    return HostCallError(f"{error}; to resume: {resume_command(directory)}")


def _open_loggers(
    session: Session, columns: Sequence[str], own: Sequence[Logger]
) -> list[RowLogger]:
    directory, settings, start = session.directory, session.settings, session.start
    loggers: list[RowLogger] = [UserLogger(logger) for logger in own if is_first()]
    if start.checkpoint is not None and start.position.columns != tuple(columns):
        raise ConfigError(
            f"{str(directory)!r}: was logged with the metrics {', '.join(start.position.columns)}, "
            f"but an update now returns {', '.join(columns)}; use the parts of the original run"
        )
    if directory is None or session.held is None:
        return loggers
    session.held.check()
    try:
        kind = BinaryLogger if settings.trials else CsvLogger
        loggers.insert(0, kind(directory, columns, start.position.metrics_bytes))
        if settings.run.tensorboard:
            done = start.position.updates * settings.config.batch_size
            hide_after = done if start.resumed else None
            loggers.append(TensorBoardLogger(directory, settings.run.num_seeds, hide_after))
        if settings.run.wandb:
            loggers.append(WandbLogger(directory, vars(settings.config) | vars(settings.hparams)))
    except OSError as error:
        raise cannot_log(directory, error) from error
    return loggers


def _named_loggers(settings: RunSettings, directory: Path | None) -> list[Logger]:
    """Make the loggers that the settings name. Raises `ConfigError` if one is not a logger."""
    found = []
    for reference in settings.loggers if is_first() else ():
        logger = resolve("loggers", reference)
        if isinstance(logger, type) or not hasattr(logger, "write"):
            logger = called("loggers", logger, directory)
        if not (hasattr(logger, "write") and hasattr(logger, "close")):
            raise ConfigError(
                f"loggers = {reference!r}: is not a logger; it needs the methods write and "
                "close, see ppo.Logger"
            )
        found.append(logger)
    return found
