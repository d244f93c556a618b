"""Plots of a run."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from purejaxppo.checks import RunWarning
from purejaxppo.curves import POINTS, means_of_stretches
from purejaxppo.host.stats import FEW_SEEDS, bootstrap_mean_interval, mean_interval

RETURNS = "episode_return"
NO_EVALUATIONS = np.zeros(0), np.zeros(0)


def learning_curve(
    path: Path,
    env_id: str,
    env_steps: np.ndarray,
    returns: Float[np.ndarray, "U S"],
    evaluations: tuple[np.ndarray, np.ndarray] = NO_EVALUATIONS,
    *,
    metric: str = RETURNS,
    samples: str = "environment steps",
) -> None:
    """Draw the return over environment steps: the mean over seeds and its 95% bootstrap interval.

    Args:
        path: the PNG file to write.
        env_steps: `[U]` steps of one run.
        returns: mean return of the episodes that ended in each update, NaN if none did.
        evaluations: environment steps `[P]` and mean return over seeds `[P]`.
        metric: name of the metric, if it is not the return.
        samples: what the steps are.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import EngFormatter

    steps, curves = smooth(env_steps, returns)
    mean, _, _ = mean_interval(curves)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    num_seeds = returns.shape[1]
    name = "training episodes" if metric == RETURNS else metric_label(metric)
    of_seeds = f", mean of {num_seeds} seeds" if num_seeds > 1 else ""
    axes.plot(steps, mean, color="C0", label=f"{name}{of_seeds}")
    if num_seeds > 1:
        low, high = bootstrap_mean_interval(curves)
        axes.fill_between(
            steps, low, high, color="C0", alpha=0.2, lw=0, label=band_label(num_seeds)
        )
    if evaluations[0].size and metric == RETURNS:
        label = f"evaluation, sampled actions{of_seeds}"
        axes.plot(*evaluations, "o-", ms=4, lw=1, color="C1", label=label)
    if num_seeds > 1 or evaluations[0].size:
        axes.legend(loc="best", frameon=False)
    ylabel = "return" if metric == RETURNS else metric_label(metric)
    bare_axes(axes, f"{samples} (per seed)", ylabel)
    axes.set_title(plain(env_id))
    axes.set_xlim(0, float(env_steps[-1]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=150)


def png_of(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """A PNG of what `draw` draws into axes, of a size in inches."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    return content.getvalue()


@contextmanager
def warns_if_undrawn(what: str) -> Iterator[None]:
    """Warn instead of raising, since all numbers are written before plots are drawn."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"{what}: cannot be drawn: {error}; all numbers were saved", RunWarning, stacklevel=4
        )


def metric_label(metric: str) -> str:
    """Axis label of a metric."""
    known = {RETURNS: "return of training episodes", "reference_kl": "KL from the reference"}
    return known.get(metric, metric.replace("_", " "))


def plain(text: str) -> str:
    """Escape text so that matplotlib does not read it as mathematics."""
    return text.replace("$", r"\$")


def band_label(num_seeds: int) -> str:
    """Legend entry for a band from `bootstrap_mean_interval`."""
    only = "only " if num_seeds < FEW_SEEDS else ""
    return f"95% bootstrap interval of the mean ({only}{num_seeds} seeds)"


def bare_axes(axes: Any, xlabel: str, ylabel: str) -> None:
    """Set labels, a faint grid, and no frame at the top and right."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(
    env_steps: np.ndarray, returns: Float[np.ndarray, "U S"]
) -> tuple[np.ndarray, Float[np.ndarray, "P S"]]:
    """Reduce each seed's curve to at most 200 points, as `purejaxppo.curve` does."""
    steps, curves = means_of_stretches(env_steps, returns.T, POINTS)
    return steps, curves.T
