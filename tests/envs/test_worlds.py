"""The environments of suites, through their adapters."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.envs import available_environments
from purejaxppo.envs.base import MultiDiscrete, is_discrete, parts_of
from purejaxppo.envs.registry import make_environment
from purejaxppo.envs.single import Single, reset_on_demand
from purejaxppo.envs.suites import is_installed, make_single
from purejaxppo.masks import ACTION_MASK, is_masked
from purejaxppo.suites import SUITES

N, STEPS = 4, 300
SHORT = "jumanji/Snake-v1", "navix/Navix-Empty-5x5-v0"
"""Environments of the short form."""
EXPENSIVE = {"brax": ("inverted_pendulum", "spring/hopper"), "playground": ("CartpoleBalance",)}
"""Suites whose environments take half a minute or more to compile: only these are walked over."""
WRONG_SPACES = {"jumanji/TSP-v1": "the position is -1 before the first city"}
LIMITS = {
    "brax/inverted_pendulum": "episode_length", "craftax/Craftax-Classic-Symbolic-v1":
    "max_timesteps", "jumanji/Snake-v1": "time_limit", "navix/Navix-Empty-8x8-v0": "max_steps",
    "xminigrid/MiniGrid-Empty-8x8": "max_steps", "playground/CartpoleBalance": "episode_length",
}  # fmt: skip


def names_of(prefix: str) -> list[str]:
    """The environments of a suite to walk over."""
    if not is_installed(prefix):
        pytest.skip(f"{prefix} is not installed")
    if prefix in EXPENSIVE:
        return [f"{prefix}/{name}" for name in EXPENSIVE[prefix]]
    return available_environments(f"{prefix}/")


def all_of(prefix: str, check: Callable[[str], None]) -> None:
    """Run a check for all environments of a suite, and report all that fail."""
    failed = {}
    for name in names_of(prefix):
        try:
            check(name)
        except Exception as error:
            failed[name] = str(error)[:500]
    assert not failed


def single_of(env_id: str, **params: Any) -> Single:
    if not is_installed(env_id.partition("/")[0]):
        pytest.skip(f"the suite of {env_id} is not installed")
    return make_single(env_id, ppo.Config(env_params=params).env_params)


def random_action(space: Any, key: jax.Array, obs: Any) -> jax.Array:
    """A random action that is allowed."""
    if not is_masked(obs):
        return space.sample(key)
    logits = jnp.where(obs[ACTION_MASK], 0.0, -1e9)
    if is_discrete(space):
        return jax.random.categorical(key, logits)
    parts = jnp.split(logits, np.cumsum(space.num_categories)[:-1])
    return jnp.stack([jax.random.categorical(key, x) for x in parts])


def contains(space: Any, obs: Any) -> None:
    """Check observations `[T, N, ...]` against a space."""
    parts = parts_of(space)
    if isinstance(parts, dict):
        assert set(parts) == set(obs)
        for name, part in parts.items():
            contains(part, obs[name])
        return
    found = np.asarray(obs)
    assert np.isfinite(found).all()
    low, high = (0, parts.n - 1) if is_discrete(parts) else (parts.low, parts.high)
    assert (found >= np.asarray(low, float) - 1e-5).all()
    assert (found <= np.asarray(high, float) + 1e-5).all()


def rows(tree: Any) -> list[np.ndarray]:
    return [np.asarray(data_of(x)) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("env_id", SHORT)
def test_walk(env_id: str):
    check_walk(env_id)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", SUITES)
def test_walk_over_a_suite(prefix: str):
    all_of(prefix, check_walk)


def check_walk(env_id: str) -> None:
    """300 random steps: spaces and flags, the last observation, and resets."""
    single = single_of(env_id)
    env = make_environment(ppo.Config(env_id=env_id))
    space = env.action_space
    # Products of matrices round differently in batches of other sizes: 5e-10 was measured.
    physics = env_id.partition("/")[0] in EXPENSIVE
    agree = functools.partial(jnp.allclose if physics else jnp.array_equal, equal_nan=True)
    always = reset_on_demand(*plain(single), slow_reset=not single.slow_reset)

    def step(carry: Any, key: jax.Array) -> Any:
        state, obs = carry
        act, move = (jax.random.split(k, N) for k in jax.random.split(key))
        action = jax.vmap(functools.partial(random_action, space))(act, obs)
        state, result = env.step(move, state, action)
        other, _ = always(move, carry[0], action)
        pairs = zip(*(map(data_of, jax.tree.leaves(tree)) for tree in (state, other)), strict=True)
        same = [agree(x, y) for x, y in pairs]
        return (state, result.obs), (result, jnp.stack(same).all())

    state, obs = jax.jit(env.reset)(jax.random.split(jax.random.key(1), N))
    _, (result, same) = jax.jit(functools.partial(jax.lax.scan, step))(
        (state, obs), jax.random.split(jax.random.key(2), STEPS)
    )
    if env_id not in WRONG_SPACES:
        contains(env.observation_space, result.final_obs)
        contains(env.observation_space, result.obs)
    assert np.isfinite(result.reward).all()
    assert same.all(), "resets of few environments and of all differ"
    ended = np.asarray(result.terminated | result.truncated)
    if ended.any():
        last, fresh = ([x[ended] for x in rows(tree)] for tree in (result.final_obs, result.obs))
        assert any((x != y).any() for x, y in zip(last, fresh, strict=True))
    check_lengths(env.max_episode_steps, ended, np.asarray(result.truncated))


def data_of(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def plain(single: Single) -> Any:
    """Reset and step of one environment, with the types that `vectorised` gives."""
    found: dict[str, Any] = {}

    def keep(reset_one: Any, step_one: Any, *, slow_reset: bool) -> Any:
        found.update(reset=reset_one, step=step_one)
        return reset_on_demand(reset_one, step_one, slow_reset=slow_reset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purejaxppo.envs.single.reset_on_demand", keep)
        ppo.envs.single.vectorised(single._replace(evaluation=None))
    return found["reset"], found["step"]


def check_lengths(limit: int | None, ended: np.ndarray, truncated: np.ndarray) -> None:
    """Episodes are at most as long as the limit, and those that are cut off exactly as long."""
    for n in range(N):
        steps = 0
        for t in range(STEPS):
            steps += 1
            if truncated[t, n] and limit is not None:
                assert steps == limit
            if ended[t, n]:
                steps = 0
            assert limit is None or steps < limit


@pytest.mark.parametrize("env_id", SHORT[:1])
def test_two_updates(env_id: str):
    check_training(env_id)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", SUITES)
def test_two_updates_with_each_environment_of_a_suite(prefix: str):
    all_of(prefix, check_training)


def check_training(env_id: str) -> None:
    config = ppo.Config(
        env_id=env_id, num_envs=2, num_steps=4, num_minibatches=2, update_epochs=1,
        total_timesteps=16, hidden_sizes=(4,),
    )  # fmt: skip
    _, metrics = jax.jit(ppo.make_train(config))(jax.random.key(0), ppo.HParams())
    assert np.isfinite(np.asarray(metrics["policy_loss"])).all()


@pytest.mark.parametrize(
    "env_id", [pytest.param(x, marks=() if "navix" in x else pytest.mark.slow) for x in LIMITS]
)
def test_a_time_limit_truncates(env_id: str):
    """The limit is that of the settings; the suite's own counter agrees."""
    single = single_of(env_id, **{LIMITS[env_id]: 5})
    assert single.max_episode_steps == 5
    state, obs = single.reset(jax.random.key(0))
    step = jax.jit(single.step)
    for t in range(1, 6):
        action = random_action(single.action_space, jax.random.key(t), obs)
        if is_discrete(single.action_space) and not is_masked(obs):
            action = jnp.zeros_like(action)  # does not reach a goal
        state, obs, _, terminated, truncated = step(jax.random.key(t), state, action)
        if not bool(terminated):
            assert bool(truncated) == (t == 5)
    assert not bool(terminated)


def test_joint_masks_are_one_choice():
    """Tetris' mask is of pairs (rotation, column): a forbidden pair is never the action."""
    single = single_of("jumanji/Tetris-v0")
    state, obs = single.reset(jax.random.key(0))
    assert single.action_space.n == 40
    np.testing.assert_array_equal(obs[ACTION_MASK], np.ravel(state[0].action_mask))
    action = int(np.flatnonzero(obs[ACTION_MASK])[-1])
    (moved, _), _, _, _, _ = single.step(jax.random.key(0), state, jnp.int32(action))
    column = action % 10
    assert np.asarray(moved.grid_padded)[:, column:].any()


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("brxa/ant", "no suite 'brxa'; did you mean brax"),
        ("jumanji/Snake", "no such environment; did you mean jumanji/Snake-v1"),
        ("jumanji/Sokoban-v0", "downloads its levels"),
        ("brax/fast", "has no physics backend"),
        ("brax/spring/swimmer", "no such environment; did you mean brax/"),
    ],
)
def test_unknown_names(env_id: str, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        ppo.make_task(ppo.Config(env_id=env_id))


def test_a_suite_that_fails_gives_its_reason(monkeypatch: pytest.MonkeyPatch):
    def fails(name: str, params: Any) -> Any:
        raise ValueError(f"{name}: no texture")

    suite = SimpleNamespace(names=lambda: ["Broken-v0"], make=fails)
    monkeypatch.setattr("purejaxppo.envs.suites._adapter", lambda prefix: suite)
    with pytest.raises(ppo.ConfigError, match="cannot be made: Broken-v0: no texture"):
        ppo.make_task(ppo.Config(env_id="craftax/Broken-v0"))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", SUITES)
def test_all_environments_can_be_listed(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    if not is_installed(prefix):
        pytest.skip(f"{prefix} is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["envs", f"{prefix}/"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == available_environments(f"{prefix}/")
    assert not list(tmp_path.iterdir())


def test_a_missing_suite_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("purejaxppo.envs.suites.is_installed", lambda prefix: False)
    with pytest.raises(ppo.ConfigError, match=r"pip install 'purejaxppo\[craftax\]'"):
        ppo.make_task(ppo.Config(env_id="craftax/Craftax-Symbolic-v1", env_params={"a": 1}))


def test_unknown_parameters_of_a_suite():
    with pytest.raises(ppo.ConfigError, match="no such parameter; did you mean max_steps"):
        single_of("navix/Navix-Empty-8x8-v0", max_step=3)


def test_multi_discrete_masks_have_one_row_per_choice():
    single = single_of("jumanji/Connector-v3")
    assert isinstance(single.action_space, MultiDiscrete)
    assert single.observation_space[ACTION_MASK].shape == (50,)


@pytest.mark.parametrize("slow_reset", [False, True])
def test_starts_have_the_distribution_of_the_environment(slow_reset: bool):
    """Chi-square tests of uniform starts, and that they do not depend on the start before."""
    kinds, rows, steps = 6, 40, 1500

    def reset(key: Any) -> Any:
        kind = jax.random.randint(key, (), 0, kinds)
        return kind, kind

    def step(key: Any, kind: Any, action: Any) -> Any:
        over = jax.random.bernoulli(key, 0.05 + 0.1 * kind)  # many episodes end at the same time
        return kind, kind, 0.0, over, False

    many = jax.jit(reset_on_demand(reset, step, slow_reset=slow_reset))

    def scanned(state: Any, key: Any) -> Any:
        state, result = many(jax.random.split(key, rows), state, jnp.zeros(rows))
        return state, (result.final_obs, result.obs, result.terminated)

    first, _ = jax.vmap(reset)(jax.random.split(jax.random.key(0), rows))
    _, found = jax.lax.scan(scanned, first, jax.random.split(jax.random.key(1), steps))
    before, after, over = (np.asarray(x) for x in found)
    counts = np.zeros((kinds, kinds))
    np.add.at(counts, (before[over], after[over]), 1)
    assert counts.sum() > 9_000
    assert scipy.stats.chisquare(counts.sum(axis=0)).pvalue > 1e-3
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3
