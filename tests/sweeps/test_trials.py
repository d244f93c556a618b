"""The winner of a sweep, and single trials as states and as run directories."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import logged
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.evaluation import LATER_EVALUATION, evaluation_keys
from purejaxppo.host.configfile import RunSettings, Settings, load_settings
from purejaxppo.sweeps.outcomes import Outcome
from purejaxppo.sweeps.settings import Definition, SweepSettings
from purejaxppo.sweeps.strategies import Trial
from purejaxppo.sweeps.trials import extract_trial, single_trial_settings
from purejaxppo.sweeps.winner import best_trials, describe_winner

CONFIG = ppo.Config(
    env_id="RandomWalk", total_timesteps=8 * 32, num_steps=8, hidden_sizes=(8,),
    normalize_obs=True, num_minibatches=2,
)  # fmt: skip
RATES = [1e-3, 3e-3, 1e-2, 1e30]
OPTIONS: dict[str, Any] = {"num_seeds": 2, "eval_episodes": 4, "progress": False}
ALONE: dict[str, Any] = OPTIONS | {"env": RandomWalk()}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ppo.SweepResult, Path]:
    """Four trials, the last of which fails; two continue after half of the updates."""
    directory = tmp_path_factory.mktemp("halved") / "s"
    result = ppo.sweep(
        CONFIG, {"learning_rate": RATES}, strategy="halving", eta=2, rungs=1, run_dir=directory,
        env=RandomWalk(), **OPTIONS,
    )  # fmt: skip
    return result, directory


def stopped_early(result: ppo.SweepResult) -> int:
    return next(o.trial.number for o in result.outcomes if o.updates == 4 and not o.failed)


@pytest.fixture(scope="module")
def best_run(halved: tuple[ppo.SweepResult, Path]) -> ppo.Result:
    return ppo.run(CONFIG, halved[0].hparams, **ALONE)


def test_winner_is_evaluated_again_on_fresh_episodes(
    halved: tuple[ppo.SweepResult, Path], best_run: ppo.Result
):
    result, directory = halved
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2**31 + 2), 2)
    fresh = [
        ppo.evaluate(
            CONFIG, jax.tree.map(lambda x, s=s: x[s], best_run.states), keys[s], 512,
            env=RandomWalk(),
        )
        for s in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(result.best_returns, fresh, rtol=1e-5)
    assert result.best is not None
    table = json.loads((directory / "winner.json").read_text())
    assert table["trial"] == result.best.trial.number
    assert table["values"] == result.best.trial.values
    np.testing.assert_allclose(table["selection_return"], best_run.returns.mean(), rtol=1e-6)
    means = np.mean(fresh, axis=1)
    np.testing.assert_allclose(table["return"], means.mean(), rtol=1e-5)
    assert table["return"] == pytest.approx(result.best_return, rel=1e-6)
    half = 12.7062 * means.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    np.testing.assert_allclose(
        table["return_interval_95"], [means.mean() - half, means.mean() + half], rtol=1e-3
    )
    assert (table["episodes_per_seed"], table["selection_episodes_per_seed"]) == (512, 4)
    note = (directory / "winner.toml").read_text().partition("\n")[0]
    assert f"return {table['return']:.2f} on 1,024 fresh episodes" in note
    assert note.endswith(f"selection return {table['selection_return']:.2f}.")


def test_lowest_number_wins_a_tie():
    definition = Definition(Settings(CONFIG), SweepSettings(grid=("learning_rate=1,2,3,4,5,6",)))
    returns = {5: [500.0, 500.0], 3: [500.0, 499.0], 4: [500.0, 500.0], 2: [np.nan, 500.0]}
    returns |= {1: [500.0, 500.0], 0: [500.0, 500.0]}
    outcomes = {
        n: Outcome(Trial(n, {"learning_rate": n + 1.0}), np.array(r), {}, 8 if n else 4, 0)
        for n, r in returns.items()
    }
    assert [o.trial.number for o in best_trials(outcomes, definition)] == [1, 4, 5]
    table = {
        "trial": 1, "tied_with": [4, 5], "return": 498.756, "return_interval_95": [490.0, 500.0],
        "interval_over": "seeds", "return_per_seed": [1.0, 2.0], "episodes_per_seed": 512,
        "selection_return": 500.0,
    }  # fmt: skip
    assert describe_winner(table) == (
        "trial 1 (tied with trials 4, 5): return 498.76 on 1,024 fresh episodes, 95% interval "
        "490.00 to 500.00 over only 2 seeds; selection return 500.00"
    )


def test_states_of_a_trial_equal_those_of_its_run(
    halved: tuple[ppo.SweepResult, Path], best_run: ppo.Result
):
    result, directory = halved
    loaded = ppo.load_trial(directory, env=RandomWalk())
    assert loaded.config == CONFIG
    assert loaded.hparams == result.hparams
    for states in (loaded.state, result.states()):
        jax.tree.map(np.testing.assert_array_equal, raw(states), raw(best_run.states))
    (one, state), expected = ppo.load_trial(directory, seed=1, env=RandomWalk())[1:], best_run
    assert one == result.hparams
    mine = jax.tree.map(lambda x: x[1], expected.states)
    jax.tree.map(np.testing.assert_array_equal, raw(state), raw(mine))
    number = stopped_early(result)
    early = ppo.load_trial(directory, number, env=RandomWalk())
    assert early.hparams.learning_rate == RATES[number]
    np.testing.assert_array_equal(early.state.learner.updates, [4, 4])
    np.testing.assert_array_equal(result.states(3).learner.updates[0] < 4, True)  # it failed


def test_trial_and_seed_must_be_integers(halved: tuple[ppo.SweepResult, Path]):
    for trial, seed, words in (
        (2.5, None, "trial = 2.5: must be a whole number"),
        ("best", 1.0, "seed = 1.0: must be a whole number"),
        (9, 0, "trial = 9: the sweep has trials 0 to 3"),
    ):
        with pytest.raises(ppo.ConfigError, match=words):
            ppo.load_trial(halved[1], trial, seed, env=RandomWalk())  # type: ignore


def raw(states: ppo.TrainState) -> Any:
    def data(x: Any) -> np.ndarray:
        key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return jax.tree.map(data, states)


def test_resumed_trial_equals_an_uninterrupted_run(
    halved: tuple[ppo.SweepResult, Path], tmp_path: Path
):
    result, directory = halved
    number = stopped_early(result)
    run_dir = extract_trial(directory, number, env=RandomWalk())
    assert run_dir == directory / "trials" / f"{number:04d}"
    assert load_settings(run_dir / "config.toml").hparams.learning_rate == RATES[number]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    made = checkpoint.stat().st_mtime_ns
    assert extract_trial(directory, number, env=RandomWalk()) == run_dir
    assert checkpoint.stat().st_mtime_ns == made
    assert ppo.load(run_dir, seed=1, which="best", env=RandomWalk()).state.learner.updates == 4

    again = ppo.resume(run_dir, progress=False, env=RandomWalk())
    whole = ppo.run(
        CONFIG, ppo.HParams(learning_rate=RATES[number]), run_dir=tmp_path / "whole", **ALONE
    )
    np.testing.assert_array_equal(again.returns, whole.returns)
    jax.tree.map(np.testing.assert_array_equal, raw(again.states), raw(whole.states))
    for name in whole.metrics.keys() - {"seconds"}:
        np.testing.assert_array_equal(again.metrics[name], whole.metrics[name])
    assert logged(run_dir) == logged(tmp_path / "whole")


def test_single_seed_of_the_winner_can_be_extended(
    halved: tuple[ppo.SweepResult, Path], best_run: ppo.Result
):
    run_dir = extract_trial(halved[1], "best", seed=1, env=RandomWalk())
    assert run_dir.name.endswith("-seed-1")
    longer = ppo.resume(run_dir, total_timesteps=10 * 32, progress=False, env=RandomWalk())
    assert longer.metrics["episode_return"].shape == (1, 10)
    for name in ("episode_return", "policy_loss", "env_steps"):
        np.testing.assert_array_equal(longer.metrics[name][0, :8], best_run.metrics[name][1])


@pytest.mark.parametrize(
    ("trial", "seed", "message"),
    [
        (99, None, "trial = 99: the sweep has trials 0 to 3"),
        (-1, None, "trial = -1: must be at least 0"),
        ("worst", None, "trial = 'worst': must be best, or the number of a trial"),
        (0, 2, "seed = 2: the trials have seeds 0 to 1"),
        (3, None, "trial = 3: the loss of seed 0 was not finite at update"),
    ],
)
def test_trials_that_cannot_be_loaded_give_one_line(
    halved: tuple[ppo.SweepResult, Path], trial: Any, seed: int | None, message: str
):
    for function in (ppo.load_trial, extract_trial):
        with pytest.raises(ppo.ConfigError) as raised:
            function(halved[1], trial, seed, env=RandomWalk())
        assert str(raised.value).startswith(message)
        assert "\n" not in str(raised.value)
    assert not list((halved[1] / "trials").glob("*.part"))
    if trial == 99:
        with pytest.raises(ppo.ConfigError, match="trials 0 to 3"):
            halved[0].states(trial)


def test_unfinished_sweep_has_no_trials_to_load(tmp_path: Path):
    with pytest.raises(ppo.ConfigError, match=r"no sweep\.toml found"):
        ppo.load_trial(tmp_path)
    (tmp_path / "sweep.toml").write_text("")
    for function in (ppo.load_trial, extract_trial):
        with pytest.raises(ppo.ConfigError, match="is not finished; to resume: purejaxppo resume"):
            function(tmp_path)


def test_sweep_passes_on_all_sweep_settings(monkeypatch: pytest.MonkeyPatch):
    given = inspect.signature(ppo.sweep).parameters
    others: dict[str, Any] = {
        "strategy": "sobol", "trials": 3, "batch": 2, "eta": 2, "rungs": 2, "interval": 2,
        "memory_gb": 1.0, "engine": "ray", "wave_cpus": 2, "wave_gpus": 1, "wave_tpus": 1,
    }  # fmt: skip
    needs = {"batch": "optuna", "eta": "halving", "rungs": "halving", "interval": "pbt"}
    seen: list[Definition] = []
    monkeypatch.setattr(
        "purejaxppo.sweeps.engine.start_sweep", lambda found, *_, **__: seen.append(found) or 1
    )
    for field in dataclasses.fields(SweepSettings):
        if field.name in ("grid", "sample"):
            continue
        assert given[field.name].default == field.default
        more = {"strategy": needs[field.name]} if field.name in needs else {}
        more |= {"engine": "ray"} if field.name.startswith("wave_") else {}
        more |= {"env": RandomWalk(), field.name: others[field.name]}
        ppo.sweep(CONFIG, {"gamma": ppo.uniform(0, 1)}, **more)
        assert getattr(seen[-1].sweep, field.name) == others[field.name]


@pytest.mark.parametrize(
    ("devices", "trials", "seeds", "own"), [(0, 8, 2, 0), (4, 8, 2, 0), (4, 1, 2, 4), (4, 2, 1, 2)]
)
def test_extracted_trial_has_the_same_devices_per_run_as_in_its_wave(
    devices: int, trials: int, seeds: int, own: int
):
    """Results depend bitwise on how the environments are split over devices."""
    run = RunSettings(seed=3, num_seeds=seeds, devices=devices, keep=1)
    wave = Settings(CONFIG, run=run, trials=(ppo.HParams(),) * trials)
    hparams = ppo.HParams(gamma=0.5)
    found = single_trial_settings(wave, hparams, seeds)
    assert (found.config, found.hparams, found.trials) == (CONFIG, hparams, ())
    assert (found.run.seed, found.run.num_seeds, found.run.devices) == (3, seeds, own)


@pytest.mark.slow
def test_command_line_evaluates_exports_and_resumes_a_trial(tmp_path: Path, capsys: Any):
    sweep, policy = str(tmp_path / "s"), tmp_path / "policy.bin"
    small = "--total-timesteps 64 --num-steps 8 --hidden-sizes 4 --num-minibatches 2".split()
    search = "--num-seeds 2 --eval-episodes 2 --grid gamma=0.9,0.99".split()
    assert main(["sweep", "--run-dir", sweep, *small, *search]) == 0
    best = json.loads((tmp_path / "s/winner.json").read_text())["trial"]
    capsys.readouterr()

    assert main(["eval", sweep, "--trial", str(1 - best), "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [1]
    assert main(["eval", sweep, "--json", "--episodes", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = ppo.load_trial(sweep, best).state
    keys = evaluation_keys(0, 2, LATER_EVALUATION)
    config = ppo.load_trial(sweep, best).config
    returns = [
        ppo.evaluate(config, jax.tree.map(lambda x, s=s: x[s], states), keys[s], 4).mean()
        for s in (0, 1)
    ]
    np.testing.assert_allclose(found["return_per_seed"], returns, rtol=1e-6)
    assert main(["export", sweep, str(policy), "--seed", "1"]) == 0
    assert policy.stat().st_size > 0

    capsys.readouterr()
    resumed = ["resume", sweep, "--trial", "best", "--total-timesteps", "96"]
    assert main(resumed) == 0
    run_dir = tmp_path / f"s/trials/{best:04d}"
    assert ppo.load(run_dir, seed=None).state.learner.updates.tolist() == [3, 3]
    for command, words in (
        (["eval", sweep, "--trial", "9"], "trial = 9: the sweep has trials 0 to 1"),
        (["eval", sweep, "--trial", "x"], "must be best, or the number of a trial"),
        (["eval", sweep, "--checkpoint", "best"], "leave out --checkpoint"),
        (["eval", sweep, "--seed", "2"], "seed = 2: the trials have seeds 0 to 1"),
        (["resume", sweep, "--total-timesteps", "96"], "extend one of them with --trial best"),
        ([*resumed, "--coordinator", "127.0.0.1:1"], "cannot be used with --trial"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err
