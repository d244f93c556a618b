"""Settings that change an environment, against loops over the unchanged one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_envs import RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.envs import spaces
from purejaxppo.envs.registry import make_environment
from purejaxppo.envs.single import Single
from purejaxppo.evaluation import LATER_EVALUATION, evaluation_keys

N, STEPS = 3, 40
Config = ppo.Config


def single() -> Single:
    """Counts its steps and its actions; ends by chance."""
    space = spaces.box((2,))

    def reset(key: Any) -> Any:
        start = jax.random.uniform(key)
        return (jnp.int32(0), start), jnp.stack([0.0, start])

    def step(key: Any, state: Any, action: Any) -> Any:
        count, start = state
        obs = jnp.stack([count + 1.0, start + action])
        over = jax.random.bernoulli(key, 0.1)
        return (count + 1, start), obs, 1.0 + action, over, count + 1 >= 12

    return Single("counter", space, spaces.discrete(5), 12, reset, step)


def walk(actions: np.ndarray, **settings: Any) -> Any:
    """Observations, rewards and flags `[STEPS, N, ...]` of given actions."""
    env = make_environment(Config(**settings), single())
    state, first = env.reset(jax.random.split(jax.random.key(3), N))

    def step(state: Any, inputs: Any) -> Any:
        key, action = inputs
        return env.step(jax.random.split(key, N), state, action)

    keys = jax.random.split(jax.random.key(4), STEPS)
    _, result = jax.lax.scan(step, state, (keys, jnp.asarray(actions)))
    return np.asarray(first), jax.tree.map(np.asarray, result)


@pytest.fixture
def actions() -> np.ndarray:
    return np.random.default_rng(0).integers(5, size=(STEPS, N))


def test_frames_are_those_of_the_episode(actions: np.ndarray):
    """Each stacked observation holds the last three of the same episode, or repeats the first."""
    plain_first, plain = walk(actions)
    first, found = walk(actions, frame_stack=3)
    np.testing.assert_array_equal(first, np.tile(plain_first, 3))
    for n in range(N):
        frames = [plain_first[n]] * 3
        for t in range(STEPS):
            frames = [*frames[1:], plain.final_obs[t, n]]
            np.testing.assert_array_equal(found.final_obs[t, n], np.concatenate(frames))
            if plain.terminated[t, n] or plain.truncated[t, n]:
                frames = [plain.obs[t, n]] * 3
            np.testing.assert_array_equal(found.obs[t, n], np.concatenate(frames))


def test_the_time_limit_truncates_exactly(actions: np.ndarray):
    _, found = walk(actions, time_limit=5)
    steps = np.zeros(N, int)
    for t in range(STEPS):
        steps += 1
        np.testing.assert_array_equal(found.final_obs[t, :, 0], steps)
        np.testing.assert_array_equal(found.truncated[t], steps == 5)
        steps[found.terminated[t] | found.truncated[t]] = 0
    assert found.truncated.any()
    assert make_environment(Config(time_limit=5), single()).max_episode_steps == 5
    assert make_environment(Config(time_limit=50), single()).max_episode_steps == 12


def test_repeated_actions_add_rewards_until_the_end(actions: np.ndarray):
    _, found = walk(actions, action_repeat=4)
    steps = np.zeros(N, int)
    for t in range(STEPS):
        done = found.terminated[t] | found.truncated[t]
        taken = found.final_obs[t, :, 0].astype(int) - steps
        assert (taken[~done] == 4).all()
        assert ((taken >= 1) & (taken <= 4)).all()
        np.testing.assert_allclose(found.reward[t], taken * (1 + actions[t]))
        steps = np.where(done, 0, steps + taken)
    assert (taken < 4).any() or found.terminated.any()
    assert make_environment(Config(action_repeat=5), single()).max_episode_steps == 3


def test_sticky_actions_repeat_the_last_one(actions: np.ndarray):
    _, found = walk(actions, sticky_actions=0.25)
    carried = np.rint(found.reward - 1).astype(int)
    last, stuck, differ = np.zeros(N, int), 0, 0
    for t in range(STEPS):
        assert ((carried[t] == actions[t]) | (carried[t] == last)).all()
        stuck += (carried[t] != actions[t]).sum()
        differ += (actions[t] != last).sum()
        done = found.terminated[t] | found.truncated[t]
        last = np.where(done, 0, carried[t])
    assert 0.12 < stuck / differ < 0.4


def test_observations_are_clipped(actions: np.ndarray):
    _, plain = walk(actions)
    _, found = walk(actions, obs_clip=3.0)
    np.testing.assert_array_equal(found.final_obs, np.clip(plain.final_obs, -3, 3))


def test_rewards_are_clipped_for_learning_only(tiny: ppo.Config):
    """The advantages are those of clipped rewards, and the returns those of all."""
    clipped = dataclasses.replace(tiny, reward_clip=0.5)
    task = ppo.make_task(clipped, env=RandomWalk())
    parts = task.parts(None)  # pyright: ignore
    state = task.learner(None).init(jax.random.key(0), ppo.HParams(), ())
    _, rollout = parts.actor.collect(state.learner, state.actors, ppo.HParams(), ())
    assert (np.abs(rollout.reward) > 0.5).any()
    found = parts.advantage(rollout, ppo.HParams())
    smaller = rollout._replace(reward=jnp.clip(rollout.reward, -0.5, 0.5))
    plain = ppo.make_task(tiny, env=RandomWalk()).parts(None).advantage  # pyright: ignore
    for x, y in zip(found, plain(smaller, ppo.HParams()), strict=True):
        np.testing.assert_array_equal(x, y)
    runs = [ppo.make_train(c, RandomWalk())(jax.random.key(0), ppo.HParams())[1]
            for c in (tiny, clipped)]  # fmt: skip
    returns = [np.asarray(x["episode_return"])[0] for x in runs]
    np.testing.assert_array_equal(*returns)


def test_parameters_are_drawn_for_each_episode():
    """Each episode of CartPole moves with its own mass and force, and its trajectory is that of an
    environment made with them."""
    randomize = ("masspole=uniform:0.05,0.5", "force_mag=choice:5,10")
    env = make_environment(Config(randomize=randomize))
    state, _ = env.reset(jax.random.split(jax.random.key(0), 200))
    values = state[1]
    assert (values["masspole"].min() >= 0.05) & (values["masspole"].max() <= 0.5)
    assert abs(float(values["masspole"].mean()) - 0.275) < 0.03
    assert set(values["force_mag"].tolist()) == {5.0, 10.0}
    params = {name: float(x[7]) for name, x in values.items()}
    plain = make_environment(Config(env_params=params))
    action = jnp.ones(200, int)
    keys = jax.random.split(jax.random.key(1), 200)
    moved, result = env.step(keys, state, action)
    _, expected = plain.step(keys, state[0], action)
    np.testing.assert_allclose(result.final_obs[7], expected.final_obs[7], rtol=1e-6)
    assert not np.allclose(result.final_obs[8], expected.final_obs[8], rtol=1e-6)
    before = moved[1]["masspole"]
    for _ in range(60):
        moved, result = env.step(keys, moved, action)
    assert (np.asarray(moved[1]["masspole"]) != np.asarray(before)).all()  # all have ended once


def test_values_that_follow_from_others_are_computed_again():
    """gymnax stores CartPole's total mass beside the two masses."""
    changed = make_environment(Config(env_params={"masspole": 0.5, "length": 0.7}))
    given = {"masspole": 0.5, "length": 0.7, "total_mass": 1.5, "polemass_length": 0.35}
    same = make_environment(Config(env_params=given))
    keys = jax.random.split(jax.random.key(0), 2)
    state, _ = changed.reset(keys)
    results = [env.step(keys, state, jnp.array([0, 1]))[1] for env in (changed, same)]
    np.testing.assert_allclose(results[0].final_obs, results[1].final_obs, rtol=1e-6)


@pytest.mark.parametrize(
    ("randomize", "words"),
    [
        (("masspole=0.1",), "must be NAME=uniform:LOW,HIGH"),
        (("masspole=uniform:0.5,0.1",), "the lower bound must be below"),
        (("masspole=loguniform:0,1",), "must be above 0"),
        (("mass=uniform:0,1",), "no parameter 'mass' that can differ between episodes; it has"),
        (("tau=uniform:0,1", "tau=choice:1"), "tau given twice"),
        (("max_steps_in_episode=choice:5,9",), "no parameter 'max_steps_in_episode' that can"),
    ],
)
def test_bad_randomization(randomize: tuple[str, ...], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(Config(randomize=randomize))


@pytest.mark.slow
def test_a_grid_evaluates_each_value(tmp_path: Path, capsys: Any):
    """The returns are those of runs that have each value."""
    run = tmp_path / "run"
    config = Config(
        total_timesteps=96, num_envs=4, num_steps=8, hidden_sizes=(8,),
        randomize=("masspole=uniform:0.05,0.5",),
    )  # fmt: skip
    result = ppo.run(config, run_dir=run, num_seeds=2, eval_episodes=4, progress=False)
    words = ["eval", str(run), "--episodes", "6", "--grid"]
    assert main([*words, "masspole=0.9,0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["values"] == [0.1, 0.9]
    keys = evaluation_keys(0, 2, LATER_EVALUATION)
    for value, returns in zip(found["values"], found["return_per_seed"], strict=True):
        fixed = dataclasses.replace(config, randomize=(), env_params={"masspole": value})
        for seed in range(2):
            state = jax.tree.map(lambda x, s=seed: x[s], result.states)
            actors = ppo.evaluate(fixed, state._replace(actors=()), keys[seed], 6)
            np.testing.assert_allclose(returns[seed], np.mean(actors), rtol=1e-5)
    assert (run / "grid_masspole.png").stat().st_size > 5000
    assert main([*words, "mass=1"]) == 2
    assert "no such parameter" in capsys.readouterr().err
    assert main([*words, "masspole"]) == 2
    assert "must be NAME=V1,V2" in capsys.readouterr().err


def test_a_discrete_observation_cannot_be_stacked():
    with pytest.raises(ppo.ConfigError, match=r"frame_stack = 2: .* discrete observations"):
        make_environment(Config(env_id="FrozenLake-misc", frame_stack=2))


def test_gymnax_environments_are_changed_too():
    env = make_environment(Config(frame_stack=2, time_limit=7))
    assert env.max_episode_steps == 7
    _, obs = env.reset(jax.random.split(jax.random.key(0), 2))
    assert obs.shape == (2, 8)


class Old:
    """gymnax 0.0.x's base class: five values, and the reset inside `step`."""

    default_params = None

    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        key, key_reset = jax.random.split(key)
        obs, moved, reward, done, info = self.step_env(key, state, action, params)
        fresh, start = self.reset_env(key_reset, params)
        state = jax.tree.map(lambda x, y: jnp.where(done, x, y), start, moved)
        return jnp.where(done, fresh, obs), state, reward, done, info

    def reset(self, key: Any, params: Any = None) -> Any:
        return self.reset_env(key, params)

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        raise NotImplementedError

    def reset_env(self, key: Any, params: Any) -> Any:
        raise NotImplementedError


class OldWalk(Old):
    """Ends at 3 or, without saying why, after 5 steps."""

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        position, time = state
        position, time = position + action, time + 1
        done = (position >= 3) | (time >= 5)
        return position[None] * 1.0, (position, time), 1.0, done, {}

    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(1), (jnp.int32(0), jnp.int32(0))

    def observation_space(self, params: Any) -> Any:
        return spaces.box((1,))

    def action_space(self, params: Any) -> Any:
        return spaces.discrete(2)


class OldTruncated(OldWalk):
    def is_truncated(self, state: Any, params: Any) -> Any:
        return (state[1] >= 5) & (state[0] < 3)


class Wrapper:
    """A wrapper of gymnax 0.0.x that doubles rewards."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        obs, state, reward, done, info = self.env.step(key, state, action, params)
        return obs, state, 2 * reward, done, info


@pytest.mark.parametrize(
    ("env", "truncates", "reward"), [
        (OldWalk(), False, 1), (OldTruncated(), True, 1), (Wrapper(OldWalk()), False, 2),
    ],
)  # fmt: skip
def test_environments_with_five_values(env: Any, truncates: bool, reward: float):
    made = make_environment(Config(), env)
    state, _ = made.reset(jax.random.split(jax.random.key(0), 2))
    for _ in range(5):
        state, result = made.step(jax.random.split(jax.random.key(1), 2), state, jnp.array([0, 1]))
        if result.terminated[1]:
            break
    assert result.reward.tolist() == [reward] * 2
    np.testing.assert_array_equal(result.terminated, [False, True])
    while not (result.terminated | result.truncated)[0]:
        state, result = made.step(jax.random.split(jax.random.key(1), 2), state, jnp.zeros(2, int))
    assert bool(result.truncated[0]) == truncates
    assert bool(result.terminated[0]) != truncates
    np.testing.assert_array_equal(result.obs[0], [0.0])


def test_an_environment_that_resets_itself_cannot_be_changed():
    with pytest.raises(ppo.ConfigError, match=r"frame_stack: env .* resets itself in its step"):
        make_environment(Config(frame_stack=2), Wrapper(OldWalk()))


class LosesTheLast(Wrapper):
    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        obs, state, reward, done, _ = super().step(key, state, action, params)
        return obs, state, reward, done, {"truncated": done}


def test_truncation_needs_the_last_observation():
    with pytest.raises(ppo.ConfigError, match="without info\\['final_observation'\\]"):
        ppo.make_task(Config(), env=LosesTheLast(OldWalk()))
