"""The page and the pictures of a sweep."""

import base64
import csv
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.loggers import COLUMNS
from purejaxppo.host.stats import bootstrap_interval, interquartile_mean
from purejaxppo.sweeps import files
from purejaxppo.sweeps.report import read_results, write_report
from purejaxppo.sweeps.settings import Definition, SweepSettings

RETURNS = {0: [1.0, 2.0, 3.0], 1: [5.0, 4.0, 9.0], 2: [np.nan, 7.0, 7.0], 3: [0.0, 0.5, 1.0]}
UPDATES = 4
PICTURES = ["learning_curves", "final_return", "parallel_coordinates", "robustness"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a sweep of four trials and three seeds has written; one training has failed."""
    sweep = SweepSettings(
        grid=("hidden_sizes=[8],[16,16]",), sample=("learning_rate=loguniform:1e-4,1e-2",), trials=2
    )
    settings = Settings(ppo.Config(total_timesteps=UPDATES * 512), run=RunSettings(num_seeds=3))
    rates = [1e-4, 1e-3, 1e-2, 3e-4]
    rows = [
        {
            "trial": trial, "seed": seed, "hidden_sizes": "[8]" if trial % 2 else "[16, 16]",
            "learning_rate": rates[trial], "eval_return": "" if np.isnan(value) else value,
            "failed_at_update": 2 if np.isnan(value) else "", "env_steps": UPDATES * 512, "wave": 0,
        }
        for trial, returns in RETURNS.items() for seed, value in enumerate(returns)
    ]  # fmt: skip
    with files.new_sweep(tmp_path / "s", Definition(settings, sweep)) as directory:
        files.write(directory / files.RESULTS, files.results_text(rows))
        keys = np.indices((4, 3, UPDATES)).reshape(3, -1)
        columns = {"trial": keys[0], "seed": keys[1], "update": keys[2] + 1}
        curve = keys[2] * np.asarray(list(RETURNS.values()))[keys[0], keys[1]]
        files.write_curves(directory / files.CURVES, [columns | {name: curve for name in COLUMNS}])
    return directory


def test_results_are_read_back_with_the_best_trial_first(finished: Path):
    results = read_results(finished)
    assert results.numbers == [1, 0, 3, 2]
    assert results.values["hidden_sizes"] == [(8,), (16, 16), (8,), (16, 16)]
    assert results.values["learning_rate"] == [1e-3, 1e-4, 3e-4, 1e-2]
    np.testing.assert_array_equal(results.returns[0], RETURNS[1])
    assert np.isnan(results.scores[3])


def test_the_page_holds_its_pictures_and_needs_nothing_else(
    finished: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plot", str(finished)]) == 0
    page = Path(capsys.readouterr().out.strip())
    text = page.read_text()
    for name in PICTURES:
        found = re.search(rf'id="{name}"[^>]*base64,([^"]+)"', text)
        assert found is not None
        assert base64.b64decode(found[1]) == (finished / f"{name}.png").read_bytes()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "The best is trial 1" in text
    assert "<td>failed</td>" in text


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, which no Python package brings along")
def test_a_browser_shows_the_page_without_a_complaint(finished: Path, tmp_path: Path):
    """Every picture is decoded (one that is not has the width 0), and the console stays empty."""
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


def test_a_sweep_that_is_not_finished_has_no_page(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (finished / files.CURVES).unlink()
    assert main(["plot", str(finished)]) == 2
    assert "is not finished; go on with it by purejaxppo resume" in capsys.readouterr().err
    assert main(["plot", str(tmp_path)]) == 2
    assert "holds no sweep.toml" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_sweep_of_which_every_trial_failed_has_a_page_too(finished: Path):
    table = finished / files.RESULTS
    with table.open(newline="") as file:
        rows = [row | {"eval_return": ""} for row in csv.DictReader(file)]
    table.write_text(files.results_text(rows))
    assert "Every trial failed" in write_report(finished).read_text()


def test_the_interquartile_mean_and_its_interval():
    values = np.array([100.0, 1, 2, 3, 4, 5, 6, -100])
    assert interquartile_mean(values) == np.mean([2, 3, 4, 5])
    sample = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(sample, lambda x: x.mean(axis=-1))
    half = 1.96 * sample.std() / 20
    np.testing.assert_allclose([low, high], [sample.mean() - half, sample.mean() + half], atol=0.03)
