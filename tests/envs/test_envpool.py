"""Environments of EnvPool, against Gymnasium's."""

from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.envs.registry import make_environment

pytest.importorskip("envpool", reason="envpool is not installed")
N = 3


def test_steps_are_those_of_gymnasium():
    """Each step from the same state; after the end of an episode the next one starts at once."""
    made: Any = make_environment(ppo.Config(env_id="envpool/CartPole-v1")).in_python
    envs, own, rng = made(N), gymnasium.make("CartPole-v1").unwrapped, np.random.default_rng(0)
    assert isinstance(own, CartPoleEnv)
    obs, _ = envs.reset(seed=3)
    ended = 0
    for _ in range(200):
        action = rng.integers(0, 2, N)
        after, reward, terminated, truncated, info = envs.step(action)
        final = info["final_obs"] if (terminated | truncated).any() else after
        for n in range(N):
            own.reset()
            own.state = np.asarray(obs[n], np.float64)
            expected, paid, over, _, _ = own.step(int(action[n]))
            np.testing.assert_allclose(final[n], expected, atol=1e-4)
            assert (reward[n], terminated[n]) == (paid, over)
            if over:
                assert np.abs(after[n]).max() <= 0.05
        ended += int(terminated.sum())
        obs = after
    assert ended > 5


def test_the_limit_truncates_and_a_run_learns():
    config = ppo.Config(
        env_id="envpool/Pendulum-v1", num_envs=N, num_steps=64, num_minibatches=1,
        total_timesteps=8 * N * 64, hidden_sizes=(8,),
    )  # fmt: skip
    task = ppo.make_task(config)
    assert task.parts is not None
    assert task.parts(None).env.max_episode_steps == 200
    result = ppo.run(config, eval_episodes=4, progress=False)
    assert np.nanmax(np.asarray(result.metrics["episode_length"])) == 200
    assert np.isfinite(np.asarray(result.returns)).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.states.learner.params))


@pytest.mark.parametrize(
    ("name", "words"),
    [("CartPole-v9", "no such environment; did you mean envpool/CartPole-v1"),
     ("CartPole-v1", "cannot be made")],
)  # fmt: skip
def test_what_cannot_be_made(name: str, words: str):
    params: Any = {"gravitas": 1.0} if words == "cannot be made" else {}
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(ppo.Config(env_id=f"envpool/{name}", env_params=params))


def test_all_are_listed_without_being_made(capsys: Any):
    """Some of them end the process when they are made without a display or a library."""
    assert main(["envs", "envpool/"]) == 0
    listed = capsys.readouterr().out
    assert "envpool/CartPole-v1" in listed
    assert "Box[4, 84, 84]" in next(x for x in listed.splitlines() if "envpool/Pong-v5" in x)


def test_images_are_drawn():
    config = ppo.Config(env_id="envpool/CartPole-v1", num_envs=N, num_steps=8, num_minibatches=1)
    task = ppo.make_task(config)
    state = jax.jit(task.learner(None).init)(jax.random.key(1), ppo.HParams(), ())
    frames = ppo.render_policy(task, state, jax.random.key(0), max_steps=8)
    assert len(np.unique(frames, axis=0)) > 4
