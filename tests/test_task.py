"""Tasks: the interface for everything that is trained, and custom parts."""

import dataclasses
import json
import pickle
import tomllib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parts
import pytest
from commands import assert_same_end, parts_of
from regression import LineConfig, LineHParams, fitted, line_task, longer
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.learner import FIRST_STATISTICS
from purejaxppo.objectives.table import READ_BY_SOME

HPARAMS = ppo.HParams(learning_rate=0.3)
EVERY_5: dict[str, Any] = {
    "checkpoint_every": 5, "checkpoint_unit": "updates", "eval_episodes": 4, "progress": False,
    "keep": 9,
}  # fmt: skip


# A task other than reinforcement learning, with the same host


def test_a_regression_equals_a_plain_loop(tmp_path: Path):
    result = ppo.run(line_task(), HPARAMS, run_dir=tmp_path / "r", **EVERY_5)
    np.testing.assert_allclose(
        result.states.learner.params[0], fitted(0.3, seed=0), rtol=1e-4, atol=1e-6
    )
    header = (tmp_path / "r/metrics.csv").read_text().splitlines()[0]
    assert header == "seed,update,loss,slope,seconds"
    assert json.loads((tmp_path / "r/summary.json").read_text())["eval_return_mean"] < 0
    assert (tmp_path / "r/learning_curve.png").exists()


def test_a_regression_resumes_bit_for_bit(tmp_path: Path, fused: Any):
    ppo.run(line_task(), HPARAMS, run_dir=tmp_path / "whole", **EVERY_5)
    half = line_task(longer(total_timesteps=10 * 8))
    ppo.run(half, HPARAMS, run_dir=tmp_path / "half", **EVERY_5)
    with pytest.raises(ppo.ConfigError, match="task: was passed from Python"):
        ppo.resume(tmp_path / "half", total_timesteps=20 * 8, progress=False)
    ppo.resume(tmp_path / "half", half, total_timesteps=20 * 8, progress=False)
    states = [ppo.load(tmp_path / x, line_task()).state for x in ("whole", "half")]
    np.testing.assert_array_equal(*(x.learner.params for x in states))


@pytest.mark.parametrize(("devices", "seeds"), [(2, 2), (2, 1)])
def test_a_regression_is_spread_over_devices(devices: int, seeds: int):
    """By seeds, or by the samples of one seed."""
    given: dict[str, Any] = {"num_seeds": seeds, "eval_episodes": 4, "progress": False}
    one = ppo.run(line_task(), HPARAMS, devices=1, **given)
    two = ppo.run(line_task(), HPARAMS, devices=devices, **given)
    assert two.summary["device"]["used"] == devices
    np.testing.assert_allclose(two.states.learner.params, one.states.learner.params, atol=1e-6)
    with pytest.raises(ppo.ConfigError, match="rows = 9: not divisible"):
        ppo.run(line_task(longer(rows=9)), HPARAMS, devices=2, progress=False)


def test_a_regression_is_swept_over_its_own_settings(tmp_path: Path):
    found = ppo.sweep(
        line_task(), {"learning_rate": [0.01, 0.3], "degree": [1, 2], "weight_decay": [0.0, 1.0]},
        hparams=LineHParams(), run_dir=tmp_path / "s", eval_episodes=16, progress=False,
    )  # fmt: skip
    assert found.best is not None
    assert found.best.trial.values["learning_rate"] == 0.3
    assert found.best.trial.values["weight_decay"] == 0.0
    again = ppo.resume_sweep(tmp_path / "s", line_task(), progress=False)
    np.testing.assert_array_equal(again.returns, found.returns)
    loaded = ppo.load_trial(tmp_path / "s", 0, 0, line_task())
    assert type(loaded.hparams) is LineHParams
    with np.load(tmp_path / "s/curves.npz") as curves:
        assert {"loss", "slope"} <= set(curves)
        assert "episode_return" not in curves


def test_a_swept_setting_of_another_task_is_refused():
    with pytest.raises(ppo.ConfigError, match="num_envs: no such setting of LineConfig"):
        ppo.sweep(line_task(), {"num_envs": [4, 8]}, progress=False)


def test_a_task_that_does_not_act_has_no_agent():
    with pytest.raises(ppo.ConfigError, match="LineConfig has no policy that acts"):
        ppo.make_agent(line_task(), ppo.TrainState((), ()))


# Custom hyperparameters


def test_custom_hyperparameters_are_traced_mapped_and_saved(tmp_path: Path):
    train = ppo.make_train(line_task())
    decays = jnp.array([0.0, 1.0])
    hparams = LineHParams(learning_rate=0.3, weight_decay=decays)
    axes = ppo.vmap_axes(hparams)
    states, _ = jax.jit(jax.vmap(train, (None, axes)))(jax.random.key(0), hparams)
    sizes = np.linalg.norm(states.learner.params, axis=1)
    assert sizes[1] < 0.9 * sizes[0]
    own = LineHParams(learning_rate=0.3, weight_decay=0.5)
    ppo.run(line_task(), own, run_dir=tmp_path / "r", **EVERY_5)
    assert 'hparams = "regression:LineHParams"' in (tmp_path / "r/config.toml").read_text()
    assert ppo.load(tmp_path / "r", line_task()).hparams == own
    with pytest.raises(ppo.ConfigError, match="weight_decay has shape"):
        train(jax.random.key(0), hparams)


# Parts


def learned(config: ppo.Config, **given: Any) -> Any:
    """Metrics of a whole run, and the state."""
    train = ppo.make_train(config, RandomWalk(), **given)
    return jax.jit(train)(jax.random.key(0), ppo.HParams(learning_rate=0.01))


@pytest.mark.slow
def test_reimplemented_parts_equal_the_built_in_ones(tiny: ppo.Config):
    _, ours = learned(tiny)
    _, own = learned(tiny, objective=parts.clipped)
    np.testing.assert_allclose(own["policy_loss"], ours["policy_loss"], rtol=1e-4, atol=1e-6)
    _, ours = learned(dataclasses.replace(tiny, advantage="td0"))
    _, own = learned(tiny, advantage=parts.one_step)
    np.testing.assert_allclose(own["value_loss"], ours["value_loss"], rtol=1e-4)
    adam = lambda h: optax.chain(  # noqa: E731
        optax.clip_by_global_norm(h.max_grad_norm), optax.adam(h.learning_rate, eps=h.adam_eps)
    )
    ours, own = (learned(tiny, **given)[0] for given in ({}, {"optimizer": adam}))
    for x, y in zip(*(jax.tree.leaves(s.learner.params) for s in (ours, own)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "module", [pytest.param(parts.TwoHeads, marks=pytest.mark.slow), parts.Recurrent]
)
def test_a_custom_network_trains_evaluates_loads_and_is_exported(
    module: Any, tiny: ppo.Config, tmp_path: Path
):
    config = dataclasses.replace(tiny, hidden_sizes=(64, 64), memory_size=64)
    given: dict[str, Any] = {"env": RandomWalk(), "network": module}
    result = ppo.run(config, run_dir=tmp_path / "r", eval_episodes=4, progress=False, **given)
    assert np.isfinite(result.returns).all()
    state = ppo.load(tmp_path / "r", **given).state
    returns = ppo.evaluate(config, state, jax.random.key(1), 4, **given)
    assert returns.shape == (4,)
    exported = ppo.export_policy(config, state, **given)
    agent = ppo.make_agent(config, state, **given)
    obs = jnp.ones((3, 2))
    carry = [agent.initial_carry(3), jnp.zeros(3, bool)] if module is parts.Recurrent else []
    got = exported.call(obs, *carry)
    wanted, _ = agent.act(jax.random.key(0), obs, agent.initial_carry(3), deterministic=True)
    np.testing.assert_array_equal(got[0] if carry else got, wanted)
    with pytest.raises(ppo.ConfigError, match="network: was passed from Python"):
        ppo.resume(tmp_path / "r", env=RandomWalk(), progress=False)


def test_a_recurrent_module_is_reset_where_an_episode_starts(tiny: ppo.Config):
    config = dataclasses.replace(tiny, hidden_sizes=(64, 64), memory_size=64)
    task = ppo.make_task(config, env=RandomWalk(), network=parts.Recurrent)
    assert task.parts is not None
    network = task.parts(None).network
    params = network.init(jax.random.key(0))
    obs, carry = jax.random.normal(jax.random.key(1), (5, 2, 2)), network.initial_carry(2)
    start = jnp.zeros((5, 2), bool).at[3].set(True)
    _, whole, _ = network.apply(params, carry, obs, start)
    _, after, _ = network.apply(params, carry, obs[3:], start[3:])
    np.testing.assert_allclose(whole[3:], after, atol=1e-6)
    _, never, _ = network.apply(params, carry, obs, jnp.zeros((5, 2), bool))
    assert np.abs(np.asarray(whole[3:] - never[3:])).max() > 1e-3


def test_weights_of_an_estimator_are_applied(tiny: ppo.Config):
    """Weights of 1 change nothing; weights of 0 for every second environment do."""
    config = dataclasses.replace(tiny, num_minibatches=1, advantage_normalization="none")

    def weighted(weight: Any) -> Any:
        def estimate(rollout: ppo.Rollout, hparams: ppo.HParams) -> Any:
            advantage, target = parts.one_step(rollout, hparams)
            return advantage, target, jnp.broadcast_to(weight, advantage.shape)

        return learned(config, advantage=estimate)[1]

    plain, ones = learned(config, advantage=parts.one_step)[1], weighted(1.0)
    np.testing.assert_allclose(ones["value_loss"], plain["value_loss"], rtol=1e-6)
    halves = weighted(jnp.array([1.0, 0.0, 1.0, 0.0]))
    assert not np.allclose(halves["value_loss"], plain["value_loss"], rtol=1e-3)


def test_extra_losses_are_learned_and_logged(tiny: ppo.Config, tmp_path: Path):
    def shrink(params: Any, network: Any, batch: ppo.Batch, hparams: ppo.HParams) -> Any:
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)) * batch.weight

    own = dataclasses.replace(ppo.OBJECTIVES["ppo_clip"], extra_losses={"size": shrink})
    plain = learned(tiny)[0].learner.params
    small = learned(tiny, objective=own)[0].learner.params
    sizes = [sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(p)) for p in (plain, small)]
    assert sizes[1] < sizes[0]
    ppo.run(
        tiny, objective=own, env=RandomWalk(), run_dir=tmp_path / "r", eval_episodes=2,
        progress=False,
    )  # fmt: skip
    assert ",size,seconds" in (tmp_path / "r/metrics.csv").read_text().splitlines()[0]


def test_a_custom_actor_collects_the_rollouts(tiny: ppo.Config):
    """It doubles every reward."""

    def doubled(made: ppo.Parts) -> ppo.Actor:
        def collect(*arguments: Any) -> Any:
            actors, rollout = made.actor.collect(*arguments)
            return actors, rollout._replace(reward=2 * rollout.reward)

        return ppo.Actor(made.actor.init, collect)

    plain, twice = learned(tiny)[1], learned(tiny, collect=doubled)[1]
    first = [np.asarray(x["episode_return"])[0] for x in (plain, twice)]
    assert first[1] == pytest.approx(2 * first[0])


def test_loggers_and_callbacks_see_every_update(tiny: ppo.Config, tmp_path: Path):
    logger, seen = parts.Written(), []

    def callback(update: int, metrics: Any, states: ppo.TrainState) -> bool:
        assert metrics["policy_loss"].shape[1] == 2
        assert int(states.learner.updates[0]) == update
        seen.append((update, len(metrics["policy_loss"])))
        return False

    result = ppo.run(
        tiny, env=RandomWalk(), num_seeds=2, loggers=[logger], callback=callback,
        eval_episodes=2, progress=False,
    )  # fmt: skip
    assert [update for update, _ in logger.rows] == [1, 2, 3]
    assert logger.closed
    losses = np.stack([metrics["policy_loss"] for _, metrics in logger.rows], axis=1)
    np.testing.assert_array_equal(losses, result.metrics["policy_loss"])
    assert sum(count for _, count in seen) == seen[-1][0] == 3


def test_a_run_that_a_callback_stopped_can_be_resumed(tmp_path: Path, fused: Any):
    given: dict[str, Any] = {"eval_episodes": 4, "progress": False}
    ppo.run(line_task(), HPARAMS, run_dir=tmp_path / "whole", **given)
    stopped = ppo.run(
        line_task(), HPARAMS, run_dir=tmp_path / "r", callback=lambda *_: True, **given
    )
    assert stopped.summary["env_steps"] < stopped.summary["env_steps_planned"]
    ppo.resume(tmp_path / "r", line_task(), progress=False)
    states = [ppo.load(tmp_path / x, line_task()).state for x in ("whole", "r")]
    np.testing.assert_array_equal(*(x.learner.params for x in states))


def test_action_masks_are_applied_everywhere():
    """In sampling, log-probabilities, entropies, modes and divergences."""
    config = ppo.Config(num_envs=8, num_steps=16, hidden_sizes=(8,), objective="ppo_kl")
    task, made = ppo.make_task(config, env=Masked()), parts_of(config, Masked())
    state = jax.jit(ppo.make_learner(task).init)(jax.random.key(0), ppo.HParams())
    _, rollout = jax.jit(made.actor.collect)(*state, ppo.HParams(), ())
    allowed = np.asarray(rollout.obs["action_mask"])
    assert 0 < allowed.mean() < 1
    assert np.take_along_axis(allowed, np.asarray(rollout.action)[..., None], -1).all()
    left = np.exp(np.asarray(rollout.policy_outputs, np.float64)) * allowed
    p = left / left.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, np.asarray(rollout.action)[..., None], -1)[..., 0]
    np.testing.assert_allclose(rollout.log_prob, np.log(chosen), atol=1e-5)
    distribution = made.policy.distribution(rollout.policy_outputs)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    np.testing.assert_allclose(distribution.entropy(), entropy, atol=1e-5)
    assert np.take_along_axis(allowed, np.asarray(distribution.mode())[..., None], -1).all()
    np.testing.assert_allclose(distribution.kl_divergence(distribution), 0.0, atol=1e-6)
    state, metrics = jax.jit(ppo.make_train(task))(jax.random.key(0), ppo.HParams())
    assert all(np.isfinite(np.asarray(metrics[x])).all() for x in ("policy_loss", "kl", "entropy"))
    agent = ppo.make_agent(task, state)
    obs = {"action_mask": jnp.array([[False, True, False]] * 64), "position": jnp.zeros((64, 2))}
    assert (agent.act(jax.random.key(0), obs, ())[0] == 1).all()
    returns = ppo.evaluate(task, state, jax.random.key(1), 8)
    assert np.isfinite(returns).all()


class Masked(RandomWalk):
    """A random walk with a third action; which of the three is forbidden depends on time."""

    def _obs(self, obs: jax.Array) -> dict[str, jax.Array]:
        forbidden = jnp.abs(obs[0]).astype(jnp.int32) % 3
        return {"position": obs, "action_mask": jnp.arange(3) != forbidden}

    def reset_env(self, key: Any, params: Any) -> Any:
        obs, state = super().reset_env(key, params)
        return self._obs(obs), state

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, *rest = super().step_env(key, state, action % 2, params)
        return (self._obs(obs), *rest)

    def observation_space(self, params: Any) -> Any:
        from gymnax.environments import spaces

        position = super().observation_space(params)
        return spaces.Dict({"position": position, "action_mask": spaces.Box(0, 1, (3,), bool)})

    def action_space(self, params: Any = None) -> Any:
        from gymnax.environments import spaces

        return spaces.Discrete(3)


# From the command line


def test_parts_named_on_the_command_line_are_found_again(tmp_path: Path, capsys: Any):
    run = str(tmp_path / "r")
    command = (
        "--env-id toy_envs:RandomWalk --network parts:TwoHeads --optimizer parts:adamw "
        "--objective parts:clipped "
        "--advantage parts:one_step --loggers parts:Written --total-timesteps 1024 "
        f"--eval-episodes 2 --run-dir {run}"
    ).split()
    assert main(["train", *command]) == 0
    text = (tmp_path / "r/config.toml").read_text()
    for line in ('network = "parts:TwoHeads"', 'loggers = ["parts:Written"]'):
        assert line in text
    (tmp_path / "r/summary.json").unlink()
    assert main(["resume", run]) == 0
    assert main(["eval", run, "--episodes", "4"]) == 0
    assert main(["export", run, str(tmp_path / "policy.bin")]) == 0
    assert "seed 0: return" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--env-id toy_envs:Nothing",
            "env_id = 'toy_envs:Nothing': module toy_envs has no Nothing",
        ),
        ("--network nowhere:f", "network = 'nowhere:f': module nowhere cannot be imported"),
        ("--network parts:f", "network = 'parts:f': module parts has no f"),
        ("--network nowhere", "--network nowhere: must be one of auto, package.module:name"),
        ("--network json:dumps", "network: returned str; must be a Flax Linen module"),
        ("--optimizer json:loads", "optimizer: TypeError"),
        ("--objective json:JSONDecoder", "objective"),
        ("--loggers parts:adamw", "loggers"),
    ],
)
def test_parts_that_cannot_be_loaded_give_a_one_line_error(
    option: str, message: str, tmp_path: Path, capsys: Any
):
    arguments = [*option.split(), "--run-dir", str(tmp_path / "r"), "--total-timesteps=512"]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_and_config_toml_must_name_the_same_modules(tiny: ppo.Config, tmp_path: Path):
    config = dataclasses.replace(
        tiny, env_id="CartPole-v1", network="parts:TwoHeads", hidden_sizes=(64, 64), memory_size=64
    )
    ppo.run(config, run_dir=tmp_path / "r", eval_episodes=2, progress=False)
    path = tmp_path / "r/config.toml"
    path.write_text(path.read_text().replace("parts:TwoHeads", "parts:Recurrent"))
    with pytest.raises(ppo.ConfigError, match=r"'parts:TwoHeads', but config\.toml has 'parts:Rec"):
        ppo.load(tmp_path / "r")


# Objectives as values


@pytest.mark.parametrize("name", ppo.OBJECTIVES)
def test_each_objective_has_defaults_that_work(name: str, tmp_path: Path, capsys: Any):
    assert main(["train", "--objective", name, "--print-config"]) == 0
    printed = capsys.readouterr().out
    for setting in ("num_envs", "num_steps", "update_epochs", "num_minibatches"):
        value = getattr(ppo.Config(objective=name), setting)
        assert f"\n{setting} = {value}\n" in printed
    ppo.make_task(ppo.Config(objective=name))


def test_settings_left_at_auto_follow_the_objective():
    config = ppo.Config(objective="a2c")
    assert (config.num_envs, config.num_steps, config.update_epochs) == (16, 16, 1)
    changed = dataclasses.replace(config, objective="ppo_clip")
    assert (changed.num_envs, changed.num_steps, changed.update_epochs) == (4, 128, 4)
    given = dataclasses.replace(ppo.Config(num_envs=8), objective="a2c")
    assert (given.num_envs, given.num_steps) == (8, 16)
    assert ppo.Config(num_envs=4) == ppo.Config()


def test_every_setting_that_some_objectives_read_exists():
    fields = {f.name for kind in (ppo.Config, ppo.HParams) for f in dataclasses.fields(kind)}
    assert fields >= READ_BY_SOME


def test_no_module_branches_on_the_name_of_the_objective():
    package = Path(ppo.__file__).parent
    for path in package.rglob("*.py"):
        assert "config.objective ==" not in path.read_text(), path
        assert "config.objective in" not in path.read_text(), path


# Errors


class Wrong(nn.Module):
    outputs: int = 2
    width: int = 1

    @nn.compact
    def __call__(self, obs: Any) -> Any:
        return nn.Dense(self.outputs)(obs), nn.Dense(self.width)(obs)


class Concrete(nn.Module):
    @nn.compact
    def __call__(self, obs: Any) -> Any:
        x = nn.Dense(2)(obs)
        return x, x[:, 0] if float(x.sum()) > 0 else x[:, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": Wrong()}, r"returned shapes \[\(2, 2\), \(2, 1\)\].*value\[B\]"),
        ({"network": Wrong(outputs=3)}, r"\(2, 3\).*policy_outputs\[B, 2\]"),
        ({"network": Concrete()}, "network: cannot be applied to observations of shape"),
        ({"network": 7}, "network is of type int: must be a Flax Linen module"),
        ({"network": lambda: None}, "network: cannot be called with num_outputs"),
        ({"objective": lambda terms, h: jnp.mean(terms.advantage)}, "one number per sample"),
        ({"objective": lambda terms, h: terms.nothing}, "objective: cannot be traced: Attr"),
        ({"objective": 7}, "objective is of type int: must be an Objective, or a policy loss"),
        (
            {"objective": lambda terms, h: np.asarray(terms.advantage)},
            "objective: cannot be compiled, since Python or NumPy",
        ),
        (
            {"objective": lambda terms, h: terms.advantage if h.clip_eps > 0.1 else terms.ratio},
            "objective: cannot be compiled, since Python or NumPy",
        ),
        (
            {"advantage": lambda rollout, h: (rollout.reward, rollout.reward * float(h.gamma))},
            "advantage: cannot be compiled, since Python or NumPy",
        ),
        (
            {"optimizer": lambda h: optax.sgd(float(h.learning_rate))},
            "optimizer: cannot be compiled, since Python or NumPy",
        ),
        ({"optimizer": lambda h: 7}, "optimizer: returned int; it must be a function hparams"),
        (
            {"optimizer": lambda h: optax.GradientTransformation(
                lambda p: (), lambda g, s, p=None: (jax.tree.leaves(g), s))},
            "optimizer: returned a tree of PyTreeDef",
        ),
        (
            {"optimizer": lambda h: optax.GradientTransformation(
                lambda p: (), lambda g, s, p=None: (jax.tree.map(jnp.sum, g), s))},
            r"optimizer: its update of .* has shape \(\), but the parameter",
        ),
        ({"advantage": lambda rollout, h: rollout.reward}, r"advantage: returned 1 value "),
        (
            {"advantage": lambda rollout, h: (rollout.reward, rollout.reward[0])},
            r"advantage: returned 2 values of shapes .* = \(8, 4\)",
        ),
        ({"collect": lambda made: 7}, "collect: returned int; it must be a function Parts"),
        ({"collect": lambda made: made.actor._replace(collect=lambda *_: 7)}, "collect: "),
    ],
)  # fmt: skip
def test_errors_name_the_part_that_does_not_fit(given: Any, message: str, tiny: ppo.Config):
    config = dataclasses.replace(tiny, hidden_sizes=(64, 64), memory_size=64)
    with pytest.raises(ppo.ConfigError, match=message) as refused:
        ppo.make_task(config, env=RandomWalk(), **given)
    assert "\n" not in str(refused.value)


def test_parts_that_contradict_each_other_are_refused(tiny: ppo.Config):
    config = ppo.Config(memory="gru", num_minibatches=2)
    with pytest.raises(ppo.ConfigError, match="memory = gru: has no effect with a network"):
        ppo.make_task(config, network=parts.TwoHeads)
    with pytest.raises(ppo.ConfigError, match="network = 'parts:TwoHeads' in Config, and network"):
        ppo.make_task(ppo.Config(network="parts:TwoHeads"), network=parts.TwoHeads)
    task = ppo.make_task(tiny, env=RandomWalk())
    with pytest.raises(ppo.ConfigError, match="network: make_train is given a Task, whose parts"):
        ppo.make_train(task, network=parts.TwoHeads)
    with pytest.raises(TypeError, match="'netwerk' is not a part; the parts are env, env_params"):
        ppo.make_task(tiny, netwerk=parts.TwoHeads)


def test_tasks_are_pickled_as_the_call_that_makes_them():
    task = pickle.loads(pickle.dumps(ppo.make_task(ppo.Config(), network=parts.TwoHeads)))
    assert task.passed == ("network",)
    assert pickle.loads(pickle.dumps(line_task(LineConfig(rows=4)))).config.rows == 4


def test_the_core_does_not_import_the_host():
    """Nor do objectives and environments; and no module used in an update imports `task`."""
    package = Path(ppo.__file__).parent
    core = [*package.glob("*.py"), *package.glob("objectives/*.py"), *package.glob("envs/*.py")]
    for path in core:
        if path.name not in ("__init__.py", "__main__.py"):
            text = path.read_text()
            for outer in ("host", "sweeps", "cli", "rlhf"):
                assert f"purejaxppo.{outer}" not in text, path
    path_of_an_update = "types config collect advantages losses improve learner train".split()
    for name in path_of_an_update:
        assert "purejaxppo.task" not in (package / f"{name}.py").read_text()


def test_a_run_of_a_task_equals_that_of_its_config(tiny: ppo.Config, tmp_path: Path):
    given: dict[str, Any] = {"eval_episodes": 2, "progress": False}
    config = dataclasses.replace(tiny, env_id="CartPole-v1")
    ppo.run(config, run_dir=tmp_path / "a", **given)
    ppo.run(ppo.make_task(config), run_dir=tmp_path / "b", **given)
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_every_package_is_part_of_the_wheel():
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    listed = {x for x in tomllib.loads(text)["tool"]["setuptools"]["packages"]}
    package = Path(ppo.__file__).parent
    found = {p.parent.relative_to(package.parent).as_posix() for p in package.rglob("__init__.py")}
    assert {name.replace("/", ".") for name in found} <= listed


def test_a_custom_loss_may_read_the_kl_divergence(tiny: ppo.Config):
    def penalized(weight: float) -> Any:
        return lambda terms, h: -jnp.exp(terms.log_ratio) * terms.advantage + weight * terms.kl

    _, free = learned(tiny, objective=penalized(0.0))
    _, held = learned(tiny, objective=penalized(1e3))
    assert np.asarray(held["kl"])[-1] < 0.2 * np.asarray(free["kl"])[-1]


class Named(nn.Module):
    """Separate actor and critic."""

    num_outputs: int

    @nn.compact
    def __call__(self, obs: Any) -> Any:
        hidden = nn.tanh(nn.Dense(8, name="critic_hidden")(obs))
        value = nn.Dense(1, name="critic_value")(hidden)[..., 0]
        return nn.Dense(self.num_outputs, name="actor")(obs), value


def test_fitting_the_critic_does_not_change_the_policy_of_trpo(tiny: ppo.Config):
    """The reported KL divergence is between the policies before and after the whole update."""
    config = dataclasses.replace(
        tiny, objective="trpo", hidden_sizes=(64, 64), memory_size=64, num_envs=8
    )
    given: dict[str, Any] = {"network": Named, "optimizer": lambda h: optax.adamw(0.1)}
    task = ppo.make_task(config, env=RandomWalk(), **given)
    assert task.parts is not None
    learner, made = ppo.make_learner(task), task.parts(None)
    state = jax.jit(learner.init)(jax.random.key(0), ppo.HParams())
    _, rollout = jax.jit(made.actor.collect)(*state, ppo.HParams(), ())
    after, metrics = jax.jit(learner.update)(state, ppo.HParams())
    _, outputs, _ = made.network.apply(after.learner.params, (), rollout.obs, rollout.start)
    before = made.policy.distribution(rollout.policy_outputs)
    kl = np.mean(np.asarray(before.kl_divergence(made.policy.distribution(outputs))))
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-4
    with pytest.raises(ppo.ConfigError, match="its modules need names that begin with critic"):
        ppo.make_task(config, env=RandomWalk(), network=parts.TwoHeads)


def test_a_constant_weight_changes_nothing(tiny: ppo.Config):
    """Even a small one: means are divided by the sum of the weights."""

    def weighted(weight: float) -> Any:
        def estimate(rollout: ppo.Rollout, hparams: ppo.HParams) -> Any:
            advantage, target = parts.one_step(rollout, hparams)
            return advantage, target, jnp.full_like(advantage, weight)

        return learned(tiny, advantage=estimate)[1]

    one, small = weighted(1.0), weighted(1e-4)
    for name in ("value_loss", "policy_loss", "explained_variance"):
        np.testing.assert_allclose(small[name], one[name], rtol=1e-3, atol=1e-5)


def test_a_task_without_a_loss_trains_to_the_end():
    plain = line_task()

    def learner(axis: str | None) -> ppo.Learner:
        inner = plain.learner(axis)

        def update(*given: Any) -> Any:
            state, metrics = inner.update(*given)
            return state, {"mse": metrics["loss"]}

        return ppo.Learner(inner.init, update)

    task = dataclasses.replace(plain, learner=learner, curve="mse", with_config=lambda _: task)
    result = ppo.run(task, HPARAMS, num_seeds=2, eval_episodes=2, progress=False)
    assert result.metrics["mse"].shape == (2, 20)


def test_all_entry_points_use_the_data_of_a_task():
    learner = ppo.make_learner(line_task())
    state = learner.init(jax.random.key(0), HPARAMS)
    state, _ = ppo.train_chunk(learner, state, HPARAMS, 20)
    np.testing.assert_allclose(state.learner.params[1], 2.0, atol=0.5)
    assert ppo.evaluate(line_task(), state, jax.random.key(1), 4).shape == (4,)


def test_a_passed_objective_sets_its_defaults(tiny: ppo.Config):
    task = ppo.make_task(ppo.Config(), objective=ppo.OBJECTIVES["a2c"])
    assert (task.config.num_envs, task.config.update_epochs) == (16, 1)
    own = dataclasses.replace(ppo.OBJECTIVES["reinforce_baseline"], name="mine")
    config = ppo.Config(objective="reinforce_baseline", baseline="mean")
    assert ppo.make_task(config, objective=own).config.num_steps == 1024


@pytest.mark.parametrize("command", ["train", pytest.param("sweep", marks=pytest.mark.slow)])
def test_an_objective_named_on_the_command_line_sets_its_defaults(command: str, tmp_path: Path):
    """The host and the learner count the same steps."""
    directory = tmp_path / "r"
    arguments = (
        f"{command} --objective parts:actor_critic --total-timesteps 1024 --eval-episodes 2 "
        f"--run-dir {directory}"
    ).split()
    if command == "sweep":
        arguments += ["--grid", "gamma=0.9,0.99"]
    assert main(arguments) == 0
    name = "config.toml" if command == "train" else "sweep.toml"
    assert "num_envs = 16\nnum_steps = 16\n" in (directory / name).read_text()
    if command == "train":
        rows = (directory / "metrics.csv").read_text().splitlines()[1:]
        assert [int(float(row.split(",")[2])) for row in rows] == [256, 512, 768, 1024]
    else:
        with np.load(directory / "curves.npz") as curves:
            assert sorted(set(curves["env_steps"].tolist())) == [256, 512, 768, 1024]


@pytest.mark.slow
def test_a_config_file_with_custom_hyperparameters_trains_again(tmp_path: Path, capsys: Any):
    own = parts.Decay(weight_decay=0.5)
    config = ppo.Config(optimizer="parts:decayed", total_timesteps=512)
    ppo.run(config, own, run_dir=tmp_path / "a", eval_episodes=2, progress=False)
    again = ["train", str(tmp_path / "a/config.toml"), "--run-dir", str(tmp_path / "b")]
    assert main(again) == 0
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_a_class_inside_a_function_is_refused_before_training(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Local(ppo.HParams):
        weight_decay: float = 0.0

    with pytest.raises(ppo.ConfigError, match="is defined inside a function"):
        ppo.run(line_task(), Local(), run_dir=tmp_path / "r", progress=False)
    assert not (tmp_path / "r/config.toml").exists()


@dataclasses.dataclass(frozen=True)
class Fields(ppo.HParams):
    count: int = 3
    maybe: float | None = None
    array: jax.Array | float = 0.0


def test_fields_of_any_type_are_traced():
    found = jax.jit(lambda h: h.count + h.array)(Fields(array=jnp.float32(2)))
    assert found == 5
    assert Fields(count=4).count == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": optax.adam(1e-3)}, "pass a function of hyperparameters"),
        ({"advantage": "gae"}, "advantage is of type str"),
        ({"collect": 7}, "collect is of type int: must be a function"),
        (
            {"objective": dataclasses.replace(
                ppo.OBJECTIVES["trpo"], extra_losses={"x": lambda *_: 0})},
            "extra_losses have no effect",
        ),
        (
            {"objective": dataclasses.replace(
                ppo.OBJECTIVES["ppo_clip"], extra_losses={"entropy": lambda *_: 0})},
            "extra_losses: entropy is the name of a metric",
        ),
        (
            {"objective": dataclasses.replace(
                ppo.OBJECTIVES["ppo_clip"], extra_losses={"x": lambda *_: jnp.ones((8, 4, 1))})},
            r"extra_losses\['x'\]: returned shape \(8, 4, 1\)",
        ),
    ],
)  # fmt: skip
def test_parts_without_effect_are_refused(given: Any, message: str, tiny: ppo.Config):
    with pytest.raises(ppo.ConfigError, match=message):
        ppo.make_task(tiny, env=RandomWalk(), **given)


def test_a_critic_learning_rate_needs_a_critic(tiny: ppo.Config):
    config = dataclasses.replace(tiny, hidden_sizes=(64, 64), memory_size=64)
    train = ppo.make_train(config, RandomWalk(), network=parts.TwoHeads)
    with pytest.raises(ppo.ConfigError, match="critic_learning_rate: has no effect, since"):
        train(jax.random.key(0), ppo.HParams(critic_learning_rate=1e-3))


class Nested(Masked):
    def _obs(self, obs: jax.Array) -> Any:
        return {"inner": super()._obs(obs), "other": obs}

    def observation_space(self, params: Any) -> Any:
        from gymnax.environments import spaces

        inner = super().observation_space(params)
        return spaces.Dict({"inner": inner, "other": inner.spaces["position"]})


def test_nested_masks_are_refused(tiny: ppo.Config):
    config = dataclasses.replace(tiny, hidden_sizes=(64, 64), memory_size=64)
    with pytest.raises(ppo.ConfigError, match="action_mask lies inside another dictionary"):
        ppo.make_task(config, env=Nested(), network=First)


class Several(RandomWalk):
    """Two arrays of different scales, a choice and a mask."""

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> Any:
        obs = super().get_obs(state, params, key)
        return {
            "small": obs, "large": {"inner": 100.0 + 50.0 * obs[:1]},
            "choice": jnp.int32(obs[0] > 0), "action_mask": jnp.ones(2, bool),
        }  # fmt: skip

    def observation_space(self, params: Any = None) -> Any:
        from gymnax.environments import spaces

        small = super().observation_space(params)
        large = spaces.Dict({"inner": spaces.Box(-1e4, 1e4, (1,))})
        return spaces.Dict({
            "small": small, "large": large, "choice": spaces.Discrete(2),
            "action_mask": spaces.Box(0, 1, (2,), bool),
        })  # fmt: skip


def test_entries_of_an_observation_are_joined_and_normalised_one_by_one(tiny: ppo.Config):
    config = dataclasses.replace(tiny, normalize_obs=True)
    task = ppo.make_task(config, env=Several())
    parts = task.parts(None)  # pyright: ignore
    state = task.learner(None).init(jax.random.key(0), ppo.HParams(), ())
    stats = state.learner.obs_stats
    assert stats["choice"] == stats["action_mask"] == ()
    start = jax.random.fold_in(jax.random.key(0), FIRST_STATISTICS)
    actors = parts.actor.init(start, ppo.HParams(), ())
    _, raw = parts.actor.collect(state.learner._replace(obs_stats=()), actors, ppo.HParams(), ())
    for found, obs in (
        (stats["small"], raw.obs["small"]), (stats["large"]["inner"], raw.obs["large"]["inner"]),
    ):  # fmt: skip
        flat = np.asarray(obs, np.float64).reshape(-1, obs.shape[-1])
        np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.var, flat.var(0), rtol=1e-3, atol=1e-5)
    kernel = state.learner.params["actor"]["encoder"]["Dense_0"]["kernel"]
    assert kernel.shape[0] == 2 + 1 + raw.obs["small"].shape[-1]
    trained, metrics = jax.jit(ppo.make_train(task))(jax.random.key(0), ppo.HParams())
    assert np.isfinite(metrics["policy_loss"]).all()
    agent = ppo.make_agent(task, jax.tree.map(lambda x: x, trained))
    obs = jax.tree.map(lambda x: x[0], raw.obs)
    action, _ = agent.act(jax.random.key(0), obs, agent.initial_carry(4))
    assert action.shape == (4,)


class InTuple(RandomWalk):
    def observation_space(self, params: Any) -> Any:
        from gymnax.environments import spaces

        return spaces.Tuple([super().observation_space(params)])


def test_a_tuple_space_needs_tuple_observations():
    words = r"returns an observation of shape \(2,\), but .* has the shape {'0': \(2,\)}"
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(ppo.Config(), env=InTuple(), network=parts.TwoHeads)


class First(nn.Module):
    num_outputs: int

    @nn.compact
    def __call__(self, obs: Any) -> Any:
        x = nn.Dense(self.num_outputs + 1)(obs["other"])
        return x[..., :-1], x[..., -1]


def test_invalid_loggers_and_callbacks_are_refused(tiny: ppo.Config, tmp_path: Path):
    config = dataclasses.replace(tiny, env_id="CartPole-v1")
    ppo.run(config, run_dir=tmp_path / "r", eval_episodes=2, progress=False)
    for call in (lambda **x: ppo.run(config, **x), lambda **x: ppo.resume(tmp_path / "r", **x)):
        with pytest.raises(ppo.ConfigError, match="is not a logger; it needs write"):
            call(loggers=[print], progress=False)
        with pytest.raises(ppo.ConfigError, match="callback is of type int: must be a function"):
            call(callback=7, progress=False)
