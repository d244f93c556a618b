"""Estimators against plain loops, textbook formulas, limiting cases and hand-worked numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import purejaxppo as ppo
from purejaxppo.advantages import gae, make_advantage
from purejaxppo.types import Rollout

T, N = 40, 6


def random_rollout(seed: int, end: float = 0.15) -> Rollout:
    rng = np.random.default_rng(seed)
    numbers = {k: jnp.asarray(rng.normal(size=(T, N)), jnp.float32) for k in ("v", "next", "r")}
    terminated, truncated = jnp.asarray(rng.random((2, T, N)) < end)
    value = numbers["v"]
    following = jnp.concatenate([value[1:], numbers["next"][-1:]])
    done = terminated | truncated
    return Rollout(
        obs=jnp.zeros((T, N, 1)),
        start=jnp.zeros((T, N), bool),
        action=jnp.zeros((T, N), int),
        log_prob=jnp.zeros((T, N)),
        value=value,
        next_value=jnp.where(done, numbers["next"], following),
        reward=numbers["r"],
        terminated=terminated,
        truncated=truncated,
        mask=jnp.ones((T, N)),
        carry=(),
    )


def as_numpy(rollout: Rollout) -> dict[str, np.ndarray]:
    names = ("value", "next_value", "reward", "terminated", "truncated")
    return {k: np.asarray(getattr(rollout, k), np.float64) for k in names}


def double_loop(r: dict[str, np.ndarray], gamma: float, lam: float) -> np.ndarray:
    """The definition: A_t = sum_k (gamma lambda)^k delta_{t+k}, up to the end of the episode."""
    advantage = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                bootstrap = 0.0 if r["terminated"][k, n] else gamma * r["next_value"][k, n]
                delta = r["reward"][k, n] + bootstrap - r["value"][k, n]
                advantage[t, n] += weight * delta
                weight *= gamma * lam
                if r["terminated"][k, n] or r["truncated"][k, n]:
                    break
    return advantage


def lambda_return(r: dict[str, np.ndarray], gamma: float, lam: float) -> np.ndarray:
    """G_t = r_t + gamma ((1 - lambda) V(s') + lambda G_{t+1}), a mixture of n-step returns."""
    returns = np.zeros((T, N))
    for n in range(N):
        for t in reversed(range(T)):
            alive = 1.0 - r["terminated"][t, n]
            ends = r["terminated"][t, n] or r["truncated"][t, n] or t == T - 1
            after = r["next_value"][t, n]
            mixed = after if ends else (1 - lam) * after + lam * returns[t + 1, n]
            returns[t, n] = r["reward"][t, n] + gamma * alive * mixed
    return returns


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0), (0.5, 0.0)])
def test_gae_equals_double_loop_and_lambda_return(seed: int, gamma: float, lam: float):
    rollout, hparams = random_rollout(seed), ppo.HParams(gamma=gamma, gae_lambda=lam)
    advantage, target = jax.jit(gae)(rollout, hparams)
    numbers = as_numpy(rollout)
    np.testing.assert_allclose(advantage, double_loop(numbers, gamma, lam), atol=2e-5)
    np.testing.assert_allclose(target, lambda_return(numbers, gamma, lam), atol=2e-5)
    np.testing.assert_allclose(target, advantage + rollout.value, atol=1e-6)


def n_step_return(r: dict[str, np.ndarray], gamma: float, n: int) -> np.ndarray:
    """sum_{k<n} gamma^k r_{t+k} + gamma^n V(s_{t+n}), up to the end of the episode or rollout."""
    returns = np.zeros((T, N))
    for env in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, min(t + n, T)):
                returns[t, env] += weight * r["reward"][k, env]
                weight *= gamma * (1 - r["terminated"][k, env])
                last = k
                if r["terminated"][k, env] or r["truncated"][k, env]:
                    break
            returns[t, env] += weight * r["next_value"][last, env]
    return returns


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("steps", [1, 3, T + 5])
def test_n_step_returns_equal_double_loop(seed: int, steps: int):
    rollout, r = random_rollout(seed), as_numpy(random_rollout(seed))
    config = ppo.Config(advantage="n_step", bootstrap_steps=steps)
    advantage, target = jax.jit(make_advantage(config))(rollout, ppo.HParams(gamma=0.9))
    np.testing.assert_allclose(target, n_step_return(r, 0.9, steps), atol=2e-5)
    np.testing.assert_allclose(advantage, target - rollout.value, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_other_estimators_match_their_definitions(seed: int):
    """One-step TD; returns to the end, with the value if a rollout or time limit cuts them off; one
    reward and the lambda-return after it."""
    rollout, r = random_rollout(seed), as_numpy(random_rollout(seed))
    hparams = ppo.HParams(gamma=0.9, gae_lambda=0.6)

    def found(name: Any) -> tuple[Array, Array]:
        return jax.jit(make_advantage(ppo.Config(advantage=name)))(rollout, hparams)

    for name, target in (
        ("td0", n_step_return(r, 0.9, 1)),
        ("monte_carlo", n_step_return(r, 0.9, T)),
    ):
        np.testing.assert_allclose(found(name)[1], target, atol=2e-5)
        np.testing.assert_allclose(found(name)[0], target - r["value"], atol=2e-5)
    after = np.concatenate([lambda_return(r, 0.9, 0.6)[1:], r["next_value"][-1:]])
    ends = (r["terminated"] + r["truncated"]) > 0
    following = np.where(ends, r["next_value"], after)
    wanted = r["reward"] + 0.9 * (1 - r["terminated"]) * following - r["value"]
    np.testing.assert_allclose(found("lambda_return")[0], wanted, atol=2e-5)
    np.testing.assert_allclose(found("lambda_return")[1], lambda_return(r, 0.9, 0.6), atol=2e-5)


def test_gae_is_the_same_under_jit():
    rollout, hparams = random_rollout(7), ppo.HParams()
    with jax.disable_jit():
        plain = gae(rollout, hparams)
    for x, y in zip(plain, jax.jit(gae)(rollout, hparams), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_lambda_0_is_one_step_td():
    rollout = random_rollout(1)
    advantage, _ = gae(rollout, ppo.HParams(gamma=0.9, gae_lambda=0.0))
    r = as_numpy(rollout)
    td = r["reward"] + 0.9 * (1 - r["terminated"]) * r["next_value"] - r["value"]
    np.testing.assert_allclose(advantage, td, atol=1e-5)


def test_lambda_1_is_monte_carlo_for_any_critic():
    rollout = random_rollout(2)
    ended = rollout.terminated.at[-1].set(True)
    rollout = rollout._replace(
        terminated=ended,
        truncated=jnp.zeros_like(ended),
        next_value=jnp.concatenate([rollout.value[1:], jnp.full((1, N), 1e3)]),
    )
    _, target = gae(rollout, ppo.HParams(gamma=0.9, gae_lambda=1.0))
    reward, expected = np.asarray(rollout.reward, np.float64), np.zeros((T + 1, N))
    for t in reversed(range(T)):
        expected[t] = reward[t] + 0.9 * expected[t + 1] * ~np.asarray(ended[t])
    np.testing.assert_allclose(target, expected[:-1], atol=1e-5)


def test_a_time_limit_bootstraps_and_a_termination_does_not():
    """By hand, gamma = lambda = 1/2: delta = 1 + V'/2 - V, or 1 - V after a termination."""
    rollout = jax.tree.map(lambda x: x[:2, :3], random_rollout(0))
    flags = jnp.array([[False, False, True], [False, False, False]])
    rollout = rollout._replace(
        reward=jnp.ones((2, 3)),
        value=jnp.full((2, 3), 4.0),
        next_value=jnp.full((2, 3), 10.0),
        truncated=flags[:, ::1],
        terminated=jnp.array([[False, True, False], [False, False, False]]),
    )
    advantage, _ = gae(rollout, ppo.HParams(gamma=0.5, gae_lambda=0.5))
    np.testing.assert_allclose(advantage, [[2.5, -3.0, 2.0], [2.0, 2.0, 2.0]])
