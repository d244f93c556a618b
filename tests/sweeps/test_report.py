"""The report and the plots of a sweep."""

import base64
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import accept_results
from matplotlib.backends.backend_agg import FigureCanvasAgg

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.plots import learning_curve
from purejaxppo.host.rundir import sealed
from purejaxppo.host.stats import (
    bootstrap_interval,
    bootstrap_mean_interval,
    interquartile_mean,
)
from purejaxppo.host.summary import METRICS_DIGEST
from purejaxppo.sweeps import files, pictures
from purejaxppo.sweeps.outcomes import Outcome, result_rows
from purejaxppo.sweeps.report import write_report
from purejaxppo.sweeps.results import read_results
from purejaxppo.sweeps.settings import Definition, SweepSettings
from purejaxppo.sweeps.space import parse_values
from purejaxppo.sweeps.strategies import all_trials

RETURNS = {0: [1.0, 2.0, 3.0], 1: [5.0, 4.0, 9.0], 2: [np.nan, 7.0, 7.0], 3: [0.0, 0.5, 1.0]}
UPDATES = 4
COLUMNS = ("env_steps", "episode_return", "policy_loss")
PICTURES = ["learning_curves", "final_return", "parallel_coordinates", "robustness"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The files of a finished sweep of four trials and three seeds; one run failed."""
    sweep = SweepSettings(
        grid=("hidden_sizes=[8],[16,16]",), sample=("learning_rate=loguniform:1e-4,1e-2",), trials=2
    )
    settings = Settings(ppo.Config(total_timesteps=UPDATES * 512), run=RunSettings(num_seeds=3))
    rates = [1e-4, 0.0010123456789012345, 1e-2, 3e-4]
    rows = [
        {
            "trial": trial, "seed": seed, "hidden_sizes": "[8]" if trial % 2 else "[16, 16]",
            "learning_rate": rates[trial], "eval_return": "" if np.isnan(value) else value,
            "failed_at_update": 2 if np.isnan(value) else "", "env_steps": UPDATES * 512, "wave": 0,
        }
        for trial, returns in RETURNS.items() for seed, value in enumerate(returns)
    ]  # fmt: skip
    directory = tmp_path / "s"
    with files.new_sweep(directory, Definition(settings, sweep)):
        files.write(directory / files.RESULTS, files.results_text(rows))
        keys = np.indices((4, 3, UPDATES)).reshape(3, -1)
        columns = {"trial": keys[0], "seed": keys[1], "update": keys[2] + 1}
        curve = keys[2] * np.asarray(list(RETURNS.values()))[keys[0], keys[1]]
        curves = [columns | {name: curve for name in COLUMNS}]
        files.write(directory / files.CURVES, files.curves_content(curves))
        winner = {
            "trial": 1, "tied_with": [], "return": 5.5, "return_interval_95": [4.25, 6.75],
            "interval_over": "seeds", "return_per_seed": [5.0, 5.5, 6.0],
            "episodes_per_seed": 342, "selection_return": 6.0,
        }  # fmt: skip
        files.write(directory / files.WINNER_JSON, json.dumps(winner))
        wave = files.wave_directory(directory, 0)
        wave.mkdir(parents=True)
        (wave / "metrics.f32").write_bytes(b"")
        digest = {METRICS_DIGEST: hashlib.sha256(b"").hexdigest()}
        (wave / "summary.json").write_text(sealed({"versions": {"jax": "0.10.2"}} | digest))
        accept_results(directory)
    return directory


def test_results_are_read_with_the_best_trial_first(finished: Path):
    results = read_results(finished)
    assert results.numbers == [1, 0, 3, 2]
    assert results.values["hidden_sizes"] == [(8,), (16, 16), (8,), (16, 16)]
    assert results.values["learning_rate"] == [0.0010123456789012345, 1e-4, 3e-4, 1e-2]
    np.testing.assert_array_equal(results.returns[0], RETURNS[1])
    assert np.isnan(results.scores[3])


def test_values_of_every_type_are_read_back_from_the_table(tmp_path: Path):
    grid = (
        "normalize_obs=true,false", "activation=tanh,relu", "target_kl=none,0.01", "num_envs=4,8",
        "hidden_sizes=[8],[16,16]", "learning_rate=1e-4,0.1",
    )  # fmt: skip
    definition = Definition(Settings(), SweepSettings(grid=grid))
    trials = all_trials(definition.sweep.space, "random", 1, seed=0)
    outcomes = {t.number: Outcome(t, np.zeros(1), {}, 1, 0) for t in trials}
    rows = csv.DictReader(io.StringIO(files.results_text(result_rows(outcomes, definition))))
    for trial, row in zip(trials, rows, strict=True):
        for name, value in trial.values.items():
            assert parse_values(name, row[name]) == (value,)


def test_report_is_self_contained(finished: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(finished)]) == 0
    page = Path(capsys.readouterr().out.strip())
    text = page.read_text()
    for name in PICTURES:
        found = re.search(rf'id="{name}"[^>]*base64,([^"]+)"', text)
        assert found is not None
        assert base64.b64decode(found[1]) == (finished / f"{name}.png").read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert len(re.findall("<figcaption>[^<]{20,}</figcaption>", text)) == len(PICTURES)
    assert "<td>failed</td>" in text


def test_report_describes_the_sweep_with_rounded_numbers(finished: Path):
    text = re.sub('base64,[^"]+', "", write_report(finished).read_text())
    for said in (
        "Winner: trial 1: return 5.50 on 1,026 fresh episodes, 95% interval 4.25 to 6.75 over "
        "only 3 seeds; selection return 6.00.",
        "learning_rate = 0.001012", "ppo_clip", "2,048 per run", "jax 0.10.2",
        "mean over 128 evaluation episodes per seed", "mean over 342 fresh episodes per seed",
    ):  # fmt: skip
        assert said in text
    assert not re.search(r"\d\.\d{7}", text)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, which no Python package provides")
def test_browser_shows_the_report_without_errors(finished: Path, tmp_path: Path):
    """Every image is decoded (otherwise its width is 0), and the console stays empty."""
    main(["plot", str(finished)])
    page = finished / "report.html"
    widths = "[...document.images].map(i => i.naturalWidth)"
    script = f"<script>onload = () => document.title = {widths}</script>"
    page.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    widths = re.search("<title>(.*)</title>", done.stdout)
    assert widths is not None
    assert [int(w) > 400 for w in widths[1].split(",")] == [True] * len(PICTURES)


def test_unfinished_sweep_has_no_report(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (finished / files.FINISHED).unlink()
    assert main(["plot", str(finished)]) == 2
    assert "is not finished; to resume: purejaxppo resume" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "no sweep.toml found" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_report_of_a_sweep_with_only_failed_trials(finished: Path):
    table = finished / files.RESULTS
    with table.open(newline="") as file:
        rows = [row | {"eval_return": ""} for row in csv.DictReader(file)]
    table.write_text(files.results_text(rows))
    (finished / files.WINNER_JSON).unlink()
    accept_results(finished)
    assert "Every trial failed" in write_report(finished).read_text()


@pytest.mark.filterwarnings("error")
def test_report_of_a_sweep_with_one_successful_trial(finished: Path):
    table = finished / files.RESULTS
    with table.open(newline="") as file:
        rows = [row | ({} if row["trial"] == "1" else {"eval_return": ""}) for row in
                csv.DictReader(file)]  # fmt: skip
    table.write_text(files.results_text(rows))
    accept_results(finished)
    write_report(finished)
    figure = pictures.parallel_coordinates(read_results(finished))
    assert len(figure.axes) == 1  # no colour scale for a single value


def test_interquartile_mean_and_its_interval():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    assert interquartile_mean(values) == np.mean([2, 3, 4, 5])
    sample = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(sample, lambda x: x.mean(axis=-1))
    half = 1.96 * sample.std() / 20
    np.testing.assert_allclose([low, high], [sample.mean() - half, sample.mean() + half], atol=0.03)


def test_bootstrap_interval_of_means_equals_that_of_all_resamples():
    """Three seeds have 27 resamples; missing values are left out."""
    values = np.array([[1.0, 2.0, 6.0], [3.0, np.nan, 5.0], [4.0, np.nan, np.nan]])
    low, high = bootstrap_mean_interval(values, confidence=0.8, resamples=20_000)
    for row, expected in ((0, values[0]), (1, values[1, [0, 2]])):
        # In the second row, three draws from three seeds leave one to three values.
        draws = [d for d in itertools.product(values[row], repeat=3) if np.isfinite(d).any()]
        means = np.array([np.nanmean(d) for d in draws])
        bounds = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
        np.testing.assert_allclose([low[row], high[row]], bounds)
        assert expected.min() <= low[row] <= high[row] <= expected.max()
    assert np.isnan([low[2], high[2]]).all()


def test_band_of_a_run_stays_within_its_returns_and_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
    )
    returns = np.array([[0.0, 500.0, 500.0], [500.0, 500.0, 500.0]])
    learning_curve(tmp_path / "x.png", "CartPole-v1", np.array([512, 1024]), returns)
    (axes,) = figures[0].axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.0, 500.0)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training episodes, mean of 3 seeds",
        "95% bootstrap interval of the mean (only 3 seeds)",
    ]


def drawn(figure: Any) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(
    ("low", "high"), [(1e-4, 1e-2), (1.3e-4, 3.8e-3), (1e-5, 1.0), (0.21, 0.34), (1, 2**20)]
)
def test_ticks_of_a_logarithmic_axis_do_not_overlap(low: float, high: float, finished: Path):
    results = read_results(finished)
    values = results.values | {"learning_rate": [low, high, low, high]}
    figure = drawn(pictures.final_returns(dataclasses.replace(results, values=values)))
    (axes,) = (axes for axes in figure.axes if axes.get_xlabel() == "learning_rate")
    assert axes.get_xscale() == "log"
    labels = [x for x in axes.get_xticklabels(which="both") if x.get_text()]
    boxes = sorted((box.x0, box.x1) for box in (x.get_window_extent() for x in labels))
    assert len(boxes) >= 2
    assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(boxes))


def test_short_list_of_values_becomes_ordered_ticks(finished: Path):
    results = read_results(finished)
    sweep = SweepSettings(grid=("gamma=0.999,0.9,0.99", "hidden_sizes=[8],[16,16]"))
    definition = dataclasses.replace(results.definition, sweep=sweep)
    values = {"gamma": [0.99, 0.9, 0.999, 0.9], "hidden_sizes": results.values["hidden_sizes"]}
    changed = dataclasses.replace(results, definition=definition, values=values)
    figure = drawn(pictures.final_returns(changed))
    ticks = [[x.get_text() for x in axes.get_xticklabels()] for axes in figure.axes]
    assert ticks == [["0.9", "0.99", "0.999"], ["[8]", "[16, 16]"]]
    points = figure.axes[0].collections[-1].get_offsets()
    np.testing.assert_array_equal(points[:, 0], [1, 0, 2, 0])


def test_each_plot_has_a_legend(finished: Path):
    results = read_results(finished)
    curves, returns, coordinates, seeds = (
        drawn(draw(results))
        for draw in (
            pictures.learning_curves, pictures.final_returns, pictures.parallel_coordinates,
            pictures.robustness,
        )
    )  # fmt: skip

    def texts(legend: Any) -> list[str]:
        return [text.get_text() for text in legend.get_texts()]

    band = "95% bootstrap interval of the mean (only 3 seeds)"
    assert texts(curves.legends[0]) == ["trial 1", "trial 0", "trial 3", "other trials", band]
    assert texts(returns.legends[0]) == ["one seed", "mean of a trial"]
    assert coordinates.axes[-1].get_ylabel() == "selection return"
    left, right = seeds.axes
    assert texts(left.get_legend()) == ["95% bootstrap interval", "only 3 seeds"]
    assert texts(right.get_legend()) == ["trial 1", "trial 0", "trial 3"]
