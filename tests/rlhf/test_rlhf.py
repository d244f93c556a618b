"""Rollouts of tokens, advantages, objectives, generation and prompts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import (
    VOCABULARY,
    architecture,
    config_of,
    log_probs,
    random_params,
    table_problem,
)

import purejaxppo as ppo
from purejaxppo.distributions import categorical
from purejaxppo.improve import policy_terms
from purejaxppo.losses import Terms
from purejaxppo.rlhf import (
    TOKEN_OBJECTIVES,
    Problem,
    Prompts,
    RLHFHParams,
    generate,
    make_decoder,
    make_rlhf_task,
)
from purejaxppo.rlhf.actor import TokenParts, draw_prompts, make_token_actor
from purejaxppo.rlhf.advantages import estimate
from purejaxppo.rlhf.generation import observe, truncated
from purejaxppo.rlhf.losses import kl_estimate, sequence_surrogate, token_sequence_surrogate
from purejaxppo.rlhf.task import architecture_of


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_rollout_has_kl_0_and_its_rewards_are_scores(temperature: float):
    made = architecture("rloo")
    problem, table = table_problem(0)
    config = config_of("rloo", num_minibatches=1)
    learner = ppo.make_learner(make_rlhf_task(config, problem))
    hparams = RLHFHParams(temperature=temperature, kl_coef=3.0)
    state = jax.jit(learner.init)(jax.random.key(0), hparams)
    _, metrics = jax.jit(learner.update)(state, hparams)
    assert metrics["reference_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["clip_fraction"] == 0.0
    expected = np.exp(log_probs(made, problem.reference(made), temperature))
    error = np.std(table) / np.sqrt(config.num_sequences)
    assert abs(metrics["score"] - expected @ table) < 4 * error


# Rollouts


@pytest.mark.slow
def test_each_position_of_a_rollout_equals_a_loop():
    """Prompts of 1 to 3 tokens, padded on the left, and responses that stop early."""
    length, beta, temperature, rows = 4, 0.3, 0.7, 48
    config = config_of(
        "ppo_clip", response_length=length, num_prompts=12, group_size=4, critic="shared"
    )
    prompts = Prompts(jnp.array([[0, 0, 1], [3, 2, 1], [0, 2, 2]]), jnp.array([1, 3, 2]))
    own = Problem(
        "own", prompts, lambda sample: sample.responses.lengths + 0.7, VOCABULARY, 3,
        partial(random_params, seed=5),
    )  # fmt: skip
    made = architecture_of(config, own)
    network, reference = make_decoder(made), random_params(made, 5)
    params = jax.tree.map(lambda x: x + 0.05, random_params(made, 6))
    task = make_rlhf_task(config, own)
    hparams = RLHFHParams(kl_coef=beta, temperature=temperature)
    actor = make_token_actor(TokenParts(config, own, network))
    learner = task.learner(None).init(jax.random.key(0), hparams, task.data).learner
    actors = actor.init(jax.random.key(1), hparams, task.data)
    collect = jax.jit(lambda *x: actor.collect(*x, hparams, task.data))
    _, rollout = collect(learner._replace(params=params), actors)

    def read(params: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = jnp.zeros((len(tokens), 1), bool).at[0].set(True)
        obs = observe(jnp.asarray(tokens)[:, None], temperature)
        _, logits, value = network.apply(params, (), obs, start)
        return np.asarray(jax.nn.log_softmax(logits[:, 0])), np.asarray(value[:, 0])

    stops = set()
    for row in range(rows):
        whole = np.append(rollout.obs["token"][:, row], rollout.action[-1, row])
        first = int(np.flatnonzero(rollout.start[:, row]).item())
        n = int(prompts.lengths[np.flatnonzero((prompts.tokens == whole[:3]).all(1)).item()])
        assert first == 3 - n
        response = whole[3:]
        end = int(np.flatnonzero(response == 3)[0]) + 1 if 3 in response else length
        stops.add(end)
        tokens = whole[first : 3 + end]
        (new, value), (old, _) = read(params, tokens), read(reference, tokens)
        for t in range(6):
            counts = 2 <= t < 2 + end
            assert rollout.mask[t, row] == counts
            assert rollout.terminated[t, row] == (t == 1 + end)
            if counts:
                at, action = t - first, whole[t + 1]
                np.testing.assert_allclose(rollout.log_prob[t, row], new[at, action], atol=1e-5)
                np.testing.assert_allclose(rollout.value[t, row], value[at], atol=1e-5)
                score = end + 0.7 if t == 1 + end else 0.0
                reward = score - beta * (new[at, action] - old[at, action])
                np.testing.assert_allclose(rollout.reward[t, row], reward, atol=1e-5)
                if t < 1 + end:
                    np.testing.assert_allclose(rollout.next_value[t, row], value[at + 1], atol=1e-5)
    assert len(stops) > 2


def test_a_step_that_does_not_count_cannot_overflow():
    """Its log ratio is 1,000, whose exponential is infinite."""
    policy, objective = categorical(2), ppo.OBJECTIVES["ppo_clip"]
    zeros = jnp.zeros((2, 1))
    rollout = ppo.Rollout(
        obs=(), start=zeros > 0, action=zeros.astype(int), log_prob=jnp.array([[-0.7], [-1000.7]]),
        value=zeros, next_value=zeros, reward=zeros, terminated=zeros > 0, truncated=zeros > 0,
        mask=jnp.array([[1.0], [0.0]]), carry=(),
    )  # fmt: skip
    batch = ppo.Batch(rollout, zeros + 1, zeros, rollout.mask)
    terms = policy_terms(objective, policy, jnp.zeros((2, 1, 2)), batch, ppo.HParams())
    for name, values in terms.items():
        assert np.isfinite(np.sum(values * batch.weight)), name


# Advantages and objectives, against plain loops


def rollout_of(rewards: np.ndarray, lengths: np.ndarray, prompt: int = 2) -> Any:
    steps = np.arange(prompt - 1 + rewards.shape[0])[:, None] - (prompt - 1)
    mask = ((steps >= 0) & (steps < lengths)).astype(np.float32)
    padded = np.concatenate([np.full((prompt - 1, rewards.shape[1]), 7.0), rewards])
    zeros = jnp.zeros(mask.shape)
    value = jnp.asarray(np.random.default_rng(5).normal(size=mask.shape), jnp.float32)
    return ppo.Rollout(
        obs=(), start=zeros > 0, action=zeros, log_prob=zeros, value=value,
        next_value=jnp.concatenate([value[1:], value[-1:]]),
        reward=jnp.asarray(padded, jnp.float32), terminated=jnp.asarray(steps == lengths - 1),
        truncated=zeros > 0, mask=jnp.asarray(mask), carry=(),
    )  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_OBJECTIVES)
def test_advantages_equal_a_loop_over_groups(name: str):
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(4, 6)), np.array([4, 1, 3, 2, 4, 2])
    rollout = rollout_of(rewards, lengths)
    config = config_of(name, num_prompts=2, group_size=3, response_length=4, oversampling=1)
    hparams = RLHFHParams(gae_lambda=0.9, gamma=0.8)
    advantage, target, weight = estimate(config, rollout, hparams)
    returns = np.array([rewards[:n, i].sum() for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        group = returns[i // 3 * 3 : i // 3 * 3 + 3]
        others = np.delete(group, i % 3)
        for t in range(n):
            to_go = rewards[t:n, i].sum()
            standardized = (returns[i] - group.mean()) / group.std(ddof=1)
            expected = {
                "rloo": returns[i] - others.mean(),
                "dr_grpo": returns[i] - group.mean(),
                "reinforce_pp": to_go,
                "gspo_token": to_go - others.mean(),
                "ppo_clip": gae_by_hand(rollout, i, t, n),
            }.get(name, standardized)
            np.testing.assert_allclose(advantage[1 + t, i], expected, rtol=1e-4, atol=1e-5)
            if name == "ppo_clip":
                value = rollout.value[1 + t, i]
                np.testing.assert_allclose(target[1 + t, i], expected + value, rtol=1e-4)
        per_token = 1 / n if config.averaging == "sequences" else 1.0
        np.testing.assert_allclose(weight[1:, i], (np.arange(4) < n) * per_token, rtol=1e-6)
    assert (np.asarray(weight)[0] == 0).all()


def gae_by_hand(rollout: Any, row: int, t: int, length: int) -> float:
    """The lambda-weighted sum of TD errors from token t on; no bootstrap after the last token."""
    value, total = rollout.value[1:, row], 0.0
    for k in range(length - 1, t - 1, -1):
        after = 0.0 if k == length - 1 else value[k + 1]
        total = rollout.reward[1 + k, row] + 0.8 * after - value[k] + 0.8 * 0.9 * total
    return float(total)


def test_equal_returns_have_no_advantage():
    for reward in (0.1, 25.03):
        rollout = rollout_of(np.full((4, 32), reward), np.full(32, 4))
        for name, about in TOKEN_OBJECTIVES.items():
            if about.uses_groups and not about.per_token:
                config = config_of(name, num_prompts=2, group_size=16, oversampling=1)
                advantage, *_ = estimate(config, rollout, RLHFHParams())
                np.testing.assert_allclose(advantage, 0.0, atol=1e-4)


def test_gspo_clips_the_geometric_mean_of_a_response():
    rng = np.random.default_rng(1)
    ratio, lengths = 0.3 * rng.normal(size=(5, 4)), [5, 1, 3, 2]
    mask = (np.arange(5)[:, None] < lengths).astype(np.float32)
    advantage = np.broadcast_to(rng.normal(size=4), (5, 4))
    ratio[mask == 0] = np.inf  # what is not counted must not matter
    hparams = RLHFHParams(clip_eps=0.1, clip_higher=0.05)
    terms = Terms(*(jnp.asarray(x, jnp.float32) for x in (ratio, ratio, advantage)))
    found = sequence_surrogate(terms._replace(mask=jnp.asarray(mask)), hparams)
    for i, n in enumerate(lengths):
        s, a = np.exp(ratio[:n, i].mean()), advantage[0, i]
        expected = -min(s * a, np.clip(s, 0.9, 1.05) * a)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-5)


def test_gspo_token_has_the_value_of_gspo_and_the_gradient_of_single_tokens():
    rng = np.random.default_rng(2)
    lengths, hparams = np.array([4, 2]), RLHFHParams(clip_eps=0.5)
    mask = jnp.asarray((np.arange(4)[:, None] < lengths) * 1.0)
    ratio = jnp.asarray(0.1 * rng.normal(size=(4, 2)), jnp.float32)
    advantage = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)

    def total(ratio: jax.Array, loss: Any, advantage: jax.Array) -> jax.Array:
        terms = Terms(ratio, ratio, advantage, mask=mask)
        return jnp.sum(loss(terms, hparams) * mask / jnp.sum(mask, axis=0))

    gradient = jax.grad(total)(ratio, token_sequence_surrogate, advantage)
    for i, n in enumerate(lengths):
        s = np.exp(np.asarray(ratio)[:n, i].mean())
        np.testing.assert_allclose(gradient[:n, i], -s * advantage[:n, i] / n, rtol=1e-5)
    same = jnp.broadcast_to(advantage[0], (4, 2))
    for function in (total, jax.grad(total)):
        one, other = (
            function(ratio, loss, same) for loss in (token_sequence_surrogate, sequence_surrogate)
        )
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_estimators_of_the_divergence():
    """k1 and k3 are unbiased; k3 has the sign of a divergence for every token; by enumeration."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), size=2)
    kl, log_ratio = np.sum(p * np.log(p / q)), jnp.asarray(np.log(p / q))
    k1, k2, k3 = (np.asarray(kl_estimate(kind, log_ratio)) for kind in ("k1", "k2", "k3"))
    np.testing.assert_allclose([p @ k1, p @ k3], kl, rtol=1e-5)
    np.testing.assert_allclose(k2, np.log(p / q) ** 2 / 2, rtol=1e-5)
    assert (k3 >= 0).all()
    near = p * np.exp(0.1 * rng.normal(size=5))
    log_ratio = jnp.asarray(np.log(p / (near / near.sum())))
    k1, k3 = (np.asarray(kl_estimate(kind, log_ratio)) for kind in ("k1", "k3"))
    assert p @ (k3 - p @ k3) ** 2 < 0.1 * p @ (k1 - p @ k1) ** 2


# Generation


def test_responses_end_at_the_stop_token_or_the_limit():
    made = architecture("rloo", context=12)
    network, params = make_decoder(made), random_params(made, 0)
    prompts = Prompts(jnp.zeros((64, 2), int), jnp.ones(64, int))
    keys = jax.random.split(jax.random.key(0), 64)
    found = generate(network, params, keys, prompts, max_tokens=8, stop_token=3)
    tokens = np.asarray(found.tokens)
    for row, length, stopped in zip(tokens, found.lengths, found.stopped, strict=True):
        stops = np.flatnonzero(row == 3)
        assert stopped == (len(stops) > 0)
        assert length == (stops[0] + 1 if len(stops) else 8)
    assert 0 < np.mean(found.stopped) < 1


def test_samples_follow_the_policy_at_a_temperature():
    made = architecture("rloo")
    network, params = make_decoder(made), random_params(made, 1)
    rows = 20_000
    prompts = Prompts(jnp.zeros((rows, 1), int), jnp.ones(rows, int))
    keys = jax.random.split(jax.random.key(3), rows)
    call = jax.jit(lambda *x: generate(network, *x, max_tokens=3, stop_token=-1, temperature=0.6))
    found = call(params, keys, prompts)
    index = np.asarray(found.tokens) @ (VOCABULARY ** np.arange(2, -1, -1))
    expected = np.exp(log_probs(made, params, 0.6))
    counts = np.bincount(index, minlength=64)
    error = np.sqrt(rows * expected * (1 - expected))
    assert (np.abs(counts - rows * expected) < 4.5 * error + 1).all()
    sums = np.asarray(found.log_prob).sum(1)
    np.testing.assert_allclose(sums, np.log(expected)[index], atol=1e-4)


def test_greedy_tokens_are_the_most_likely_and_padding_changes_nothing():
    made = architecture("rloo", context=12)
    network, params = make_decoder(made), random_params(made, 2)
    short = Prompts(jnp.array([[1, 2]]), jnp.array([2]))
    padded = Prompts(jnp.array([[3, 0, 1, 2]]), jnp.array([2]))
    keys = jax.random.split(jax.random.key(0), 1)
    found = [
        generate(network, params, keys, x, max_tokens=5, stop_token=-1, deterministic=True).tokens
        for x in (short, padded)
    ]
    np.testing.assert_array_equal(*found)
    sequence = [1, 2]
    for token in np.asarray(found[0][0]):
        seen = jnp.array(sequence)[:, None]
        start = jnp.zeros(seen.shape, bool).at[0].set(True)
        _, logits, _ = network.apply(params, (), observe(seen, 1.0), start)
        assert int(jnp.argmax(logits[-1, 0])) == token
        sequence.append(int(token))


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))

    def kept(top_k: int, top_p: float) -> list[list[int]]:
        rows = np.asarray(truncated(logits, top_k, top_p)) > -1e30
        return [np.flatnonzero(row).tolist() for row in rows]

    assert kept(0, 1.0) == [[0, 1, 2, 3]] * 2
    assert kept(2, 1.0)[0] == [1, 3]
    assert kept(9, 1.0) == [[0, 1, 2, 3]] * 2
    assert kept(0, 0.75) == [[1, 2, 3], [0]]
    assert kept(0, 0.65) == [[1, 3], [0]]
    assert kept(0, 1e-9) == [[1], [0]]
    assert kept(1, 0.9) == [[1], [0]]


def test_top_k_limits_what_is_sampled():
    made = architecture("rloo", context=12)
    network, params = make_decoder(made), random_params(made, 0)
    prompts = Prompts(jnp.zeros((512, 1), int), jnp.ones(512, int))
    keys = jax.random.split(jax.random.key(0), 512)
    found = generate(network, params, keys, prompts, max_tokens=1, stop_token=-1, top_k=2)
    _, logits, _ = network.apply(params, (), observe(jnp.zeros((1, 1), int), 1.0), jnp.ones((1, 1)))
    best = np.argsort(np.asarray(logits[0, 0]))[-2:]
    assert set(np.unique(found.tokens)) == set(best.tolist())
    log_prob = jax.nn.log_softmax(logits[0, 0])[found.tokens[:, 0]]
    np.testing.assert_allclose(found.log_prob[:, 0], log_prob, atol=1e-5)


# Prompts


@pytest.mark.parametrize(("num_prompts", "available"), [(3, 7), (2, 8), (5, 3), (4, 1)])
def test_prompts_are_drawn_without_replacement(num_prompts: int, available: int):
    config = config_of("rloo", num_prompts=num_prompts, group_size=2, num_minibatches=1)
    task = make_rlhf_task(config, table_problem(0)[0])
    actors = jax.jit(task.learner(None).init)(jax.random.key(0), RLHFHParams(), task.data).actors
    draws, seen = actors.env_state, []
    for _ in range(2 * available):
        rows, draws = draw_prompts(config, draws, available)
        assert (np.asarray(rows[::2]) == np.asarray(rows[1::2])).all()
        seen += np.asarray(rows[::2]).tolist()
    epochs = np.reshape(seen, (-1, available))
    assert (np.sort(epochs, axis=1) == np.arange(available)).all()
    if available > 2:
        assert len({tuple(x) for x in epochs.tolist()}) > 1
