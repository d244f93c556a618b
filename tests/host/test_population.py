"""Population-based training, compared with plain NumPy and with one device."""

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host import checkpoints
from purejaxppo.host.parallel import ENVS, SEEDS, Spread
from purejaxppo.host.population import (
    FACTORS,
    Member,
    Population,
    choose_parents,
    exchange,
    explore,
)
from purejaxppo.sweeps.strategies import Trial
from purejaxppo.sweeps.trials import extract_trial
from purejaxppo.types import LearnerState

CONFIG = ppo.Config(
    env_id="RandomWalk", total_timesteps=8 * 32, num_steps=8, hidden_sizes=(8,), num_minibatches=2
)
SPACE: dict[str, Any] = {
    "learning_rate": ppo.loguniform(1e-4, 1e-1), "ent_coef": ppo.uniform(0.0, 0.1)
}  # fmt: skip


def train(directory: Path, devices: int, **options: Any) -> ppo.SweepResult:
    return ppo.sweep(
        CONFIG, SPACE, strategy="pbt", trials=8, interval=2, devices=devices, run_dir=directory,
        eval_episodes=4, env=RandomWalk(), progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("size", [5, 12, 20])
def test_the_best_fifth_replace_the_worst(size: int):
    rng = np.random.default_rng(size)
    score = rng.normal(size=size)
    score[3] = np.nan
    padded = np.append(score, 100.0)  # padding, which must not be copied
    parents = np.asarray(choose_parents(jax.random.key(0), size, jnp.asarray(padded, jnp.float32)))
    order = sorted(range(size), key=lambda k: -np.inf if np.isnan(score[k]) else score[k])
    cut = size // 5
    worst, best = set(order[:cut]), set(order[-cut:])
    assert 3 in worst
    for k in range(size + 1):
        assert parents[k] in (best if k in worst else {k})


def test_copied_hyperparameters_change_by_a_factor_within_their_range():
    population = Population(500, 2, (("gamma", 0.5, 0.9), ("ent_coef", 0.0, 1.0)), 0, 10)
    given = ppo.HParams(gamma=jnp.full(500, 0.8), ent_coef=jnp.full(500, 0.5))
    replaced = jnp.arange(500) < 400
    found = explore(jax.random.key(1), population, given, replaced)
    gammas, coefficients = np.asarray(found.gamma), np.asarray(found.ent_coef)
    np.testing.assert_array_equal(gammas[400:], np.float32(0.8))
    np.testing.assert_allclose(np.unique(gammas[:400]), [0.64, 0.9], rtol=1e-6)
    np.testing.assert_allclose(np.unique(coefficients[:400]), [0.4, 0.6], rtol=1e-6)
    low = np.mean(coefficients[:400] < 0.5)
    assert abs(low - 0.5) < 0.1
    assert np.mean((gammas[:400] < 0.8) == (coefficients[:400] < 0.5)) < 0.6  # drawn independently
    assert found.learning_rate == given.learning_rate


def test_parameters_and_hyperparameters_have_the_same_parent_and_keys_are_kept():
    """8 members on 4 devices, each with its own number in place of everything learned. Member 2 has
    failed, so its return, the highest, does not count, and its updates continue."""
    number = jnp.arange(8.0)
    keys = jax.random.split(jax.random.key(0), 8)
    updates, rounds = jnp.full(8, 4).at[2].set(3), jnp.full(8, 4)
    learner = LearnerState(keys, {"w": number}, number, (), (), updates)
    hparams = ppo.HParams(gamma=0.5 + number / 100)
    hparams = jax.tree.map(lambda x: jnp.broadcast_to(x, 8), hparams)
    members = Member(learner, hparams, number.at[2].set(99.0), jnp.ones(8), rounds)
    population = Population(8, 2, (("gamma", 0.0, 1.0),), 0, 10)
    spread = Spread(Mesh(np.asarray(jax.devices()[:4]).reshape(4, 1), (SEEDS, ENVS)))
    over = spread.over(lambda x: exchange(population, x), (spread.seeds,), spread.seeds)
    found = jax.jit(over)(members)
    np.testing.assert_array_equal(found.learner.params["w"], [0, 1, 7, *range(3, 8)])
    np.testing.assert_array_equal(found.learner.opt_state, [0, 1, 7, *range(3, 8)])
    np.testing.assert_array_equal(found.learner.updates, rounds)
    assert not np.any(found.failed)
    gamma = np.asarray(found.hparams.gamma)
    assert np.isclose(gamma[2], 0.57 * np.asarray(FACTORS)).any()
    others = np.arange(8) != 2
    np.testing.assert_allclose(gamma[others], 0.5 + np.arange(8)[others] / 100, rtol=1e-6)
    assert bool(jnp.all(found.learner.key == keys))
    assert not np.any(found.returned)


@pytest.mark.parametrize(
    ("score", "parents"),
    [
        ([1.0, np.nan, 5.0, 3.0, -np.inf, 2.0], [0, 1, 2, 3, 2, 5]),  # failed ranks below unscored
        (
            [-np.inf] * 4 + [0.0] + [-np.inf] * 5,
            [*range(8), 4, 4],
        ),  # copies of the only one with a score
        ([np.nan] * 5, range(5)),  # no scores
        ([-np.inf] * 5, range(5)),
    ],
)
def test_only_members_with_a_score_are_copied(score: list[float], parents: Any):
    for seed in range(5):
        found = choose_parents(jax.random.key(seed), len(score), jnp.asarray(score))
        np.testing.assert_array_equal(found, list(parents))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pbt") / "s"
    train(directory, devices=1)
    return directory


def curves(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "curves.npz") as table:
        return dict(table)


def test_a_population_is_the_same_on_1_and_4_devices(alone: Path, tmp_path: Path):
    train(tmp_path / "s", devices=4)
    assert (tmp_path / "s/results.csv").read_text() == (alone / "results.csv").read_text()
    for name, column in curves(alone).items():
        np.testing.assert_array_equal(curves(tmp_path / "s")[name], column)


def test_the_worst_continue_from_the_best_with_perturbed_learning_rates(alone: Path):
    """According to the curves: after an exchange a learning rate is unchanged, or that of another
    member times a factor. The schedule is linear."""
    table = curves(alone)
    rates = table["learning_rate"].reshape(8, 8) / (1 - np.arange(8) / 8)
    changed = 0
    for update in range(1, 8):
        before, after = rates[:, update - 1], rates[:, update]
        same = np.isclose(after, before, rtol=1e-5)
        if update % 2:
            assert same.all()
        factors = np.append(np.outer(before, FACTORS).ravel(), [1e-4, 1e-1])
        assert all(np.isclose(factors, x, rtol=1e-5).any() for x in after[~same])
        changed += int((~same).sum())
    assert 1 <= changed <= 3
    rows = list(csv.DictReader((alone / "results.csv").open()))
    np.testing.assert_allclose([float(r["learning_rate"]) for r in rows], rates[:, -1], rtol=1e-5)


RATES = [1e30, *np.geomspace(1e-3, 1e-1, 6).tolist(), 1e30]
"""Learning rates of 8 members: the first and the last fail in their first update."""
SCRIPT = """
import sys
sys.path[:0] = ["tests", "tests/host"]
import conftest
import test_population
with test_population.pytest.MonkeyPatch.context() as patch:
    patch.setattr("purejaxppo.sweeps.engine.write_report", lambda directory: directory)
    test_population.train_failing(sys.argv[1], devices=4)
"""


def train_failing(directory: str, devices: int) -> ppo.SweepResult:
    trials = [Trial(n, {"learning_rate": rate, "ent_coef": 0.0}) for n, rate in enumerate(RATES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purejaxppo.sweeps.strategies.all_trials", lambda *given: trials)
        return train(Path(directory), devices)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("failing") / "s"
    train_failing(str(directory), devices=1)
    return directory


def test_a_failed_member_is_replaced_and_learns_again(failing: Path):
    """One of 8 members is replaced at each exchange, every second update: one of the two failed
    members after update 2, the other after update 4."""
    table = curves(failing)
    names = ("policy_loss", "learning_rate", "env_steps")
    loss, rate, steps = (table[name].reshape(8, 8) for name in names)
    updates = np.arange(8)
    for member, revived in {7: 2, 0: 4}.items():
        kept = updates >= revived
        np.testing.assert_array_equal(np.isfinite(loss[member]), kept)
        np.testing.assert_array_equal(steps[member, kept], 32 * (updates[kept] + 1))
        assert np.isnan(steps[member, ~kept]).all()
        scheduled = 1 - updates / 8
        mine, others = rate[member, kept] / scheduled[kept], rate[1:7, 0]
        np.testing.assert_allclose(mine, mine[0], rtol=1e-5)  # it is not replaced again
        assert np.isclose(np.outer(others, FACTORS), mine[0], rtol=1e-5).any()
    assert np.isfinite(loss[1:7]).all()
    rows = list(csv.DictReader((failing / "results.csv").open()))
    assert all(row["failed_at_update"] == "" and row["eval_return"] for row in rows)


@pytest.mark.slow
def test_devices_agree_on_exchanges_even_if_their_first_member_failed(
    failing: Path, tmp_path: Path, one_cache: None
):
    """In a separate process, since devices that disagree wait for each other forever."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "s")]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "s/results.csv").read_text() == (failing / "results.csv").read_text()
    for name, column in curves(failing).items():
        np.testing.assert_array_equal(curves(tmp_path / "s")[name], column)


def test_a_resumed_population_remembers_failed_members(
    failing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stops after update 1, with two failed members, and after update 3, with one."""
    directory, seen = tmp_path / "s", []

    def stop(progress: Any, done: int, returns: Any) -> None:
        if done in (1, 3):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("purejaxppo.host.loop.CHUNK_SECONDS", 1e-9)
    monkeypatch.setattr("purejaxppo.sweeps.progress.WaveProgress.update", stop)
    with pytest.raises(SystemExit):
        train_failing(str(directory), devices=1)
    seen.append(checkpoints.find(directory / "waves/0000")[0].position)
    with pytest.raises(SystemExit):
        ppo.resume_sweep(directory, progress=False, env=RandomWalk())
    seen.append(checkpoints.find(directory / "waves/0000")[0].position)
    ppo.resume_sweep(directory, progress=False, env=RandomWalk())
    assert [(x.updates, x.failed) for x in seen] == [(1, {0: 1, 7: 1}), (3, {0: 1})]
    assert (directory / "results.csv").read_text() == (failing / "results.csv").read_text()
    for name, column in curves(failing).items():
        np.testing.assert_array_equal(curves(directory)[name], column)


def test_the_best_member_is_written_as_a_config_file(alone: Path):
    rows = list(csv.DictReader((alone / "results.csv").open()))
    best = max(rows, key=lambda row: float(row["eval_return"]))
    text = (alone / "winner.toml").read_text()
    assert f"learning_rate = {best['learning_rate']}\n" in text
    _, hparams, state = ppo.load_trial(alone, env=RandomWalk())
    assert repr(hparams.learning_rate) == best["learning_rate"]
    assert isinstance(state.learner, LearnerState)


def test_an_extracted_member_can_be_trained_longer(failing: Path):
    """It has no metrics for the updates before it was replaced."""
    run_dir = extract_trial(failing, 0, env=RandomWalk())
    longer = ppo.resume(run_dir, total_timesteps=9 * 32, progress=False, env=RandomWalk())
    np.testing.assert_array_equal(
        np.isnan(longer.metrics["policy_loss"]), [[True] * 4 + [False] * 5]
    )
    np.testing.assert_array_equal(longer.metrics["env_steps"][0, 4:], 32 * np.arange(5, 10))
    kept = curves(failing)["policy_loss"].reshape(8, 8)[0, 4:]
    np.testing.assert_array_equal(longer.metrics["policy_loss"][0, 4:8], kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sample gamma=choice:0.9,0.99", "gamma has a list of values; give it a range"),
        ("--grid num_envs=4 --sample gamma=uniform:0.9,1", "num_envs has a list of values"),
        (
            "--sample kl_beta=uniform:0.5,5 --trials 5 --objective ppo_kl_adaptive",
            "kl_beta is swept, and has no effect with objective = ppo_kl_adaptive, after the first",
        ),
        ("--sample gamma=uniform:0.9,1 --trials 4", "a population has at least 5 members"),
        ("--sample gamma=uniform:0.9,1 --num-seeds 2", "num_seeds = 2: must be 1 with strategy"),
    ],
)
def test_invalid_populations_are_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", "--strategy", "pbt", "--run-dir", str(tmp_path / "s")]
    assert main([*command, *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
