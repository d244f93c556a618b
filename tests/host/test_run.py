"""`run`: its files, repeatability, failing seeds, evaluation, agents and plots."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fusing, logged
from toy_envs import Clock, ConstantChain, Params, Poisoned, RandomWalk, Unending

import purejaxppo as ppo
from purejaxppo.evaluation import FINAL_EVALUATION, LATER_EVALUATION, evaluation_keys
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.loggers import in_order
from purejaxppo.host.plots import smooth
from purejaxppo.host.stats import mean_interval

FILES = {
    "config.toml", "metrics.csv", "eval.csv", "summary.json", "learning_curve.png", "checkpoints",
    ".lock",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ppo.Config, Any, Path]:
    directory = tmp_path_factory.mktemp("runs") / "with space é"
    config = ppo.Config(
        total_timesteps=1000, num_steps=8, hidden_sizes=(8,), normalize_obs=True, num_minibatches=2
    )
    hparams = ppo.HParams(learning_rate=1e-3)
    with fusing():
        result = ppo.run(
            config, hparams, seed=3, num_seeds=2, run_dir=directory, eval_episodes=16,
            tensorboard=True,
        )  # fmt: skip
    return config, result, directory


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_directory_holds_the_documented_files(finished: Any):
    _, result, directory = finished
    assert {p.name for p in directory.iterdir()} == FILES | {"tensorboard"}
    summary = json.loads((directory / "summary.json").read_text())
    assert summary.pop("digest")
    assert summary == result.summary
    assert summary["env_steps"] == 1024  # 1000, rounded up to updates of 32
    assert summary["eval_return_mean"] == pytest.approx(result.returns.mean())
    low, high = summary["eval_return_interval_95"]
    assert low <= summary["eval_return_mean"] <= high
    assert summary["versions"]["jax"] == jax.__version__
    assert (directory / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((directory / "tensorboard").glob("seed_*/events*"))) == 2


def test_metrics_equal_those_of_make_train_and_read_back_exactly(finished: Any, fused: Any):
    config, result, directory = finished
    table = rows(directory)
    assert [(r["seed"], r["update"]) for r in table[:3]] == [("0", "1"), ("1", "1"), ("0", "2")]
    assert list(table[0])[2:] == [*in_order(set(result.metrics) - {"seconds"}), "seconds"]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] <= result.summary["run_seconds"]
    assert len(table) == 2 * config.num_updates
    keys = jax.random.split(jax.random.key(3), 2)
    train, hparams = ppo.make_train(config), ppo.HParams(learning_rate=1e-3)
    each = [fused(train, key, hparams) for key in keys]
    states, metrics = jax.tree.map(lambda *x: jnp.stack(x), *each)
    assert set(result.metrics) == {*metrics, "seconds"}
    for name in metrics:
        expected = np.asarray(metrics[name])
        np.testing.assert_array_equal(result.metrics[name], expected)
        read = np.array([np.float32(r[name]) for r in table]).reshape(-1, 2).T
        np.testing.assert_array_equal(read, expected.astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, states.learner.params, result.states.learner.params)


@pytest.mark.usefixtures("fused")
def test_config_toml_repeats_the_run_bit_for_bit(finished: Any, tmp_path: Path):
    _, result, directory = finished
    settings = load_settings(directory / "config.toml")
    again = ppo.run(
        settings.config, settings.hparams, seed=settings.run.seed,
        num_seeds=settings.run.num_seeds, run_dir=tmp_path / "again",
        eval_episodes=settings.run.eval_episodes, tensorboard=True, progress=False,
    )  # fmt: skip
    assert logged(tmp_path / "again") == logged(directory)
    assert (tmp_path / "again/config.toml").read_text() == (directory / "config.toml").read_text()
    np.testing.assert_array_equal(again.returns, result.returns)


def test_the_final_state_can_be_loaded(finished: Any):
    config, result, directory = finished
    loaded = ppo.load(directory, seed=None)
    assert loaded.config == config
    assert loaded.hparams == ppo.HParams(learning_rate=1e-3)
    leaves = jax.tree.leaves(result.states)
    for x, y in zip(jax.tree.leaves(loaded.state), leaves, strict=True):
        assert x.dtype == y.dtype
        assert bool(jnp.all(x == y))
    one, all_ = ppo.load(directory, seed=1).state.learner, result.states.learner
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[1]), one.params, all_.params)


def test_a_directory_that_holds_a_run_is_not_changed(finished: Any):
    config, _, directory = finished
    before = (directory / "metrics.csv").read_bytes()
    with pytest.raises(ppo.ConfigError, match="already holds a run"):
        ppo.run(config, run_dir=directory)
    assert (directory / "metrics.csv").read_bytes() == before


def test_a_non_finite_loss_does_not_affect_other_seeds(tmp_path: Path, capsys: Any):
    """The rewards of some seeds become NaN at some step."""
    config = ppo.Config(
        env_id="poisoned", total_timesteps=8 * 60, num_envs=1, num_steps=8, num_minibatches=1,
        hidden_sizes=(8,), update_epochs=1,
    )  # fmt: skip
    result = ppo.run(config, num_seeds=6, run_dir=tmp_path / "r", env=Poisoned(), eval_episodes=4)
    assert 0 < len(result.failed) <= 6
    seed, update = next(iter(result.failed.items()))
    text = capsys.readouterr().out
    assert f"seed {seed}: the loss is not finite at update {update}" in text
    assert "Try a lower learning_rate (now 0.00025)" in text
    assert result.summary["failed_seeds"][str(seed)] == {
        "update": update,
        "last_good_update": update - 1,
    }
    mine = [r for r in rows(tmp_path / "r") if r["seed"] == str(seed)]
    assert [int(r["update"]) for r in mine] == list(range(1, update + 1))
    assert np.isnan(float(mine[-1]["policy_loss"]))
    assert all(np.isfinite(float(r["policy_loss"])) for r in mine[:-1])
    for leaf in jax.tree.leaves(result.states.learner.params):
        assert np.isfinite(leaf).all()
    assert result.states.learner.updates[seed] == update - 1


class Infinite(RandomWalk):
    """Its observation is infinite in the last step of a full-length episode."""

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> jax.Array:
        return jnp.where(state.time == 4, jnp.inf, super().get_obs(state))


def test_statistics_of_an_infinite_observation_are_not_kept(tiny: ppo.Config):
    """The network sees it clipped, so the loss is finite but the statistics are not."""
    config = dataclasses.replace(tiny, normalize_obs=True)
    result = ppo.run(config, env=Infinite(), eval_episodes=2)
    assert result.failed == {0: 1}
    for leaf in jax.tree.leaves(result.states.learner._replace(key=())):
        assert np.isfinite(leaf).all()


def test_evaluations_share_no_key_with_training():
    training = jax.random.key_data(jax.random.split(jax.random.key(0), 64))
    deeper = jax.vmap(lambda k: jax.random.key_data(jax.random.split(k, 8)))(
        jax.random.wrap_key_data(training)
    )
    seen = {tuple(row) for row in np.concatenate([training, deeper.reshape(-1, 2)]).tolist()}
    for purpose in (FINAL_EVALUATION, LATER_EVALUATION):
        keys = jax.random.key_data(evaluation_keys(0, 64, purpose)).tolist()
        assert not seen & {tuple(row) for row in keys}
        seen |= {tuple(row) for row in keys}


def test_a_run_stops_once_all_seeds_have_failed(tmp_path: Path):
    config = ppo.Config(total_timesteps=10**9, num_steps=8, hidden_sizes=(8,), num_minibatches=1)
    result = ppo.run(config, ppo.HParams(learning_rate=1e38), run_dir=tmp_path / "r")
    assert result.failed.keys() == {0}
    assert result.summary["eval_return_mean"] is None
    assert result.summary["env_steps"] < 10**6
    for leaf in jax.tree.leaves(result.states.learner.params):
        assert np.isfinite(leaf).all()
    json.loads((tmp_path / "r/summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hparams": ppo.HParams(learning_rate=np.array([1e-3, 1e-4]))}, "vmap the function"),
        ({"eval_episodes": 0}, "eval_episodes = 0"),
        ({"tensorboard": True}, "give run_dir"),
        ({"num_seeds": 0}, "num_seeds = 0"),
        ({"run_dir": "/proc/none/here"}, "cannot be written"),
        ({"run_dir": "x" * 300}, "File name too long"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.run(ppo.Config(), **options)


# Agents and evaluation


@pytest.mark.parametrize("memory", ["none", pytest.param("lstm", marks=pytest.mark.slow)])
def test_an_agent_works_in_a_python_loop_and_agrees_with_evaluate(memory: Any):
    """A plain Python loop over one environment, with deterministic actions in both."""
    config = ppo.Config(
        env_id="RandomWalk", total_timesteps=3 * 32, num_steps=8, hidden_sizes=(8,),
        memory=memory, memory_size=8, normalize_obs=True,
    )  # fmt: skip
    env = RandomWalk()
    state, _ = jax.jit(ppo.make_train(config, env))(jax.random.key(0), ppo.HParams())
    returns = ppo.evaluate(
        config, state, jax.random.key(5), num_episodes=400, deterministic=True, env=env
    )
    agent, act = ppo.make_agent(config, state, env), None
    act = jax.jit(agent.act, static_argnums=3)
    params, mine = env.default_params, []
    for episode in range(100):
        key = jax.random.fold_in(jax.random.key(100), episode)
        obs, env_state = env.reset(key, params)
        carry, total, over = agent.initial_carry(1), 0.0, False
        while not over:
            key, step_key = jax.random.split(key)
            action, carry = act(key, obs[None], carry, True)
            obs, env_state, reward, terminated, truncated, _ = env.step(
                step_key, env_state, action[0], params
            )
            total, over = total + float(reward), bool(terminated | truncated)
        mine.append(total)
    error = np.hypot(np.std(mine) / 10, np.std(returns) / 20)
    assert abs(np.mean(mine) - np.mean(returns)) < 4 * error


def test_start_resets_a_row_of_the_carry(tiny: ppo.Config):
    config = dataclasses.replace(tiny, memory="gru")
    state, _ = jax.jit(ppo.make_train(config))(jax.random.key(0), ppo.HParams())
    agent = ppo.make_agent(config, state)
    key, obs = jax.random.key(1), jnp.ones((2, 4))
    fresh = agent.initial_carry(2)
    _, carry = agent.act(key, obs, fresh)
    _, again = agent.act(key, obs, carry, start=jnp.array([True, False]))
    for first, second in zip(jax.tree.leaves(carry), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(first[0], second[0], atol=1e-6)
        assert np.abs(first[1] - second[1]).max() > 1e-4


def test_evaluate_is_reproducible_and_keeps_the_returns_of_cut_episodes():
    config = ppo.Config(total_timesteps=512)
    state, _ = jax.jit(ppo.make_train(config))(jax.random.key(0), ppo.HParams())
    key = jax.random.key(2)
    whole = ppo.evaluate(config, state, key, num_episodes=8)
    np.testing.assert_array_equal(whole, ppo.evaluate(config, state, key, num_episodes=8))
    cut = ppo.evaluate(config, state, key, num_episodes=8, max_steps=5)
    np.testing.assert_array_equal(cut, np.minimum(whole, 5))
    for bad in ({"num_episodes": 0}, {"max_steps": 0}):
        with pytest.raises(ppo.ConfigError, match="= 0: must be at least 1"):
            ppo.evaluate(config, state, key, **bad)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ppo.ConfigError, match="leading axis of 2 seeds"):
        ppo.evaluate(config, states, key)
    both = jax.vmap(lambda s, k: ppo.evaluate(config, s, k, 8))(states, jnp.stack([key, key]))
    np.testing.assert_array_equal(both[0], whole)


class Unlimited(Unending):
    """It has no time limit either."""

    @property
    def default_params(self) -> Any:
        return ()


class OneLate(ConstantChain):
    def is_truncated(self, state: Clock, params: Params) -> jax.Array:
        return state.time > params.max_steps_in_episode


def test_an_episode_that_does_not_end_has_no_return(tiny: ppo.Config, monkeypatch: Any):
    """Rewards are 1, so the return is the episode's length."""
    monkeypatch.setattr("purejaxppo.evaluation.MAX_STEPS_WITHOUT_LIMIT", 20)
    state = ppo.make_learner(tiny, ConstantChain()).init(jax.random.key(0), ppo.HParams())

    def returns(env: Any, **given: Any) -> list[float]:
        return ppo.evaluate(tiny, state, jax.random.key(1), 2, env=env, **given).tolist()

    assert returns(ConstantChain()) == [5, 5]
    assert returns(ConstantChain(), max_steps=5) == [5, 5]
    assert returns(OneLate()) == [6, 6]
    assert returns(ConstantChain(), env_params=Params(4.5)) == [5, 5]  # pyright: ignore
    assert np.isnan(returns(Unending())).all()
    assert np.isnan(returns(Unlimited())).all()
    assert returns(Unending(), max_steps=7) == [7, 7]
    assert returns(Unlimited(), max_steps=7) == [7, 7]


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_one_program_evaluates_sampled_and_deterministic_actions(env: str, tiny: ppo.Config):
    config = dataclasses.replace(tiny, env_id=env)
    state = ppo.make_learner(config).init(jax.random.key(0), ppo.HParams())

    def returns(deterministic: Any) -> jax.Array:
        key = jax.random.key(1)
        return ppo.evaluate(config, state, key, 4, deterministic=deterministic, max_steps=20)

    both = jax.jit(returns)
    found = {value: both(value) for value in (False, True)}
    assert both._cache_size() == 1  # type: ignore
    assert (found[False] != found[True]).any()
    for value in (False, True):
        np.testing.assert_allclose(found[value], jax.jit(lambda: returns(value))(), rtol=1e-5)  # noqa: B023


# Statistics and plots


def test_mean_interval_is_students():
    """For 1, 2, 3, 4: t(0.975, 3) = 3.182446, standard deviation sqrt(5/3), divided by sqrt(4)."""
    values = np.array([[1.0, 2.0, 3.0, 4.0], [7.0, np.nan, np.nan, np.nan]])
    mean, low, high = mean_interval(values)
    np.testing.assert_allclose(mean, [2.5, 7.0])
    half = 3.182446 * np.sqrt(5 / 3) / 2
    np.testing.assert_allclose([low[0], high[0]], [2.5 - half, 2.5 + half], rtol=1e-6)
    assert np.isnan([low[1], high[1]]).all()


def test_curves_carry_the_last_episode_forward():
    returns = np.array([[np.nan, 1.0], [2.0, np.nan], [np.nan, 3.0]])
    steps, curves = smooth(np.array([10, 20, 30]), returns)
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(curves, [[np.nan, 1], [2, 1], [2, 3]])
    _, long = smooth(np.arange(1000), np.ones((1000, 2)))
    assert long.shape == (200, 2)
