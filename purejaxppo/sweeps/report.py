"""Write a self-contained HTML report of a finished sweep."""

import html
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.checks import RunWarning
from purejaxppo.host.page import PAGE, figure
from purejaxppo.host.plots import band_label
from purejaxppo.host.rundir import REPORT, StorageError
from purejaxppo.sweeps import files
from purejaxppo.sweeps.pictures import (
    SHOWN_CURVES,
    SHOWN_INTERVALS,
    final_returns,
    learning_curves,
    parallel_coordinates,
    robustness,
)
from purejaxppo.sweeps.results import Results, read_results
from purejaxppo.sweeps.space import short
from purejaxppo.sweeps.winner import count_seeds, describe_winner

SHOWN_ROWS = 50


def write_report(directory: Path) -> Path:
    """Draw each plot as a PNG, and write `report.html`, which contains them all.

    Returns:
        the path of the report.

    Raises:
        ConfigError: as `read_results`.
        StorageError: if they cannot be written.
    """
    results = read_results(directory)
    body = [_heading(results)]
    for name, (title, draw, caption) in _pictures(results).items():
        path = directory / f"{name}.png"
        try:
            draw(results).savefig(path, dpi=150)
        except OSError as error:
            raise StorageError(f"{str(path)!r}: cannot be written: {error.strerror}") from error
        except Exception as error:  # a plot that fails must not prevent the report
            warnings.warn(f"{str(path)!r}: cannot be drawn: {error}", RunWarning, stacklevel=2)
            body.append(f"<h2>{title}</h2>\n<p>This plot could not be drawn.</p>")
            continue
        body.append(f"<h2>{title}</h2>\n{figure(name, title, path.read_bytes(), caption)}")
    page = directory / REPORT
    files.write(page, PAGE.format(title=_title(results), body="\n".join([*body, _table(results)])))
    return page


def _pictures(results: Results) -> dict[str, tuple[str, Callable[[Results], Any], str]]:
    """Title, drawing function and caption of each plot."""
    seeds, shown = count_seeds(results.num_seeds), min(SHOWN_CURVES, len(results.numbers))
    intervals = min(SHOWN_INTERVALS, len(results.numbers))
    episodes = results.definition.settings.run.eval_episodes
    band = f"; bands: {band_label(results.num_seeds)}" if results.num_seeds > 1 else ""
    others = ", all others in grey" if len(results.numbers) > shown else ""
    selection = f"The selection return is a mean over {episodes:,} evaluation episodes per seed"
    return {
        "learning_curves": (
            "Learning curves", learning_curves,
            f"Return of training episodes, mean over {seeds}, of {_best(shown)}{others}"
            f"{band}.",
        ),
        "final_return": (
            "Selection return by setting", final_returns,
            f"{selection}. Grey: one seed. Blue: mean of a trial over its seeds.",
        ),
        "parallel_coordinates": (
            "All settings at once", parallel_coordinates,
            "One line per trial, through its value on each axis to its selection return, which "
            "also sets its colour.",
        ),
        "robustness": (
            "Robustness over seeds", robustness,
            f"{_best(intervals).capitalize()}. Left: interquartile mean "
            f" of the selection return over {seeds}, with its 95% bootstrap interval. Right: "
            "fraction of seeds with a selection return above each value.",
        ),
    }  # fmt: skip


def _best(trials: int) -> str:
    return "the best trial" if trials == 1 else f"the best {trials} trials"


def _title(results: Results) -> str:
    return html.escape(f"Sweep of {results.env_id}")


def _heading(results: Results) -> str:
    best = "<strong>Every trial failed</strong>: a loss was not finite."
    if results.winner is not None:
        values = results.values.items()
        k = results.numbers.index(results.winner["trial"])
        said = ", ".join(f"{name} = {short(column[k])}" for name, column in values)
        best = (
            f"<strong>Winner: {html.escape(describe_winner(results.winner))}.</strong> Settings: "
            f"{html.escape(said)}. <code>winner.toml</code> lists all of its settings."
        )
    facts = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in _facts(results).items()
    )
    return f'<h1>{_title(results)}</h1>\n<p>{best}</p>\n<table class="facts">\n{facts}\n</table>'


def _facts(results: Results) -> dict[str, str]:
    """The rows of the table of facts: what was searched, and how."""
    settings, count = results.definition.settings, len(results.numbers)
    steps = sorted({int(steps) for steps in results.steps})
    lengths = f"{steps[-1]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    facts = {
        "environment": settings.config.label,
        "objective": getattr(settings.config, "objective", "-"),
        "strategy": results.definition.sweep.strategy,
        "trials": f"{count:,}",
        "seeds": f"{results.num_seeds:,} per trial",
        "environment steps": f"{lengths} per run",
        "selection return": f"mean over {settings.run.eval_episodes:,} evaluation episodes per "
        "seed, by which trials are ranked",
    }
    if results.winner is not None:
        facts["winner's return"] = (
            f"mean over {results.winner['episodes_per_seed']:,} fresh episodes per seed"
        )
    if results.versions:
        facts["versions"] = ", ".join(f"{name} {v}" for name, v in results.versions.items())
    return facts


def _table(results: Results) -> str:
    names = list(results.values)
    columns = ["trial", *names, "selection return", "lowest seed"]
    head = "".join(f"<th>{html.escape(x)}</th>" for x in columns)
    lines = []
    for k, number in enumerate(results.numbers[:SHOWN_ROWS]):
        score = results.scores[k]
        cells = [str(number), *(short(results.values[name][k]) for name in names)]
        cells += ["failed", ""] if np.isnan(score) else [
            f"{score:.2f}", f"{results.returns[k].min():.2f}"
        ]  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in cells) + "</tr>")
    more = len(results.numbers) - SHOWN_ROWS
    note = f"<p>and {more} more in <code>results.csv</code></p>" if more > 0 else ""
    return f"<h2>Trials</h2>\n<table><tr>{head}</tr>\n" + "\n".join(lines) + f"\n</table>{note}"
