"""The Python interface: keys, batches of hyperparameters, refused arguments, curves, the cache."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config as type_checks
from toy_envs import RandomWalk

import purejaxppo as ppo


def small(**changes: Any) -> ppo.Config:
    sizes = {"total_timesteps": 64, "num_steps": 8, "hidden_sizes": (8,), "num_minibatches": 2}
    return ppo.Config(**(sizes | {"memory_size": 4} | changes))


@pytest.fixture(scope="module")
def learner() -> ppo.Learner:
    return ppo.make_learner(small())


@pytest.fixture(scope="module")
def state(learner: ppo.Learner) -> ppo.TrainState:
    return jax.jit(learner.init)(jax.random.key(0), ppo.HParams())


def assert_same(a: Any, b: Any) -> None:
    def numbers(x: jax.Array) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(numbers(x), numbers(y))


# Keys


def test_an_old_style_key_gives_the_same_bits_as_a_typed_one(
    learner: ppo.Learner, state: ppo.TrainState
):
    """`train` is only traced: it passes its key to `init` and does nothing else with it."""
    config, hparams = small(), ppo.HParams()
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    olds, news = jax.random.split(old, 2), jax.random.split(new, 2)
    assert olds.shape == (2, 2)
    train, init = ppo.make_train(config), jax.jit(jax.vmap(learner.init, (0, None)))
    assert jax.eval_shape(train, old, hparams) == jax.eval_shape(train, new, hparams)
    _, metrics = jax.eval_shape(jax.vmap(train, (0, None)), olds, hparams)
    assert metrics["env_steps"].shape == (2, 2)
    assert_same(init(olds, hparams), init(news, hparams))
    assert_same(learner.init(old, hparams), learner.init(new, hparams))
    evaluate = jax.jit(lambda key: ppo.evaluate(config, state, key, 4))
    assert_same(evaluate(old), evaluate(new))
    agent, obs = ppo.make_agent(config, state), jnp.ones((50, 4))
    assert_same(agent.act(old, obs, ()), agent.act(new, obs, ()))


# Batches of hyperparameters


def test_vmap_axes_maps_arrays_and_shares_other_values():
    hparams = ppo.HParams(
        learning_rate=jnp.array([1e-4, 1e-3]), gamma=np.array([0.9, 0.99]), ent_coef=jnp.zeros(())
    )
    axes = ppo.vmap_axes(hparams)
    found = {f.name: getattr(axes, f.name) for f in dataclasses.fields(axes)}
    assert found.pop("learning_rate") == found.pop("gamma") == 0
    assert set(found.values()) == {None}
    products = jax.vmap(lambda h: h.learning_rate * h.gamma * h.clip_eps, (axes,))(hparams)
    np.testing.assert_allclose(products, [1e-4 * 0.9 * 0.2, 1e-3 * 0.99 * 0.2], rtol=1e-5)
    with pytest.raises(ppo.ConfigError, match="learning_rate has length 2 and gamma has length 3"):
        ppo.vmap_axes(dataclasses.replace(hparams, gamma=jnp.array([0.9, 0.9, 0.9])))


def test_seeds_and_learning_rates_can_be_vmapped_in_both_ways():
    """Each run reports its own rate for its first update."""
    train, keys = ppo.make_train(small(), RandomWalk()), jax.random.split(jax.random.key(0), 2)
    rates = jnp.array([1e-4, 1e-3, 1e-2])
    by_rate = jax.vmap(lambda key, rate: train(key, ppo.HParams(learning_rate=rate)), (None, 0))
    _, metrics = jax.jit(jax.vmap(by_rate, (0, None)))(keys, rates)
    assert metrics["episode_return"].shape == (2, 3, 2)
    np.testing.assert_array_equal(metrics["learning_rate"][0, :, 0], rates)
    assert len(np.unique(metrics["value_loss"][..., -1])) == 6
    hparams = ppo.HParams(learning_rate=rates)
    over_seeds = jax.vmap(train, (0, None))
    both = jax.vmap(over_seeds, (None, ppo.vmap_axes(hparams)))
    assert jax.eval_shape(both, keys, hparams)[1]["episode_return"].shape == (3, 2, 2)


# Refused arguments


@pytest.fixture
def as_users_call() -> Iterator[None]:
    """Disable the tests' own type checks, which would raise first."""
    type_checks.update("jaxtyping_disable", True)
    yield
    type_checks.update("jaxtyping_disable", False)


KEY, HPARAMS, OBS = jax.random.key(0), ppo.HParams(), jnp.ones((2, 4))
KEYS = jax.random.split(KEY, 8)
SEVERAL = ppo.HParams(gamma=jnp.array([0.9, 0.99]))


def agent_of(state: ppo.TrainState) -> ppo.Agent:
    return ppo.make_agent(small(), state)


@functools.cache
def gru_agent() -> ppo.Agent:
    config = small(memory="gru")
    return ppo.make_agent(config, jax.jit(ppo.make_learner(config).init)(KEY, HPARAMS))


REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (
        lambda learner, state: ppo.make_train(small())(KEYS, HPARAMS),
        "key has shape (8,): train takes one key; use jax.vmap(train, (0, None))(keys, hparams)",
    ),
    (
        lambda learner, state: learner.init(jax.random.split(jax.random.PRNGKey(0), 8), HPARAMS),
        "key has shape (8, 2): init takes one key; use jax.vmap(learner.init",
    ),
    (
        lambda learner, state: ppo.make_train(small())(3, HPARAMS),
        "key = 3: train takes a JAX random key; use jax.random.key(3)",
    ),
    (
        lambda learner, state: jax.jit(learner.init)(3, HPARAMS),
        "key is int32[]: init takes a JAX random key; use jax.random.key(seed)",
    ),
    (
        lambda learner, state: ppo.evaluate(small(), state, KEYS),
        "key has shape (8,): evaluate takes one key; use jax.vmap(lambda key: ppo.evaluate(",
    ),
    (
        lambda learner, state: agent_of(state).act(KEYS, OBS, ()),
        "key has shape (8,): act takes one key; pass one for all rows of obs",
    ),
    (
        lambda learner, state: ppo.make_train(small())(KEY, {"gamma": 0.9}),
        "hparams = {'gamma': 0.9}: train takes ppo.HParams; use ppo.HParams(**hparams)",
    ),
    (
        lambda learner, state: ppo.make_train(small())(KEY, 1e-3),
        "hparams = 0.001: train takes ppo.HParams; use for example ppo.HParams(learning_rate=",
    ),
    (
        lambda learner, state: jax.vmap(learner.init, (None, 0))(KEY, jnp.ones(3)),
        "hparams is float32[]: init takes ppo.HParams; use for example ppo.HParams(learning_rate=",
    ),
    (
        lambda learner, state: ppo.make_train(small())(KEY, SEVERAL),
        "gamma has shape (2,): train takes one number per hyperparameter; use jax.vmap(train, "
        "(None, ppo.vmap_axes(hparams)))(key, hparams)",
    ),
    (
        lambda learner, state: learner.init(KEY, SEVERAL),
        "gamma has shape (2,): init takes one number per hyperparameter; use jax.vmap(learner.init",
    ),
    (
        lambda learner, state: learner.update(state, SEVERAL),
        "gamma has shape (2,): update takes one number per hyperparameter; use jax.vmap(learner.up",
    ),
    (
        lambda learner, state: ppo.train_chunk(learner, state, SEVERAL, 1),
        "gamma has shape (2,): train_chunk takes one number per hyperparameter; use jax.vmap(",
    ),
    (
        lambda learner, state: ppo.vmap_axes({"gamma": OBS}),  # type: ignore
        "vmap_axes takes ppo.HParams; use ppo.HParams(**hparams)",
    ),
    (
        lambda learner, state: ppo.make_train("CartPole-v1"),  # type: ignore
        "config = 'CartPole-v1': make_train takes a ppo.Config; use ppo.Config(env_id='CartPole-v1",
    ),
    (
        lambda learner, state: ppo.make_learner({"num_envs": 8}),  # type: ignore
        "config = {'num_envs': 8}: make_learner takes a ppo.Config; use ppo.Config(**config)",
    ),
    (
        lambda learner, state: ppo.evaluate(state, small(), KEY),
        "config is of type TrainState: evaluate takes a ppo.Config",
    ),
    (
        lambda learner, state: ppo.make_agent(small(), (state, {})),  # type: ignore
        "state is of type tuple: make_agent takes the TrainState that train or learner.init "
        "returns; train returns (state, metrics)",
    ),
    (
        lambda learner, state: ppo.train_chunk(learner, state.learner, HPARAMS, 1),
        "state is of type LearnerState: train_chunk takes the TrainState",
    ),
    (
        lambda learner, state: ppo.train_chunk(
            learner, jax.tree.map(lambda x: x[None], state), HPARAMS, 1
        ),
        "state: its leaves have a leading axis of 1 seeds; use jax.vmap(lambda state, hparams: ",
    ),
    (
        lambda learner, state: ppo.train_chunk(small(), state, HPARAMS, 1),  # type: ignore
        "learner is of type Config: train_chunk takes the Learner that ppo.make_learner(config)",
    ),
    (
        lambda learner, state: ppo.train_chunk(learner, state, HPARAMS, 2.0),  # type: ignore
        "num_updates = 2.0: must be a whole number, at least 0",
    ),
    (
        lambda learner, state: ppo.train_chunk(learner, state, HPARAMS, -1),
        "num_updates = -1: must be at least 0",
    ),
    (
        lambda learner, state: ppo.make_learner(small(hidden_sizes=())).update(state, HPARAMS),
        "state.learner.params['actor_head']['kernel'] has shape (8, 2), but this config needs "
        "shape (4, 2); pass the config and env that the state was trained with",
    ),
    (
        lambda learner, state: ppo.make_learner(small(num_envs=8)).update(state, HPARAMS),
        "state.actors.keys has shape (4,), but this config needs shape (8,)",
    ),
    (
        lambda learner, state: ppo.evaluate(small(hidden_sizes=(8, 8)), state, KEY),
        "state.learner.params['actor']['encoder']['Dense_1']['bias'] is missing, but this config",
    ),
    (
        lambda learner, state: ppo.export_policy(small(env_id="Acrobot-v1"), state),
        "['Dense_0']['kernel'] has shape (4, 8), but this config needs shape (6, 8)",
    ),
    (
        lambda learner, state: agent_of(state).act(KEY, OBS[0], ()),
        "obs has shape (4,): act takes a batch [n, 4]; add an axis with obs[None]",
    ),
    (
        lambda learner, state: agent_of(state).value(OBS[0], ()),
        "obs has shape (4,): value takes a batch [n, 4]; add an axis with obs[None]",
    ),
    (
        lambda learner, state: agent_of(state).act(KEY, OBS[:0], ()),
        "obs has shape (0, 4): act takes a batch [n, 4]; pass one observation",
    ),
    (
        lambda learner, state: agent_of(state).initial_carry(-1),
        "n = -1: must be at least 1",
    ),
    (
        lambda learner, state: ppo.run("CartPole-v1"),  # type: ignore
        "config = 'CartPole-v1': run takes a ppo.Config; use ppo.Config(env_id='CartPole-v1')",
    ),
    (
        lambda learner, state: ppo.run(small(), {}),  # type: ignore
        "hparams = {}: run takes ppo.HParams; use ppo.HParams(**hparams)",
    ),
    (
        lambda learner, state: ppo.run(small(), ppo.HParams(gamma=jnp.ones(2))),
        "gamma has shape (2,): run takes one number per hyperparameter; to train hyperparameters "
        "in parallel, use sweep",
    ),
    (
        lambda learner, state: ppo.sweep(small(), {"gamma": [0.9]}, hparams=1e-3),  # type: ignore
        "hparams = 0.001: sweep takes ppo.HParams; use for example ppo.HParams(learning_rate=",
    ),
    (
        lambda learner, state: ppo.sweep(small(), [("gamma", [0.9])]),  # type: ignore
        "space = [('gamma', [0.9])]: must be a dict, as in {'learning_rate': [1e-3, 1e-4]}",
    ),
    (
        lambda learner, state: agent_of(state).act(KEY, np.ones((2, 3)), ()),
        "obs has shape (2, 3): act takes a batch [n, 4]; pass one observation",
    ),
    (
        lambda learner, state: agent_of(state).value(OBS[None], ()),
        "obs has shape (1, 2, 4): value takes a batch [n, 4]; use jax.vmap",
    ),
    (
        lambda learner, state: agent_of(state).act(KEY, OBS, (), start=jnp.ones(3, bool)),
        "start has shape (3,): act takes one flag per observation, [2]; leave it out",
    ),
    (
        lambda learner, state: gru_agent().act(KEY, OBS, gru_agent().initial_carry(3)),
        "carry has arrays of shapes [(3, 4), (3, 4)]: act takes [(2, 4), (2, 4)] for 2 "
        "observations; start from agent.initial_carry(2)",
    ),
    (
        lambda learner, state: gru_agent().value(OBS, ()),
        "carry has arrays of shapes []: value takes [(2, 4), (2, 4)] for 2 observations",
    ),
    (
        lambda learner, state: ppo.evaluate(small(), state, KEY, True),
        "num_episodes = True: must be a whole number, at least 1",
    ),
    (
        lambda learner, state: ppo.evaluate(small(), state, KEY, 8.0),  # type: ignore
        "num_episodes = 8.0: must be a whole number, at least 1",
    ),
    (
        lambda learner, state: jax.jit(lambda n: ppo.evaluate(small(), state, KEY, n))(8),
        "num_episodes is traced: must be a Python integer",
    ),
    (
        lambda learner, state: ppo.evaluate(small(), state, KEY, max_steps=1e3),  # type: ignore
        "max_steps = 1000.0: must be a whole number, at least 1",
    ),
]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_errors_name_the_argument_the_rule_and_the_fix(
    call: Callable[[Any, Any], Any], message: str, learner: ppo.Learner, state: ppo.TrainState
):
    with pytest.raises(ppo.ConfigError) as error:
        call(learner, state)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("as_users_call")
def test_keys_and_observations_may_be_numpy_arrays(learner: ppo.Learner, state: ppo.TrainState):
    key: Any = np.asarray(jax.random.PRNGKey(0))
    assert_same(learner.init(key, HPARAMS).learner.key, learner.init(KEY, HPARAMS).learner.key)
    agent = agent_of(state)
    assert_same(agent.act(key, np.ones((2, 4)), ()), agent.act(KEY, OBS, ()))


# Curves


def test_curve_has_means_of_stretches_and_no_gaps_after_the_first_value():
    nan = np.nan
    metrics = {
        "env_steps": jnp.array([[10, 20, 30, 40, 50]] * 2),
        "episode_return": jnp.array([[nan, nan, 1.0, 3.0, nan], [2.0, nan, nan, nan, 8.0]]),
        "value_loss": jnp.array([[nan] * 5] * 2),
    }
    steps, values = ppo.curve(metrics, points=3)  # stretches of 2, 2 and 1 updates
    np.testing.assert_array_equal(steps, [20, 40, 50])
    np.testing.assert_array_equal(values, [[nan, 2, 2], [2, 2, 8]])
    steps, values = ppo.curve(jax.tree.map(lambda x: x[0], metrics))
    np.testing.assert_array_equal(steps, [10, 20, 30, 40, 50])
    np.testing.assert_array_equal(values, [nan, nan, 1, 3, 3])
    steps, values = ppo.curve(jax.tree.map(lambda x: x[None], metrics), "value_loss", 2)
    np.testing.assert_array_equal(steps, [30, 50])
    assert values.shape == (1, 2, 2)
    assert np.isnan(values).all()
    # A failed run stops counting steps; the axis is that of the other runs.
    metrics["env_steps"] = jnp.array([[10, 10, 10, 10, 10], [10, 20, 30, 40, 50]])
    np.testing.assert_array_equal(ppo.curve(metrics, points=3)[0], [20, 40, 50])
    with pytest.raises(ppo.ConfigError, match="did you mean episode_return"):
        ppo.curve(metrics, "episode_returns")
    with pytest.raises(ppo.ConfigError, match="points = 0: must be at least 1"):
        ppo.curve(metrics, points=0)
    with pytest.raises(ppo.ConfigError, match="metrics contain no updates"):
        ppo.curve(jax.tree.map(lambda x: x[:, :0], metrics))


# The compilation cache


CACHED = """
import jax, purejaxppo as ppo
counts = {}
def count(name, **_):
    counts[name] = counts.get(name, 0) + 1
jax.monitoring.register_event_listener(count)
jax.random.key(1)
ppo.enable_compilation_cache()
first = jax.config.jax_compilation_cache_dir
ppo.enable_compilation_cache()
assert jax.config.jax_compilation_cache_dir == first
config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(4,), num_minibatches=2)
jax.block_until_ready(jax.jit(ppo.make_train(config))(jax.random.key(0), ppo.HParams()))
print(*(counts.get(f"/jax/compilation_cache/cache_{x}", 0) for x in ("hits", "misses")))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    variables["XDG_CACHE_HOME"] = str(tmp_path)

    def run() -> tuple[int, int]:
        command = [sys.executable, "-c", CACHED]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        hits, misses = done.stdout.split()
        return int(hits), int(misses)

    first, second = run(), run()
    assert first[0] == 0
    assert first[1] > 0
    assert second == (first[1], 0)
    assert any((tmp_path / "purejaxppo").iterdir())
