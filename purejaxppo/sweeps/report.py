"""Pictures of a sweep, and one page that holds them all and needs nothing else."""

import base64
import csv
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.config import ConfigError
from purejaxppo.host.plots import bare_axes, smooth
from purejaxppo.host.rundir import SWEEP, StorageError, holds, resume_command
from purejaxppo.host.stats import bootstrap_interval, interquartile_mean, mean_interval
from purejaxppo.sweeps import files
from purejaxppo.sweeps.settings import Definition, load_definition
from purejaxppo.sweeps.space import Range, parse_values

REPORT = "report.html"
SHOWN_CURVES = 5
SHOWN_ROWS = 50
SHOWN_INTERVALS = 10
LEAST_FOR_BANDS = 3
"""Seeds: an interval of two reaches far beyond anything seen."""


@dataclass(frozen=True)
class Results:
    """What a finished sweep of K trials and S seeds has written, the best trial first."""

    definition: Definition
    numbers: list[int]
    values: dict[str, list[Any]]
    """Of each swept setting, `[K]`."""
    returns: np.ndarray
    """`[K, S]`, NaN where a training failed."""
    steps: np.ndarray
    """`[K]` environment steps of each training."""
    curves: dict[str, np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """`[K]`."""
        return self.returns.mean(axis=1)


def read_results(directory: Path) -> Results:
    """What `write_report` draws.

    Raises:
        ConfigError: if the directory holds no sweep, or one that is not finished.
    """
    if not holds(directory, SWEEP):
        raise ConfigError(
            f"run_dir = {str(directory)!r}: holds no {SWEEP}; give a sweep's directory"
        )
    if not (directory / files.CURVES).is_file():
        raise ConfigError(
            f"run_dir = {str(directory)!r}: the sweep is not finished; go on with it by "
            f"{resume_command(directory)}"
        )
    definition = load_definition(directory / SWEEP)
    names, seeds = definition.sweep.space.names, definition.settings.run.num_seeds
    with (directory / files.RESULTS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    returns = np.array([float(r["eval_return"] or "nan") for r in rows]).reshape(-1, seeds)
    steps = np.array([int(r["env_steps"]) for r in rows]).reshape(-1, seeds)[:, 0]
    score = np.where(np.isfinite(returns.mean(axis=1)), returns.mean(axis=1), -np.inf)
    order = np.lexsort((-score, -steps))
    firsts = [rows[i * seeds] for i in order]
    with np.load(directory / files.CURVES) as curves:
        return Results(
            definition=definition,
            numbers=[int(row["trial"]) for row in firsts],
            values={name: [_value(name, row[name]) for row in firsts] for name in names},
            returns=returns[order],
            steps=steps[order],
            curves=dict(curves),
        )


def write_report(directory: Path) -> Path:
    """Draw each picture as a PNG, and write `report.html`, which holds them.

    Returns:
        the page's path.

    Raises:
        ConfigError: as `read_results`.
        StorageError: if they cannot be written.
    """
    results = read_results(directory)
    pictures: dict[str, tuple[str, Callable[[Results], Any]]] = {
        "learning_curves": ("Learning curves", learning_curves),
        "final_return": ("Final return over each setting", final_returns),
        "parallel_coordinates": ("All settings at once", parallel_coordinates),
        "robustness": ("Robustness over seeds", robustness),
    }
    body = [_heading(results)]
    for name, (title, draw) in pictures.items():
        path = directory / f"{name}.png"
        try:
            draw(results).savefig(path, dpi=120)
        except OSError as error:
            raise StorageError(f"{str(path)!r}: cannot be written: {error.strerror}") from error
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(
            f'<h2>{title}</h2>\n<img id="{name}" alt="{title}" src="data:image/png;base64,{data}">'
        )
    page = directory / REPORT
    files.write(page, _PAGE.format(title=_title(results), body="\n".join([*body, _table(results)])))
    return page


def learning_curves(results: Results) -> Any:
    """The best trials with their 95% bands over seeds, the others in grey."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for rank, number in enumerate(results.numbers):
        steps, curves = smooth(*_curve(results, number))
        mean, low, high = mean_interval(curves)
        if rank >= SHOWN_CURVES or not np.isfinite(results.scores[rank]):
            axes.plot(steps, mean, color="0.8", lw=0.7, zorder=1)
            continue
        axes.plot(steps, mean, color=f"C{rank}", label=f"trial {number}", zorder=3)
        if results.returns.shape[1] >= LEAST_FOR_BANDS:
            axes.fill_between(steps, low, high, color=f"C{rank}", alpha=0.15, lw=0, zorder=2)
    seen = results.curves["episode_return"][np.isfinite(results.curves["episode_return"])]
    if seen.size:
        margin = 0.05 * float(np.ptp(seen)) or 1.0
        axes.set_ylim(seen.min() - margin, seen.max() + margin)
    bare_axes(axes, "environment steps (per training)", "return of training episodes")
    axes.set_xlim(0, results.steps.max())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if np.isfinite(results.scores).any():
        axes.legend(loc="best", frameon=False)
    return figure


def final_returns(results: Results) -> Any:
    """A panel for each swept setting: every training's return, and each trial's mean."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(3, len(results.values))
    lines = -(-len(results.values) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes, (name, values) in zip(panels, results.values.items(), strict=False):
        at, labels = _positions(results, name, values)
        seeds = results.returns.shape[1]
        axes.scatter(np.repeat(at, seeds), results.returns.ravel(), s=8, color="0.7", zorder=2)
        axes.scatter(at, results.scores, s=22, color="C0", zorder=3)
        bare_axes(axes, name, "final return" if axes is panels[0] else "")
        if labels is not None:
            axes.set_xticks(range(len(labels)), labels)
        elif _is_logarithmic(results, name, values) and np.isfinite(results.returns).any():
            axes.set_xscale("log")
    for axes in panels[len(results.values) :]:
        axes.set_axis_off()
    return figure


def parallel_coordinates(results: Results) -> Any:
    """A line for each trial through all its settings to its return, coloured by it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # slow to import

    names = [*results.values, "return"]
    figure = Figure(figsize=(max(6.0, 2.2 * len(names)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    heights = [_heights(results, name, values) for name, values in results.values.items()]
    scores = results.scores
    low, high = (np.nanmin(scores), np.nanmax(scores)) if np.isfinite(scores).any() else (0, 0)
    shares = (scores - low) / ((high - low) or 1.0)
    for k in reversed(range(len(scores))):
        if np.isfinite(shares[k]):
            line = [h[k] for h, _, _ in heights] + [shares[k]]
            axes.plot(range(len(names)), line, color=colormaps["viridis"](shares[k]), lw=1.2)
    for x, (_, bottom, top) in enumerate([*heights, ((), f"{low:.4g}", f"{high:.4g}")]):
        axes.axvline(x, color="0.3", lw=0.8)
        axes.text(x, -0.04, bottom, ha="center", va="top", fontsize=8)
        axes.text(x, 1.03, top, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0, pad=18)
    axes.set_yticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.spines[:].set_visible(False)
    return figure


def robustness(results: Results) -> Any:
    """The best trials' interquartile means over seeds with 95% bootstrap intervals, and their
    performance profiles: the share of seeds whose return is above each value (Agarwal et al. 2021,
    arXiv:2108.13264)."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [k for k in range(len(results.numbers)) if np.isfinite(results.scores[k])]
    shown = shown[:SHOWN_INTERVALS]
    for line, k in enumerate(shown):
        middle = interquartile_mean(results.returns[k])
        low, high = bootstrap_interval(results.returns[k], interquartile_mean)
        left.plot([low, high], [line, line], color=f"C{line}", lw=5, alpha=0.35)
        left.plot(middle, line, "o", color=f"C{line}")
        ordered = np.sort(results.returns[k])
        above = 1.0 - np.arange(len(ordered) + 1) / len(ordered)
        edges = np.concatenate([ordered[:1], ordered])
        right.step(edges, above, where="post", color=f"C{line}")
    left.set_yticks(range(len(shown)), [f"trial {results.numbers[k]}" for k in shown])
    left.invert_yaxis()
    bare_axes(left, "interquartile mean of the final return", "")
    bare_axes(right, "final return", "share of seeds above")
    right.set_ylim(0, 1.03)
    return figure


def _curve(results: Results, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps `[U]` and training returns `[U, S]` of a trial."""
    mine = results.curves["trial"] == number
    seeds, updates = results.curves["seed"][mine], results.curves["update"][mine]
    order = np.lexsort((updates, seeds))
    returns = results.curves["episode_return"][mine][order].reshape(results.returns.shape[1], -1)
    ends = np.unique(updates)
    total = results.steps[results.numbers.index(number)]
    return ends * (total / ends[-1]), returns.T


def _positions(
    results: Results, name: str, values: Sequence[Any]
) -> tuple[np.ndarray, list[str] | None]:
    """Where trials lie on a setting's axis, and the labels of its ticks if it is not of numbers."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return np.asarray(values, float), None
    labels = list(dict.fromkeys(_label(value) for value in values))
    return np.array([labels.index(_label(value)) for value in values], float), labels


def _heights(results: Results, name: str, values: Sequence[Any]) -> tuple[np.ndarray, str, str]:
    """Shares of an axis from 0 to 1, and what stands at its ends."""
    at, labels = _positions(results, name, values)
    low, high = float(at.min()), float(at.max())
    ends = (labels[0], labels[-1]) if labels else (f"{low:.4g}", f"{high:.4g}")
    if labels is None and _is_logarithmic(results, name, values):
        at, low, high = np.log(at), np.log(low), np.log(high)
    return (at - low) / ((high - low) or 1.0), *ends


def _is_logarithmic(results: Results, name: str, values: Sequence[Any]) -> bool:
    wanted = dict(results.definition.sweep.space.sample).get(name)
    if isinstance(wanted, Range):
        return wanted.kind == "loguniform"
    return min(values) > 0 and max(values) >= 10 * min(values)


def _label(value: Any) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _value(name: str, text: str) -> Any:
    return parse_values(name, text)[0]


def _title(results: Results) -> str:
    return html.escape(f"Sweep of {results.definition.settings.config.env_id}")


def _heading(results: Results) -> str:
    count, seeds = results.returns.shape
    said = ", ".join(f"{name} = {_label(values[0])}" for name, values in results.values.items())
    best = "<strong>Every trial failed</strong>: a loss was not finite."
    if np.isfinite(results.scores[0]):
        best = (
            f"<strong>The best is trial {results.numbers[0]}</strong>: return "
            f"{results.scores[0]:.2f} with {html.escape(said)}. <code>winner.toml</code> has its "
            "settings."
        )
    return (
        f"<h1>{_title(results)}</h1>\n<p>{count} trials of {seeds} seeds; "
        f"{results.definition.sweep.strategy} search.</p>\n<p>{best}</p>"
    )


def _table(results: Results) -> str:
    names = list(results.values)
    head = "".join(f"<th>{html.escape(x)}</th>" for x in ["trial", *names, "return", "lowest seed"])
    lines = []
    for k, number in enumerate(results.numbers[:SHOWN_ROWS]):
        score = results.scores[k]
        shown = [str(number), *(_short(results.values[name][k]) for name in names)]
        shown += ["failed", ""] if np.isnan(score) else [
            f"{score:.2f}", f"{results.returns[k].min():.2f}"
        ]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in shown) + "</tr>")
    more = len(results.numbers) - SHOWN_ROWS
    note = f"<p>and {more} more in <code>results.csv</code></p>" if more > 0 else ""
    return f"<h2>Trials</h2>\n<table><tr>{head}</tr>\n" + "\n".join(lines) + f"\n</table>{note}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _label(value)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
