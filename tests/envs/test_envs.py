"""The environment interface: auto-reset, flags, types, adapters."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from toy_envs import ConstantChain, Params, RandomWalk

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.envs import make_environment
from purejaxppo.types import Environment, TimeStep


class Wrapped:
    """Any object with gymnax's methods: steps go through the public, self-resetting `step`."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return obs, state, reward * 2, terminated, truncated, info


class FiveValues(Wrapped):
    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return self.env.step(key, state, action, params)[:5]


def roll(env: Environment, steps: int, n: int = 3) -> tuple[Any, TimeStep]:
    """`steps` steps of n environments under actions that vary; `[steps, n, ...]`."""
    state, obs = env.reset(jax.random.split(jax.random.key(0), n))

    def step(state: Any, key: jax.Array) -> Any:
        keys = jax.random.split(key, n)
        action = jax.vmap(env.action_space.sample)(keys)
        return env.step(keys, state, action)

    return obs, jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        state, jax.random.split(jax.random.key(1), steps)
    )[1]


def test_the_end_of_an_episode_returns_both_observations():
    first, steps = roll(make_environment(ppo.Config(), RandomWalk()), 60)
    done = np.asarray(steps.terminated | steps.truncated)
    both = np.asarray(steps.terminated & steps.truncated)
    assert done.any()
    assert both.any()
    assert (steps.truncated & ~steps.terminated).any()
    obs, final = np.asarray(steps.obs), np.asarray(steps.final_obs)
    np.testing.assert_array_equal(obs[~done], final[~done])
    assert (obs[done][:, 0] == 0).all()
    assert (final[done][:, 0] > 0).all()
    before = np.concatenate([np.asarray(first)[None], obs[:-1]])
    np.testing.assert_array_equal(final[..., 0], before[..., 0] + 1)
    np.testing.assert_array_equal(final[..., 1], before[..., 1])  # identifies the episode
    assert len(np.unique(obs[done][:, 1])) > 0.8 * done.sum()  # fresh episodes differ


def test_the_time_limit_truncates_and_does_not_terminate():
    _, steps = roll(make_environment(ppo.Config(), ConstantChain()), 11)
    assert not steps.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [4, 9])
    _, longer = roll(make_environment(ppo.Config(), ConstantChain(), Params(8)), 11)
    np.testing.assert_array_equal(np.flatnonzero(longer.truncated[:, 0]), [7])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Catch-bsuite"])
def test_step_env_equals_the_public_step(env_id: str):
    """Equal states, flags and rewards until the first reset, where keys differ."""
    inner, params = gymnax.make(env_id)
    fast = make_environment(ppo.Config(env_id=env_id), inner, params)
    public = make_environment(ppo.Config(env_id=env_id), Wrapped(inner), params)
    (_, a), (_, b) = roll(fast, 300), roll(public, 300)
    done = np.asarray(a.terminated | a.truncated)
    assert done.any()
    until = np.argmax(done, axis=0) + 1
    for n in range(3):
        np.testing.assert_allclose(a.reward[: until[n], n] * 2, b.reward[: until[n], n], rtol=1e-5)
        np.testing.assert_array_equal(a.terminated[: until[n], n], b.terminated[: until[n], n])
        np.testing.assert_allclose(
            a.final_obs[: until[n], n], b.final_obs[: until[n], n], rtol=1e-4, atol=1e-5
        )


def test_a_wrapper_is_not_bypassed(tiny: ppo.Config, key: jax.Array):
    plain = jax.jit(ppo.make_train(tiny, env=ConstantChain()))(key, ppo.HParams())[1]
    wrapped = jax.jit(ppo.make_train(tiny, env=Wrapped(ConstantChain())))(key, ppo.HParams())[1]
    np.testing.assert_allclose(np.nanmax(plain["episode_return"]), 5.0)
    np.testing.assert_allclose(np.nanmax(wrapped["episode_return"]), 10.0)


def test_an_environment_with_the_old_interface_is_refused(tiny: ppo.Config, key: jax.Array):
    with pytest.raises(ppo.ConfigError, match=r"returned 5 values; gymnax 1\.x returns"):
        ppo.make_train(tiny, env=FiveValues(ConstantChain()))(key, ppo.HParams())
    with pytest.raises(ppo.ConfigError, match="has no reset, step"):
        ppo.make_learner(tiny, env=object())


@pytest.mark.parametrize("env_id", ppo.available_environments("gymnax/"))
def test_every_listed_environment_can_be_trained(env_id: str, key: jax.Array):
    """Traced, not run: types and shapes of the whole run fit."""
    config = ppo.Config(env_id=env_id, num_envs=2, num_steps=4, num_minibatches=2)
    state, metrics = jax.eval_shape(ppo.make_train(config), key, ppo.HParams())
    assert metrics["episode_return"].shape == (config.num_updates,)
    assert all(x.dtype != jnp.int64 for x in jax.tree.leaves(state))


IN_EVERY_SUITE = ("Pendulum-v1", "PointRobot-misc", "Reacher-misc")


@pytest.mark.parametrize(
    "env_id",
    [
        pytest.param(name, marks=() if name in IN_EVERY_SUITE else pytest.mark.slow)
        for name in ppo.available_environments("gymnax/")
    ],
)
def test_every_listed_environment_trains_and_evaluates_from_the_command_line(
    env_id: str, tmp_path: Path, capsys: Any
):
    small = "--total-timesteps=32 --num-envs=2 --num-steps=8 --update-epochs=1 --num-minibatches=1"
    arguments = [*small.split(), "--hidden-sizes=4", "--eval-episodes=2"]
    assert main(["train", "--env-id", env_id, *arguments, "--run-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.isfinite(summary["eval_return_per_seed"]).all()


class ArrayBounds(ConstantChain):
    """Both spaces have bounds made by jnp; those of observations also depend on a parameter."""

    def observation_space(self, params: Any) -> Any:
        return spaces.Box(0.0, jnp.array([1.0, params.max_steps_in_episode]), (2,))

    def action_space(self, params: Any) -> Any:
        return spaces.Box(-jnp.ones(2), jnp.ones(2), (2,))


def test_bounds_may_be_arrays_made_under_jit_and_parameters_traced(tiny: ppo.Config):
    def longest(params: Any) -> jax.Array:
        state, metrics = ppo.make_train(tiny, ArrayBounds(), params)(
            jax.random.key(0), ppo.HParams()
        )
        ppo.evaluate(tiny, state, jax.random.key(1), 2, max_steps=2, env=ArrayBounds())
        return jnp.nanmax(metrics["episode_length"])

    np.testing.assert_array_equal(jax.jit(lambda: longest(None))(), 5)
    found = jax.jit(jax.vmap(lambda limit: longest(Params(limit))))(jnp.array([3, 6]))
    np.testing.assert_array_equal(found, [3, 6])


def test_traced_action_bounds_are_refused(tiny: ppo.Config):
    config = dataclasses.replace(tiny, env_id="Pendulum-v1")
    params = gymnax.make("Pendulum-v1")[1]
    with pytest.raises(ppo.ConfigError, match="action bounds of Pendulum-v1 depend on traced"):
        jax.eval_shape(lambda params: ppo.make_learner(config, env_params=params) and 0, params)


class WrongObs(ConstantChain):
    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> jax.Array:
        return jnp.ones(3)


class VectorReward(ConstantChain):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        return obs, state, reward[None], terminated, info


class OddSpaces(ConstantChain):
    def __init__(self, observation: Any, action: Any):
        self.spaces = observation, action

    def observation_space(self, params: Any) -> Any:
        return self.spaces[0]

    def action_space(self, params: Any) -> Any:
        return self.spaces[1]


class GrowingState(Wrapped):
    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, *rest = self.env.step(key, state, action, params)
        return obs, state.replace(time=state.time[None]), *rest


def test_an_environment_whose_shapes_do_not_fit_is_refused(tiny: ppo.Config):
    with pytest.raises(ppo.ConfigError, match=r"shape \(3,\), but its observation space"):
        ppo.make_learner(tiny, env=WrongObs())
    with pytest.raises(ppo.ConfigError, match=r"shape \(1,\) as its reward"):
        ppo.make_learner(tiny, env=VectorReward())
    with pytest.raises(ppo.ConfigError, match="a state with different shapes than reset"):
        ppo.make_learner(tiny, env=GrowingState(ConstantChain()))


class OtherTypes(ConstantChain):
    """Reset returns `first` as state and observation, step adds `second` to both."""

    def __init__(self, first: Any, second: Any, observation: Any = None):
        self.first, self.second, self.observation = first, second, observation

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        state = {"at": state["at"] + self.second, "time": state["time"] + 1}
        return self.observed(state), state, 1, False, {}

    def reset_env(self, key: Any, params: Any) -> Any:
        state = {"at": self.first, "time": 0}
        return self.observed(state), state

    def observed(self, state: Any) -> jax.Array:
        return jnp.stack([state["at"]] * 2).astype(self.observation or state["at"].dtype)

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        return state["time"] >= 5


class IntegerObs(ConstantChain):
    def reset_env(self, key: Any, params: Any) -> Any:
        _, state = super().reset_env(key, params)
        return jnp.ones(2, jnp.int32), state


class FloatingTime(Wrapped):
    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, *rest = self.env.step(key, state, action, params)
        return obs, state.replace(time=state.time * 1.0), *rest


HALF = jnp.float32(0.5)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (OtherTypes(jnp.int32(0), HALF, jnp.float32), "float32 but reset returns int32 as its st"),
        (OtherTypes(jnp.int32(0), 0.5, jnp.float32), r"\['at'\], .*; make reset return float32"),
        (OtherTypes(jnp.int8(0), jnp.int32(300), jnp.float32), "int32 but reset returns int8"),
        (FloatingTime(ConstantChain()), r"float32 but reset returns int32 as its state \.time"),
        (IntegerObs(), "float32 but reset returns int32 as its observation, so"),
    ],
)  # fmt: skip
def test_types_that_lose_values_of_step_are_refused(tiny: ppo.Config, env: Any, words: str):
    with pytest.raises(ppo.ConfigError, match=f"env {type(env).__name__}: step returns .*{words}"):
        ppo.make_learner(tiny, env=env)


@pytest.mark.parametrize(
    ("first", "second"),
    [(HALF, jnp.int32(2)), (HALF, jnp.bool_(True)), (HALF, 2), (jnp.int8(0), 3)],
)  # fmt: skip
def test_types_that_keep_values_of_step_are_cast(first: Any, second: Any):
    """Also if step replaces the state instead of adding to it."""
    env = OtherTypes(first, second)
    env.step_env = lambda key, state, action, params: (
        jnp.stack([second] * 2), {"at": second, "time": state["time"] + 1}, 1, False, {}
    )  # fmt: skip
    _, steps = roll(make_environment(ppo.Config(), env), 2)
    assert steps.obs.dtype == first.dtype
    np.testing.assert_array_equal(steps.final_obs, second)


BOX, TWO = spaces.Box(0, 1, (2,)), spaces.Discrete(2)


@pytest.mark.parametrize(
    ("observation", "action", "words"),
    [
        (spaces.Dict({"a": object()}), TWO, "observation space .*not supported"),
        (BOX, spaces.Dict({"a": TWO}), "action space .* is not supported"),
        (BOX, spaces.Tuple([TWO]), "action space .* is not supported"),
        (BOX, spaces.Box(1.0, -1.0, (1,)), "lower bound must be below"),
        (BOX, spaces.Box(float("nan"), 1.0, (1,)), "lower bound must be below"),
    ],
)
def test_unsupported_spaces_are_refused(
    tiny: ppo.Config, observation: Any, action: Any, words: str
):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.run(tiny, env=OddSpaces(observation, action))


def test_runs_can_be_vmapped_over_parameters_of_the_environment(tiny: ppo.Config):
    def longest(limit: jax.Array) -> jax.Array:
        train = ppo.make_train(tiny, ConstantChain(), Params(limit))
        return jnp.nanmax(train(jax.random.key(0), ppo.HParams())[1]["episode_length"])

    np.testing.assert_array_equal(jax.jit(jax.vmap(longest))(jnp.array([3, 6])), [3, 6])


def test_unknown_environments_suggest_the_nearest():
    with pytest.raises(ppo.ConfigError, match="did you mean CartPole-v1"):
        ppo.make_learner(ppo.Config(env_id="cartpole"))
    with pytest.raises(ppo.ConfigError, match="pass it as env"):
        ppo.make_learner(ppo.Config(env_id="MNISTBandit-bsuite"))


def test_multi_discrete_space():
    space = ppo.MultiDiscrete((3, 2))
    samples = jax.vmap(space.sample)(jax.random.split(jax.random.key(0), 100))
    assert {tuple(row) for row in samples.tolist()} == {(i, j) for i in range(3) for j in range(2)}
    assert space.contains(jnp.array([2, 1]))
    assert not space.contains(jnp.array([2, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        ppo.MultiDiscrete((3, 0))


DRAWS = """
import sys
import purejaxppo as ppo
ppo.make_learner(ppo.Config())
assert not {"seaborn", "matplotlib.pyplot", "pandas", "orbax"} & sys.modules.keys()
import gymnax, jax, matplotlib
matplotlib.use("agg")
env, params = gymnax.make("Pong-misc")
state = env.reset(jax.random.key(0))[1]
print(env.render(state, params))
"""


@pytest.mark.slow
def test_plotting_libraries_are_imported_when_used():
    done = subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("AxesImage")
