"""Trained states, from a run directory."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from purejaxppo.config import Config, ConfigError, HParams
from purejaxppo.host import checkpoint
from purejaxppo.host.checkpoint import Checkpoint
from purejaxppo.host.configfile import Settings, load_settings
from purejaxppo.host.program import stacked_hparams
from purejaxppo.host.rundir import CONFIG, SUMMARY, RunWarning
from purejaxppo.inputs import whole_number
from purejaxppo.learner import make_learner
from purejaxppo.types import Learner, TrainState


class Loaded(NamedTuple):
    """What `load` gives back."""

    config: Config
    hparams: HParams
    state: TrainState


def load(
    run_dir: str | Path,
    *,
    seed: int | None = 0,
    which: Literal["newest", "best"] | int = "newest",
    env: Any = None,
    env_params: Any = None,
) -> Loaded:
    """The settings and the state of a run, finished or not, as its checkpoint holds them.

    Damaged checkpoints are skipped with a warning. No code is ever run from what is read.

    Args:
        seed: which of the trainings that ran side by side, counted from 0 (in a wave of a sweep
            those of one trial after those of another); None gives all, leaves `[S, ...]`.
        which: the newest checkpoint, the best by evaluation, or the one after so many updates.
        env: the object passed to `run`, if one was.
        env_params: its parameters, if they were passed to `run`.

    Raises:
        ConfigError: if there is no such checkpoint or seed, or it is of another environment.
    """

    def learner(settings: Settings) -> Learner:
        check_env(settings, env, env_params)
        return make_learner(settings.config, env, env_params)

    found, states = find_states(Path(run_dir), which, learner)
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
    run_dir: Path, which: str | int, learner: Callable[[Settings], Learner]
) -> tuple[Checkpoint, TrainState]:
    """A checkpoint and its states `[S, ...]`, also of a run that is removing older checkpoints.

    Checkpoints that belong to a different run than `config.toml` are skipped if there are others.

    Args:
        learner: makes the learner for a checkpoint's settings.

    Raises:
        ConfigError: as `load`.
    """
    while True:
        found = _of_this_run(run_dir, which)
        with checkpoint.pinned(found.path) as there:
            if there:
                return found, restore_states(found, learner(found.settings))


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
    """`checkpoint.find`, with a warning for each that had to be skipped."""
    try:
        there = run_dir.is_dir()
    except OSError as error:
        raise ConfigError(f"run directory {str(run_dir)!r}: {error.strerror}") from error
    if not there:
        raise ConfigError(f"run directory {str(run_dir)!r}: does not exist; check the path")
    found, skipped = checkpoint.find(run_dir, which, check)
    _warn(skipped)
    return found


def newest_or_none(run_dir: Path, check: Callable[[Checkpoint], Any]) -> Checkpoint | None:
    """The newest complete checkpoint to resume from; None if the run was killed before its first.

    Args:
        check: raises `ConfigError` for a checkpoint to be skipped.

    Raises:
        ConfigError: if there are checkpoints but all are skipped, or the run was finished.
    """
    if checkpoint.has_any(run_dir):
        return find_with_warnings(run_dir, check=check)
    if (run_dir / SUMMARY).exists():
        raise ConfigError(
            f"run directory {str(run_dir)!r}: the run was finished, and its checkpoints are gone; "
            "put them back, or begin a new run"
        )
    _warn([f"{p}: an unfinished save" for p in checkpoint.unfinished(run_dir)])
    return None


def restore_states(found: Checkpoint, learner: Learner) -> TrainState:
    """The states `[S, ...]` of a checkpoint.

    Raises:
        ConfigError: if the learner's states have other shapes.
    """
    settings = found.settings

    def init() -> TrainState:
        keys = jax.random.split(jax.random.key(0), settings.num_trainings)
        return jax.vmap(learner.init)(keys, stacked_hparams(settings))

    return checkpoint.restore(found, init)


def check_env(settings: Settings, env: Any, env_params: Any) -> None:
    """Raise `ConfigError` if the run was on an environment passed from Python and none is given,
    or the other way about."""
    given = env is not None or env_params is not None
    if settings.run.custom_env and not given:
        raise ConfigError(
            "run.custom_env = true: the environment or its parameters were passed from Python, so "
            "they have to be passed again: purejaxppo.resume and purejaxppo.load take env and "
            "env_params"
        )
    if given and not settings.run.custom_env:
        raise ConfigError(
            f"env: the run was on {settings.config.env_id} by its name; leave out env and "
            "env_params"
        )


def _warn(skipped: list[str]) -> None:
    for line in skipped:
        warnings.warn(f"skipped {line}", RunWarning, stacklevel=4)
