"""Sweeps: trials equal the corresponding runs, and interruptions lose or repeat nothing."""

import csv
import dataclasses
import importlib
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host.configfile import RunSettings, Settings, load_settings
from purejaxppo.host.parallel import choose_spread
from purejaxppo.sweeps.plan import make_groups, padded_count
from purejaxppo.sweeps.settings import Definition, SweepSettings, dump_definition, load_definition
from purejaxppo.sweeps.strategies import Batch, Halving, Optuna, Trial, all_trials

run_module = importlib.import_module("purejaxppo.host.run")
LENGTH = 9
CONFIG = ppo.Config(
    env_id="RandomWalk", total_timesteps=LENGTH * 32, num_steps=8, hidden_sizes=(8,),
    normalize_obs=True, num_minibatches=2,
)  # fmt: skip
RATES = [1e-3, 1e-2, 3e-2]


def sweep(space: dict[str, Any], directory: Path | None = None, **options: Any) -> ppo.SweepResult:
    given: dict[str, Any] = {"num_seeds": 2, "eval_episodes": 4, "progress": False} | options
    return ppo.sweep(CONFIG, space, run_dir=directory, env=RandomWalk(), **given)


def columns(directory: Path) -> dict[str, np.ndarray]:
    with np.load(directory / "curves.npz") as table:
        return dict(table)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep."""
    directory = tmp_path_factory.mktemp("sweep") / "s"
    sweep({"learning_rate": RATES}, directory)
    return directory


def test_trial_equals_a_run_with_its_settings_bit_for_bit(whole: Path):
    hparams = ppo.HParams(learning_rate=RATES[1])
    alone = ppo.run(CONFIG, hparams, num_seeds=2, eval_episodes=4, env=RandomWalk(), progress=False)
    table = columns(whole)
    for seed in range(2):
        mine = (table["trial"] == 1) & (table["seed"] == seed)
        np.testing.assert_array_equal(table["update"][mine], np.arange(1, LENGTH + 1))
        for name in ("episode_return", "policy_loss", "grad_norm", "env_steps"):
            np.testing.assert_array_equal(table[name][mine], alone.metrics[name][seed])
    rows = list(csv.DictReader((whole / "results.csv").open()))
    found = [float(row["eval_return"]) for row in rows if row["trial"] == "1"]
    assert found == [float(x) for x in alone.returns.mean(axis=1)]


def test_wave_can_be_loaded_but_not_resumed_as_a_run(
    whole: Path, capsys: pytest.CaptureFixture[str]
):
    wave = whole / "waves/0000"
    config, hparams, state = ppo.load(wave, seed=2 * 1 + 1, env=RandomWalk())
    assert (config, hparams.learning_rate) == (CONFIG, RATES[1])
    alone = ppo.run(CONFIG, hparams, num_seeds=2, eval_episodes=4, env=RandomWalk(), progress=False)
    np.testing.assert_array_equal(
        state.learner.opt_state[1].mu, alone.states.learner.opt_state[1].mu[1]
    )
    with pytest.raises(ppo.ConfigError, match="is part of a sweep; to resume the sweep: "):
        ppo.resume(wave, env=RandomWalk())


def test_winner_is_the_best_trial_and_is_written_as_a_config_file(whole: Path):
    rows = list(csv.DictReader((whole / "results.csv").open()))
    means = {n: np.mean([float(r["eval_return"]) for r in rows if r["trial"] == n]) for n in "012"}
    best = max(means, key=lambda n: means[n])
    settings = load_settings(whole / "winner.toml")
    assert settings.hparams.learning_rate == RATES[int(best)]
    assert settings.config == CONFIG
    assert settings.run.num_seeds == 2


class Killed(BaseException):
    """Simulates a kill signal."""


@pytest.mark.parametrize(
    ("calls", "stopped"),
    [
        pytest.param(14, True, marks=pytest.mark.slow),
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(5, True, marks=pytest.mark.slow),
        pytest.param(14, False, marks=pytest.mark.slow),
    ],
)
def test_interrupted_sweep_equals_an_uninterrupted_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, stopped: bool
):
    """Waves of two trials and of one, with one update per chunk. The process is stopped, or dies,
    after `calls` chunks. If stopped, it repeats nothing; if killed, no finished wave."""
    done: list[int] = []
    dies = [calls]
    prepared_run = run_module.run_wave

    def run_wave(settings: Any, where: Any, prepared: Any, *rest: Any, **more: Any) -> Any:
        def chunk(states: Any, hparams: Any, count: int) -> Any:
            if len(done) == dies[0]:
                if not stopped:
                    raise Killed
                signal.raise_signal(signal.SIGTERM)
            done.append(count)
            return prepared.program.chunk(states, hparams, count)

        program = prepared.program._replace(chunk=chunk)
        return prepared_run(settings, where, prepared._replace(program=program), *rest, **more)

    monkeypatch.setattr("purejaxppo.sweeps.waves.run_wave", run_wave)
    monkeypatch.setattr("purejaxppo.host.loop.CHUNK_SECONDS", 1e-9)
    directory = tmp_path / "s"
    with pytest.raises(SystemExit if stopped else Killed):
        sweep({"learning_rate": RATES}, directory, checkpoint_every=1e-9, memory_gb=2e-5)
    dies[0] = -1
    before = sum(done)
    ppo.resume_sweep(directory, progress=False, env=RandomWalk())
    waves = len(list((directory / "waves").iterdir()))
    assert waves == 2
    repeated = sum(done) - waves * LENGTH
    assert repeated == 0 if stopped else 0 <= repeated <= before % LENGTH
    results = [csv.DictReader((d / "results.csv").open()) for d in (whole, directory)]
    for mine, theirs in zip(*results, strict=True):
        assert {**mine, "wave": ""} == {**theirs, "wave": ""}
    one, other = columns(whole), columns(directory)
    for name, column in one.items():
        np.testing.assert_array_equal(column, other[name])


def test_failed_trial_is_recorded_and_does_not_affect_others(whole: Path, tmp_path: Path):
    result = sweep({"learning_rate": [*RATES, 1e30]}, tmp_path / "s")
    rows = list(csv.DictReader((tmp_path / "s/results.csv").open()))
    failed = [row for row in rows if row["trial"] == "3"]
    assert all(row["eval_return"] == "" and int(row["failed_at_update"]) > 0 for row in failed)
    others = [row for row in rows if row["trial"] != "3"]
    assert others == list(csv.DictReader((whole / "results.csv").open()))
    assert np.isnan(result.returns[3]).all()
    assert result.best is not None
    assert result.best.trial.number != 3


@pytest.mark.slow
def test_halving_continues_the_best_trials_seamlessly(tmp_path: Path):
    space = {"learning_rate": ppo.loguniform(1e-4, 1e-1)}
    options: dict[str, Any] = {"trials": 9, "num_seeds": 1, "eval_episodes": 4}
    halved = sweep(space, tmp_path / "halved", strategy="halving", **options)
    whole = sweep(space, **options)
    updates = [outcome.updates for outcome in halved.outcomes]
    assert sorted(updates) == [1] * 6 + [3] * 2 + [9]
    last = updates.index(9)
    assert halved.returns[last] == whole.returns[last]
    table = columns(tmp_path / "halved")
    np.testing.assert_array_equal(table["update"][table["trial"] == last], np.arange(1, 10))
    assert halved.best is not None
    assert halved.best.trial.number == last


@pytest.mark.parametrize(
    ("count", "seeds", "devices", "size"),
    [(3, 1, 0, 3), (5, 1, 0, 8), (3, 1, 2, 4), (3, 2, 2, 3), (3, 1, 4, 4), (2, 1, 4, 2)],
)
def test_waves_are_padded_to_divide_evenly_among_devices(
    count: int, seeds: int, devices: int, size: int
):
    """There are 4 devices; the mesh would refuse a size that does not divide evenly."""
    run = RunSettings(num_seeds=seeds, devices=devices)
    settings = Settings(CONFIG, run=run)
    assert padded_count(count, settings) == size
    spread = choose_spread(
        dataclasses.replace(settings, trials=(ppo.HParams(),) * size),
        ppo.make_task(CONFIG, env=RandomWalk()),
    )
    assert spread.mesh.size == (devices or (4 if size * seeds % 4 == 0 else 3))


def test_trials_are_grouped_by_static_settings_and_cover_all_combinations():
    definition = SweepSettings(
        grid=("num_envs=4,8", "hidden_sizes=[8],[16,16]"),
        sample=("ent_coef=loguniform:1e-4,1e-1", "target_kl=choice:none,0.01"),
        trials=3,
    )
    trials = all_trials(definition.space, "random", definition.trials, seed=0)
    assert len({tuple(t.values.items()) for t in trials}) == 2 * 2 * 3
    groups = make_groups(Settings(), trials)
    kinds = {
        (g.settings.config.num_envs, g.settings.config.hidden_sizes, h.target_kl is None)
        for g in groups
        for _, h in g.members
    }
    assert len(kinds) == len(groups)
    assert sum(len(group.members) for group in groups) == 12
    waves = groups[0].waves(2)
    assert all(len(wave.settings.trials) == 2 for wave in waves)
    assert [t for w in waves for t in w.trials] == [t for t, _ in groups[0].members]


def test_definition_round_trips_through_its_file(tmp_path: Path):
    sweep = SweepSettings(
        grid=('activation="tanh","relu"', "hidden_sizes=[8],[16,16]"),
        sample=("learning_rate=loguniform:1e-4,0.1",), strategy="sobol", trials=5,
    )  # fmt: skip
    definition = Definition(Settings(CONFIG), sweep)
    path = tmp_path / "sweep.toml"
    path.write_text(dump_definition(definition))
    assert load_definition(path) == definition
    assert dict(sweep.space.grid)["hidden_sizes"] == ((8,), (16, 16))


def test_sobol_puts_one_of_8_samples_into_each_eighth():
    space = SweepSettings(sample=("gamma=uniform:0,1", "ent_coef=loguniform:1e-4,1")).space
    trials = all_trials(space, "sobol", 8, seed=3)
    gammas = np.array([trial.values["gamma"] for trial in trials])
    coefficients = np.array([trial.values["ent_coef"] for trial in trials])
    assert sorted(np.floor(gammas * 8)) == list(range(8))
    assert sorted(np.floor((np.log10(coefficients) + 4) / 4 * 8)) == list(range(8))
    assert all_trials(space, "sobol", 8, seed=4) != trials


def test_halving_keeps_the_best_third_and_no_failed_trials():
    trials = [Trial(n, {}) for n in range(9)]
    strategy = Halving(trials, eta=3, rungs=5)
    first = strategy.ask()
    assert first == Batch(trials, share=1 / 9)
    strategy.tell(first, np.array([5, np.nan, 7, 1, 2, 3, 9, 0, 4.0]))
    second = strategy.ask()
    assert second is not None
    assert [t.number for t in second.trials] == [0, 2, 6]
    strategy.tell(second, np.array([1.0, np.nan, 0.5]))
    third = strategy.ask()
    assert third is not None
    assert ([t.number for t in third.trials], third.share) == ([0], 1.0)
    strategy.tell(third, np.array([1.0]))
    assert strategy.ask() is None


def test_optuna_searches_where_returns_are_high_and_can_be_resumed():
    """The return is highest at 1e-3; a second process resumes after each batch."""
    space = SweepSettings(
        grid=("num_envs=4,8",),
        sample=("learning_rate=loguniform:1e-6,1", "clip_eps=choice:0.1,0.2"),
    ).space

    def returns(batch: Batch) -> np.ndarray:
        rates = np.array([trial.values["learning_rate"] for trial in batch.trials])
        return np.where(rates > 0.3, np.nan, -np.square(np.log10(rates) + 3))

    first, seen = Optuna(space, count=60, batch=10, seed=0), []
    while batch := first.ask():
        second = Optuna(space, count=60, batch=10, seed=0)
        for told in seen:
            second.tell(told, returns(told))
        assert second.ask() == batch
        first.tell(batch, returns(batch))
        seen.append(batch)
    assert [t.number for batch in seen for t in batch.trials] == list(range(60))
    assert np.nanmean(returns(seen[-1])) > 4 * np.nanmean(returns(seen[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--grid learning_rat=1", "learning_rat: no such setting to sweep; did you mean learning_"),
        ("--grid run.seed=1,2", "run.seed: no such setting to sweep"),
        ("--grid learning_rate=", "learning_rate: has no values"),
        ("--grid learning_rate", "'learning_rate': write NAME=VALUE,VALUE"),
        ("--sample gamma=uniform:0.99,0.9", "uniform:0.99,0.9: is empty"),
        (
            "--sample learning_rate=loguniform:0,1",
            "loguniform:0.0,1.0: the first bound has no logarithm",
        ),
        ("--sample learning_rate=normal:0,1", "write learning_rate=uniform:LOW,HIGH"),
        ("--sample num_envs=uniform:4,64", "each value of num_envs needs its own compilation"),
        ("--grid gamma=0.9 --sample gamma=uniform:0.9,1", "gamma: is swept twice"),
        ("--grid gamma=0.9,1.5", "trial 1 (gamma = 1.5): gamma = 1.5: must be at least 0"),
        ("--grid num_envs=4,oak", "trial 1 (num_envs = oak): num_envs = 'oak': must be a whole"),
        ("--grid num_minibatches=3", "is not divisible by num_minibatches = 3"),
        ("--grid gamma=0.9 --devices 99", "devices = 99: only 4 available"),
        ("--grid gamma=0.9 --trials 0", "trials = 0: must be at least 1"),
        ("--grid kl_beta=1,2", "kl_beta is swept, and has no effect with objective = ppo_clip"),
        (
            "--grid vf_coef=0.5,1 --objective reinforce --num-steps 500 --update-epochs 1 "
            "--num-minibatches 1",
            "vf_coef is swept, and has no effect with objective = reinforce, which has no critic",
        ),
        ("--sample gae_lambda=uniform:0,1 --advantage td0", "has no effect with advantage = td0"),
        ("--grid gamma=0.9 --eta 2", "eta = 2: has no effect with strategy = random"),
        ("--grid gamma=0.9 --wave-gpus 1", "leave it out, or choose engine = ray"),
        ("--grid env_id=A,B", "env_id: returns of different environments or tasks do not compare"),
        ("", "nothing to sweep; add --grid or --sample"),
    ],
)
def test_bad_input_gives_one_message_and_writes_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    directory = tmp_path / "s"
    status = main(["sweep", *arguments.split(), "--run-dir", str(directory)])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not directory.exists()


def test_loggers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "my.toml"
    file.write_text('[run]\ntensorboard = true\n[sweep]\ngrid = ["gamma=0.9"]\n')
    assert main(["sweep", str(file), "--run-dir", str(tmp_path / "s")]) == 2
    assert "run.tensorboard = true: a sweep writes" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_dry_run_writes_nothing_and_too_large_trials_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = "--total-timesteps 64 --num-steps 8 --hidden-sizes 4 --grid gamma=0.9,0.99".split()
    directory = tmp_path / "s"
    command = ["sweep", *small, "--run-dir", str(directory), "--no-compilation-cache"]
    assert main([*command, "--dry-run"]) == 0
    assert "2 trials x 1 seed = 2 runs" in capsys.readouterr().out
    assert not directory.exists()
    assert main([*command, "--memory-gb", "1e-9"]) == 2
    assert "of num_seeds = 1 take" in capsys.readouterr().err


def test_sweep_settings_change_the_trials():
    """The strategy, the number of trials and the seed each have an effect."""
    base = SweepSettings(sample=("gamma=uniform:0,1",), trials=4)

    def trials(seed: int = 0, **changes: Any) -> list[Trial]:
        changed = dataclasses.replace(base, **changes)
        return all_trials(changed.space, changed.strategy, changed.trials, seed)

    assert trials() == trials()
    assert trials() != trials(strategy="sobol")
    assert trials() != trials(seed=1)
    assert trials() == trials(trials=5)[:4]


def test_halving_has_the_given_number_of_rungs():
    trials = [Trial(n, {}) for n in range(30)]
    for rungs, shares in ((1, [1 / 2, 1]), (3, [1 / 8, 1 / 4, 1 / 2, 1])):
        strategy, seen = Halving(trials, eta=2, rungs=rungs), []
        while batch := strategy.ask():
            seen.append(batch.share)
            strategy.tell(batch, np.arange(len(batch.trials), dtype=float))
        assert seen == shares
