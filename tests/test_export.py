"""Exported policies, called from a process that does not have this package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_envs import Target

import purejaxppo as ppo
from purejaxppo.cli import main

CALLER = """
import sys
import numpy as np
from jax import export
path, obs, actions = sys.argv[1:]
with open(path, "rb") as file:
    policy = export.deserialize(bytearray(file.read()))
observations = np.load(obs)
np.save(actions, policy.call(observations))
assert not {"purejaxppo", "flax", "distrax", "gymnax"} & sys.modules.keys()
"""


def small(**changes: Any) -> ppo.Config:
    return ppo.Config(**({"total_timesteps": 128, "num_steps": 8, "hidden_sizes": (8,)} | changes))


def trained(config: ppo.Config, env: Any = None) -> ppo.TrainState:
    return jax.jit(ppo.make_train(config, env))(jax.random.key(0), ppo.HParams())[0]


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", pytest.param("Pendulum-v1", marks=pytest.mark.slow)]
)
def test_exported_policy_gives_the_agents_actions_without_the_package(
    tmp_path: Path, capsys: Any, env_id: str
):
    config = small(env_id=env_id, normalize_obs=True)
    run, file = tmp_path / "r", tmp_path / "policy.bin"
    ppo.run(config, num_seeds=2, run_dir=run, eval_episodes=2, progress=False)
    assert main(["export", str(run), str(file), "--seed", "1"]) == 0
    shape = ppo.load(run, seed=1).state.actors.obs.shape[1:]
    shown = ",".join(map(str, shape))
    assert f"policy.bin: takes float32[n,{shown}]; gives " in capsys.readouterr().out
    obs = np.random.default_rng(0).normal(size=(7, *shape)).astype(np.float32)
    np.save(tmp_path / "obs.npy", obs)
    command = [sys.executable, "-c", CALLER, str(file), "obs.npy", "actions.npy"]
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(command, check=True, cwd=tmp_path, env=variables)
    agent = ppo.make_agent(config, ppo.load(run, seed=1).state)
    act = jax.jit(lambda obs: agent.act(jax.random.key(0), obs, (), deterministic=True)[0])
    as_users_compile: Any = {"xla_backend_optimization_level": 3}
    expected = act.lower(jnp.asarray(obs)).compile(as_users_compile)(jnp.asarray(obs))
    found = np.load(tmp_path / "actions.npy")
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert main(["export", str(run), str(file)]) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_exported_memory_is_an_input_and_output(memory: Any):
    config = small(memory=memory, memory_size=4)
    state = trained(config)
    agent, policy = ppo.make_agent(config, state), ppo.export_policy(config, state)
    again = jax.export.deserialize(policy.serialize())
    mine = theirs = agent.initial_carry(3)
    assert not any(np.any(x) for x in jax.tree.leaves(mine))
    rng = np.random.default_rng(0)
    for start in ([True, True, True], [False, True, False], [False, False, False]):
        obs, starts = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.array(start)
        expected, mine = agent.act(jax.random.key(0), obs, mine, True, starts)
        action, theirs = again.call(obs, theirs, starts)
        np.testing.assert_array_equal(action, expected)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_exported_samples_equal_the_agents_for_the_same_key():
    config, env = small(), Target()
    state = trained(config, env)
    policy = ppo.export_policy(config, state, sample=True, env=env)
    key, obs = jax.random.key(3), jnp.ones((50, 2))
    expected, _ = ppo.make_agent(config, state, env).act(key, obs, ())
    action = policy.call(jax.random.key_data(key), obs)
    np.testing.assert_allclose(action, expected, rtol=1e-5)
    np.testing.assert_array_equal(policy.call(jax.random.PRNGKey(3), obs), action)
    assert np.std(action) > 0.1
    assert set(policy.platforms) == {"cpu", "cuda", "rocm", "tpu"}


def test_a_state_of_several_seeds_is_refused():
    states = jax.tree.map(lambda x: x[None], trained(small()))
    with pytest.raises(ppo.ConfigError, match="leading axis of 1 seeds"):
        ppo.export_policy(small(), states)
