"""The learned policy against the exact optimum of problems whose responses can be enumerated."""

from typing import Any

import jax
import numpy as np
import pytest
from enumerable import (
    LENGTH,
    VOCABULARY,
    architecture,
    config_of,
    log_probs,
    objective_of,
    responses_of,
    table_problem,
    trained,
)

import purejaxppo as ppo
from purejaxppo.rlhf import TOKEN_OBJECTIVES, RLHFHParams, make_rlhf_task


def fractions_of_the_optimum(
    objective: str,
    betas: list[float],
    num_seeds: int,
    updates: int,
    size: tuple[int, int] = (VOCABULARY, LENGTH),
    **settings: Any,
) -> np.ndarray:
    """How far the policies `[seeds, betas]` are on the way from the reference to the optimum.

    The best policy is pi_ref exp(r / beta) / Z, and its objective beta log Z.
    """
    made = config_of(objective, **settings).architecture(size[0], size[1] + 1)
    states, metrics = trained(objective, betas, num_seeds, updates, size, **settings)
    assert metrics["decoding_gap"].max() < 1e-5
    np.testing.assert_allclose(metrics["reference_kl"][..., 0], 0.0, atol=1e-5)
    found = np.zeros((num_seeds, len(betas)))
    for (seed, i), _ in np.ndenumerate(found):
        problem, table = table_problem(seed, *size)
        reference = log_probs(made, problem.reference(made))
        params = jax.tree.map(lambda x, at=(seed, i): x[at], states.learner.params)
        best = betas[i] * np.log(np.sum(np.exp(reference + table / betas[i])))
        start = objective_of(reference, reference, table, betas[i])
        reached = objective_of(log_probs(made, params), reference, table, betas[i])
        assert reached <= best + 1e-5
        found[seed, i] = (reached - start) / (best - start)
    return found


@pytest.mark.parametrize("objective", ["ppo_clip", pytest.param("gspo", marks=pytest.mark.slow)])
def test_the_policy_approaches_the_exact_optimum(objective: str):
    assert fractions_of_the_optimum(objective, [1.0], 1, updates=150).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
def test_the_policy_approaches_the_exact_optimum_for_any_penalty(objective: str):
    updates = 1200 if objective == "dapo" else 600  # dapo leaves groups out
    found = fractions_of_the_optimum(objective, [2.0, 1.0, 0.5], 5, updates).mean(axis=0)
    print(objective, found.round(4))
    assert (found > 0.95).all()


@pytest.mark.slow
def test_a_smaller_penalty_moves_the_policy_further():
    """Divergence and score are monotone in the penalty."""
    _, metrics = trained("rloo", [2.0, 1.0, 0.5], 5, updates=400)
    for name in ("reference_kl", "score"):
        last = metrics[name][..., -20:].mean(axis=(0, 2))
        assert (np.diff(last) > 0).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo_clip", "rloo", "grpo", "gspo"])
def test_the_policy_approaches_the_exact_optimum_of_a_larger_problem(objective: str):
    """1,296 responses, which take a larger decoder; one seed."""
    larger = {"num_layers": 2, "width": 64, "num_heads": 4}
    updates = 3000 if objective == "grpo" else 1500
    found = fractions_of_the_optimum(objective, [2.0, 1.0, 0.5], 1, updates, size=(6, 4), **larger)
    print(objective, found.round(4))
    assert (found > 0.95).all()


# The penalty in the loss


def fixed_point(reference: np.ndarray, table: np.ndarray, beta: float, kind: str) -> np.ndarray:
    """Log-probabilities `[V, V, V]` at which the expected gradient of the loss is zero.

    At each prefix, Q(a) - beta f'(a) is the same for all tokens a, where Q is the expected score
    after a, without later penalties; f' is log(pi / ref) for k2 and 1 - ref / pi for k3.
    """
    if not reference.shape:
        return np.zeros(())
    firsts = np.exp(reference).sum(axis=tuple(range(1, reference.ndim)))
    log_first = np.log(firsts)
    later = [
        fixed_point(reference[a] - log_first[a], table[a], beta, kind) for a in range(len(firsts))
    ]
    q = np.array([np.sum(np.exp(x) * t) for x, t in zip(later, table, strict=True)])
    if kind == "k2":
        log_pi = log_first + q / beta
        log_pi -= np.log(np.exp(log_pi).sum())
    else:  # pi = beta ref / (c - q), with c > max q such that they sum to 1
        low, high = q.max() + 1e-12, q.max() + beta + 10.0
        for _ in range(200):
            c = (low + high) / 2
            total = np.sum(beta * firsts / (c - q))
            low, high = (c, high) if total > 1 else (low, c)
        log_pi = np.log(beta * firsts / (c - q))
    return np.stack([p + x for p, x in zip(log_pi, later, strict=True)])


def shape_of_tokens(values: np.ndarray) -> np.ndarray:
    return values.reshape((VOCABULARY,) * LENGTH)


def distance(made: Any, params: Any, target: np.ndarray) -> float:
    """KL(pi, target), by enumeration."""
    log_pi = log_probs(made, params)
    return float(np.sum(np.exp(log_pi) * (log_pi - target.reshape(-1))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["k2", "k3", "k2_sequence"])
def test_a_penalty_in_the_loss_has_its_own_fixed_point(kind: str):
    beta, made, num_seeds = 1.0, architecture("rloo"), 3
    states, _ = trained("rloo", [beta], num_seeds, 400, kl_in="loss", kl_estimator=kind)
    for seed in range(num_seeds):
        problem, table = table_problem(seed)
        reference = log_probs(made, problem.reference(made))
        best = reference + table / beta
        best -= np.log(np.exp(best).sum())
        if kind == "k2_sequence":
            target, other = best, None
        else:
            kinds = ("k2", "k3") if kind == "k2" else ("k3", "k2")
            target, other = (
                fixed_point(shape_of_tokens(reference), shape_of_tokens(table), beta, k)
                for k in kinds
            )
        assert np.exp(target).sum() == pytest.approx(1.0, abs=1e-6)
        params = jax.tree.map(lambda x, seed=seed: x[seed, 0], states.learner.params)
        found = distance(made, params, target)
        print(kind, seed, found, distance(made, params, best))
        assert found < 0.02
        if other is not None:
            assert found < 0.3 * distance(made, params, other)
            assert found < 0.3 * distance(made, params, best)


def test_the_sampled_divergence_agrees_with_the_enumerated_one():
    """Within 3 standard errors, also at temperature 0.7."""
    made, config = architecture("rloo"), config_of("rloo", num_prompts=64, num_minibatches=1)
    problem, _ = table_problem(0)
    task = make_rlhf_task(config, problem)
    learner = ppo.make_learner(task)
    state = jax.jit(learner.init)(jax.random.key(0), RLHFHParams())
    moved = jax.tree.map(lambda x: x * 1.3, state.learner.params)
    state = state._replace(learner=state.learner._replace(params=moved))
    for temperature in (1.0, 0.7):
        _, metrics = jax.jit(learner.update)(state, RLHFHParams(temperature=temperature))
        log_pi = log_probs(made, moved, temperature)
        ratio = log_pi - log_probs(made, problem.reference(made), temperature)
        kl = np.sum(np.exp(log_pi) * ratio)
        variance = np.sum(np.exp(log_pi) * (ratio - kl) ** 2)
        error = np.sqrt(variance / config.num_sequences)
        assert kl > 3 * error
        assert abs(metrics["reference_kl"] - kl) < 3 * error
    assert responses_of().shape == (VOCABULARY**LENGTH, LENGTH)
