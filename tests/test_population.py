"""Population-based training, against plain NumPy and against itself on one device."""

import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from envs import RandomWalk
from jax.sharding import Mesh

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host.parallel import ENVS, SEEDS, Spread
from purejaxppo.host.population import (
    FACTORS,
    Member,
    Population,
    choose_parents,
    exchange,
    explore,
)
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
def test_the_best_fifth_take_the_place_of_the_worst(size: int):
    rng = np.random.default_rng(size)
    score = rng.normal(size=size)
    score[3] = np.nan
    padded = np.append(score, 100.0)  # one that only fills a device, and must not be taken over
    parents = np.asarray(choose_parents(jax.random.key(0), size, jnp.asarray(padded, jnp.float32)))
    order = sorted(range(size), key=lambda k: -np.inf if np.isnan(score[k]) else score[k])
    cut = size // 5
    worst, best = set(order[:cut]), set(order[-cut:])
    assert 3 in worst
    for k in range(size + 1):
        assert parents[k] in (best if k in worst else {k})


def test_what_is_taken_over_changes_by_a_factor_and_stays_in_its_range():
    population = Population(500, 2, (("gamma", 0.5, 0.9), ("ent_coef", 0.0, 1.0)), 0, 10)
    given = ppo.HParams(gamma=jnp.full(500, 0.8), ent_coef=jnp.full(500, 0.5))
    taken = jnp.arange(500) < 400
    found = explore(jax.random.key(1), population, given, taken)
    gammas, coefficients = np.asarray(found.gamma), np.asarray(found.ent_coef)
    np.testing.assert_array_equal(gammas[400:], np.float32(0.8))
    np.testing.assert_allclose(np.unique(gammas[:400]), [0.64, 0.9], rtol=1e-6)
    np.testing.assert_allclose(np.unique(coefficients[:400]), [0.4, 0.6], rtol=1e-6)
    low = np.mean(coefficients[:400] < 0.5)
    assert abs(low - 0.5) < 0.1
    assert np.mean((gammas[:400] < 0.8) == (coefficients[:400] < 0.5)) < 0.6  # drawn apart
    assert found.learning_rate == given.learning_rate


def test_parameters_and_numbers_come_from_the_same_member_and_keys_do_not():
    """8 members over 4 devices, each of which has its own number for everything it learned."""
    number = jnp.arange(8.0)
    keys = jax.random.split(jax.random.key(0), 8)
    learner = LearnerState(keys, {"w": number}, number, (), (), jnp.full(8, 4))
    hparams = ppo.HParams(gamma=0.5 + number / 100)
    hparams = jax.tree.map(lambda x: jnp.broadcast_to(x, 8), hparams)
    members = Member(learner, hparams, number, jnp.ones(8))
    population = Population(8, 2, (("gamma", 0.0, 1.0),), 0, 10)
    spread = Spread(Mesh(np.asarray(jax.devices()[:4]).reshape(4, 1), (SEEDS, ENVS)))
    over = spread.over(
        lambda x: exchange(population, x, x.learner.updates[0]), (spread.seeds,), spread.seeds
    )
    found = over(members)
    np.testing.assert_array_equal(found.learner.params["w"], [7, *range(1, 8)])
    np.testing.assert_array_equal(found.learner.opt_state, [7, *range(1, 8)])
    gamma = np.asarray(found.hparams.gamma)
    assert np.isclose(gamma[0], 0.57 * np.asarray(FACTORS)).any()
    np.testing.assert_allclose(gamma[1:], 0.5 + np.arange(1, 8) / 100, rtol=1e-6)
    assert bool(jnp.all(found.learner.key == keys))
    assert not np.any(found.returned)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pbt") / "s"
    train(directory, devices=1)
    return directory


def curves(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "curves.npz") as table:
        return dict(table)


def test_a_population_over_4_devices_is_the_one_on_1(alone: Path, tmp_path: Path):
    train(tmp_path / "s", devices=4)
    assert (tmp_path / "s/results.csv").read_text() == (alone / "results.csv").read_text()
    for name, column in curves(alone).items():
        np.testing.assert_array_equal(curves(tmp_path / "s")[name], column)


def test_the_worst_go_on_from_the_best_and_at_their_rates(alone: Path):
    """As the curves show it: after an exchange a learning rate is the one before, or a factor of
    another's; the schedule is linear."""
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


def test_the_best_member_comes_out_as_a_config_file(alone: Path):
    rows = list(csv.DictReader((alone / "results.csv").open()))
    best = max(rows, key=lambda row: float(row["eval_return"]))
    text = (alone / "winner.toml").read_text()
    assert f"learning_rate = {best['learning_rate']}\n" in text


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
        ("--sample gamma=uniform:0.9,1 --seeds 2", "leave seeds at 1, and choose trials"),
    ],
)
def test_what_a_population_cannot_be_made_of(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", "--strategy", "pbt", "--run-dir", str(tmp_path / "s")]
    assert main([*command, *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
