"""Tuning a language model: exact optimum, advantages, objectives, generation and prompts."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.distributions import categorical
from purejaxppo.improve import policy_terms
from purejaxppo.losses import Terms
from purejaxppo.rlhf import (
    Architecture,
    Problem,
    Prompts,
    Responses,
    RLHFConfig,
    RLHFHParams,
    Sample,
    generate,
    make_decoder,
    make_rlhf_task,
)
from purejaxppo.rlhf.actor import draw_prompts, make_token_actor
from purejaxppo.rlhf.generate import observe
from purejaxppo.rlhf.objectives import TOKEN_OBJECTIVES, sequence_surrogate
from purejaxppo.rlhf.problems import reverse_digits, sort_digits
from purejaxppo.rlhf.task import architecture_of

VOCABULARY, LENGTH = 4, 3
RESPONSES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))


def config_of(objective: Any, **changes: Any) -> RLHFConfig:
    given: dict[str, Any] = {
        "num_layers": 1, "width": 32, "num_heads": 2, "response_length": LENGTH,
    }  # fmt: skip
    return RLHFConfig(objective, **(given | changes))


def architecture(objective: str, context: int = LENGTH + 1) -> Architecture:
    return config_of(objective).architecture(VOCABULARY, context)


def random_params(made: Architecture, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(make_decoder(made).init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(100 + seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def table_problem(seed: int) -> tuple[Problem, np.ndarray]:
    """Every response of 3 tokens has a random score; the prompt is one token."""
    table = jax.random.normal(jax.random.key(200 + seed), (1, VOCABULARY**LENGTH))
    places = VOCABULARY ** jnp.arange(LENGTH - 1, -1, -1)

    def score(sample: Sample) -> jax.Array:
        index = jnp.sum(sample.responses.tokens * places, axis=1)
        return jnp.take_along_axis(sample.extras, index[:, None], axis=1)[:, 0]

    prompts = Prompts(jnp.zeros((1, 1), int), jnp.ones(1, int))
    problem = Problem(
        "table", prompts, score, VOCABULARY, -1, partial(random_params, seed=seed), table
    )
    return problem, np.asarray(table[0], np.float64)


def log_probs(made: Architecture, params: Any, temperature: float = 1.0) -> np.ndarray:
    """Of all responses, by enumeration."""
    tokens = jnp.concatenate([jnp.zeros((len(RESPONSES), 1), int), RESPONSES], axis=1).T
    start = jnp.zeros((LENGTH, len(RESPONSES)), bool).at[0].set(True)
    _, logits, _ = make_decoder(made).apply(params, (), observe(tokens[:-1], temperature), start)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:][..., None], -1)
    return np.asarray(each[..., 0].sum(0), np.float64)


def objective_of(log_prob: Any, reference: Any, table: Any, beta: float) -> float:
    """E[r] - beta KL(pi, pi_ref)."""
    return float(np.sum(np.exp(log_prob) * (table - beta * (log_prob - reference))))


def fractions_of_the_optimum(
    objective: Any, betas: list[float], num_seeds: int, updates: int
) -> np.ndarray:
    """How far the policies `[seeds, betas]` are on the way from the reference to the optimum.

    The best policy is pi_ref exp(r / beta) / Z, and its objective beta log Z.
    """
    made = architecture(objective)
    config = config_of(objective, total_timesteps=updates * 256 * LENGTH)
    tasks = [make_rlhf_task(config, table_problem(seed)[0]) for seed in range(num_seeds)]
    learner = ppo.make_learner(tasks[0])

    def train(key: jax.Array, data: Any, beta: jax.Array) -> Any:
        hparams = RLHFHParams(kl_coef=beta)
        state = learner.init(key, hparams, data)
        return ppo.train_chunk(learner, state, hparams, updates, data)

    data = jax.tree.map(lambda *x: jnp.stack(x), *(task.data for task in tasks))
    over_betas = jax.vmap(train, (None, None, 0))
    states, metrics = jax.jit(jax.vmap(over_betas, (0, 0, None)))(
        jax.random.split(jax.random.key(0), num_seeds), data, jnp.array(betas)
    )
    assert metrics["decoding_gap"].max() < 1e-5
    np.testing.assert_allclose(metrics["reference_kl"][..., 0], 0.0, atol=1e-6)
    found = np.zeros((num_seeds, len(betas)))
    for (seed, i), _ in np.ndenumerate(found):
        problem, table = table_problem(seed)
        reference = log_probs(made, problem.reference(made))
        params = jax.tree.map(lambda x, at=(seed, i): x[at], states.learner.params)
        best = betas[i] * np.log(np.sum(np.exp(reference + table / betas[i])))
        start = objective_of(reference, reference, table, betas[i])
        reached = objective_of(log_probs(made, params), reference, table, betas[i])
        assert reached <= best + 1e-5
        found[seed, i] = (reached - start) / (best - start)
    return found


@pytest.mark.parametrize("objective", ["ppo_clip", "gspo"])
def test_the_policy_approaches_the_exact_optimum(objective: str):
    assert fractions_of_the_optimum(objective, [1.0], 1, updates=150).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("objective", TOKEN_OBJECTIVES)
def test_the_policy_approaches_the_exact_optimum_for_any_penalty(objective: str):
    found = fractions_of_the_optimum(objective, [2.0, 1.0, 0.5], 5, updates=400).mean(axis=0)
    assert (found > 0.95).all()


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
    actor = make_token_actor(config, own, network)
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
    return ppo.Rollout(
        obs=(), start=zeros > 0, action=zeros, log_prob=zeros, value=zeros, next_value=zeros,
        reward=jnp.asarray(padded, jnp.float32), terminated=jnp.asarray(steps == lengths - 1),
        truncated=zeros > 0, mask=jnp.asarray(mask), carry=(),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "gspo"])
def test_advantages_equal_a_loop_over_groups(name: str):
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(4, 6)), np.array([4, 1, 3, 2, 4, 2])
    rollout = rollout_of(rewards, lengths)
    estimator = TOKEN_OBJECTIVES[name].advantage(3)
    advantage, _, weight = estimator(rollout, RLHFHParams())
    returns = np.array([rewards[:n, i].sum() for i, n in enumerate(lengths)])
    for i in range(6):
        group = returns[i // 3 * 3 : i // 3 * 3 + 3]
        others = np.delete(group, i % 3)
        expected = {
            "rloo": returns[i] - others.mean(),
            "dr_grpo": returns[i] - group.mean(),
        }.get(name, (returns[i] - group.mean()) / group.std(ddof=1))
        np.testing.assert_allclose(advantage[1:, i], expected, rtol=1e-4)
        per_token = 1 / lengths[i] if name in ("grpo", "gspo") else 1.0
        counted = np.arange(4) < lengths[i]
        np.testing.assert_allclose(weight[1:, i], counted * per_token, rtol=1e-6)
    assert (np.asarray(weight)[0] == 0).all()


def test_equal_returns_have_no_advantage():
    for reward in (0.1, 25.03):
        rollout = rollout_of(np.full((4, 32), reward), np.full(32, 4))
        for name in ("rloo", "grpo", "dr_grpo", "gspo"):
            advantage, *_ = TOKEN_OBJECTIVES[name].advantage(16)(rollout, RLHFHParams())
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


# Problems


@pytest.mark.parametrize(("make", "answer"), [(sort_digits, sorted), (reverse_digits, reversed)])
def test_scores_of_digits_equal_a_loop(make: Any, answer: Any):
    problem = make(length=3, digits=4)
    prompts = np.asarray(problem.prompts.tokens)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 6, (len(prompts), 5)), rng.integers(1, 6, len(prompts))
    expected = []
    for row, prompt in enumerate(prompts):
        assert prompt[3] == 4
        right = [*answer(prompt[:3].tolist()), 5]
        if row % 2:
            tokens[row, :4], lengths[row] = right, 4
        pairs = zip(tokens[row, : lengths[row]], right, strict=False)
        expected.append(sum(a == b for a, b in pairs) / 4)
    assert max(expected) == 1.0
    responses = Responses(*(jnp.asarray(x) for x in (tokens, lengths, lengths > 0, tokens * 0.0)))
    sample = Sample(problem.prompts, responses, problem.extras)
    np.testing.assert_allclose(problem.score(sample), expected, rtol=1e-6)
    held_out = np.asarray(problem.held_out.tokens)
    together = {tuple(x) for x in np.concatenate([prompts, held_out]).tolist()}
    assert len(together) == len(prompts) + len(held_out) == 4**3


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo_clip", "rloo", "grpo", "gspo"])
def test_sorting_is_learned(objective: Any):
    config = RLHFConfig(
        objective, num_prompts=32, response_length=4, num_minibatches=4,
        total_timesteps=300 * 512 * 4,
    )  # fmt: skip
    task = make_rlhf_task(config, sort_digits(length=3, digits=6))
    hparams = RLHFHParams(learning_rate=1e-3, kl_coef=0.0)
    result = ppo.run(task, hparams, num_seeds=2, eval_episodes=128, progress=False)
    assert (result.metrics["score"][:, 0] < 0.2).all()
    assert (np.mean(result.returns == 1, axis=1) > 0.9).all()


# As a task


def small_task() -> ppo.Task:
    config = config_of("grpo", total_timesteps=6 * 16 * LENGTH, num_prompts=4, group_size=4)
    return make_rlhf_task(config, table_problem(0)[0])


def test_a_run_resumes_bit_for_bit_and_uses_devices(tmp_path: Any, fused: Any):
    task, options = small_task(), {"eval_episodes": 8, "progress": False}
    hparams = RLHFHParams()
    whole = ppo.run(task, hparams, run_dir=tmp_path / "a", devices=1, **options)
    assert whole.metrics.keys() >= {"score", "reference_kl", "response_length", "stopped"}
    assert (whole.metrics["response_length"] == LENGTH).all()
    stopped = ppo.run(
        task, hparams, run_dir=tmp_path / "b", devices=1, callback=lambda *_: True, **options
    )
    assert stopped.summary["env_steps"] < whole.summary["env_steps"]
    resumed = ppo.resume(tmp_path / "b", task, progress=False)
    for x, y in zip(
        *(jax.tree.leaves(r.states.learner.params) for r in (whole, resumed)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(whole.returns, resumed.returns)
    two = ppo.run(task, hparams, devices=2, **options)
    np.testing.assert_allclose(whole.metrics["score"][0, 0], two.metrics["score"][0, 0], rtol=1e-5)


def test_seeds_share_the_reference_and_are_swept(tmp_path: Any):
    result = ppo.sweep(
        small_task(), {"kl_coef": [0.1, 1.0]}, hparams=RLHFHParams(), num_seeds=2,
        eval_episodes=4, progress=False,
    )  # fmt: skip
    assert np.asarray(result.returns).shape == (2, 2)


# What is refused


def test_a_score_of_another_shape_is_refused():
    per_token = dataclasses.replace(table_problem(0)[0], score=lambda x: x.responses.tokens * 1.0)
    with pytest.raises(
        ppo.ConfigError, match=r"score of table: returned shape \(1, 3\) for 1 resp"
    ):
        make_rlhf_task(config_of("rloo"), per_token)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_minibatches": 3}, "= 256 is not divisible by num_minibatches = 3"),
        ({"objective": "grpo", "group_size": 1}, "the baseline is computed from the other resp"),
        ({"num_prompts": 0}, "num_prompts = 0: must be at least 1"),
        ({"critic": "shared"}, "critic = shared: has no effect with objective = rloo"),
        ({"positions": "rotery"}, "must be one of learned, rotary .did you mean rotary"),
        ({"num_heads": 0}, "num_heads = 0: must be at least 1"),
        ({"num_heads": 3}, "width = 32 is not divisible by num_heads = 3"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        make_rlhf_task(config_of(**({"objective": "rloo"} | settings)), table_problem(0)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": Prompts(jnp.zeros((2, 1), int), jnp.array([1, 0]))}, "prompts: one is empty"),
        ({"prompts": Prompts(jnp.zeros((1, 1), int), jnp.array([2]))}, "a length of 2 for 1 token"),
        ({"prompts": Prompts(jnp.array([[4]]), jnp.array([1]))}, "tokens from 4 to 4, but vocab"),
        ({"prompts": Prompts(jnp.array([[-100, 1]]), jnp.array([1]))}, "tokens from -100 to 1"),
        ({"stop_token": 4}, "stop_token = 4: must be a token below vocab_size = 4"),
        ({"extras": jnp.zeros(3)}, "prompts: the extras need one row per prompt, 1 rows"),
    ],
)
def test_impossible_problems_are_refused(changes: dict[str, Any], words: str):
    problem = dataclasses.replace(table_problem(0)[0], **changes)
    with pytest.raises(ppo.ConfigError, match=words):
        make_rlhf_task(config_of("rloo"), problem)


def test_a_temperature_of_0_is_refused():
    with pytest.raises(ppo.ConfigError, match="temperature = 0"):
        RLHFHParams(temperature=0.0)
