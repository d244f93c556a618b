"""Expected gradients by enumeration, against the gradient of the objective."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import random_params, token_log_probs
from jax.flatten_util import ravel_pytree

import purejaxppo as ppo
from purejaxppo.distributions import categorical
from purejaxppo.improve import make_loss
from purejaxppo.rlhf import (
    Problem,
    Prompts,
    Responses,
    RLHFConfig,
    RLHFHParams,
    Sample,
    make_decoder,
)
from purejaxppo.rlhf.actor import TokenActor
from purejaxppo.rlhf.advantages import estimate
from purejaxppo.rlhf.losses import by_a_constant, make_token_loss, with_kl
from purejaxppo.rlhf.task import architecture_of

STOP, LENGTH, BETA = 2, 2, 0.5
EVERY = [(STOP,), *itertools.product((0, 1), (0, 1, STOP))]
"""All responses of at most 2 tokens, of a vocabulary of 0, 1 and the stop token."""
SIZES = np.array([len(x) for x in EVERY])
PADDED = np.array([[*x, *[0] * (LENGTH - len(x))] for x in EVERY])
SCORES = np.random.default_rng(0).normal(size=len(EVERY)).astype(np.float32)
PAGE = Path(__file__).parents[2] / "docs/rlhf/index.md"


class Setting(NamedTuple):
    objective: str
    averaging: str = "constant"
    kl_in: str = "reward"
    kl_estimator: str = "auto"
    only_kl: bool = False
    """Without scores, so that the gradient is that of the penalty."""


PENALTY = ("rloo", "constant")
SETTINGS = {
    "`ppo_clip`, `gae_lambda = 1`": Setting("ppo_clip"),
    "`reinforce_pp`, not normalised": Setting("reinforce_pp"),
    "`rloo`": Setting("rloo"),
    "`dr_grpo`": Setting("dr_grpo"),
    "`dr_grpo`, averaged over tokens": Setting("dr_grpo", "tokens"),
    "`dr_grpo`, averaged over sequences": Setting("dr_grpo", "sequences"),
    "`grpo`, divided by a constant": Setting("grpo", "constant"),
    "`grpo`": Setting("grpo", "sequences"),
    "`gspo`": Setting("gspo", "sequences"),
    "`gspo_token`": Setting("gspo_token", "sequences"),
    "penalty alone, k1 in the reward": Setting(*PENALTY, "reward", "k1", True),
    "penalty alone, k2 in the reward": Setting(*PENALTY, "reward", "k2", True),
    "penalty alone, k3 in the reward": Setting(*PENALTY, "reward", "k3", True),
    "penalty alone, k2 in the loss": Setting(*PENALTY, "loss", "k2", True),
    "penalty alone, k3 in the loss": Setting(*PENALTY, "loss", "k3", True),
    "penalty alone, k2_sequence in the loss": Setting(*PENALTY, "loss", "k2_sequence", True),
}
EXACT = [0, 1, 2, 3, 10, 15]
"""Positions of the settings whose expected gradient is that of the objective."""


class Case(NamedTuple):
    setting: Setting
    config: RLHFConfig
    actor: TokenActor
    params: Any
    reference: Any
    scores: np.ndarray


def case(setting: Setting, group: int = 2) -> Case:
    config = RLHFConfig(
        setting.objective, num_prompts=1, group_size=group, response_length=LENGTH,
        num_minibatches=1, num_layers=1, width=16, num_heads=2, averaging=setting.averaging,
        kl_in=setting.kl_in, kl_estimator=setting.kl_estimator, oversampling=1, overlong_buffer=0,
        advantage_normalization="none",
    )  # fmt: skip
    problem = Problem(
        "enumerated", Prompts(jnp.zeros((1, 1), int), jnp.ones(1, int)),
        lambda sample: jnp.zeros(len(sample.responses.lengths)), 3, STOP, lambda made: (),
    )  # fmt: skip
    made = architecture_of(config, problem)
    params, reference = (
        jax.tree.map(lambda x: 2 * x, random_params(made, seed)) for seed in (0, 1)
    )
    scores = 0 * SCORES if setting.only_kl else SCORES
    return Case(setting, config, TokenActor(config, problem, make_decoder(made)), params,
                reference, scores)  # fmt: skip


def of_responses(one: Case, params: Any) -> jax.Array:
    """Log-probabilities of all responses."""
    made = architecture_of(one.config, one.actor.problem)
    each = token_log_probs(made, params, PADDED)
    return jnp.sum(jnp.where(np.arange(LENGTH) < SIZES[:, None], each, 0.0), axis=1)


def objective(one: Case) -> Any:
    """`params -> E[score] - beta KL(pi, pi_ref)`."""
    reference = of_responses(one, one.reference)

    def value(params: Any) -> jax.Array:
        log_pi = of_responses(one, params)
        return jnp.sum(jnp.exp(log_pi) * (one.scores - BETA * (log_pi - reference)))

    return value


def expected_gradient(one: Case, loss: Any = None) -> np.ndarray:
    """The expectation over groups of the gradient of the loss of one group."""
    group, hparams = one.config.group_size, RLHFHParams(kl_coef=BETA, gae_lambda=1.0, clip_eps=0.2)
    members = np.array(list(itertools.product(range(len(EVERY)), repeat=group)))
    prompts = Prompts(jnp.zeros((group, 1), int), jnp.ones(group, int))
    policy = categorical(3)
    if loss is None:
        _, loss = make_token_loss(one.config, one.actor.network, policy)
    log_pi = of_responses(one, one.params)
    probability = jnp.exp(jnp.sum(log_pi[members], axis=1))
    assert float(jnp.sum(probability)) == pytest.approx(1.0, abs=1e-4)

    def of_group(params: Any, rows: jax.Array) -> jax.Array:
        stopped = jnp.any(jnp.asarray(PADDED)[rows] == STOP, axis=1)
        responses = Responses(jnp.asarray(PADDED)[rows], jnp.asarray(SIZES)[rows], stopped,
                              jnp.zeros((group, LENGTH)))  # fmt: skip
        scores = jnp.asarray(one.scores)[rows]
        rollout = one.actor.rollout(
            one.params, one.reference, Sample(prompts, responses, ()), scores, hparams
        )
        advantage, target, weight = estimate(one.config, rollout, hparams)
        batch = ppo.Batch(rollout, advantage, target, weight)
        return loss(params, batch, hparams, jnp.sum(weight))[0]

    def total(params: Any) -> jax.Array:
        each = jax.vmap(of_group, (None, 0))(params, jnp.asarray(members))
        return jnp.sum(probability * each)

    found = jax.jit(jax.grad(total))(one.params)
    return actor_part(found)


def actor_part(tree: Any) -> np.ndarray:
    """The gradient of the policy, as a vector; the critic's is another."""
    return np.asarray(ravel_pytree(tree["actor"])[0], np.float64)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("name", [list(SETTINGS)[i] for i in EXACT])
def test_the_expected_gradient_is_that_of_the_objective(name: str):
    one = case(SETTINGS[name])
    wanted = -actor_part(jax.grad(objective(one))(one.params)) / LENGTH
    if SETTINGS[name].objective == "dr_grpo":
        wanted /= 2  # (K - 1) / K
    found = expected_gradient(one)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_leaving_the_response_out_of_its_baseline_matters_by_a_factor_only():
    one = case(SETTINGS["`dr_grpo`"], group=3)
    wanted = -actor_part(jax.grad(objective(one))(one.params)) / LENGTH * 2 / 3
    np.testing.assert_allclose(expected_gradient(one), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_the_page_lists_the_angles_to_the_objective():
    """The cosine between the expected gradient and that of the objective."""
    text = PAGE.read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (.*?) \| (-?\d\.\d{3}) \|$", text, re.MULTILINE))
    found = {}
    for name, setting in SETTINGS.items():
        one = case(setting)
        wanted = -actor_part(jax.grad(objective(one))(one.params))
        found[name] = cosine(expected_gradient(one), wanted)
    for name, value in found.items():
        assert name in listed, "\n".join(f"| {k} | {v:.3f} |" for k, v in found.items())
        assert float(listed[name]) == pytest.approx(value, abs=2e-3), name
    exact = [list(SETTINGS)[i] for i in EXACT]
    assert all((value > 0.9999) == (name in exact) for name, value in found.items())


def test_the_expected_gradient_of_k1_in_the_loss_is_zero():
    one = case(Setting(*PENALTY, "loss", "k2", only_kl=True))
    rloo = one.config.token_objective.objective
    policy = categorical(3)
    losses = [
        by_a_constant(
            one.config,
            make_loss(dataclasses.replace(rloo, loss=own), one.actor.network, policy),
        )
        for own in (rloo.loss, with_kl("k1", rloo.loss))
    ]
    without, with_k1 = (expected_gradient(one, loss) for loss in losses)
    usual = expected_gradient(one)
    assert np.abs(with_k1 - without).max() < 1e-6
    assert np.abs(usual - without).max() > 1e-3
