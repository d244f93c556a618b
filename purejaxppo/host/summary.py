"""Results of a run: `summary.json` and the learning curve."""

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purejaxppo.host.checkpoint import Checkpoint, Position
from purejaxppo.host.configfile import Settings, dump_settings
from purejaxppo.host.evaluations import evaluation_curve
from purejaxppo.host.loggers import SECONDS, in_order
from purejaxppo.host.parallel import Spread
from purejaxppo.host.plots import NO_EVALUATIONS, learning_curve, warns_if_undrawn
from purejaxppo.host.report import write_run_report
from purejaxppo.host.rundir import (
    CURVE,
    REPORT,
    SUMMARY,
    StorageError,
    resume_command,
    sealed,
    write_whole,
)
from purejaxppo.host.stats import episode_mean, mean_interval
from purejaxppo.task import FinishedRun, Plot, Task
from purejaxppo.types import TrainState

METRICS_COLUMNS = "metrics_columns"
"""In the summary of a sweep's wave: the columns of its `metrics.f32`."""
METRICS_DIGEST = "metrics_sha256"
"""In the summary of a sweep's wave: the SHA-256 of its `metrics.f32`."""
SETTINGS_DIGEST = "settings_sha256"
"""In the summary of a sweep's wave: the SHA-256 of its settings, which define its trials."""


class Training(NamedTuple):
    """State and metrics of a run when it ends or is stopped."""

    states: TrainState
    """Leaves `[S, ...]`."""
    metrics: dict[str, np.ndarray]
    """Arrays `[S, U]`."""
    position: Position


class Final(NamedTuple):
    """Returns `[S, E]` of the final evaluation, NaN for episodes that did not end."""

    sampled: np.ndarray
    deterministic: np.ndarray | None
    """None for a wave of a sweep."""


class Best(NamedTuple):
    """The best checkpoint of a run by its evaluations."""

    checkpoint: Checkpoint
    fresh: np.ndarray | None
    """Its returns `[S, E]` on new episodes; None if there was only one checkpoint to choose."""


def summarize(
    settings: Settings,
    task: Task,
    spread: Spread,
    training: Training,
    final: Final,
    *,
    compile_seconds: float,
    best: Best | None,
) -> dict[str, Any]:
    """Make the content of `summary.json`."""
    config, position = settings.config, training.position
    finished = [s for s in range(settings.num_runs) if s not in position.failed]
    evaluated = _returns("eval_return", final.sampled, finished)
    if final.deterministic is not None:
        evaluated |= _returns("eval_return_deterministic", final.deterministic, finished)
    done = position.updates * config.batch_size
    total, seconds = done * settings.num_runs, position.run_seconds
    return {
        "env_id": config.label,
        "num_seeds": settings.run.num_seeds,
        "eval_episodes": final.sampled.shape[1],
        **evaluated,
        **_own_results(task, training, final, finished),
        "unfinished_eval_episodes": int(np.isnan(final.sampled[finished]).sum()),
        "failed_seeds": {
            str(s): {"update": u, "last_good_update": u - 1}
            for s, u in sorted(position.failed.items())
        },
        "best_checkpoint": best and _best(best, finished),
        "extended": [{"updates": at, "total_timesteps": n} for at, n in position.extended],
        "env_steps": done,
        "env_steps_planned": config.num_updates * config.batch_size,
        "compile_seconds": round(compile_seconds, 3),
        "run_seconds": round(seconds, 3),
        "steps_per_second": round(total / seconds, 1),
        **(_of_wave(settings, task, training) if settings.trials else {}),
        "device": _device(spread),
        "versions": {"python": platform.python_version()}
        | {
            name: version(name)
            for name in ("purejaxppo", "jax", "jaxlib", "flax", "optax", "gymnax", "distrax")
        },
    }


def _own_results(
    task: Task, training: Training, final: Final, finished: list[int]
) -> dict[str, Any]:
    """The entries that the task adds; none if every seed failed."""
    if task.results is None or not finished:
        return {}
    kinds = {"sampled": final.sampled, "deterministic": final.deterministic}
    evaluated = {name: x[finished] for name, x in kinds.items() if x is not None}
    metrics, states = _of_seeds(training, finished)
    return task.results(metrics, evaluated, states)


def _of_seeds(training: Training, seeds: list[int]) -> tuple[dict[str, np.ndarray], TrainState]:
    """Metrics and states of some seeds."""
    metrics = {name: x[seeds] for name, x in training.metrics.items()}
    return metrics, jax.tree.map(lambda x: x[np.array(seeds)], training.states)


def settings_digest(settings: Settings) -> str:
    """SHA-256 of the settings in config-file form."""
    return hashlib.sha256(dump_settings(settings).encode()).hexdigest()


def _of_wave(settings: Settings, task: Task, training: Training) -> dict[str, Any]:
    return {
        "curve": task.curve,
        METRICS_COLUMNS: [name for name in in_order(training.metrics) if name != SECONDS],
        METRICS_DIGEST: training.position.metrics_digest,
        SETTINGS_DIGEST: settings_digest(settings),
    }


def write_results(
    directory: Path, settings: Settings, task: Task, training: Training, summary: dict[str, Any]
) -> None:
    """Write the summary, then draw the curve. Raises `StorageError` if the summary cannot be
    written."""
    try:
        write_whole(directory / SUMMARY, sealed(summary))
    except OSError as error:
        raise StorageError(
            f"{str(directory)!r}: the summary cannot be written: {error.strerror}; free space, "
            f"then: {resume_command(directory)}"
        ) from error
    if settings.trials:
        return
    draw_curve(directory, settings, task, training.metrics[task.curve])
    if task.samples is not None:
        plots: Sequence[Plot] = ()
        with warns_if_undrawn(f"plots of {task.config.title}"):
            plots = _plots(directory, settings, task, training)
        with warns_if_undrawn(repr(str(directory / REPORT))):
            names = (task.curve, *task.progress)
            write_run_report(directory, settings, names, training.metrics, summary, plots=plots)


def _plots(directory: Path, settings: Settings, task: Task, training: Training) -> Sequence[Plot]:
    """The plots that the task adds; none if every seed failed."""
    failed = training.position.failed
    finished = [s for s in range(settings.num_runs) if s not in failed]
    if task.plots is None or not finished:
        return ()
    steps, returns = NO_EVALUATIONS if failed else evaluation_curve(directory)
    evaluations = steps // settings.config.batch_size, returns
    metrics, states = _of_seeds(training, finished)
    return task.plots(FinishedRun(settings.hparams, metrics, states, evaluations))


def draw_curve(directory: Path, settings: Settings, task: Task, values: np.ndarray) -> None:
    """Draw `learning_curve.png` of returns, or of the task's other metric, `[S, U]`; warn if that
    fails, since the numbers are already written."""
    steps = np.arange(1, values.shape[1] + 1) * settings.config.batch_size
    env_id = settings.config.label
    with warns_if_undrawn(repr(str(directory / CURVE))):
        learning_curve(
            directory / CURVE, env_id, steps, values.T, evaluation_curve(directory),
            metric=task.curve, samples=settings.config.words.samples,
        )  # fmt: skip


def _returns(name: str, returns: np.ndarray, finished: list[int]) -> dict[str, Any]:
    """Means of the returns `[S, E]` of each seed, and over the seeds that finished."""
    per_seed = episode_mean(returns)
    mean, low, high = (_number(x) for x in mean_interval(per_seed[finished]))
    return {
        f"{name}_per_seed": [_number(x) for x in per_seed],
        f"{name}_mean": mean,
        f"{name}_interval_95": None if low is None else [low, high],
    }


def _best(best: Best, finished: list[int]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "updates": best.checkpoint.position.updates,
        "eval_return_mean": best.checkpoint.eval_return,
    }
    if best.fresh is not None:
        entry["fresh_return_mean"] = _number(episode_mean(episode_mean(best.fresh[finished])))
    return entry


def _device(spread: Spread) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "used": spread.mesh.size,
        "cpu_count": os.cpu_count(),
    }


def _number(value: Any) -> float | None:
    """Convert to float, or None if not finite, since JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
