"""The host loop: compile once, train in chunks of about half a second, write the results."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import numpy as np

from purejaxppo.config import Config, ConfigError, HParams, check_fields
from purejaxppo.evaluation import FRESH_EVALUATION
from purejaxppo.host.checkpoint import (
    Checkpoint,
    Position,
    check_same_run,
    has_any,
    ranked_by_return,
)
from purejaxppo.host.configfile import RunSettings, Settings, load_settings
from purejaxppo.host.evaluations import evaluation_curve
from purejaxppo.host.load import check_env, find_with_warnings, newest_or_none, restore_states
from purejaxppo.host.loggers import (
    COLUMNS,
    CSV_COLUMNS,
    AppendedLogger,
    BinaryLogger,
    CsvLogger,
    HostMetrics,
    Logger,
    TensorBoardLogger,
    WandbLogger,
    close_all,
    read_metrics,
    require,
)
from purejaxppo.host.memory import check_memory, check_program, memory_in_words
from purejaxppo.host.parallel import (
    choose_spread,
    describe_devices,
    needs_all_threads,
    use_all_cores,
    with_devices,
)
from purejaxppo.host.processes import agree, is_first
from purejaxppo.host.program import (
    CHUNK_CAPACITY,
    Evaluation,
    Prepared,
    Program,
    compile_program,
    enable_compilation_cache,
    stacked_hparams,
)
from purejaxppo.host.progress import Progress
from purejaxppo.host.rundir import (
    CONFIG,
    CURVE,
    SUMMARY,
    DamagedError,
    Held,
    RunWarning,
    StorageError,
    locked,
    new_run,
    old_run,
    resume_command,
    unsealed,
    write_settings,
)
from purejaxppo.host.saver import Saver
from purejaxppo.host.signals import StopRequest, stop_requests
from purejaxppo.host.summary import Best, Final, Training, draw_curve, summarize, write_results
from purejaxppo.inputs import check_config, check_hparams
from purejaxppo.learner import MUST_BE_FINITE, make_learner
from purejaxppo.types import Learner, Metrics, TrainState

CHUNK_SECONDS = 0.5
_NOTHING, _SAVE, _SAVE_AND_EVALUATE = range(3)


@dataclass(frozen=True)
class Result:
    """What `run` gives back."""

    states: TrainState
    """Leaves `[S, ...]`; of a seed that failed, its last good state."""
    metrics: dict[str, np.ndarray]
    """`[S, U]`; NaN after a seed has failed."""
    returns: np.ndarray
    """`[S, eval_episodes]` returns of the final evaluation with sampled actions, NaN for an episode
    that did not end; `[S, 0]` if nothing was evaluated (a run that was finished already, or any
    process but the first)."""
    returns_deterministic: np.ndarray
    """The same with the policy's most likely actions."""
    summary: dict[str, Any]
    """What `summary.json` holds."""
    failed: dict[int, int]
    """Seeds whose loss turned non-finite, and the update at which it did."""


def run(
    config: Config,
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
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
) -> Result:
    """Train `num_seeds` times side by side, evaluate, and write it all down.

    SIGTERM or SIGINT makes it save and leave by `SystemExit(143)` or `KeyboardInterrupt` once the
    updates under way are done, which takes about half a second; `resume` goes on from there.

    Where `jax.distributed` has joined several processes, all of them call this with the same
    arguments; the first evaluates and writes, the others get no returns.

    Args:
        run_dir: directory for `config.toml`, `metrics.csv`, `eval.csv`, `summary.json`,
            `learning_curve.png` and `checkpoints/`; None writes nothing.
        devices: how many to spread over: the seeds, each of which comes out as it would alone, and
            where there are more devices than seeds the environments of each, which then learns
            from minibatches made of equal parts. 0 takes as many as divide several seeds.
        eval_episodes: episodes of each evaluation, per seed.
        eval_every: interval between evaluations, in `eval_unit`s; each also saves a checkpoint, of
            which the best stays. inf evaluates each checkpoint and the end of the run.
        checkpoint_every: how often the whole state is saved, in `checkpoint_unit`s; inf saves only
            where the run ends or is stopped.
        keep: newest checkpoints that are kept, beside the best by evaluation.
        tensorboard: write event files under `run_dir/tensorboard/` too.
        wandb: log to Weights & Biases too.
        compilation_cache: keep compiled programs in the user's cache folder, for this process
            from here on; a folder that JAX was already told to use is left as it is.
        progress: show how far it is on standard output.
        env: an object that keeps gymnax 1.x's contract, in place of the one that
            `config.env_id` names.
        env_params: its parameters; None takes its defaults.

    Raises:
        ConfigError: before anything is compiled or written, if a setting cannot work, or
            `run_dir` already holds a run, is written by another process or cannot be written.
        StorageError: if metrics or the last checkpoint cannot be written (a full disk).
    """
    host = RunSettings(
        seed=seed, num_seeds=num_seeds, devices=devices, eval_episodes=eval_episodes,
        eval_every=eval_every, eval_unit=eval_unit, checkpoint_every=checkpoint_every,
        checkpoint_unit=checkpoint_unit, keep=keep, tensorboard=tensorboard, wandb=wandb,
        custom_env=env is not None or env_params is not None,
    )  # fmt: skip
    check_config(config, "run")
    settings = Settings(config, HParams() if hparams is None else hparams, host)
    return run_settings(
        settings, run_dir, compilation_cache=compilation_cache, progress=progress, env=env,
        env_params=env_params,
    )  # fmt: skip


def run_settings(
    settings: Settings,
    run_dir: str | Path | None,
    *,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
) -> Result:
    """`run`, for settings as a file gives them."""
    check_scalars(settings.hparams, "run")
    if settings.trials:
        raise ConfigError("trials: this is a part of a sweep; see its sweep.toml")
    _check_outputs(run_dir, settings.run)
    use_all_cores()
    learner = make_learner(settings.config, env, env_params)
    settings = with_devices(settings, env, env_params)
    with ExitStack() as stack:
        directory = None if run_dir is None else Path(run_dir)
        held = None
        if directory is not None and is_first():
            held = stack.enter_context(new_run(directory, settings))
        start = _Start(Position(0), None, None, None)
        shown = Progress(settings, 0, enabled=progress and is_first())
        last = settings.config.num_updates
        session = _Session(settings, learner, directory, held, start, shown, env, env_params, last)
        return _go(session, compilation_cache)


class Leg(NamedTuple):
    """From which update to which a wave is trained."""

    first: int
    last: int
    states: Callable[[], TrainState] | None = None
    """Of all trainings after `first` updates; None begins them."""


def run_wave(
    settings: Settings,
    directory: Path | None,
    prepared: Prepared,
    leg: Leg,
    shown: Progress,
    *,
    env: Any = None,
    env_params: Any = None,
) -> Result:
    """Train the trials of `settings` side by side by programs that were compiled for as many, or
    go on with that where `directory` holds a part of it already.

    Metrics are written as `metrics.f32`, and checkpoints are not evaluated.

    Raises:
        ConfigError: as `resume`.
        StorageError: as `run`.
    """
    learner = prepared.learner
    start = _Start(Position(leg.first), None, None, None)
    with ExitStack() as stack:
        held = None
        if directory is not None and has_any(directory) and not (directory / CONFIG).exists():
            with locked(directory) as own:
                write_settings(own, settings)
        if directory is not None and (directory / CONFIG).exists():
            held = stack.enter_context(old_run(directory))
            start = _restore(directory, settings, learner)
        elif directory is not None:
            held = stack.enter_context(new_run(directory, settings))
        if start.states is None and leg.states is not None:
            start = _Start(Position(leg.first), leg.states(), None, None)
        session = _Session(
            settings, learner, directory, held, start, shown, env, env_params, leg.last, prepared
        )
        return _go(session, compilation_cache=False)


def resume(
    run_dir: str | Path,
    *,
    total_timesteps: int | None = None,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
) -> Result:
    """Continue a run that was stopped or killed, from its newest complete checkpoint.

    It ends with the results of an undisturbed run, bit for bit. A run killed before its first
    checkpoint starts from the beginning; a finished one is left as it is, and its results are
    returned.

    Args:
        total_timesteps: new length of the run, which may be finished. From here on schedules run
            over the new length, so a linear learning rate rises again to what is left of it.
        env: the object passed to `run`, if one was.
        env_params: its parameters, if they were passed to `run`.

    Raises:
        ConfigError: if there is no run, another process writes there, no checkpoint is whole, or
            `config.toml` was changed to another training.
        StorageError: as `run`.
    """
    directory = Path(run_dir)
    use_all_cores()
    with old_run(directory) if is_first() else nullcontext() as held:
        settings = load_settings(directory / CONFIG)
        if total_timesteps is not None:
            config = dataclasses.replace(settings.config, total_timesteps=total_timesteps)
            settings = dataclasses.replace(settings, config=config)
        check_env(settings, env, env_params)
        if settings.trials:
            raise ConfigError(
                f"run_dir = {str(directory)!r}: is a part of a sweep; to resume the sweep: "
                f"{resume_command(directory)}"
            )
        _check_outputs(directory, settings.run)
        learner = make_learner(settings.config, env, env_params)
        choose_spread(settings)
        start = _restore(directory, settings, learner)
        if total_timesteps is not None and start.checkpoint is not None:
            _check_some_left(start.checkpoint)
        shown = Progress(settings, start.position.updates, enabled=progress and is_first())
        if (summary := _summary_if_finished(directory, start, settings)) is not None:
            if start.metrics is not None and not (directory / CURVE).exists():
                draw_curve(directory, settings, start.metrics["episode_return"].T)
            shown.already_finished(summary, resume_command(directory))
            return _finished_result(start, summary)
        if held is not None:
            write_settings(held, settings)
        last = settings.config.num_updates
        session = _Session(settings, learner, directory, held, start, shown, env, env_params, last)
        return _go(session, compilation_cache)


def _check_some_left(found: Checkpoint) -> None:
    if len(found.position.failed) == found.settings.num_trainings:
        raise ConfigError(
            f"{str(found.path)!r}: the loss of every seed turned non-finite, so no seed can be "
            "trained longer; start a new run with a lower learning_rate or max_grad_norm"
        )


class _Start(NamedTuple):
    """Where training begins: anew, or where a checkpoint was made."""

    position: Position
    states: TrainState | None
    metrics: HostMetrics | None
    """`[U, S]` of the updates done."""
    checkpoint: Checkpoint | None
    again: bool = False
    """Whether an earlier process has begun this run."""


class _Session(NamedTuple):
    """One process's part of a run."""

    settings: Settings
    learner: Learner
    directory: Path | None
    held: Held | None
    """The directory, in the process that writes there."""
    start: _Start
    shown: Progress
    env: Any
    env_params: Any
    last: int
    """Updates to train up to."""
    prepared: Prepared | None = None
    """What was compiled already, for a wave of a sweep."""


def _restore(directory: Path, settings: Settings, learner: Learner) -> _Start:
    """From the newest checkpoint that belongs to this run and whose metrics are complete."""
    config, metrics = settings.config, {}

    def check(found: Checkpoint) -> None:
        check_same_run(found, settings)
        if config.num_updates >= found.position.updates:
            metrics[found.path] = read_metrics(directory, found.position, settings)

    found = newest_or_none(directory, check)
    if found is None:
        return _Start(Position(0), None, None, None, again=True)
    position = found.position
    if config.num_updates < position.updates:
        raise ConfigError(
            f"total_timesteps = {config.total_timesteps}: {position.updates * config.batch_size} "
            "environment steps are trained already; give at least as many"
        )
    if config.total_timesteps != found.settings.config.total_timesteps:
        change = (position.updates, config.total_timesteps)
        position = dataclasses.replace(position, extended=(*position.extended, change))
    return _Start(position, restore_states(found, learner), metrics[found.path], found, again=True)


def _summary_if_finished(
    directory: Path, start: _Start, settings: Settings
) -> dict[str, Any] | None:
    """What `summary.json` holds if it is of the run as it is now, trained to its end."""
    try:
        summary = unsealed(directory / SUMMARY)
        done, planned = int(summary["env_steps"]), int(summary["env_steps_planned"])
        len(summary["failed_seeds"])
    except (DamagedError, ValueError, TypeError, LookupError, OverflowError):
        return None
    config, position = settings.config, start.position
    ended = position.updates == config.num_updates or (
        len(position.failed) == settings.num_trainings
    )
    current = done == position.updates * config.batch_size
    whole = planned == config.num_updates * config.batch_size
    return summary if start.states is not None and ended and current and whole else None


def _finished_result(start: _Start, summary: dict[str, Any]) -> Result:
    assert start.states is not None
    assert start.metrics is not None
    metrics = {name: values.T for name, values in start.metrics.items()}
    nothing = np.zeros((len(next(iter(metrics.values()))), 0))
    return Result(start.states, metrics, nothing, nothing, summary, start.position.failed)


def check_scalars(hparams: Any, function: str) -> None:
    """Raise `ConfigError` if it is no `HParams`, or a number is an array: those are for `vmap`."""
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


def _open_loggers(session: _Session) -> list[Logger]:
    directory, settings, start = session.directory, session.settings, session.start
    if directory is None or session.held is None:
        return []
    session.held.check()
    try:
        kind = BinaryLogger if settings.trials else CsvLogger
        loggers: list[Logger] = [kind(directory, start.position.metrics_bytes)]
        if settings.run.tensorboard:
            done = start.position.updates * settings.config.batch_size
            hide_after = done if start.again else None
            loggers.append(TensorBoardLogger(directory, settings.run.num_seeds, hide_after))
        if settings.run.wandb:
            loggers.append(WandbLogger(directory, vars(settings.config) | vars(settings.hparams)))
    except OSError as error:
        raise _cannot_log(directory, error) from error
    return loggers


def _cannot_log(directory: Path | None, error: OSError) -> StorageError:
    directory = directory or Path()
    return StorageError(
        f"{str(directory)!r}: metrics cannot be written: {error.strerror}; free space, then: "
        f"{resume_command(directory)}"
    )


def _go(session: _Session, compilation_cache: bool) -> Result:
    """Compile, train, evaluate, write."""
    settings, directory, start = session.settings, session.directory, session.start
    if compilation_cache:
        enable_compilation_cache()
    shown = session.shown
    with ExitStack() as stack, memory_in_words(settings):
        stop = stack.enter_context(stop_requests())
        loggers = _open_loggers(session)
        stack.callback(close_all, loggers)
        stack.callback(shown.close)
        shown.starting(start.checkpoint, start.again, describe_devices(settings))
        program, evaluation, compile_seconds = _compile(session)
        saver = None
        if directory is not None:
            later = None if settings.trials else evaluation
            saver = Saver(directory, settings, later, start.checkpoint, stop, held=session.held)
            stack.callback(saver.close)
        if _agreed(stop):
            _exit_after_save(stop, shown, directory)
        shown.training(compile_seconds)
        loop = _Loop(session, program, loggers, saver, shown, stop)
        training = loop.train()
        shown.close()
        saved = None if saver is None else saver.finish(training.position, loop.states)
        if stop:
            _exit_after_save(stop, shown, directory)
        with shown.working("evaluating"):
            final = _evaluate_at_end(session, evaluation, training.states, stop)
            if final is None:
                _exit_after_save(stop, shown, directory)
            best = None
            if saver is not None and saved is not None and is_first():
                saver.record(saved, final.sampled, final.deterministic)
                best = _best_checkpoint(session, evaluation, training, stop)
        if stop:
            _exit_after_save(stop, shown, directory)
    summary = summarize(settings, training, final, compile_seconds, best)
    _warn_of_unfinished(summary, final)
    if directory is not None and session.held is not None:
        session.held.check()
        write_results(directory, settings, training, summary)
    shown.finished(summary, directory)
    return Result(
        training.states, training.metrics, final.sampled,
        np.zeros_like(final.sampled[:, :0]) if final.deterministic is None else final.deterministic,
        summary, training.position.failed,
    )  # fmt: skip


def _warn_of_unfinished(summary: dict[str, Any], final: Final) -> None:
    unfinished = summary["unfinished_eval_episodes"]
    if unfinished:
        warnings.warn(
            f"{unfinished} of {final.sampled.size} evaluation episodes did not end within the "
            "environment's time limit, or 10,000 steps if it states none, and are left out of the "
            "means; give the environment a time limit (max_steps_in_episode)",
            RunWarning,
            stacklevel=3,
        )


def _compile(session: _Session) -> tuple[Program, Any, float]:
    """The programs of a run, and the seconds that compiling them took."""
    if session.prepared is not None:
        return session.prepared.program, session.prepared.evaluation, 0.0
    began = time.perf_counter()
    check_memory(session.settings, session.learner)
    evaluation = Evaluation(session.settings, session.env, session.env_params)
    with session.shown.working("compiling"):
        program = compile_program(
            session.settings, session.env, session.env_params,
            fresh=session.start.states is None, evaluation=evaluation if is_first() else None,
        )  # fmt: skip
    check_program(session.settings, program)
    return program, evaluation, time.perf_counter() - began


def _evaluate_at_end(
    session: _Session, evaluation: Any, states: TrainState, stop: StopRequest
) -> Final | None:
    """None if asked to stop before it was done."""
    if not is_first():
        return Final(np.zeros((session.settings.num_trainings, 0)), None)
    sampled = _unless_stopped(stop, partial(evaluation, states))
    if sampled is None or session.settings.trials:
        return sampled if sampled is None else Final(sampled, None)
    deterministic = _unless_stopped(stop, partial(evaluation, states, deterministic=True))
    return None if deterministic is None else Final(sampled, deterministic)


def _best_checkpoint(
    session: _Session, evaluation: Any, training: Training, stop: StopRequest
) -> Best | None:
    """The best checkpoint, and its returns over fresh episodes if it was chosen among several: the
    highest of several estimates is too high."""
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
    if not same and jax.process_count() > 1:  # reading a checkpoint takes all processes
        return Best(found, None)
    states = training.states if same else restore_states(found, session.learner)
    fresh = partial(evaluation, states, purpose=FRESH_EVALUATION)
    return Best(found, _unless_stopped(stop, fresh))


def _unless_stopped(stop: StopRequest, evaluation: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The evaluation's returns; None at once if asked to stop, since Python hears of signals only
    between calls into compiled code."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
    future = pool.submit(evaluation)
    pool.shutdown(wait=False)
    while not future.done():
        if stop:
            return None
        wait([future], timeout=0.05)
    return future.result()


def _agreed(stop: StopRequest) -> bool:
    """Whether any process was asked to stop; then each of them takes it as asked of itself. A
    signal amid this exchange, of which the others do not know, counts at the next."""
    asked = int(agree(stop.signum or 0).max())
    stop.signum = stop.signum or asked or None
    return bool(asked)


def _exit_after_save(stop: StopRequest, shown: Progress, directory: Path | None) -> NoReturn:
    shown.stopped(directory and resume_command(directory))
    stop.leave()


@dataclass
class _Loop:
    """Chunks of updates, and what is done between them."""

    session: _Session
    program: Program
    loggers: list[Logger]
    saver: Saver | None
    shown: Progress
    stop: StopRequest

    def __post_init__(self) -> None:
        start = self.session.start
        self.done, self.failed = start.position.updates, dict(start.position.failed)
        self.parts = [] if start.metrics is None else [start.metrics]

    def train(self) -> Training:
        """To the end, until no seed is left that goes well, or until asked to stop; one chunk at
        least, if there is anything left to do."""
        start, num_updates = self.session.start, self.session.last
        self.last_save = self.last_evaluation = time.perf_counter()
        self.began = self.last_save - start.position.run_seconds
        hparams = stacked_hparams(self.session.settings)
        states = start.states if start.states is not None else self.program.begin(hparams)
        found = start.checkpoint
        if found is not None and found.eval_return is None and self.done < num_updates:
            self._make_up_for(found, states)
        count, alone = 1, needs_all_threads(self.session.settings)
        while self.done < num_updates and self._alive().any():
            if alone and self.parts and self._stopped_while_evaluating():
                break
            count = min(count, num_updates - self.done, CHUNK_CAPACITY, self._until_due())
            first = self.done == start.position.updates
            began = time.perf_counter()
            states, rows = self.program.chunk(states, hparams, count)
            metrics = _columns(rows, count)
            seconds = time.perf_counter() - began
            self._take(metrics)
            fitting = max(1, int(count * CHUNK_SECONDS / seconds))
            count = min(fitting, 2) if first else fitting  # the first call has one-off overhead
            # Clocks and signals are each process's own, and none may do what the others do not.
            count, due = map(int, agree(count, self._what_is_due())[0])
            if _agreed(self.stop):
                break
            if due:
                self._save(states, evaluate=due == _SAVE_AND_EVALUATE)
        names = [name for name in CSV_COLUMNS if all(name in part for part in self.parts)]
        joined = {name: np.concatenate([part[name] for part in self.parts]).T for name in names}
        whole = self.program.gather(states)
        self.states = states if jax.process_count() > 1 else whole
        """To be saved: with several processes, each one's part."""
        return Training(whole, joined, self._position())

    def _stopped_while_evaluating(self) -> bool:
        """Wait for a checkpoint's evaluation; return True if a stop was requested meanwhile."""
        if self.saver is not None:
            self.saver.wait()
        return _agreed(self.stop)

    def _alive(self) -> np.ndarray:
        alive = np.ones(self.session.settings.num_trainings, bool)
        alive[list(self.failed)] = False
        return alive

    def _take(self, metrics: HostMetrics) -> None:
        """Check, log and show the metrics `[u, S]` of the updates that follow."""
        prepared = self.session.prepared
        if prepared is not None and prepared.population:
            written = self._take_population(metrics)
        else:
            written, bad = _finite_rows(metrics, self._alive())
            for seed, row in bad.items():
                self.failed[seed] = self.done + row + 1
                self.shown.failed(seed, self.failed[seed])
        seconds = time.perf_counter() - self.began
        metrics["seconds"] = np.full(written.shape, round(seconds, 3))
        self.parts.append({k: np.where(written, v, np.nan) for k, v in metrics.items()})
        try:
            for logger in self.loggers:
                logger.write(self.done + 1, metrics, written)
        except OSError as error:
            raise _cannot_log(self.session.directory, error) from error
        self._check_episodes(metrics)
        self.done += len(written)
        self.shown.update(self.done, self.parts[-1]["episode_return"])

    def _take_population(self, metrics: HostMetrics) -> np.ndarray:
        """Which rows `[u, S]` are of updates that were kept. A member of a population counts as
        failed only until an exchange replaces it."""
        kept = _kept_rows(metrics)
        before = np.vstack([self._alive(), kept])[:-1]
        for row, seed in zip(*np.nonzero(before & ~kept), strict=True):
            self.failed[int(seed)] = self.done + int(row) + 1
            self.shown.failed(int(seed), self.failed[int(seed)])
        self.failed = {seed: update for seed, update in self.failed.items() if not kept[-1, seed]}
        return kept

    def _check_episodes(self, metrics: HostMetrics) -> None:
        config = self.session.settings.config
        if config.whole_episodes and not np.any(metrics["episodes"]):
            warnings.warn(
                f"no episode finished within num_steps = {config.num_steps} in these updates, and "
                f"objective = {config.objective} learns from finished episodes only; increase "
                "num_steps, or use objective = a2c",
                RunWarning,
                stacklevel=2,
            )

    def _until_due(self) -> int:
        """Updates left to the next checkpoint or evaluation that is due at a number of updates."""
        run = self.session.settings.run
        left = [CHUNK_CAPACITY]
        for every, unit in (
            (run.checkpoint_every, run.checkpoint_unit), (run.eval_every, run.eval_unit)
        ):  # fmt: skip
            if unit == "updates" and math.isfinite(every):
                left.append(int(every - self.done % every))
        return min(left)

    def _make_up_for(self, found: Checkpoint, states: TrainState) -> None:
        """Evaluate the checkpoint that training continues from, if a kill prevented that."""
        run = self.session.settings.run
        regular = math.isfinite(run.eval_every) and run.eval_unit == "updates"
        if self.saver is not None and (not regular or self.done % run.eval_every == 0):
            self.saver.evaluate(found, states)

    def _what_is_due(self) -> int:
        """Nothing, a checkpoint, or one that is evaluated. At the end both are done anyway."""
        saver = self.saver
        if saver is None:
            return _NOTHING
        saver.report()
        if self.done == self.session.last:
            return _NOTHING
        run, now = self.session.settings.run, time.perf_counter()

        def due(every: float, unit: str, last: float) -> bool:
            if unit == "updates":
                return self.done % every == 0
            return not saver.busy and now - last >= every

        if due(run.eval_every, run.eval_unit, self.last_evaluation):
            return _SAVE_AND_EVALUATE
        if not due(run.checkpoint_every, run.checkpoint_unit, self.last_save):
            return _NOTHING
        return _SAVE if math.isfinite(run.eval_every) else _SAVE_AND_EVALUATE

    def _save(self, states: TrainState, evaluate: bool) -> None:
        whole = self.program.gather(states)
        if self.saver is not None:
            several = jax.process_count() > 1
            self.saver.start(self._position(), states if several else whole, whole, evaluate)
        self.last_save = time.perf_counter()
        if evaluate:
            self.last_evaluation = self.last_save

    def _position(self) -> Position:
        start = self.session.start.position
        seconds = time.perf_counter() - self.began
        rows = next((x for x in self.loggers if isinstance(x, AppendedLogger)), None)
        try:
            size, digest = rows.sync() if rows else (0, "")
        except OSError as error:
            raise _cannot_log(self.session.directory, error) from error
        return Position(self.done, size, digest, seconds, dict(self.failed), start.extended)


def _columns(rows: Metrics, count: int) -> HostMetrics:
    """The first `count` of metrics `[u, S]`; NaN for those that the objective does not have."""
    found = {name: np.asarray(values)[:count] for name, values in rows.items()}
    none = np.full_like(found["policy_loss"], np.nan)
    return {name: found.get(name, none) for name in COLUMNS}


def _finite_rows(metrics: HostMetrics, alive: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Which rows `[u, S]` belong to a training that goes well, its first bad one included, and
    the first bad row of each seed that has one."""
    finite = _kept_rows(metrics)
    good_before = np.cumsum(~finite, axis=0) - ~finite == 0
    bad = {int(s): int(np.argmin(finite[:, s])) for s in np.flatnonzero(alive & ~finite.all(0))}
    return good_before & alive, bad


def _kept_rows(metrics: HostMetrics) -> np.ndarray:
    """Which rows `[u, S]` are of updates that the learner kept."""
    return np.all([np.isfinite(metrics[name]) for name in MUST_BE_FINITE], axis=0)
