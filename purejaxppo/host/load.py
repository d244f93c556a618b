"""Trained states, from a run directory."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import jax

from purejaxppo.checks import is_reference
from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host import checkpoint, checkpoints
from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.configfile import Settings, load_settings
from purejaxppo.host.program import stacked_hparams
from purejaxppo.host.rundir import CONFIG, SUMMARY, RunWarning
from purejaxppo.inputs import whole_number
from purejaxppo.task import PartArguments, Task, make_task, own_class
from purejaxppo.types import Learner, TrainState


class Loaded(NamedTuple):
    """What `load` gives back."""

    config: Config
    hparams: HParams
    state: TrainState


def load(
    run_dir: str | Path,
    task: Task | None = None,
    *,
    seed: int | None = 0,
    which: Literal["newest", "best"] | int = "newest",
    env: Any = None,
    env_params: Any = None,
    **parts: Unpack[PartArguments],
) -> Loaded:
    """The settings and the state of a run, finished or not, as its checkpoint holds them.

    Damaged checkpoints are skipped with a warning. Modules that `config.toml` names (parts of your
    own) are imported; nothing else that is read runs any code.

    Args:
        task: the task passed to `run`, if one was.
        seed: which of the runs trained side by side, counted from 0 (in a wave of a sweep those of
            one trial after those of another); None gives all, leaves `[S, ...]`.
        which: the newest checkpoint, the best by evaluation, or the one after that many updates.
        env, env_params, parts: those passed to `run`, if any were.

    Raises:
        ConfigError: if there is no such checkpoint or seed, or it belongs to a different task.
    """
    given = {"env": env, "env_params": env_params, **parts}
    found, states = find_states(Path(run_dir), which, lambda x: task_of(x, task, given))
    settings = found.settings
    if seed is not None and whole_number("seed", seed, 0) >= settings.num_trainings:
        raise ConfigError(
            f"seed = {seed}: the run has the seeds 0 to {settings.num_trainings - 1}, counted "
            "from 0 whatever its `seed` setting"
        )
    state = states if seed is None else jax.tree.map(lambda x: x[seed], states)
    hparams = settings.hparams
    if settings.trials and seed is not None:
        hparams = settings.trials[seed // settings.run.num_seeds]
    return Loaded(settings.config, hparams, state)


def find_states(
    run_dir: Path, which: str | int, task: Callable[[Settings], Task]
) -> tuple[Checkpoint, TrainState]:
    """A checkpoint and its states `[S, ...]`, also of a run that is removing older checkpoints.

    Checkpoints that belong to a different run than `config.toml` are skipped if there are others.

    Args:
        task: makes the task for a checkpoint's settings.

    Raises:
        ConfigError: as `load`.
    """
    while True:
        found = _of_this_run(run_dir, which)
        with checkpoints.pinned(found.path) as there:
            if there:
                _check_references(run_dir, found)
                made = task(found.settings)
                return found, restore_states(found, made.learner(None), made)


def _check_references(run_dir: Path, found: Checkpoint) -> None:
    """Only `config.toml`, which people read and write, may name modules to import."""
    named = {k: v for k, v in vars(found.settings.config).items() if _is_reference(v)}
    own = vars(load_settings(run_dir / CONFIG).config) if named else {}
    for name, reference in named.items():
        if own.get(name) != reference:
            raise ConfigError(
                f"checkpoint {str(found.path)!r}: names {name} = {reference!r}, and {CONFIG} has "
                f"{own.get(name)!r}; change {CONFIG} if you trust that module"
            )


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and is_reference(value)


def _of_this_run(run_dir: Path, which: str | int) -> Checkpoint:
    try:
        settings = load_settings(run_dir / CONFIG)
        return find_with_warnings(run_dir, which, lambda x: checkpoint.check_same_run(x, settings))
    except ConfigError:
        return find_with_warnings(run_dir, which)


def find_with_warnings(
    run_dir: Path,
    which: str | int = "newest",
    check: Callable[[Checkpoint], Any] | None = None,
) -> Checkpoint:
    """`checkpoints.find`, with a warning for each that had to be skipped."""
    try:
        there = run_dir.is_dir()
    except OSError as error:
        raise ConfigError(f"run directory {str(run_dir)!r}: {error.strerror}") from error
    if not there:
        raise ConfigError(f"run directory {str(run_dir)!r}: does not exist; check the path")
    found, skipped = checkpoints.find(run_dir, which, check)
    _warn(skipped)
    return found


def newest_or_none(run_dir: Path, check: Callable[[Checkpoint], Any]) -> Checkpoint | None:
    """The newest complete checkpoint to resume from; None if the run was killed before its first.

    Args:
        check: raises `ConfigError` for a checkpoint to be skipped.

    Raises:
        ConfigError: if there are checkpoints but all are skipped, or the run was finished.
    """
    if checkpoints.has_any(run_dir):
        return find_with_warnings(run_dir, check=check)
    if (run_dir / SUMMARY).exists():
        raise ConfigError(
            f"run directory {str(run_dir)!r}: the run was finished, and its checkpoints are gone; "
            "put them back, or begin a new run"
        )
    _warn([f"{p}: an unfinished save" for p in checkpoints.unfinished(run_dir)])
    return None


def restore_states(found: Checkpoint, learner: Learner, task: Task) -> TrainState:
    """The states `[S, ...]` of a checkpoint.

    Raises:
        ConfigError: if the learner's states have other shapes.
    """
    settings = found.settings

    def init() -> TrainState:
        keys = jax.random.split(jax.random.key(0), settings.num_trainings)
        start = jax.vmap(learner.init, in_axes=(0, 0, None))
        return start(keys, stacked_hparams(settings), task.data)

    return checkpoint.restore(found, init)


def task_of(settings: Settings, task: Task | None, given: dict[str, Any]) -> Task:
    """The task of a saved run.

    Args:
        task: one passed from Python, or None.
        given: parts passed from Python, by name; None for those that were not.

    Raises:
        ConfigError: if other parts were passed than to the run, or as `make_task`.
    """
    given = {name: part for name, part in given.items() if part is not None}
    if task is not None and given:
        raise ConfigError(f"{', '.join(given)}: given beside a task, whose parts are fixed")
    passed = set(given if task is None else task.passed)
    for name in sorted(set(settings.run.passed) - passed):
        raise ConfigError(
            f"{name}: was passed from Python to the run, so it must be passed again: "
            f"purejaxppo.resume and purejaxppo.load take {name}=..."
        )
    for name in sorted(passed - set(settings.run.passed)):
        raise ConfigError(
            f"{name}: was not passed to the run, which is of {settings.config.label}; leave it out"
        )
    if task is not None:
        return task.with_config(settings.config)
    return make_task(settings.config, hparams=own_class(settings.hparams), **given)


def _warn(skipped: list[str]) -> None:
    for line in skipped:
        warnings.warn(f"skipped {line}", RunWarning, stacklevel=4)
