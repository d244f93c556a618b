"""The plots in the reports of language runs, with made-up numbers."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.stats import binomtest

from purejaxppo.checks import RunWarning
from purejaxppo.host.checkpoint import Position
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.evaluations import SAMPLED, EvalLog
from purejaxppo.host.summary import Training, write_results
from purejaxppo.rlhf import (
    Architecture,
    DPOConfig,
    RewardConfig,
    RLHFConfig,
    RLHFHParams,
    SFTConfig,
    TextHParams,
    letters,
    make_decoder,
    make_rlhf_task,
    make_text_task,
    write_records,
)
from purejaxppo.rlhf.plots import frontier_plots, wilson_interval
from purejaxppo.rlhf.problem import problem_of
from purejaxppo.rlhf.texts import calibration_error
from purejaxppo.task import FinishedRun, Plot, Task
from purejaxppo.types import LearnerState, TrainState

NO_EVALUATIONS = np.zeros(0, int), np.zeros(0)
BATCH_SIZE = 100


def drawn(plot: Plot) -> Any:
    axes = Figure().add_subplot()
    plot.draw(axes)
    return axes


def finished(evaluations: Any = NO_EVALUATIONS, seeds: int = 2, updates: int = 130) -> FinishedRun:
    """Two seeds whose divergence and score rise; one has no score in the second update."""
    rng = np.random.default_rng(0)
    kl = np.linspace(0, 8, updates) + rng.normal(size=(seeds, updates)) / 10
    score = np.sqrt(np.abs(kl)) + rng.normal(size=(seeds, updates)) / 10
    score[0, 1:2] = np.nan
    metrics = {"reference_kl": kl, "score": score}
    return FinishedRun(RLHFHParams(), metrics, TrainState((), ()), evaluations)  # pyright: ignore


def scattered(axes: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and colour values of the scattered points with a label."""
    (found,) = (x for x in axes.collections if x.get_label() == label)
    return np.asarray(found.get_offsets()), np.asarray(found.get_array())


# The score against the KL divergence


def test_the_frontier_shows_means_of_stretches():
    run = finished()
    (plot,) = frontier_plots(BATCH_SIZE, False, run)
    assert "single seeds" in plot.caption
    assert "gold" not in plot.caption
    kl, score = (run.metrics[name].copy() for name in ("reference_kl", "score"))
    kl[np.isnan(score)] = np.nan
    points, tokens = [], []
    for stretch in np.array_split(np.arange(130), 60):
        of_seeds = [[np.nanmean(x[s, stretch]) for x in (kl, score)] for s in range(2)]
        points.append(np.mean(of_seeds, axis=0))
        tokens.append((stretch[-1] + 1) * BATCH_SIZE)
    axes = drawn(plot)
    found, colours = scattered(axes, "score in training")
    np.testing.assert_allclose(found, points)
    np.testing.assert_allclose(colours, tokens)
    marks = {
        line.get_label(): line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 1
    }
    np.testing.assert_allclose(marks["start"], points[0])
    np.testing.assert_allclose(marks["end"], points[-1])
    assert len([x for x in axes.lines if to_rgba(x.get_color()) == to_rgba("0.8")]) == 2


def test_the_frontier_shows_gold_scores_at_the_divergence_of_their_policies():
    updates, gold = np.array([40, 130]), np.array([3.0, 2.5])
    run = finished((updates, gold))
    (plot,) = frontier_plots(BATCH_SIZE, True, run)
    assert "Diamonds" in plot.caption
    found, colours = scattered(drawn(plot), "gold score")
    kl = run.metrics["reference_kl"].mean(axis=0)
    np.testing.assert_allclose(found, [[kl[40], 3.0], [kl[129], 2.5]])
    np.testing.assert_allclose(colours, updates * BATCH_SIZE)
    (plot,) = frontier_plots(BATCH_SIZE, False, run)
    assert "Diamonds" not in plot.caption


def test_one_seed_has_no_grey_lines():
    (plot,) = frontier_plots(BATCH_SIZE, False, finished(seeds=1))
    assert "seeds" not in plot.caption
    assert not [x for x in drawn(plot).lines if to_rgba(x.get_color()) == to_rgba("0.8")]


@pytest.mark.parametrize("name", ["reference_kl", "score"])
def test_no_frontier_without_finite_values(name: str):
    run = finished()
    assert frontier_plots(BATCH_SIZE, True, run)
    run.metrics[name][1, 1:] = np.inf
    run.metrics[name][1, :1] = np.nan
    assert not frontier_plots(BATCH_SIZE, True, run)
    assert not frontier_plots(BATCH_SIZE, True, finished(updates=1))


# Reliability

DECODER: dict[str, Any] = {"num_layers": 1, "width": 8, "num_heads": 1, "row_length": 32}
MARGINS = np.random.default_rng(1).normal(0.7, 1.5, size=(2, 300))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A reward model on 60 prompts."""
    path = tmp_path_factory.mktemp("report") / "preferences.jsonl"
    write_records(path, letters.preferences(60))
    config = RewardConfig(str(path), **DECODER, batch_rows=2, total_timesteps=3 * 64)
    return make_text_task(config)


def states_of(count: int) -> TrainState:
    """The states of several seeds; the parameters are their numbers."""
    learner: Any = LearnerState(
        key=jax.random.split(jax.random.key(0), count), params=jnp.arange(count), opt_state=(),
        obs_stats=(), reward_stats=(), updates=jnp.zeros(count, jnp.int32), objective_state=(),
    )  # fmt: skip
    return TrainState(learner, ())  # pyright: ignore[reportArgumentType]


def reliability_plots(task: Task, config: Any, **hparams: float) -> list[Plot]:
    """The plots of a run with another config whose held-out pairs have `MARGINS`."""
    results: Any = task.results
    parts = results.parts._replace(config=config)
    made = results._replace(parts=parts, judge=lambda seed, _: (seed, MARGINS[seed]))
    run = FinishedRun(TextHParams(**hparams), {}, states_of(2), NO_EVALUATIONS)
    return made.plots(run)


@pytest.mark.parametrize(("config", "scale"), [(RewardConfig(), 1.0), (DPOConfig(), 0.25)])
def test_the_reliability_diagram(task: Task, config: Any, scale: float):
    """Logits are the margins of a reward model, and kl_coef times those of a DPO run."""
    given = {} if scale == 1 else {"kl_coef": scale}
    (plot,) = reliability_plots(task, config, **given)
    logits = scale * MARGINS
    pooled = logits.ravel()
    sure = 1 / (1 + np.exp(-np.abs(pooled)))
    edges = np.linspace(0.5, 1, 11)
    rows = [(sure >= low) & (sure < high) for low, high in itertools.pairwise(edges)]
    used = [(edges[k], x) for k, x in enumerate(rows) if x.any()]
    axes = drawn(plot)
    points = next(x for x in axes.lines if x.get_label() == "observed").get_xydata()
    expected = [[sure[x].mean(), (pooled[x] > 0).mean()] for _, x in used]
    np.testing.assert_allclose(points, expected)
    bars = [(bar.get_x(), bar.get_height()) for bar in axes.patches]
    np.testing.assert_allclose(bars, [(low, x.mean()) for low, x in used])
    (lines,) = (x.get_segments() for x in axes.collections)
    interval = wilson_interval(points[:, 1], np.array([300 * x.mean() for _, x in used]))
    for line, x, low, high in zip(lines, points[:, 0], *interval, strict=True):
        np.testing.assert_allclose(line, [(x, low), (x, high)])
    error = np.mean([calibration_error(x) for x in logits])
    assert f"{error:.3f}" in plot.caption
    assert f"{error:.3f}" in axes.get_title(loc="left")
    assert "300 held-out pairs" in plot.caption


def test_margins_that_are_no_logits_have_no_reliability(task: Task):
    assert not reliability_plots(task, DPOConfig(loss="ipo"))
    assert not reliability_plots(task, SFTConfig())


@pytest.mark.parametrize(("right", "count"), [(0, 4), (7, 20), (50, 50)])
def test_wilson_intervals(right: int, count: int):
    low, high = wilson_interval(np.array([right / count]), np.array([float(count)]))
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx(tuple(expected), abs=1e-6)


# The page


def finished_run(directory: Path, task: Task, metrics: Any, *failed: int) -> str:
    """The report of a run of two seeds, some of which failed in the second update."""
    settings = Settings(task.config, task.hparams, RunSettings(num_seeds=2))
    updates = task.config.num_updates
    rows = [{"prompt": "<a>", "text": str(u), "value": None} for u in range(updates + 1)]
    lines = [json.dumps({"update": u} | row) for u, row in enumerate(rows)]
    (directory / "samples.jsonl").write_text("\n".join(lines))
    log = EvalLog(directory, task.config.batch_size)
    log.add(Position(2), {SAMPLED: np.array([[1.0, 2.0], [3.0, 4.0]])})
    training = Training(states_of(2), metrics, Position(updates, failed=dict.fromkeys(failed, 2)))
    write_results(directory, settings, task, training, {"env_steps": 1})
    return (directory / "report.html").read_text()


def figures_of(page: str) -> list[str]:
    return re.findall(r'<section>.*?<img id="(\w+)"', page, re.DOTALL)


def test_the_report_of_a_reward_model(task: Task, tmp_path: Path):
    """The second seed failed, and has no finite margins."""
    margins = np.stack([MARGINS[0], np.full(300, np.nan)])
    results: Any = task.results
    made = replace(task, plots=results._replace(judge=lambda s, _: (s, margins[s])).plots)
    metrics = {x: np.ones((2, 3)) for x in (task.curve, *task.progress)}
    page = finished_run(tmp_path, made, metrics, 1)
    assert figures_of(page) == ["reliability"]
    assert f"error: {calibration_error(MARGINS[0]):.3f}." in page
    for update in (0, 2, 3):
        assert f"After {update} updates" in page
        assert f"<td>&lt;a&gt;</td><td>{update}</td><td>-</td>" in page
    assert "After 1 updates" not in page


@pytest.mark.parametrize("with_gold", [False, True])
def test_the_report_of_a_policy(tmp_path: Path, with_gold: bool):
    config = RLHFConfig(
        task="sort", num_layers=1, width=8, num_heads=1, num_prompts=2, num_minibatches=1,
        total_timesteps=5 * 2 * 8 * 8, response_length=8,
    )  # fmt: skip
    problem = replace(problem_of(config), reference=constant_reference)
    if with_gold:
        problem = replace(problem, gold=problem.score)
    task = make_rlhf_task(config, problem)
    metrics = {x: np.ones((2, 5)) for x in (task.curve, *task.progress)}
    metrics["reference_kl"] = np.arange(10.0).reshape(2, 5)
    page = finished_run(tmp_path, task, metrics)
    assert figures_of(page) == ["frontier"]
    assert ("(gold)" in page) == with_gold


def constant_reference(architecture: Architecture) -> Any:
    shapes = jax.eval_shape(make_decoder(architecture).init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_a_plot_that_fails_is_left_out(task: Task, tmp_path: Path):
    def broken(_: Any) -> None:
        raise ValueError("no ink")

    def plots(_: FinishedRun) -> list[Plot]:
        return [Plot("a", "A", "", broken), Plot("b", "B & C", "x < y", lambda axes: None)]

    def unmade(_: FinishedRun) -> list[Plot]:
        raise ValueError("no paper")

    metrics = {x: np.ones((2, 3)) for x in (task.curve, *task.progress)}
    with pytest.warns(RunWarning, match="plot a: cannot be drawn: no ink"):
        page = finished_run(tmp_path, replace(task, plots=plots), metrics)
    assert figures_of(page) == ["b"]
    assert "<h2>B &amp; C</h2>" in page
    assert "<figcaption>x &lt; y</figcaption>" in page
    with pytest.warns(RunWarning, match="cannot be drawn: no paper"):
        page = finished_run(tmp_path, replace(task, plots=unmade), metrics)
    assert not figures_of(page)
    assert "After 3 updates" in page
