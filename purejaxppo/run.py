"""The host loop: compile once, train in chunks of about half a second, write down what came."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from purejaxppo.checkpoint import FOLDER, save_state
from purejaxppo.config import Config, ConfigError, HParams, check_fields
from purejaxppo.configfile import Seeds, Settings, dump_settings
from purejaxppo.evaluate import FINAL_EVALUATION, evaluate, evaluation_keys
from purejaxppo.learner import MUST_BE_FINITE, make_learner
from purejaxppo.loggers import (
    COLUMNS,
    CsvLogger,
    HostMetrics,
    Logger,
    TensorBoardLogger,
    WandbLogger,
    close_all,
    require,
)
from purejaxppo.plots import learning_curve
from purejaxppo.progress import Progress
from purejaxppo.stats import mean_interval
from purejaxppo.types import Learner, Metrics, TrainState

CHUNK_SECONDS = 0.5
_CHUNK_CAPACITY = 1024
_RUN_FILES = (
    "config.toml",
    "metrics.csv",
    "summary.json",
    "learning_curve.png",
    "tensorboard",
    FOLDER,
)


@dataclass(frozen=True)
class Result:
    """What `run` gives back."""

    states: TrainState
    """Leaves `[S, ...]`; of a seed that failed, its last good state."""
    metrics: dict[str, np.ndarray]
    """`[S, U]`; NaN after a seed has failed."""
    returns: np.ndarray
    """`[S, eval_episodes]` returns of the final evaluation."""
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
    run_dir: str | Path | None = None,
    eval_episodes: int = 128,
    tensorboard: bool = False,
    wandb: bool = False,
    compilation_cache: bool = True,
    progress: bool = True,
    env: Any = None,
    env_params: Any = None,
) -> Result:
    """Train `num_seeds` times side by side, evaluate, and write it all down.

    Args:
        run_dir: takes `config.toml`, `metrics.csv`, `summary.json`, `learning_curve.png` and
            `checkpoints/`; None writes nothing.
        eval_episodes: episodes of the final evaluation, per seed.
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
            `run_dir` already holds a run or cannot be written.
    """
    seeds = Seeds(seed, num_seeds, eval_episodes, env is not None or env_params is not None)
    settings = Settings(config, hparams or HParams(), seeds)
    _check_scalars(settings.hparams)
    _check_loggers(run_dir, tensorboard, wandb)
    learner = make_learner(config, env, env_params)
    directory = None if run_dir is None else _prepare(Path(run_dir), settings)
    loggers = _open_loggers(directory, settings, tensorboard, wandb)
    if compilation_cache:
        enable_compilation_cache()

    shown = Progress(config, num_seeds, enabled=progress)
    try:
        shown.starting()
        with shown.working("compiling"):
            program = _compile(learner, settings)
        training = _train(program, settings, loggers, shown)
    finally:
        shown.close()
        close_all(loggers)
    with shown.working("evaluating"):
        returns = _evaluate(settings, training.states, env, env_params)
    summary = _summarize(settings, program, training, returns)
    if directory is not None:
        _write(directory, settings, training, summary)
    shown.finished(summary, directory)
    return Result(training.states, training.metrics, returns, summary, training.failed)


def _check_scalars(hparams: HParams) -> None:
    check_fields(hparams)
    for name, value in vars(hparams).items():
        if np.ndim(value):
            raise ConfigError(
                f"{name} has the shape {np.shape(value)}: run trains seeds, not hyperparameters, "
                "side by side; give one number, or vmap the function that make_train returns"
            )


def _check_loggers(run_dir: Any, tensorboard: bool, wandb: bool) -> None:
    if run_dir is None and (tensorboard or wandb):
        raise ConfigError("tensorboard and wandb write into the run directory: give run_dir")
    if tensorboard:
        require("tensorboard", "tensorboardX")
    if wandb:
        require("wandb", "wandb")


def _prepare(directory: Path, settings: Settings) -> Path:
    """Make the run directory and write the settings there, which proves that it can be written."""
    try:
        held = [name for name in _RUN_FILES if (directory / name).exists()]
        if not held:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.toml").write_text(dump_settings(settings), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: cannot be written: {error.strerror}; choose another"
        ) from error
    if held:
        raise ConfigError(
            f"run_dir = {str(directory)!r}: already holds a run ({', '.join(held)}); "
            "choose another directory, or move that one away"
        )
    return directory


def _open_loggers(
    directory: Path | None, settings: Settings, tensorboard: bool, wandb: bool
) -> list[Logger]:
    if directory is None:
        return []
    loggers: list[Logger] = [CsvLogger(directory)]
    if tensorboard:
        loggers.append(TensorBoardLogger(directory, settings.run.num_seeds))
    if wandb:
        loggers.append(WandbLogger(directory, vars(settings.config) | vars(settings.hparams)))
    return loggers


def enable_compilation_cache() -> None:
    """Keep compiled programs in `$XDG_CACHE_HOME/purejaxppo` (`~/.cache/purejaxppo`), unless JAX
    already has a folder for them."""
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "purejaxppo"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # What was compiled before left the cache initialised as absent.
    jax_cache.reset_cache()


class _Program(NamedTuple):
    """Compiled for the seeds of a run; a state's leaves are `[S, ...]`."""

    init: Callable[..., TrainState]
    chunk: Callable[..., tuple[TrainState, Metrics]]
    compile_seconds: float


def _compile(learner: Learner, settings: Settings) -> _Program:
    hparams, seeds = settings.hparams, settings.run
    began = time.perf_counter()
    root = jax.random.key(seeds.seed)
    init = jax.jit(lambda key, hparams: _init(learner, seeds.num_seeds, key, hparams))
    compiled_init = init.lower(root, hparams).compile()
    states = jax.eval_shape(init, root, hparams)
    capacity = min(settings.config.num_updates, _CHUNK_CAPACITY)
    chunk = jax.jit(
        lambda states, hparams, count: _chunk(learner, states, hparams, count, capacity)
    )
    compiled_chunk = chunk.lower(states, hparams, jnp.int32(1)).compile()
    return _Program(compiled_init, compiled_chunk, time.perf_counter() - began)


def _over_seeds(function: Callable[..., Any], states: Any, hparams: HParams) -> Any:
    """`vmap`, but for a single seed, whose conditionals then stay conditionals."""
    if jax.tree.leaves(states)[0].shape[0] > 1:
        return jax.vmap(function, (0, None))(states, hparams)
    single = function(jax.tree.map(lambda x: x[0], states), hparams)
    return jax.tree.map(lambda x: x[None], single)


def _init(learner: Learner, num_seeds: int, key: jax.Array, hparams: HParams) -> TrainState:
    return _over_seeds(learner.init, jax.random.split(key, num_seeds), hparams)


def _chunk(
    learner: Learner, states: TrainState, hparams: HParams, count: jax.Array, capacity: int
) -> tuple[TrainState, Metrics]:
    """`count` updates, at most `capacity`; one program for every count.

    Returns:
        states, and metrics `[capacity, S]` of which the first `count` rows are filled.
    """
    shapes = jax.eval_shape(lambda s: _over_seeds(learner.update, s, hparams)[1], states)
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)

    def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        states, rows = carry
        states, metrics = _over_seeds(learner.update, states, hparams)
        return states, jax.tree.map(lambda all_, row: all_.at[i].set(row), rows, metrics)

    return jax.lax.fori_loop(0, count, body, (states, rows))


class _Training(NamedTuple):
    states: TrainState
    metrics: dict[str, np.ndarray]
    failed: dict[int, int]
    run_seconds: float


def _train(
    program: _Program, settings: Settings, loggers: list[Logger], shown: Progress
) -> _Training:
    config, seeds = settings.config, settings.run
    alive = np.ones(seeds.num_seeds, bool)
    failed: dict[int, int] = {}
    parts: list[HostMetrics] = []
    shown.training(program.compile_seconds)

    began = time.perf_counter()
    states = program.init(jax.random.key(seeds.seed), settings.hparams)
    done, count = 0, 1
    while done < config.num_updates and alive.any():
        count = min(count, config.num_updates - done, _CHUNK_CAPACITY)
        chunk_began = time.perf_counter()
        states, rows = program.chunk(states, settings.hparams, jnp.int32(count))
        metrics = {name: np.asarray(rows[name])[:count] for name in COLUMNS}
        seconds = time.perf_counter() - chunk_began

        written, bad = _finite_rows(metrics, alive)
        for seed, row in bad.items():
            alive[seed] = False
            failed[seed] = done + row + 1
            shown.failed(seed, failed[seed], settings)
        parts.append({k: np.where(written, v, np.nan) for k, v in metrics.items()})
        for logger in loggers:
            logger.write(done + 1, metrics, written)
        done += count
        shown.update(done, parts[-1]["episode_return"])
        count = max(1, int(count * CHUNK_SECONDS / seconds)) if done > 1 else 2
    run_seconds = time.perf_counter() - began
    joined = {name: np.concatenate([part[name] for part in parts]).T for name in COLUMNS}
    return _Training(states, joined, failed, run_seconds)


def _finite_rows(metrics: HostMetrics, alive: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Which rows `[u, S]` belong to a training that goes well, its first bad one included, and
    the first bad row of each seed that has one."""
    finite = np.all([np.isfinite(metrics[name]) for name in MUST_BE_FINITE], axis=0)
    good_before = np.cumsum(~finite, axis=0) - ~finite == 0
    bad = {int(s): int(np.argmin(finite[:, s])) for s in np.flatnonzero(alive & ~finite.all(0))}
    return good_before & alive, bad


def _evaluate(settings: Settings, states: TrainState, env: Any, env_params: Any) -> np.ndarray:
    keys = evaluation_keys(settings.run.seed, settings.run.num_seeds, FINAL_EVALUATION)
    episodes = settings.run.eval_episodes

    def returns(state: TrainState, key: jax.Array) -> jax.Array:
        return evaluate(settings.config, state, key, episodes, env=env, env_params=env_params)

    return np.asarray(jax.jit(jax.vmap(returns))(states, keys))


def _summarize(
    settings: Settings, program: _Program, training: _Training, returns: np.ndarray
) -> dict[str, Any]:
    config, per_seed = settings.config, returns.mean(axis=1)
    finished = [s for s in range(settings.run.num_seeds) if s not in training.failed]
    mean, low, high = (_number(x) for x in mean_interval(per_seed[finished]))
    steps = config.num_updates * config.batch_size
    done = int(training.metrics["env_steps"].shape[1]) * config.batch_size
    total = done * settings.run.num_seeds
    device = jax.devices()[0]
    return {
        "env_id": config.env_id,
        "num_seeds": settings.run.num_seeds,
        "eval_episodes": returns.shape[1],
        "eval_return_per_seed": [_number(x) for x in per_seed],
        "eval_return_mean": mean,
        "eval_return_interval_95": None if low is None else [low, high],
        "failed_seeds": {str(s): {"update": u} for s, u in sorted(training.failed.items())},
        "env_steps": done,
        "env_steps_planned": steps,
        "compile_seconds": round(program.compile_seconds, 3),
        "run_seconds": round(training.run_seconds, 3),
        "steps_per_second": round(total / training.run_seconds, 1),
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "cpu_count": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()}
        | {
            name: version(name)
            for name in ("purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax", "distrax")
        },
    }


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def _write(
    directory: Path, settings: Settings, training: _Training, summary: dict[str, Any]
) -> None:
    updates = int(np.asarray(training.states.learner.updates).max())
    save_state(directory, updates, training.states)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (directory / "summary.json").write_text(text, encoding="utf-8")
    count = training.metrics["episode_return"].shape[1]
    steps = np.arange(1, count + 1) * settings.config.batch_size
    returns = training.metrics["episode_return"].T
    learning_curve(directory / "learning_curve.png", settings.config.env_id, steps, returns)
