"""Faults that other libraries for tuning language models had, each as a regression test."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import VOCABULARY, config_of, random_params, table_problem

import purejaxppo as ppo
from purejaxppo.losses import standardize
from purejaxppo.rlhf import (
    PROBLEMS,
    Problem,
    Prompts,
    Responses,
    RLHFHParams,
    Sample,
    make_decoder,
    make_rlhf_task,
)
from purejaxppo.rlhf.actor import TokenActor
from purejaxppo.rlhf.advantages import estimate
from purejaxppo.rlhf.generation import generate
from purejaxppo.rlhf.kl import make_controller
from purejaxppo.rlhf.losses import kl_estimate
from purejaxppo.rlhf.task import architecture_of, token_metrics

STOP = VOCABULARY - 1


def problem_of(score: Any, stop: int = STOP) -> Problem:
    prompts = Prompts(jnp.array([[0, 0, 1], [2, 2, 1], [0, 2, 2]]), jnp.array([1, 3, 2]))
    return Problem("own", prompts, score, VOCABULARY, stop, partial(random_params, seed=5))


def constant(sample: Sample) -> jax.Array:
    return jnp.ones(len(sample.responses.lengths))


def actor_of(config: Any, score: Any = constant) -> tuple[TokenActor, Any, Any]:
    """The actor, the parameters of another policy, and the reference."""
    own = problem_of(score)
    made = architecture_of(config, own)
    params = jax.tree.map(lambda x: x + 0.05, random_params(made, 6))
    return TokenActor(config, own, make_decoder(made)), params, random_params(made, 5)


def sample_of(lengths: list[int], width: int, stopped: Any = True, pad: int = 0) -> Sample:
    """Responses to the prompts, with token 1 before a stop token, and padding after it."""
    place, count = np.arange(width), len(lengths)
    ends = np.array(lengths)[:, None] - 1
    tokens = np.where(place < ends, 1, np.where(place == ends, STOP if stopped else 1, pad))
    prompts = problem_of(constant).prompts.take(jnp.arange(count) % 3)
    responses = Responses(
        jnp.asarray(tokens), jnp.asarray(lengths), jnp.full(count, stopped),
        jnp.zeros((count, width)),
    )  # fmt: skip
    return Sample(prompts, responses, ())


def rollout_of(lengths: list[int], scores: list[float], **hparams: Any) -> Any:
    config = config_of("rloo", response_length=4)
    actor, params, reference = actor_of(config)
    given = RLHFHParams(**({"kl_coef": 0.3} | hparams))
    sample = sample_of(lengths, 4)
    return actor.rollout(params, reference, sample, jnp.asarray(scores), given)


def test_scores_keep_their_fractions():
    """A score scattered into an integer array would be 0 and -1."""
    rollout = rollout_of([2, 4], [0.7, -1.6], kl_coef=0.0)
    np.testing.assert_allclose(np.sum(rollout.reward * rollout.mask, axis=0), [0.7, -1.6])


def test_integer_scores_are_learned_from():
    config = config_of("rloo", response_length=4, num_prompts=3)
    own = problem_of(lambda sample: sample.responses.lengths)
    task = make_rlhf_task(config, own)
    state = jax.jit(task.learner(None).init)(jax.random.key(0), RLHFHParams(), task.data)
    _, metrics = jax.jit(task.learner(None).update)(state, RLHFHParams(), task.data)
    assert float(metrics["score"]) == pytest.approx(float(metrics["response_length"]), rel=1e-5)


def test_reference_and_policy_have_the_same_temperature():
    config = config_of("rloo", response_length=4)
    actor, _, reference = actor_of(config)
    sample = sample_of([2, 4], 4)
    zeros = jnp.zeros(2)
    for temperature in (0.5, 1.0, 2.0):
        hparams = RLHFHParams(kl_coef=1.0, temperature=temperature)
        rollout = actor.rollout(reference, reference, sample, zeros, hparams)
        np.testing.assert_allclose(rollout.reward * rollout.mask, 0.0, atol=1e-6)


def test_the_score_is_at_the_last_token_and_padding_has_none():
    rollout = rollout_of([1, 2, 4], [5.0, 5.0, 5.0], kl_coef=0.0)
    for row, length in enumerate([1, 2, 4]):
        assert np.flatnonzero(rollout.reward[:, row]).tolist() == [2 + length - 1]
    assert (np.asarray(rollout.reward) * (1 - np.asarray(rollout.mask)) == 0).all()


def test_prompt_tokens_have_no_penalty():
    """The reference differs from the policy on the prompt too."""
    rollout = rollout_of([1, 2, 4], [0.0, 0.0, 0.0])
    difference = np.asarray(rollout.log_prob - rollout.extras.reference)
    assert (np.abs(difference[1]) > 1e-3).any()
    assert (np.asarray(rollout.reward)[:2] == 0).all()
    zeros = jnp.zeros_like(rollout.mask)
    batch = ppo.Batch(rollout, zeros, zeros, rollout.mask)
    expected = np.sum(difference * np.asarray(rollout.mask), axis=0).mean()
    assert token_metrics(batch, None)["reference_kl"] == pytest.approx(expected, rel=1e-5)


def test_k3_penalizes_a_policy_on_either_side_of_the_reference():
    """With the wrong sign of the log ratio it would be exp(x) - 1 - x at x instead of -x."""
    x = jnp.array([-1.0, 1.0])
    np.testing.assert_allclose(kl_estimate("k3", x), [np.exp(1.0) - 2.0, np.exp(-1.0)], rtol=1e-6)


def test_each_update_has_its_own_shuffle(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    from purejaxppo import improve

    usual = improve.random_order

    def recorded(key: jax.Array, size: int) -> jax.Array:
        order = usual(key, size)
        jax.debug.callback(lambda x: seen.append(tuple(x.tolist())), order)
        return order

    monkeypatch.setattr(improve, "random_order", recorded)
    config = config_of("rloo", num_prompts=4, group_size=4, update_epochs=2, num_minibatches=2)
    task = make_rlhf_task(config, table_problem(0)[0])
    learner, hparams = task.learner(None), RLHFHParams()
    state = jax.jit(learner.init)(jax.random.key(0), hparams, task.data)
    update = jax.jit(learner.update)
    for _ in range(3):
        state, _ = update(state, hparams, task.data)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 6


def test_advantages_are_normalised_over_tokens_not_padding():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(5, 6)), np.arange(5)[:, None] < rng.integers(1, 6, 6)
    found = standardize(jnp.asarray(np.where(mask, values, 1e6)), jnp.asarray(mask * 1.0))
    real = values[mask]
    np.testing.assert_allclose(
        np.asarray(found)[mask], (real - real.mean()) / real.std(), rtol=1e-4
    )


def test_whitened_rewards_have_the_deviation_of_tokens_not_padding():
    config = config_of("rloo", response_length=4, whiten_rewards=True)
    actor, params, reference = actor_of(config)
    plain = dataclasses.replace(config, whiten_rewards=False)
    hparams, scores = RLHFHParams(kl_coef=0.3), jnp.array([1.0, -2.0, 0.5])
    sample = sample_of([1, 2, 4], 4)
    white, usual = (
        actor._replace(config=x).rollout(params, reference, sample, scores, hparams)
        for x in (config, plain)
    )
    counted = np.asarray(usual.mask) > 0
    rewards = np.asarray(usual.reward)
    np.testing.assert_allclose(white.reward, rewards / rewards[counted].std(), rtol=1e-4)


def test_rejected_groups_change_nothing_for_those_that_are_kept():
    """Three groups of two, of which one is to be kept: the first with different scores."""
    config = config_of(
        "dapo", num_prompts=1, group_size=2, oversampling=3, response_length=4, num_minibatches=1,
        overlong_buffer=0,
    )  # fmt: skip
    actor, params, reference = actor_of(config)
    hparams = RLHFHParams(kl_coef=0.0)

    def learned(scores: list[float]) -> tuple[list[int], np.ndarray, np.ndarray]:
        score = jnp.asarray(scores)
        rows, kept = actor.choose(score, score[::2] != score[1::2])
        sample = jax.tree.map(lambda x: x[rows], sample_of([1, 2, 3, 4, 2, 3], 4))
        rollout = actor.rollout(params, reference, sample, score[rows], hparams)
        extras = rollout.extras._replace(kept=jnp.broadcast_to(kept, rollout.mask.shape))
        advantage, _, weight = estimate(config, rollout._replace(extras=extras), hparams)
        return rows.tolist(), np.asarray(advantage[-1]), np.asarray(weight)

    rows, advantage, weight = learned([1.0, 1.0, 0.0, 1.0, 5.0, -5.0])
    assert rows == [2, 3]
    np.testing.assert_allclose(advantage, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)
    assert weight.sum() == 7
    assert learned([9.0, 9.0, 0.0, 1.0, 3.0, 3.0])[1].tolist() == advantage.tolist()
    rows, _, weight = learned([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])  # none can be learned from
    assert rows == [0, 1]
    assert weight.sum() == 0


def test_a_group_with_a_score_that_is_not_finite_is_kept_and_noticed():
    config = config_of("dapo", num_prompts=1, group_size=2, oversampling=2, response_length=4)
    actor, _, _ = actor_of(config)
    score = jnp.array([0.0, 1.0, jnp.nan, 1.0])
    rows, kept = actor.choose(score, jnp.array([True, True]))
    assert (rows.tolist(), kept.tolist()) == ([2, 3], [1.0, 1.0])


def test_an_answer_cut_off_by_the_limit_is_not_exact():
    problem = PROBLEMS["sort"](shortest=2, longest=2, digits=3)
    assert problem.extras_of is not None
    right = problem.text.encode("01.")
    extras = problem.extras_of(["10=", "10="])
    tokens = jnp.array([right, [*right[:2], right[0]]])
    responses = Responses(tokens, jnp.array([3, 3]), jnp.array([True, False]), tokens * 0.0)
    prompts = problem.prompts.take(jnp.array([0, 0]))
    score = problem.score(Sample(prompts, responses, extras))
    np.testing.assert_allclose(score, [1.0, 2 / 3])


def test_scores_without_a_stop_token_are_lowered_or_replaced():
    config = config_of("rloo", response_length=4)
    actor, params, reference = actor_of(config)

    def rewards(**hparams: Any) -> list[float]:
        both = [sample_of([2], 4), sample_of([4], 4, stopped=False)]
        sample = jax.tree.map(lambda *x: jnp.concatenate(x), *both)
        given = RLHFHParams(kl_coef=0.0, **hparams)
        rollout = actor.rollout(params, reference, sample, jnp.array([3.0, 3.0]), given)
        return np.sum(rollout.reward, axis=0).tolist()

    assert rewards() == [3.0, 3.0]
    assert rewards(missing_stop_penalty=1.0) == [3.0, 2.0]
    assert rewards(missing_stop_score=-1.0) == [3.0, -1.0]
    assert rewards(score_clip=2.0) == [2.0, 2.0]
    assert rewards(score_clip=2.0, missing_stop_score=-5.0) == [2.0, -5.0]


@pytest.mark.slow
def test_overlong_responses_lose_up_to_1():
    config = config_of("rloo", response_length=6, overlong_buffer=2)
    actor, params, reference = actor_of(config)
    sample = sample_of([3, 4, 5, 6], 6)
    rollout = actor.rollout(params, reference, sample, jnp.ones(4), RLHFHParams(kl_coef=0.0))
    np.testing.assert_allclose(np.sum(rollout.reward, axis=0), [1.0, 1.0, 0.5, 0.0])


@pytest.mark.slow
def test_the_stop_token_may_be_the_padding():
    """Lengths are carried; responses and prompts may contain the padding token."""
    config = config_of("rloo", response_length=4, num_prompts=3, group_size=8, num_minibatches=1)
    own = problem_of(lambda sample: sample.responses.lengths * 1.0, stop=0)
    made = architecture_of(config, own)
    params, network = random_params(made, 5), make_decoder(made)
    keys = jax.random.split(jax.random.key(0), 256)
    prompts = own.prompts.take(jnp.arange(256) % 3)
    found = generate(network, params, keys, prompts, max_tokens=4, stop_token=0)
    for tokens, length, stopped in zip(found.tokens, found.lengths, found.stopped, strict=True):
        stops = np.flatnonzero(np.asarray(tokens) == 0)
        assert stopped == (stops.size > 0)
        assert length == (stops[0] + 1 if stops.size else 4)
    assert len(set(np.asarray(found.lengths).tolist())) == 4
    actor = TokenActor(config, own, network)
    sample = Sample(prompts, found, ())
    rollout = actor.rollout(params, params, sample, found.lengths * 1.0, RLHFHParams())
    np.testing.assert_array_equal(np.sum(rollout.mask, axis=0), found.lengths)
    np.testing.assert_allclose(rollout.log_prob[2:] * rollout.mask[2:],
                               found.log_prob.T * rollout.mask[2:], atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "kl", "factor"),
    [
        ("fixed", 100.0, None),
        ("proportional", 100.0, 1 + 0.2 * 8 / 100),
        ("proportional", 0.0, 1 - 0.2 * 8 / 100),
        ("proportional", 3.3, 1 + 0.1 * 8 / 100),
        ("halving", 4.6, 2.0),
        ("halving", 4.4, 1.0),
        ("halving", 1.9, 0.5),
    ],
)
def test_controllers_of_the_penalty(kind: Any, kl: float, factor: float | None):
    """Ziegler et al. 2019 with n = 8 responses and a horizon of 100; Schulman et al. 2017."""
    config = config_of("rloo", num_prompts=2, group_size=4, num_minibatches=1, kl_control=kind)
    controller = make_controller(config)
    hparams = RLHFHParams(kl_coef=0.5, kl_target=3.0, kl_horizon=100.0)
    state = controller.update(controller.init(hparams), jnp.asarray(kl), hparams)
    expected = 0.5 if factor is None else 0.5 * factor
    assert float(controller.value(state, hparams)) == pytest.approx(expected, rel=1e-6)


def test_a_short_horizon_does_not_make_the_weight_negative():
    config = config_of("rloo", num_prompts=64, kl_control="proportional")
    controller = make_controller(config)
    hparams = RLHFHParams(kl_coef=0.5, kl_horizon=10.0)
    beta = controller.update(controller.init(hparams), jnp.asarray(0.0), hparams)
    assert float(beta) == 0.25
    for _ in range(100):
        beta = controller.update(beta, jnp.asarray(1e9), hparams)
    assert np.isfinite(beta)


@pytest.mark.slow
def test_the_weight_of_the_penalty_survives_a_resume(tmp_path: Any, fused: Any):
    config = config_of(
        "grpo", total_timesteps=6 * 16 * 3, num_prompts=4, group_size=4, kl_control="halving"
    )
    task = make_rlhf_task(config, table_problem(0)[0])
    hparams = RLHFHParams(kl_coef=0.5, kl_target=1e-6, learning_rate=1e-2)
    options: dict[str, Any] = {"eval_episodes": 4, "progress": False, "devices": 1}
    whole = ppo.run(task, hparams, run_dir=tmp_path / "a", **options)
    ppo.run(task, hparams, run_dir=tmp_path / "b", callback=lambda *_: True, **options)
    resumed = ppo.resume(tmp_path / "b", task, progress=False)
    weights = whole.metrics["kl_coef"][0]
    assert weights[-1] > 2 * weights[0]
    np.testing.assert_array_equal(weights, resumed.metrics["kl_coef"][0])
    np.testing.assert_array_equal(whole.returns, resumed.returns)
    penalties = whole.metrics["kl_coef"], whole.metrics["reference_kl"]
    assert np.isfinite(penalties).all()


@pytest.mark.slow
def test_the_first_ratio_is_1_and_the_first_divergence_0():
    for name in ("ppo_clip", "gspo", "grpo"):
        config = config_of(name, num_prompts=4, group_size=4, num_minibatches=1)
        task = make_rlhf_task(config, table_problem(0)[0])
        learner, hparams = task.learner(None), RLHFHParams(temperature=0.7)
        state = jax.jit(learner.init)(jax.random.key(0), hparams, task.data)
        _, metrics = jax.jit(learner.update)(state, hparams, task.data)
        assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-8)
        assert metrics["clip_fraction"] == 0.0
        assert metrics["reference_kl"] == pytest.approx(0.0, abs=1e-6)
        assert metrics["decoding_gap"] < 1e-5
