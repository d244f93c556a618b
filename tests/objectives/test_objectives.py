"""Objectives against mathematics: exact gradients, case analyses, dense matrices."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import collected, parts_of
from jax.flatten_util import ravel_pytree
from toy_envs import Countdown, RandomWalk, Tabular

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.collect import first_steps
from purejaxppo.distributions import categorical
from purejaxppo.host.stats import mean_interval
from purejaxppo.improve import make_loss
from purejaxppo.learner import make_batch
from purejaxppo.losses import Terms, clipped_surrogate
from purejaxppo.objectives.episodes import optimal_baseline, sum_of_others, whole_episodes
from purejaxppo.objectives.trpo import natural_step, second_derivative
from purejaxppo.types import Rollout

GAMMA = 0.8
ONE_EPOCH: dict[str, Any] = {"update_epochs": 1, "num_minibatches": 1}
TABLE = ppo.Config(
    env_id="Tabular", objective="reinforce", num_envs=3, num_steps=3 * Tabular.LIMIT,
    hidden_sizes=(), advantage_normalization="none", **ONE_EPOCH,
)  # fmt: skip


class Exact(NamedTuple):
    """Exact results for a policy on `Tabular`, in float64, by backward recursion (Bellman)."""

    gradient: np.ndarray
    """Gradient of the expected return of an episode by the logits, `[states, actions]`."""
    values: np.ndarray
    """Expected returns by time and state, `[LIMIT + 1, states]`."""


def exact(
    mdp: Tabular,
    logits: np.ndarray,
    gamma: float,
    discounted: bool,
    advantage: Callable[..., np.ndarray] | None = None,
) -> Exact:
    """The gradient sum_t w_t E[sum_a pi(a|s) grad log pi(a|s) X_t(s, a)], w_t = gamma^t if
    `discounted` else 1. X are the action values, or the expected advantages of an estimator,
    `advantage(policy, moves)`."""
    policy = np.exp(logits - logits.max(axis=1, keepdims=True))
    policy /= policy.sum(axis=1, keepdims=True)
    moves = mdp.transition[..., :-1]
    values = np.zeros((mdp.LIMIT + 1, mdp.STATES))
    action_values = np.zeros((mdp.LIMIT, mdp.STATES, mdp.ACTIONS))
    for t in reversed(range(mdp.LIMIT)):
        last = t == mdp.LIMIT - 1
        action_values[t] = mdp.reward + gamma * (0 if last else 1) * moves @ values[t + 1]
        values[t] = np.sum(policy * action_values[t], axis=1)
    expected = action_values if advantage is None else advantage(policy, moves)
    gradient, visits = np.zeros_like(logits), mdp.first
    for t in range(mdp.LIMIT):
        centred = expected[t] - np.sum(policy * expected[t], axis=1, keepdims=True)
        weight = gamma**t if discounted else 1.0
        gradient += weight * visits[:, None] * policy * centred
        visits = np.einsum("s,sa,san->n", visits, policy, moves)
    return Exact(gradient, values)


def sampled(
    config: ppo.Config,
    hparams: ppo.HParams,
    logits: np.ndarray,
    values: np.ndarray,
    mdp: Tabular,
    rollouts: int = 4096,
) -> tuple[np.ndarray, np.ndarray]:
    """For each of many rollouts, the gradient of the summed objective by the logits `[rollouts,
    states * actions]`, and the number of episodes counted. The critic returns `values[state]`."""
    parts = parts_of(config, mdp)
    network = parts.network
    params = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0)))
    params["actor_head"]["kernel"] = jnp.asarray(logits, jnp.float32)
    params["critic_head"]["kernel"] = jnp.asarray(values, jnp.float32)[:, None]
    state = ppo.make_learner(config, mdp).init(jax.random.key(0), hparams)
    learner = state.learner._replace(params=params)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, config.num_envs)
        first = first_steps(parts.env, network, keys)
        _, rollout = parts.actor.collect(learner, first, hparams, ())
        if not config.whole_episodes:
            rollout = rollout._replace(mask=whole_episodes(rollout, Tabular.LIMIT))
        batch = make_batch(rollout, parts.advantage(rollout, hparams))
        gradient = jax.grad(lambda p: parts.loss(p, batch, hparams, jnp.float32(1), ())[0])(params)
        episodes = jnp.sum(rollout.start * rollout.mask)
        return -gradient["actor_head"]["kernel"].reshape(-1), episodes

    keys = jax.random.split(jax.random.key(1), rollouts)
    gradients, episodes = jax.jit(jax.vmap(one))(keys)
    return np.asarray(gradients, np.float64), np.asarray(episodes, np.float64)


def per_episode(gradients: np.ndarray, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ratio of sums, and its standard error (delta method)."""
    ratio = gradients.sum(axis=0) / episodes.sum()
    rest = gradients - ratio * episodes[:, None]
    error = rest.std(axis=0, ddof=1) / np.sqrt(len(rest)) / episodes.mean()
    return ratio, error


def assert_expected(gradients: np.ndarray, episodes: np.ndarray, wanted: np.ndarray) -> None:
    """Agreement within 4 standard errors, which must be small enough to be meaningful."""
    ratio, error = per_episode(gradients, episodes)
    assert np.all(np.abs(ratio - wanted.reshape(-1)) < 4 * error), (ratio, wanted, error)
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(wanted)


def setting(seed: int, gamma: float) -> tuple[Tabular, np.ndarray, ppo.HParams]:
    logits = np.random.default_rng(seed).normal(0, 1, (Tabular.STATES, Tabular.ACTIONS))
    return Tabular(seed), logits, ppo.HParams(gamma=gamma, ent_coef=0.0, gae_lambda=1.0)


CRITIC = np.array([1.0, -3.0, 4.0, 2.0])
"""A wrong critic."""


@pytest.mark.parametrize(
    "changes",
    [
        {"causality": False},
        {"discount_weight": True},
        {"objective": "reinforce_baseline", "baseline": "mean", "discount_weight": True},
        {"objective": "reinforce_baseline", "baseline": "value", "discount_weight": True},
        {"objective": "reinforce_baseline", "baseline": "optimal", "discount_weight": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_reinforce_has_the_exact_gradient_of_the_discounted_return(
    changes: dict[str, Any], seed: int
):
    mdp, logits, hparams = setting(seed, GAMMA)
    config = dataclasses.replace(TABLE, **changes)
    wanted = exact(mdp, logits, GAMMA, discounted=True).gradient
    assert_expected(*sampled(config, hparams, logits, CRITIC, mdp), wanted)


@pytest.mark.parametrize("advantage", ["gae", "lambda_return", "monte_carlo", "n_step"])
def test_estimators_over_whole_episodes_are_unbiased_with_any_critic(advantage: str):
    """At gamma 1 without a weight, at lambda 1, or with n as long as an episode."""
    mdp, logits, hparams = setting(0, 1.0)
    own = {"bootstrap_steps": mdp.LIMIT} if advantage == "n_step" else {}
    config = dataclasses.replace(TABLE, objective="a2c", advantage=advantage, **own)
    wanted = exact(mdp, logits, 1.0, discounted=False).gradient
    assert_expected(*sampled(config, hparams, logits, CRITIC, mdp), wanted)


def expected_by(
    mdp: Tabular, gamma: float, lam: float, steps: int, twice: bool
) -> Callable[..., np.ndarray]:
    """Expected advantages of an estimator with the critic `CRITIC`, `[LIMIT, states, actions]`,
    from lambda-returns or n-step returns; `twice` uses the lambda-return after the first reward."""

    def advantage(policy: np.ndarray, moves: np.ndarray) -> np.ndarray:
        found = np.zeros((mdp.LIMIT, mdp.STATES, mdp.ACTIONS))
        returns = np.zeros((steps + 1, mdp.LIMIT + 1, mdp.STATES))
        returns[0, : mdp.LIMIT] = CRITIC
        for t in reversed(range(mdp.LIMIT)):
            for n in range(1, steps + 1):
                following = returns[n - 1, t + 1] if lam < 0 else returns[n, t + 1]
                value = CRITIC if t + 1 < mdp.LIMIT else 0 * CRITIC
                mixed = following if lam < 0 else (1 - lam) * value + lam * following
                whole = mdp.reward + gamma * moves @ (mixed * (t + 1 < mdp.LIMIT))
                returns[n, t] = np.sum(policy * whole, axis=1)
                last = mdp.reward + gamma * moves @ (following * (t + 1 < mdp.LIMIT))
                found[t] = last if twice else whole
        return found

    return advantage


@pytest.mark.parametrize(
    ("advantage", "lam", "steps", "twice"),
    [
        ("td0", 0.0, 1, False),
        ("gae", 0.6, 1, False),
        ("lambda_return", 0.6, 1, True),
        ("n_step", -1.0, 2, False),
    ],
)
def test_a_wrong_critic_biases_other_estimators_as_predicted(
    advantage: str, lam: float, steps: int, twice: bool
):
    mdp, logits, hparams = setting(0, GAMMA)
    hparams = dataclasses.replace(hparams, gae_lambda=max(lam, 0.0))
    own = {"bootstrap_steps": steps} if advantage == "n_step" else {}
    config = dataclasses.replace(TABLE, objective="a2c", advantage=advantage, **own)
    biased = exact(mdp, logits, GAMMA, False, expected_by(mdp, GAMMA, lam, steps, twice)).gradient
    gradients, episodes = sampled(config, hparams, logits, CRITIC, mdp)
    assert_expected(gradients, episodes, biased)
    true = exact(mdp, logits, GAMMA, discounted=False).gradient
    ratio, error = per_episode(gradients, episodes)
    assert np.max(np.abs(ratio - true.reshape(-1)) / error) > 6


def test_sums_over_others_keep_precision_next_to_a_large_own_value():
    values = np.array([[1e8, 3.0, 0.25, 1e-3], [0.0, 1.0, 2.0, 4.0]])
    wanted = [[np.delete(row, i).sum() for i in range(4)] for row in values]
    found = sum_of_others(jnp.asarray(values, jnp.float32), None)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_optimal_baseline_is_a_weighted_least_squares_fit():
    """b(s) minimises sum |w grad log pi|^2 (G - b)^2 over the other environments' visits."""
    rng = np.random.default_rng(0)
    logits, returns = rng.normal(0, 1, (6, 5, 3)), rng.normal(0, 1, (6, 5))
    weight, mask = 0.5 ** rng.integers(0, 4, (6, 5)), rng.random((6, 5)) < 0.8
    obs, action = rng.integers(0, 2, (6, 5)), rng.integers(0, 3, (6, 5))
    score = np.eye(3)[action] - np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    scale = weight * mask * np.linalg.norm(score, axis=-1)
    wanted = np.zeros((6, 5))
    for t, n in np.ndindex(6, 5):
        use = (obs == obs[t, n]) & (np.arange(5) != n)
        b = np.linalg.lstsq(scale[use][:, None], (scale * returns)[use], rcond=None)[0]
        wanted[t, n] = b[0]
    floats = (jnp.asarray(x, jnp.float32) for x in (returns, weight, mask, logits))
    total, weights, masks, outputs = floats
    unread = dict.fromkeys(Rollout._fields, ())
    rollout = Rollout(
        **unread
        | {"obs": obs, "action": jnp.asarray(action), "mask": masks}
        | {"policy_outputs": outputs}
    )
    head = categorical(Tabular.ACTIONS)
    found = optimal_baseline(head, 2, rollout, total, weights, fallback=jnp.zeros(5))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_causality_and_baselines_lower_the_variance():
    """Variance of the gradient per episode, summed over the logits. Here each baseline removes more
    than 40% of it, and they differ by a few percent; the optimal one is estimated from the same
    episodes, so it needs many of them."""
    mdp, logits, hparams = setting(0, 1.0)
    values = exact(mdp, logits, 1.0, discounted=False).values[:-1].mean(axis=0)
    steps: list[dict[str, Any]] = [
        {"causality": False},
        {},
        {"objective": "reinforce_baseline", "baseline": "mean"},
        {"objective": "reinforce_baseline", "baseline": "value"},
        {"objective": "reinforce_baseline", "baseline": "optimal"},
    ]

    def variance(changes: dict[str, Any]) -> float:
        config = dataclasses.replace(TABLE, num_envs=64, **changes)
        gradients, episodes = sampled(config, hparams, logits, values, mdp, 512)
        return float(np.sum(per_episode(gradients, episodes)[1] ** 2))

    found = np.array([variance(changes) for changes in steps])
    assert found[1] < 0.6 * found[0]
    assert np.all(found[2:] < 0.6 * found[1])
    assert found[4] < 1.03 * found[2:4].min()


# Ratios of policies


def random_terms(seed: int, near: float) -> tuple[Terms, np.ndarray]:
    rng = np.random.default_rng(seed)
    log_ratio = rng.normal(0, near, 400)
    terms = (rng.normal(-1, 1, 400), log_ratio, rng.normal(0, 2, 400))
    return Terms(*(jnp.asarray(x, jnp.float32) for x in terms)), np.exp(log_ratio)


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, None, None), (0.2, 0.5, None), (0.1, 0.3, 2.0)]
)
def test_clipping_equals_its_case_analysis_in_value_and_slope(
    low: float, high: float | None, dual: float | None
):
    """Inside the range, or outside if that lowers the objective: r A, with slope A r by log r.
    Outside if that would raise it: clipped, slope 0. With A < 0 and r > dual: also clipped."""
    terms, ratio = random_terms(0, 0.6)
    hparams = ppo.HParams(clip_eps=low, clip_higher=high, dual_clip=dual)

    def of_log_ratio(log_ratio: jax.Array) -> jax.Array:
        return -clipped_surrogate(terms._replace(log_ratio=log_ratio), hparams)

    value, back = jax.vjp(of_log_ratio, terms.log_ratio)
    (slope,) = back(jnp.ones(400))
    upper = 1 + (low if high is None else high)
    seen = set()
    for i, (r, a) in enumerate(zip(ratio, np.asarray(terms.advantage, np.float64), strict=True)):
        if a > 0 and r > upper:
            case, wanted, moves = "clipped above", upper * a, False
        elif a < 0 and r < 1 - low:
            case, wanted, moves = "clipped below", (1 - low) * a, False
        elif a < 0 and dual is not None and r > dual:
            case, wanted, moves = "dual clip", dual * a, False
        else:
            case, wanted, moves = f"{a > 0} {1 - low < r < upper}", r * a, True
        seen.add(case)
        assert value[i] == pytest.approx(wanted, rel=1e-4)
        assert slope[i] == (pytest.approx(r * a, rel=1e-4) if moves else 0.0)
    assert len(seen) == (7 if dual else 6)


def test_importance_weights_of_long_episodes_vary_widely_and_clipped_ratios_do_not():
    """100 steps, each with a ratio of 0.9 or 1.1: their product is between 0.9^100 and 1.1^100,
    has mean 1, and its variance is 1.01^100 - 1. A step's clipped objective stays in its range."""
    rng = np.random.default_rng(0)
    ratios = rng.choice([0.9, 1.1], (100_000, 100))
    weights = ratios.prod(axis=1)
    variance = 1.01**100 - 1
    assert variance == pytest.approx(1.7048, abs=1e-4)
    assert weights.mean() == pytest.approx(1.0, abs=4 * np.sqrt(variance / 100_000))
    assert weights.var() == pytest.approx(variance, rel=0.2)
    assert 1.1**100 > 13_780 > 13_780 * 0.9**100 > 0.36
    # With ten times as many steps, most weights are near 0 and a few make up the sum.
    longer = rng.choice([0.9, 1.1], (10_000, 1000)).prod(axis=1)
    assert np.median(longer) < 0.01
    assert np.sum(longer) ** 2 / np.sum(longer**2) < 100
    for advantage in (1.0, -1.0):
        terms = Terms(*(jnp.asarray(x) for x in (0.0, np.log(weights), advantage)))
        hparams = ppo.HParams(clip_eps=0.2, dual_clip=3.0)
        objective = -clipped_surrogate(terms, hparams)
        assert objective.min() >= (0.0 if advantage > 0 else -3.0001)
        assert objective.max() <= (1.2001 if advantage > 0 else -0.7999)


def batch_of(config: ppo.Config, env: Any = None) -> tuple[Any, ...]:
    """A rollout's batch with random advantages, the state that it came from, and the parts."""
    parts = parts_of(config, env)
    state = ppo.make_learner(config, env).init(jax.random.key(3), ppo.HParams())
    _, rollout, _ = jax.jit(lambda state: collected(parts, state))(state)
    advantage = jax.random.normal(jax.random.key(4), rollout.value.shape)
    batch = make_batch(rollout, (advantage, rollout.value))
    return batch, state.learner.params, parts.network, parts.policy


@pytest.mark.parametrize(
    "env_id", [pytest.param("CartPole-v1", marks=pytest.mark.slow), "Pendulum-v1"]
)
def test_all_objectives_start_with_the_policy_gradient(env_id: str, tiny: ppo.Config):
    with_outputs = dataclasses.replace(tiny, env_id=env_id, objective="ppo_kl", num_steps=8)
    batch, params, network, policy = batch_of(with_outputs)
    count, old = jnp.float32(batch.weight.size), batch.rollout
    hparams = ppo.HParams(ent_coef=0.0, vf_coef=0.0, dual_clip=3.0, clip_higher=0.3)

    def gradient_of(objective: str) -> Any:
        loss = make_loss(ppo.OBJECTIVES[objective], network, policy)
        return jax.jit(jax.grad(lambda p: loss(p, batch, hparams, count, ())[0]))(params)

    def by_hand(params: Any) -> jax.Array:
        """Sum over samples of log pi(a|s) A."""
        _, outputs, _ = network.apply(params, old.carry, old.obs, old.start)
        total = 0.0
        if env_id == "CartPole-v1":
            for i, action in enumerate(old.action.reshape(-1)):
                row = outputs.reshape(-1, 2)[i]
                total += batch.advantage.reshape(-1)[i] * (
                    row[action] - jnp.log(jnp.exp(row).sum())
                )
        else:
            mean, log_std = outputs[..., 0], outputs[..., 1]
            square = jnp.square((old.action[..., 0] - mean) / jnp.exp(log_std))
            total = jnp.sum(batch.advantage * (-0.5 * square - log_std))
        return -total / count

    wanted = jax.jit(jax.grad(by_hand))(params)
    for gradient in map(gradient_of, ppo.OBJECTIVES):
        for name in ("actor", "actor_head"):
            for x, y in zip(*map(jax.tree.leaves, (gradient[name], wanted[name])), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_beta_follows_the_rule_given_the_logged_kl(tiny: ppo.Config):
    config = dataclasses.replace(
        tiny, objective="ppo_kl_adaptive", total_timesteps=40 * 32, update_epochs=4
    )
    hparams = ppo.HParams(learning_rate=0.02, target_kl=0.01, kl_beta=0.5)
    _, metrics = jax.jit(ppo.make_train(config))(jax.random.key(0), hparams)
    beta, target = np.float32(0.5), np.float32(0.01)
    changes = set()
    for kl, used in zip(*map(np.asarray, (metrics["kl"], metrics["kl_beta"])), strict=True):
        assert used == beta
        factor = 0.5 if kl < target / np.float32(1.5) else 2.0 if kl > 1.5 * target else 1.0
        changes.add(factor)
        beta = np.float32(beta * factor)
    assert changes == {0.5, 1.0, 2.0}


def test_the_logged_kl_is_between_the_policies_before_and_after(tiny: ppo.Config):
    config = dataclasses.replace(tiny, objective="ppo_kl")
    learner = ppo.make_learner(config)
    hparams = ppo.HParams(learning_rate=0.02)
    state = learner.init(jax.random.key(0), hparams)
    parts = parts_of(config)
    network = parts.network
    _, rollout, _ = jax.jit(lambda state: collected(parts, state))(state)
    after, metrics = jax.jit(learner.update)(state, hparams)

    def probabilities(params: Any) -> np.ndarray:
        _, outputs, _ = network.apply(params, (), rollout.obs, rollout.start)
        outputs = np.asarray(outputs, np.float64)
        return np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)

    p, q = probabilities(state.learner.params), probabilities(after.learner.params)
    wanted = np.mean(np.sum(p * np.log(p / q), axis=-1))
    assert wanted > 1e-4
    assert metrics["kl"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bound", ["ppo_clip", "ppo_kl_adaptive"])
def test_many_epochs_ruin_the_policy_without_a_bound_but_not_with_one(
    monkeypatch: pytest.MonkeyPatch, bound: Any
):
    """For 20 seeds, returns of the last eight updates and the fraction lost since the best eight,
    with 95% intervals: for the plain surrogate (nothing is clipped at 1e6), and for the clipped one
    or the one with an adaptive KL penalty."""
    compiled, options = jax.stages.Lowered.compile, {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda x: compiled(x, options))
    config = ppo.Config(
        total_timesteps=25_000, num_envs=8, num_steps=64, update_epochs=20,
        hidden_sizes=(32, 32), lr_schedule="constant",
    )  # fmt: skip

    def end_and_loss(objective: Any, **numbers: Any) -> tuple[Any, Any]:
        hparams = ppo.HParams(learning_rate=3e-3, ent_coef=0.0, gae_lambda=0.9, **numbers)
        chosen = dataclasses.replace(config, objective=objective)
        result = ppo.run(chosen, hparams, num_seeds=20, eval_episodes=1, progress=False)
        assert not result.failed
        returns = result.metrics["episode_return"]
        means = [np.nanmean(returns[:, i : i + 8], axis=1) for i in range(returns.shape[1] - 7)]
        best = np.max(means, axis=0)
        return mean_interval(means[-1]), mean_interval((best - means[-1]) / best)

    free, lost = end_and_loss("ppo_clip", clip_eps=1e6)
    assert lost[1] > 0.2, lost
    end, loss = end_and_loss(bound, **{"target_kl": 0.01} if bound == "ppo_kl_adaptive" else {})
    assert free[2] < end[1], (free, end)
    assert loss[2] < lost[1], (loss, lost)


# Trust region policy optimisation


def test_fisher_products_and_the_natural_step_match_the_dense_matrix():
    """A network of two layers, in float64. The Fisher matrix is the mean over observations of
    sum_a pi(a|s) grad log pi(a|s) grad log pi(a|s)', by one backward pass for each of them."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        sizes = [(3, 4), (4, 3)]
        weights = [jnp.asarray(rng.normal(0, 1, size)) for size in sizes]
        flat, unravel = ravel_pytree(weights)
        obs = jnp.asarray(rng.normal(0, 1, (20, 3)))

        def log_policy(flat: jax.Array) -> jax.Array:
            first, second = unravel(flat)
            return jax.nn.log_softmax(jnp.tanh(obs @ first) @ second)

        old = log_policy(flat)

        def kl(flat: jax.Array) -> jax.Array:
            return jnp.mean(jnp.sum(jnp.exp(old) * (old - log_policy(flat)), axis=1))

        scores = np.asarray(jax.jacrev(log_policy)(flat))
        dense = np.einsum("sa,sai,saj->ij", np.exp(old), scores, scores) / 20
        vector = rng.normal(0, 1, flat.size)
        found = second_derivative(kl, flat, jnp.asarray(vector))
        np.testing.assert_allclose(found, dense @ vector, rtol=1e-9, atol=1e-12)

        damped, delta = dense + 0.1 * np.eye(flat.size), 0.02
        gradient = rng.normal(0, 1, flat.size)
        step = natural_step(
            lambda v: second_derivative(kl, flat, v) + 0.1 * v, jnp.asarray(gradient), delta, 40
        )
        direction = np.linalg.solve(damped, gradient)
        scale = np.sqrt(2 * delta / (direction @ damped @ direction))
        np.testing.assert_allclose(step, scale * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", pytest.param("Pendulum-v1", marks=pytest.mark.slow)]
)
def test_updates_of_trpo_stay_in_the_trust_region_and_improve(env_id: str):
    """Advantages have mean 0, so the surrogate of an unchanged policy is 0."""
    config = ppo.Config(
        env_id=env_id, objective="trpo", total_timesteps=40_000, num_envs=8, num_steps=100,
        hidden_sizes=(16,),
    )  # fmt: skip
    hparams = ppo.HParams(ent_coef=0.0, learning_rate=1e-3, trpo_delta=0.01)
    _, metrics = jax.jit(ppo.make_train(config))(jax.random.key(0), hparams)
    moved = metrics["line_search_failed"] == 0
    assert moved.sum() > 0.9 * len(moved)
    assert np.all(metrics["kl"] <= 0.01)
    assert np.all(metrics["kl"][moved] > 1e-4)
    assert np.all(metrics["policy_loss"][moved] < 0)
    np.testing.assert_allclose(metrics["policy_loss"][~moved], 0.0, atol=1e-5)
    returns = metrics["episode_return"]
    assert np.nanmean(returns[-10:]) > np.nanmean(returns[:10])


def test_a_failed_line_search_keeps_the_policy_and_is_logged(tiny: ppo.Config):
    """The step is far too large for the second-order approximation, and is never halved."""
    config = dataclasses.replace(tiny, objective="trpo", line_search_steps=1, total_timesteps=32)
    hparams = ppo.HParams(trpo_delta=10.0, cg_damping=1e-3)
    learner = ppo.make_learner(config)
    before = learner.init(jax.random.key(0), hparams)
    after, metrics = jax.jit(learner.update)(before, hparams)
    assert metrics["line_search_failed"] == 1
    assert metrics["kl"] == 0
    old, new = before.learner.params, after.learner.params
    for name in old:
        same = jax.tree.all(jax.tree.map(jnp.array_equal, old[name], new[name]))
        assert same == (not name.startswith("critic")), name


# Entropy


def test_entropy_is_log_n_for_the_uniform_policy_and_0_for_a_deterministic_one():
    policy = categorical(5)

    def entropy(outputs: jax.Array) -> jax.Array:
        return jnp.asarray(policy.distribution(outputs).entropy())

    for outputs, wanted in ((jnp.zeros(5), np.log(5)), (jnp.array([200.0, 0, 0, 0, 0]), 0.0)):
        value, gradient = jax.value_and_grad(entropy)(outputs)
        assert value == pytest.approx(wanted, abs=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    # In between: dH/dz_i = -p_i (log p_i + H).
    outputs = jnp.array([1.0, -0.5, 0.3, 2.0, 0.0])
    p = np.exp(np.float64(outputs)) / np.exp(np.float64(outputs)).sum()
    wanted = -p * (np.log(p) - np.sum(p * np.log(p)))
    np.testing.assert_allclose(jax.grad(entropy)(outputs), wanted, rtol=1e-4, atol=1e-6)


# In the training loop


@pytest.mark.parametrize(
    ("objective", "numbers"),
    [
        pytest.param(
            "trpo", {"trpo_delta": [0.001, 0.05], "cg_damping": [0.01, 0.2]}, marks=pytest.mark.slow
        ),
        pytest.param("ppo_kl", {"kl_beta": [0.1, 20.0]}, marks=pytest.mark.slow),
        ("ppo_kl_adaptive", {"kl_beta": [0.1, 20.0], "target_kl": [0.001, 0.05]}),
    ],
)
def test_hyperparameters_of_objectives_can_be_vmapped(
    objective: Any, numbers: dict[str, list[float]], tiny: ppo.Config
):
    config = dataclasses.replace(tiny, objective=objective)
    train, key = ppo.make_train(config, RandomWalk()), jax.random.key(0)
    stacked = ppo.HParams(
        learning_rate=0.01, **{name: jnp.asarray(values) for name, values in numbers.items()}
    )
    axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, stacked)
    _, together = jax.jit(jax.vmap(train, (None, axes)))(key, stacked)
    one = jax.jit(train)
    for i in range(2):
        hparams = jax.tree.map(lambda x, i=i: x[i] if jnp.ndim(x) else x, stacked)
        _, alone = one(key, hparams)
        for name in ("policy_loss", "kl", "value_loss"):
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-3, atol=1e-5)
    assert not np.allclose(together["kl"][0], together["kl"][1], rtol=0.01)


@pytest.mark.slow
def test_the_state_of_an_objective_is_saved_and_resumed(
    tiny: ppo.Config, tmp_path: Path, fused: Any
):
    config = dataclasses.replace(
        tiny, objective="ppo_kl_adaptive", total_timesteps=12 * 32, lr_schedule="constant"
    )
    hparams = ppo.HParams(learning_rate=0.03)
    given: dict[str, Any] = {"env": RandomWalk(), "progress": False}
    whole = ppo.run(config, hparams, eval_episodes=2, **given)
    half = dataclasses.replace(config, total_timesteps=6 * 32)
    ppo.run(half, hparams, run_dir=tmp_path / "r", eval_episodes=2, **given)
    resumed = ppo.resume(tmp_path / "r", total_timesteps=12 * 32, **given)
    for name in ("kl", "kl_beta", "policy_loss"):
        np.testing.assert_array_equal(whole.metrics[name], resumed.metrics[name])
    assert len(np.unique(whole.metrics["kl_beta"])) > 1
    betas = [r.states.learner.objective_state for r in (whole, resumed)]
    assert betas[0] == betas[1]


@pytest.mark.parametrize("memory", ["none", pytest.param("lstm", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "objective",
    [
        "a2c", "trpo", pytest.param("ppo_kl", marks=pytest.mark.slow), "ppo_kl_adaptive", "ppo_clip"
    ],
)  # fmt: skip
def test_every_estimator_works_with_every_objective_with_a_critic(
    objective: Any, memory: Any, tiny: ppo.Config
):
    epochs = ONE_EPOCH if objective == "a2c" else {}
    others = ("monte_carlo", "td0", "n_step", "lambda_return") if memory == "none" else ()
    for advantage in ("gae", *others):
        config = dataclasses.replace(
            tiny, objective=objective, advantage=advantage, memory=memory, **epochs
        )
        learner = ppo.make_learner(config)
        state = jax.eval_shape(learner.init, jax.random.key(0), ppo.HParams())
        after, _ = jax.eval_shape(learner.update, state, ppo.HParams())
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(
    "objective",
    [
        "reinforce",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("reinforce_baseline", "a2c", "trpo", "ppo_kl", "ppo_kl_adaptive")
        ),
    ],
)
def test_each_objective_trains_from_the_command_line(objective: str, tmp_path: Path):
    sizes = "--total-timesteps 4000 --hidden-sizes 8 --eval-episodes 2".split()
    where = ["--run-dir", str(tmp_path / "r")]
    assert main(["train", "--objective", objective, *sizes, *where]) == 0
    rows = list(csv.DictReader((tmp_path / "r/metrics.csv").open()))
    own = {name for name in ("kl", "kl_beta", "line_search_failed") if name in rows[0]}
    assert own == {
        "trpo": {"kl", "line_search_failed"},
        "ppo_kl": {"kl", "kl_beta"},
        "ppo_kl_adaptive": {"kl", "kl_beta"},
    }.get(objective, set())


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "a2c", "update_epochs": 4},
            "update_epochs, num_minibatches = 4, 1; set both to 1",
        ),
        ({"objective": "reinforce", "advantage": "gae"} | ONE_EPOCH, "use monte_carlo, or obj"),
        (
            {"objective": "reinforce", "causality": False, "discount_weight": True} | ONE_EPOCH,
            "already discounted from its first step",
        ),
        ({"objective": "trpo", "shared_trunk": True}, "use shared_trunk = false"),
        (
            {"objective": "reinforce_baseline", "baseline": "optimal", "num_envs": 1} | ONE_EPOCH,
            "use more environments",
        ),
        (
            {"objective": "reinforce", "baseline": "mean"} | ONE_EPOCH,
            "baseline = mean: has no effect with objective = reinforce; .*choose objective = rei",
        ),
        (
            {"objective": "reinforce", "discount_weight": True} | ONE_EPOCH,
            "undo the weights; use none",
        ),
        ({"objective": "reinforce", "num_steps": 128}, "num_steps = 128: .* limit of 500 steps"),
        (
            {"objective": "reinforce_baseline", "baseline": "optimal", "num_steps": 500}
            | ONE_EPOCH,
            "not Discrete; choose value or mean",
        ),
        (
            {"objective": "a2c", "discount_weight": True} | ONE_EPOCH,
            "discount_weight = true: has no effect with objective = a2c; .* choose objective = rei",
        ),
        ({"bootstrap_steps": 3}, "choose advantage = n_step"),
        ({"objective": "ppo"}, "must be one of reinforce, .*did you mean"),
    ],
)
def test_invalid_combinations_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ppo.ConfigError, match=message):
        ppo.make_learner(ppo.Config(**settings))


def test_rollouts_without_a_finished_episode_give_a_warning(tiny: ppo.Config):
    """The environment states no limit, and its episodes have 5 steps."""
    config = dataclasses.replace(tiny, objective="reinforce", num_steps=4, **ONE_EPOCH)
    with pytest.warns(RunWarning, match=r"num_steps = 4 in .* increase num_steps") as seen:
        ppo.run(config, env=Countdown(), env_params=(), eval_episodes=1, progress=False)
    assert len({str(warning.message) for warning in seen}) == 1  # is shown once
