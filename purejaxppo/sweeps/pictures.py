"""Plots of a finished sweep."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from purejaxppo.host.plots import band_label, bare_axes, metric_label, plain, smooth
from purejaxppo.host.stats import (
    bootstrap_interval,
    bootstrap_mean_interval,
    interquartile_mean,
    mean_interval,
)
from purejaxppo.sweeps.results import Results
from purejaxppo.sweeps.space import Choice, Range, short
from purejaxppo.sweeps.winner import count_seeds

SHOWN_CURVES = 5
SHOWN_INTERVALS = 10
FEW_VALUES = 3
"""A list of at most this many numbers is drawn with equal spacing and a tick for each."""
MAX_TICKS = 5


def learning_curves(results: Results) -> Any:
    """Plot learning curves: the best trials with 95% bootstrap intervals, the others in grey."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes, grey, band = figure.add_subplot(), None, None
    for rank, number in enumerate(results.numbers):
        steps, curves = smooth(*_curve(results, number))
        mean, _, _ = mean_interval(curves)
        if rank >= SHOWN_CURVES or not np.isfinite(results.scores[rank]):
            (grey,) = axes.plot(steps, mean, color="0.8", lw=0.7, zorder=1)
            continue
        axes.plot(steps, mean, color=f"C{rank}", label=f"trial {number}", zorder=3)
        if results.num_seeds > 1:
            low, high = bootstrap_mean_interval(curves)
            band = axes.fill_between(steps, low, high, color=f"C{rank}", alpha=0.15, lw=0, zorder=2)
    if grey is not None:
        grey.set_label("other trials")
    if band is not None:
        axes.fill_between([], [], color="0.5", alpha=0.3, label=band_label(results.num_seeds))
    bare_axes(axes, "environment steps (per run)", metric_label(results.curve))
    axes.set_title(f"{plain(results.env_id)}: learning curves")
    axes.set_xlim(0, results.steps.max())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def final_returns(results: Results) -> Any:
    """Plot the selection return of each seed and trial over each swept setting."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    count = len(results.values)
    columns = 2 if count == 4 else min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(6, 4 * columns), 3.4 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, (name, values) in zip(panels, results.values.items(), strict=False):
        at, labels = _positions(results, name, values)
        if results.num_seeds > 1:
            spread = np.repeat(at, results.num_seeds)
            axes.scatter(spread, results.returns.ravel(), s=8, color="0.7", label="one seed")
        mean = "mean of a trial" if results.num_seeds > 1 else "trial"
        axes.scatter(at, results.scores, s=22, color="C0", zorder=3, label=mean)
        bare_axes(axes, name, "selection return" if axes in panels[::columns] else "")
        if labels is not None:
            _label_levels(axes, labels)
        elif _is_logarithmic(results, name, values) and np.isfinite(results.returns).any():
            _make_logarithmic(axes, min(values), max(values))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(MAX_TICKS))
    for axes in panels[count:]:
        axes.set_axis_off()
    figure.suptitle(f"{plain(results.env_id)}: selection return by setting")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _label_levels(axes: Any, labels: Sequence[str]) -> None:
    crowded = sum(map(len, labels)) > 24
    axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0)
    axes.set_xlim(-0.5, len(labels) - 0.5)


def _make_logarithmic(axes: Any, low: float, high: float) -> None:
    """Make the x axis logarithmic, with few enough ticks that their labels do not overlap."""
    from matplotlib.ticker import NullFormatter  # slow to import

    axes.set_xscale("log")
    ticks = log_ticks(low, high)
    axes.set_xticks(ticks, [short(float(tick)) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float) -> list[float]:
    """At most `MAX_TICKS` round numbers between two bounds, evenly spread on a logarithmic axis;
    the bounds themselves if there are fewer than two round numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in range(first, last + 1) for d in digits]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if 2 <= len(ticks) <= MAX_TICKS:
            return ticks
    return ticks[:: -(-len(ticks) // MAX_TICKS)] if len(ticks) > 1 else sorted({low, high})


def parallel_coordinates(results: Results) -> Any:
    """Plot each trial as a line through its settings to its selection return, coloured by it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # slow to import

    names = [*results.values, "selection return"]
    figure = Figure(figsize=(max(6.0, 2.2 * len(names)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    heights = [_heights(results, name, values) for name, values in results.values.items()]
    scores = results.scores
    low, high = (np.nanmin(scores), np.nanmax(scores)) if np.isfinite(scores).any() else (0, 0)
    shares = (scores - low) / ((high - low) or 1.0)
    for k in reversed(range(len(scores))):
        if np.isfinite(shares[k]):
            line = [h[k] for h, _ in heights] + [shares[k]]
            axes.plot(range(len(names)), line, color=colormaps["viridis"](shares[k]), lw=1.2)
    marks = [marks for _, marks in heights]
    marks.append([(0.0, short(float(low))), (1.0, short(float(high)))][: 1 + (high > low)])
    for x, found in enumerate(marks):
        axes.axvline(x, color="0.3", lw=0.8)
        for height, text in found:
            axes.text(x + 0.03, height, text, ha="left", va="center", fontsize=8, zorder=5,
                      bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(names) - 0.6)
    axes.set_ylim(-0.05, 1.05)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{plain(results.env_id)}: all settings at once")
    if high > low:
        _colour_scale(figure, axes, low, high)
    return figure


def _colour_scale(figure: Any, axes: Any, low: float, high: float) -> None:
    from matplotlib.cm import ScalarMappable  # slow to import
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(low, high), "viridis")
    figure.colorbar(scale, ax=axes, label="selection return", pad=0.01)


def robustness(results: Results) -> Any:
    """Plot interquartile means over seeds and performance profiles of the best trials.

    The means have 95% bootstrap intervals. A profile is the fraction of seeds whose return is above
    each value (Agarwal et al. 2021, arXiv:2108.13264).
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [k for k in range(len(results.numbers)) if np.isfinite(results.scores[k])]
    shown = shown[:SHOWN_INTERVALS]
    for line, k in enumerate(shown):
        middle, label = interquartile_mean(results.returns[k]), f"trial {results.numbers[k]}"
        if results.num_seeds > 1:
            low, high = bootstrap_interval(results.returns[k], interquartile_mean)
            left.plot([low, high], [line, line], color=f"C{line}", lw=5, alpha=0.35)
        left.plot(middle, line, "o", color=f"C{line}")
        ordered = np.sort(results.returns[k])
        above = 1.0 - np.arange(len(ordered) + 1) / len(ordered)
        edges = np.concatenate([ordered[:1], ordered])
        right.step(edges, above, where="post", color=f"C{line}", label=label)
    left.set_yticks(range(len(shown)), [f"trial {results.numbers[k]}" for k in shown])
    left.invert_yaxis()
    bare_axes(left, "interquartile mean of the selection return", "")
    if results.num_seeds > 1:
        left.plot([], [], color="0.5", lw=5, alpha=0.5, label="95% bootstrap interval")
    left.plot([], [], "o", color="0.5", label=f"{count_seeds(results.num_seeds)}")
    bare_axes(right, "selection return", "fraction of seeds above")
    right.set_ylim(0, 1.03)
    figure.suptitle(f"{plain(results.env_id)}: robustness over {count_seeds(results.num_seeds)}")
    if shown:
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def _curve(results: Results, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps `[U]` and training returns `[U, S]` of a trial."""
    mine = results.curves["trial"] == number
    seeds, updates = results.curves["seed"][mine], results.curves["update"][mine]
    order = np.lexsort((updates, seeds))
    returns = results.curves[results.curve][mine][order].reshape(results.num_seeds, -1)
    ends = np.unique(updates)
    total = results.steps[results.numbers.index(number)]
    return ends * (total / ends[-1]), returns.T


def _levels(results: Results, name: str) -> list[Any] | None:
    """The listed values of a setting if they are drawn with equal spacing, else None.

    These are values that are not numbers, and short lists of numbers, which are sorted.
    """
    space = results.definition.sweep.space
    wanted = (dict(space.grid) | dict(space.sample))[name]
    if isinstance(wanted, Range):
        return None
    values = list(dict.fromkeys(wanted.values if isinstance(wanted, Choice) else wanted))
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
        return values
    return sorted(values) if len(values) <= FEW_VALUES else None


def _positions(
    results: Results, name: str, values: Sequence[Any]
) -> tuple[np.ndarray, list[str] | None]:
    """Positions of trials on a setting's axis, and the labels of its ticks if it has levels."""
    levels = _levels(results, name)
    if levels is None:
        return np.asarray(values, float), None
    return np.array([levels.index(value) for value in values], float), [short(x) for x in levels]


def _heights(
    results: Results, name: str, values: Sequence[Any]
) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Positions of trials on an axis from 0 to 1, and (position, text) of the axis labels."""
    at, labels = _positions(results, name, values)
    if labels is not None:
        last = max(1, len(labels) - 1)
        return at / last, [(i / last, text) for i, text in enumerate(labels)]
    low, high = float(at.min()), float(at.max())
    marks = [(0.0, short(low)), (1.0, short(high))] if high > low else [(0.0, short(low))]
    if _is_logarithmic(results, name, values):
        at, low, high = np.log(at), np.log(low), np.log(high)
    return (at - low) / ((high - low) or 1.0), marks


def _is_logarithmic(results: Results, name: str, values: Sequence[Any]) -> bool:
    wanted = dict(results.definition.sweep.space.sample).get(name)
    if isinstance(wanted, Range):
        return wanted.kind == "loguniform"
    return min(values) > 0 and max(values) >= 10 * min(values)
