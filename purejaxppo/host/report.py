"""`report.html` of a run: metric curves and samples."""

import html
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.checks import RunWarning
from purejaxppo.host.configfile import Settings
from purejaxppo.host.page import PAGE, figure, image
from purejaxppo.host.plots import (
    band_label,
    bare_axes,
    metric_label,
    png_of,
    smooth,
    warns_if_undrawn,
)
from purejaxppo.host.rundir import (
    CURVE,
    REPORT,
    SUMMARY,
    DamagedError,
    holds,
    unsealed,
    write_output,
    write_whole,
)
from purejaxppo.host.samples import read_samples
from purejaxppo.host.stats import bootstrap_mean_interval, mean_interval
from purejaxppo.task import Plot

PANEL, PLOT = (4.0, 2.9), (4.8, 3.7)
"""Sizes in inches of the curve of a metric and of a task's plot."""


def write_run_report(
    directory: Path,
    settings: Settings,
    names: tuple[str, ...],
    metrics: dict[str, np.ndarray],
    summary: dict[str, Any],
    *,
    plots: Sequence[Plot] = (),
) -> None:
    """Write `report.html` to a run directory.

    Args:
        names: the metrics to draw.
        metrics: `[S, U]`.
        summary: the content of `summary.json`.
        plots: further plots.
    """
    config, seeds = settings.config, settings.num_runs
    band = f"; bands: {band_label(seeds)}" if seeds > 1 else ""
    caption = f"Means over {seeds} seeds{band}." if seeds > 1 else "One seed."
    title = html.escape(config.title)
    body = [
        f"<h1>{title}</h1>",
        _facts(config, summary),
        "<h2>Training</h2>",
        *_curves(config, names, metrics, caption),
        *_sections(plots),
        "<h2>Samples</h2>",
        *_samples(directory),
    ]
    write_whole(directory / REPORT, PAGE.format(title=title, body="\n".join(body)))


def write_policy_page(
    path: Path, config: Any, gif: bytes, caption: str, run_dir: Path | None
) -> None:
    """Write a page with episodes of a policy, and the results of the run in `run_dir`, if given. A
    damaged summary is left out with a warning.

    Args:
        caption: plain text about the episodes.

    Raises:
        StorageError: if the page cannot be written.
    """
    title = html.escape(config.title)
    body = [f"<h1>{title}</h1>"]
    if run_dir is not None and holds(run_dir, SUMMARY):
        try:
            body.append(_facts(config, unsealed(run_dir / SUMMARY)))
        except DamagedError as error:
            warnings.warn(f"{error}; the page is without results", RunWarning, stacklevel=2)
    if run_dir is not None and holds(run_dir, CURVE):
        curve = image("training", "learning curve", (run_dir / CURVE).read_bytes())
        body.append(f"<h2>Training</h2>\n<figure>{curve}</figure>")
    episodes = image("policy", "episodes of the policy", gif, "gif")
    caption = html.escape(caption)
    body.append(f"<h2>Policy</h2>\n<figure>{episodes}\n<figcaption>{caption}</figcaption></figure>")
    write_output(path, PAGE.format(title=title, body="\n".join(body)))


def _facts(config: Any, summary: dict[str, Any]) -> str:
    words = config.words
    rows = {words.samples: f"{summary['env_steps']:,} per seed"}
    names = ("eval_return", "eval_return_deterministic")
    for name, what in zip(names, words.evaluations, strict=True):
        if summary.get(f"{name}_mean") is not None:
            rows[f"evaluation {what}"] = f"{summary[f'{name}_mean']:.3f}"
    if "exact" in summary:
        rows["exact answers"] = f"{summary['exact']:.1%}"
        if "exact_sampled" in summary:
            rows["exact answers"] += f", sampled {summary['exact_sampled']:.1%}"
    for name in ("accuracy", "bayes_accuracy", "calibration_error", "held_out_loss", "padding"):
        if summary.get(name) is not None:
            rows[name.replace("_", " ")] = f"{summary[name]:.3f}"
    for name in ("score", "reference_kl"):
        if summary.get(name) is not None:
            rows[f"last update: {metric_label(name)}"] = f"{summary[name]:.3f}"
    lines = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in rows.items()
    )
    return f'<table class="facts">\n{lines}\n</table>'


def _curves(
    config: Any, names: tuple[str, ...], metrics: dict[str, np.ndarray], caption: str
) -> list[str]:
    """A figure with a panel for each metric."""
    panels = [
        image(
            name, html.escape(metric_label(name)), png_of(partial(_curve, config, name, x), PANEL)
        )
        for name, x in ((name, metrics[name]) for name in names if name in metrics)
    ]
    return [
        '<figure id="training"><div class="grid">', *panels,
        f"</div><figcaption>{caption}</figcaption></figure>",
    ]  # fmt: skip


def _curve(config: Any, name: str, values: np.ndarray, axes: Any) -> None:
    """Draw a metric `[S, U]`: its mean over seeds and the interval of the mean."""
    from matplotlib.ticker import EngFormatter  # slow to import

    steps = np.arange(1, values.shape[1] + 1) * config.batch_size
    points, curves = smooth(steps, values.T)
    axes.plot(points, mean_interval(curves)[0], color="C0")
    if len(values) > 1:
        low, high = bootstrap_mean_interval(curves)
        axes.fill_between(points, low, high, color="C0", alpha=0.2, lw=0)
    bare_axes(axes, config.words.samples, metric_label(name))
    axes.set_xlim(0, float(steps[-1]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _sections(plots: Sequence[Plot]) -> list[str]:
    """A section for each plot. A plot that fails is left out with a warning."""
    sections = []
    for plot in plots:
        title = html.escape(plot.title)
        with warns_if_undrawn(f"plot {plot.name}"):
            drawn = figure(plot.name, title, png_of(plot.draw, PLOT), html.escape(plot.caption))
            sections.append(f"<section><h2>{title}</h2>\n{drawn}</section>")
    return sections


def _samples(directory: Path) -> list[str]:
    """Tables of the samples from the start, the middle and the end of the run."""
    rows = read_samples(directory)
    updates = sorted({row["update"] for row in rows})
    shown = sorted({updates[0], updates[len(updates) // 2], updates[-1]}) if updates else []
    tables = [
        _table(f"After {update:,} updates", [r for r in rows if r["update"] == update])
        for update in shown
    ]
    caption = "Samples of the first seed, from the start, the middle and the end of the run."
    return [f'<p class="caption">{caption}</p>', *tables]


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "update"]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(_cell(row[name]))}</td>" for name in names) + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    table = f'<table class="text"><tr>{head}</tr>\n{body}\n</table>'
    return f'<h3>{title}</h3>\n<div class="scrolling">{table}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
