"""Updates and whole runs: invariants, and learning of known optima."""

import dataclasses
import functools
import operator
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from commands import collected, parts_of
from toy_envs import Combination, ConstantChain, Countdown, RandomWalk, Target

import purejaxppo as ppo
from purejaxppo.advantages import gae
from purejaxppo.learner import FIRST_STATISTICS, make_batch
from purejaxppo.metrics import count_episodes, env_steps, explained_variance
from purejaxppo.networks import parts_in_cache
from purejaxppo.types import ActorState, Rollout


def trained(config: ppo.Config, hparams: ppo.HParams, updates: int, env: Any = None) -> Any:
    learner = ppo.make_learner(config, env)

    @jax.jit
    def run(key: jax.Array, hparams: ppo.HParams) -> Any:
        return ppo.train_chunk(learner, learner.init(key, hparams), hparams, updates)

    return run(jax.random.key(0), hparams)


def assert_equal_trees(a: Any, b: Any, **tolerance: float) -> None:
    def numbers(x: Any) -> np.ndarray:
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    def compare(x: Any, y: Any) -> None:
        if tolerance:
            np.testing.assert_allclose(numbers(x), numbers(y), **tolerance)
        else:
            np.testing.assert_array_equal(numbers(x), numbers(y))

    jax.tree.map(compare, a, b)


# Bootstrapping


@pytest.mark.parametrize("normalize_reward", [False, True])
def test_a_time_limit_is_not_a_termination(normalize_reward: bool):
    """Reward 1 forever under a limit of 5 steps: V = 1 / (1 - gamma) = 10. Without bootstrapping at
    the limit it would stay below 5."""
    config = ppo.Config(
        num_envs=8, num_steps=16, total_timesteps=128 * 150, hidden_sizes=(16,),
        lr_schedule="constant", normalize_reward=normalize_reward,
    )  # fmt: skip
    hparams = ppo.HParams(learning_rate=1e-2, gamma=0.9, ent_coef=0.0)
    state, metrics = trained(config, hparams, 150, ConstantChain())
    agent = ppo.make_agent(config, state, env=ConstantChain())
    value = agent.value(jnp.ones((1, 2)), agent.initial_carry(1))
    assert value[0] == pytest.approx(10.0, rel=0.05)
    assert np.nanmean(metrics["episode_return"]) == pytest.approx(5.0)


def test_a_termination_cuts_the_bootstrap():
    """Reward 1 for five steps, then the end: V(t) = 1 + gamma + ... + gamma^(4 - t)."""
    config = ppo.Config(num_envs=8, num_steps=16, hidden_sizes=(16,), lr_schedule="constant")
    hparams = ppo.HParams(learning_rate=1e-2, gamma=0.9, ent_coef=0.0)
    state, _ = trained(config, hparams, 150, Countdown())
    agent = ppo.make_agent(config, state, env=Countdown())
    expected = [sum(0.9**k for k in range(5 - t)) for t in range(5)]
    np.testing.assert_allclose(agent.value(jnp.eye(5), agent.initial_carry(5)), expected, rtol=0.05)


@pytest.mark.parametrize("memory", [pytest.param("none", marks=pytest.mark.slow), "gru"])
def test_next_value_is_the_value_of_the_true_successor(tiny: ppo.Config, memory: str):
    config = dataclasses.replace(tiny, memory=memory, num_steps=32, normalize_obs=True)
    parts = parts_of(config, RandomWalk())
    network = parts.network
    state, _ = trained(config, ppo.HParams(), 3, RandomWalk())
    _, rollout, raw = jax.jit(lambda state: collected(parts, state))(state)
    done = np.asarray(rollout.terminated | rollout.truncated)
    cut = np.asarray(rollout.truncated & ~rollout.terminated)
    assert cut.any()
    inner = ~done[:-1]
    np.testing.assert_allclose(rollout.next_value[:-1][inner], rollout.value[1:][inner], atol=1e-6)
    # The observation before the reset: one step further in the same episode.
    final = raw.at[..., 0].add(1.0)
    stats = state.learner.obs_stats
    final = jnp.clip((final - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10, 10)
    carry, apply = rollout.carry, jax.jit(network.apply)
    for t in range(config.num_steps):
        carry, _, _ = apply(
            state.learner.params, carry, rollout.obs[t][None], rollout.start[t][None]
        )
        value = apply(
            state.learner.params, carry, final[t][None], jnp.zeros((1, config.num_envs), bool)
        )[2][0]
        np.testing.assert_allclose(rollout.next_value[t][cut[t]], value[cut[t]], atol=1e-5)


# Statistics


def test_statistics_are_frozen_in_a_rollout_and_normalise_the_first_observation():
    """Against NumPy over four updates: update k normalises by all samples before it, and the first
    update by a separate rollout of `init`, with other actors."""
    config = ppo.Config(num_envs=3, num_steps=16, num_minibatches=2, hidden_sizes=(8,),
                        normalize_obs=True, normalize_reward=True)  # fmt: skip
    parts = parts_of(config, RandomWalk())
    learner, hparams = ppo.make_learner(config, RandomWalk()), ppo.HParams(gamma=0.9)
    state = jax.jit(learner.init)(jax.random.key(0), hparams)
    collect = jax.jit(lambda *state: collected(parts, ppo.TrainState(*state)))
    update = jax.jit(learner.update)
    returns: list[np.ndarray] = []

    def add_returns(rollout: Rollout, running: np.ndarray) -> np.ndarray:
        for reward, terminated, truncated in zip(
            rollout.reward, rollout.terminated, rollout.truncated, strict=True
        ):
            running = 0.9 * running + np.asarray(reward)
            returns.append(running)
            running = np.where(terminated | truncated, 0.0, running)
        return running

    key = jax.random.fold_in(jax.random.key(0), FIRST_STATISTICS)
    first = parts.actor.init(key, hparams, ())
    _, rollout, raw = collect(state.learner._replace(obs_stats=()), first)
    assert np.abs(np.asarray(raw[0]) - np.asarray(state.actors.obs)).max() > 0.1
    seen = [np.asarray(raw, np.float64).reshape(-1, 2)]
    add_returns(rollout, np.zeros(3))
    running = np.zeros(3)
    assert state.learner.obs_stats.total == state.learner.reward_stats.total == 3 * 16
    for _ in range(4):
        np.testing.assert_allclose(state.learner.reward_stats.var, np.var(returns), rtol=1e-3)
        actors, rollout, raw = collect(*state)
        before = np.concatenate(seen)
        expected = np.clip((np.asarray(raw) - before.mean(0)) / before.std(0), -10, 10)
        np.testing.assert_allclose(rollout.obs, expected, atol=2e-4)
        # neither by their own batch's moments nor unchanged
        assert np.abs(np.asarray(rollout.obs[0]) - np.asarray(raw[0])).max() > 0.1
        running = add_returns(rollout, running)
        seen.append(np.asarray(raw, np.float64).reshape(-1, 2))
        state, _ = update(state, hparams)
        np.testing.assert_allclose(state.learner.reward_stats.var, np.var(returns), rtol=1e-3)
        np.testing.assert_array_equal(actors.env_state.time, state.actors.env_state.time)


def test_the_first_update_is_normalised():
    """Its value loss is like later ones, although Pendulum's returns are about -1,000."""
    config = ppo.Config(
        env_id="Pendulum-v1", num_envs=4, num_steps=64, total_timesteps=256 * 8,
        hidden_sizes=(16,), update_epochs=1, normalize_obs=True, normalize_reward=True,
    )  # fmt: skip
    _, metrics = trained(config, ppo.HParams(), 8)
    losses = np.asarray(metrics["value_loss"])
    assert losses[0] < 10 * np.median(losses[1:])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"memory": "gru"}, marks=pytest.mark.slow),
        {"objective": "reinforce", "num_steps": 12, "update_epochs": 1, "num_minibatches": 1},
    ],
    ids=str,
)
def test_first_statistics_change_no_other_random_numbers(
    tiny: ppo.Config, settings: dict[str, Any]
):
    """The rest of the state is the same without statistics, also under vmap. Masked steps are left
    out."""
    plain = dataclasses.replace(tiny, **settings)
    config = dataclasses.replace(plain, normalize_obs=True, normalize_reward=True)
    keys = jax.random.split(jax.random.key(0), 2)

    def begin(config: ppo.Config) -> Any:
        learner = ppo.make_learner(config, RandomWalk())
        return jax.jit(jax.vmap(lambda key: learner.init(key, ppo.HParams())))(keys)

    state = begin(config)
    stats = state.learner.obs_stats
    learner = state.learner._replace(obs_stats=(), reward_stats=())
    assert_equal_trees(state._replace(learner=learner), begin(plain))
    assert (stats.var > 0).all()
    assert (stats.mean[0] != stats.mean[1]).any()
    if config.whole_episodes:
        assert ((stats.total > 0) & (stats.total < config.batch_size)).all()
    else:
        np.testing.assert_array_equal(stats.total, config.batch_size)


class Infinite(RandomWalk):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        obs, state, _, terminated, info = super().step_env(key, state, action, params)
        return obs, state, jnp.inf, terminated, info


def test_first_statistics_that_are_not_finite_are_discarded(tiny: ppo.Config):
    config = dataclasses.replace(tiny, normalize_obs=True, normalize_reward=True)
    learner = ppo.make_learner(config, Infinite())
    state = jax.jit(learner.init)(jax.random.key(0), ppo.HParams())
    assert state.learner.reward_stats.total == state.learner.obs_stats.total == 0
    assert state.learner.reward_stats.var == 1


# Rollouts and ratios


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"normalize_obs": True, "normalize_reward": True}, marks=pytest.mark.slow),
        pytest.param({"env_id": "Pendulum-v1", "normalize_obs": True}, marks=pytest.mark.slow),
        {"env_id": "Pendulum-v1", "normalize_obs": True, "action_distribution": "tanh_normal"},
        pytest.param(
            {"memory": "gru", "shared_trunk": True, "normalize_obs": True}, marks=pytest.mark.slow
        ),
        pytest.param({"memory": "lstm", "shared_trunk": True}, marks=pytest.mark.slow),
    ],
)
def test_the_first_minibatch_has_ratio_1_and_no_kl(settings: dict[str, Any]):
    """Checked after four updates, when normalisers are in use and carries are not zero. Rollout and
    loss may round differently in the last bit."""
    config = ppo.Config(update_epochs=1, num_minibatches=1, **settings)
    parts = parts_of(config)
    policy, network = parts.policy, parts.network
    state, _ = trained(config, ppo.HParams(), 4)

    @jax.jit
    def first(state: ppo.TrainState) -> Any:
        _, rollout, _ = collected(parts, state)
        zeros = jnp.zeros_like(rollout.value)
        _, outputs, value = network.apply(
            state.learner.params, rollout.carry, rollout.obs, rollout.start
        )
        ratio = jnp.exp(policy.distribution(outputs).log_prob(rollout.action) - rollout.log_prob)
        batch, count = make_batch(rollout, (zeros, zeros)), jnp.float32(zeros.size)
        _, metrics = parts.loss(state.learner.params, batch, ppo.HParams(), count, ())
        return ratio, value - rollout.value, metrics

    ratio, value_change, metrics = first(state)
    np.testing.assert_allclose(ratio, 1.0, atol=2**-22)
    np.testing.assert_allclose(value_change, 0.0, atol=1e-5)
    assert metrics["approx_kl"] < 1e-12
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize(
    "normalization",
    [
        "minibatch",
        pytest.param("batch", marks=pytest.mark.slow),
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_a_minibatch_in_parts_gives_the_same_update(normalization: str, monkeypatch: Any):
    """64 samples with a layer of 16 units are one part, or 8 parts of 8 samples."""
    config = ppo.Config(
        num_envs=8, num_steps=32, hidden_sizes=(16,), advantage_normalization=normalization
    )
    whole = trained(config, ppo.HParams(learning_rate=1e-2), 3)
    monkeypatch.setattr("purejaxppo.networks.PART_SIZE", 8 * 16)
    assert parts_in_cache(parts_of(config).network, 64, 64) == 8
    in_parts = trained(config, ppo.HParams(learning_rate=1e-2), 3)
    assert_equal_trees(in_parts[0].learner.params, whole[0].learner.params, atol=1e-5)
    assert_equal_trees(in_parts[1], whole[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["ppo_clip", pytest.param("trpo", marks=pytest.mark.slow)])
def test_only_programs_for_cpu_are_divided_into_parts(objective: Any, monkeypatch: Any):
    """On whichever backend they are traced. Counts the loops of the lowered program, with parts of
    8 samples and with one part for all samples."""
    config = ppo.Config(num_envs=8, num_steps=32, hidden_sizes=(16,), objective=objective)

    def loops(platform: str, part_size: int) -> int:
        monkeypatch.setattr("purejaxppo.networks.PART_SIZE", part_size)
        learner = ppo.make_learner(config)
        state = jax.eval_shape(learner.init, jax.random.key(0), ppo.HParams())
        update = jax.export.export(jax.jit(learner.update), platforms=(platform,))
        return update(state, ppo.HParams()).mlir_module().count("stablehlo.while")

    assert loops("cuda", 8 * 16) == loops("cuda", 2**30)
    assert loops("cpu", 8 * 16) > loops("cpu", 2**30)


def test_the_first_minibatch_ratio_is_exactly_1_with_the_default_sizes():
    """With a learning rate of 0, every minibatch is like the first."""
    config, hparams = ppo.Config(normalize_obs=True), ppo.HParams(learning_rate=0.0)
    _, metrics = trained(config, hparams, 3)
    np.testing.assert_array_equal(metrics["approx_kl"], 0.0)
    np.testing.assert_array_equal(metrics["clip_fraction"], 0.0)


@pytest.mark.parametrize("memory", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])
def test_replaying_a_rollout_reproduces_its_log_probabilities(memory: str):
    """Two rollouts in a row, with episodes ending inside: each action's log-probability under the
    stepwise network equals that of the replayed sequence, and the carry continues between them."""
    config = ppo.Config(memory=memory, num_envs=4, num_steps=24, hidden_sizes=(16,))
    parts = parts_of(config, RandomWalk())
    policy, network = parts.policy, parts.network
    collect = jax.jit(lambda *state: collected(parts, ppo.TrainState(*state)))
    state, _ = trained(config, ppo.HParams(learning_rate=3e-3), 3, RandomWalk())
    learner, actors = state
    carry, apply = actors.carry, jax.jit(network.apply)
    for _ in range(2):
        actors, rollout, raw = collect(learner, actors)
        assert (rollout.terminated | rollout.truncated)[:-1].any()
        assert_equal_trees(carry, rollout.carry, atol=1e-6)
        for t in range(config.num_steps):
            carry, outputs, value = apply(
                learner.params, carry, raw[t][None], rollout.start[t][None]
            )
            log_prob = policy.distribution(outputs[0]).log_prob(rollout.action[t])
            np.testing.assert_allclose(log_prob, rollout.log_prob[t], atol=1e-6)
            np.testing.assert_allclose(value[0], rollout.value[t], atol=2e-6)


# Purity, seeds and chunks


@pytest.mark.parametrize("memory", ["none", pytest.param("gru", marks=pytest.mark.slow)])
def test_chunks_equal_the_whole_bit_for_bit(
    tiny: ppo.Config, memory: str, key: jax.Array, fused: Any
):
    config = dataclasses.replace(
        tiny, memory=memory, total_timesteps=21 * 32, normalize_obs=True, normalize_reward=True,
        clip_schedule="cosine",
    )  # fmt: skip
    hparams = ppo.HParams(learning_rate=1e-3, target_kl=0.01)
    learner = ppo.make_learner(config, RandomWalk())
    whole, metrics = fused(ppo.make_train(config, RandomWalk()), key, hparams)
    state, rows = fused(learner.init, key, hparams), []
    for count in (10, 1, 10):
        chunk = functools.partial(ppo.train_chunk, learner, num_updates=count)
        state, part = fused(lambda state, hparams, run=chunk: run(state, hparams), state, hparams)
        rows.append(part)
    assert_equal_trees(whole, state)
    assert_equal_trees(metrics, jax.tree.map(lambda *x: jnp.concatenate(x), *rows))


def test_a_seed_under_vmap_equals_the_seed_alone(key: jax.Array):
    config = ppo.Config(total_timesteps=3 * 512, normalize_obs=True)
    train, hparams = ppo.make_train(config), ppo.HParams()
    keys = jax.random.split(key, 3)
    states, metrics = jax.jit(jax.vmap(train, (0, None)))(keys, hparams)
    for i in range(3):
        state, rows = jax.jit(train)(keys[i], hparams)
        mine = jax.tree.map(operator.itemgetter(i), states)
        np.testing.assert_array_equal(rows["episodes"], metrics["episodes"][i])
        assert_equal_trees(state.learner.params, mine.learner.params, atol=1e-5)
        assert (
            jax.random.key_data(state.actors.keys) == jax.random.key_data(mine.actors.keys)
        ).all()
    assert len(np.unique(metrics["value_loss"][:, 0])) == 3


@pytest.mark.slow
def test_hyperparameters_can_be_batched(tiny: ppo.Config, key: jax.Array):
    rates = jnp.array([0.0, 1e-3, 1e-1])
    batched = ppo.HParams(learning_rate=rates, gamma=jnp.array([0.9, 0.9, 0.5]))
    train = ppo.make_train(tiny)
    states, _ = jax.jit(jax.vmap(train, (None, ppo.vmap_axes(batched))))(key, batched)
    alone, _ = jax.jit(train)(key, ppo.HParams(learning_rate=1e-3, gamma=0.9))
    mine = jax.tree.map(lambda x: x[1], states)
    assert_equal_trees(alone.learner.params, mine.learner.params, atol=1e-5)


def shuffled_orders(config: ppo.Config, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    orders: list[tuple[int, ...]] = []
    permutation = jax.random.permutation

    def spy(key: jax.Array, n: int) -> jax.Array:
        order = permutation(key, n)
        jax.debug.callback(lambda x: orders.append(tuple(x.tolist())), order)
        return order

    monkeypatch.setattr(jax.random, "permutation", spy)
    for seed in (0, 1):
        jax.block_until_ready(jax.jit(ppo.make_train(config))(jax.random.key(seed), ppo.HParams()))
    jax.effects_barrier()
    return orders


def test_permutations_differ_between_epochs_updates_and_seeds(
    tiny: ppo.Config, monkeypatch: pytest.MonkeyPatch
):
    orders = shuffled_orders(tiny, monkeypatch)
    assert len(orders) == 2 * tiny.num_updates * tiny.update_epochs
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(tiny.batch_size)) for order in orders)


# Improvement


def fixed_batch(config: ppo.Config) -> tuple[ppo.Parts, ppo.LearnerState, ppo.Batch]:
    parts = parts_of(config)
    state = jax.jit(ppo.make_learner(config).init)(jax.random.key(0), ppo.HParams())
    _, rollout, _ = jax.jit(lambda state: collected(parts, state))(state)
    rng = np.random.default_rng(0)
    advantage = jnp.asarray(rng.normal(size=rollout.value.shape), jnp.float32)
    return parts, state.learner, make_batch(rollout, (advantage, advantage + rollout.value))


def test_gradients_are_clipped_by_their_global_norm(tiny: ppo.Config):
    """After one Adam step from zero moments, the first moment is 0.1 times the clipped gradient."""
    config = dataclasses.replace(tiny, update_epochs=1, num_minibatches=1)
    parts, learner, batch = fixed_batch(config)
    batch = batch._replace(target=batch.target * 100)
    improve = jax.jit(parts.improve)
    norms = {}
    for limit in (1e-3, np.inf):
        hparams = ppo.HParams(max_grad_norm=limit)
        new, metrics = improve(learner, batch, hparams, ())
        moment = next(x for x in jax.tree.leaves(new.opt_state) if x.ndim == 1)
        norms[limit] = float(jnp.linalg.norm(moment)) / 0.1
        assert metrics["grad_norm"] > 1.0
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-4)
    assert norms[np.inf] == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)


def test_target_kl_skips_the_epochs_after_the_one_that_exceeds_it(tiny: ppo.Config):
    """With one full batch per epoch, the first has no KL and the second exceeds the limit, so ten
    epochs equal two, including metrics, up to the order of the batch."""
    results = {}
    for epochs, target_kl in [(2, None), (10, None), (10, 1e-9), (10, 1e9)]:
        config = dataclasses.replace(tiny, update_epochs=epochs, num_minibatches=1)
        parts, learner, batch = fixed_batch(config)
        hparams = ppo.HParams(learning_rate=1e-2, target_kl=target_kl)
        results[epochs, target_kl] = jax.jit(parts.improve)(learner, batch, hparams, ())
    assert_equal_trees(results[10, 1e9][0].params, results[10, None][0].params, atol=1e-6)
    stopped, two = results[10, 1e-9], results[2, None]
    assert_equal_trees(stopped[0].params, two[0].params, atol=1e-5)
    assert_equal_trees(stopped[1], two[1], atol=1e-4)
    free = results[10, None][1]
    assert free["approx_kl"] > 2 * two[1]["approx_kl"]


def test_critic_learning_rate_changes_only_the_critic(tiny: ppo.Config):
    parts, learner, batch = fixed_batch(tiny)
    hparams = ppo.HParams(learning_rate=0.0, critic_learning_rate=1e-3)
    new, _ = jax.jit(parts.improve)(learner, batch, hparams, ())
    for name in learner.params:
        changed = jax.tree.leaves(jax.tree.map(
            lambda a, b: bool((a != b).any()), new.params[name], learner.params[name]))  # fmt: skip
        assert all(changed) if name.startswith("critic") else not any(changed), name


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
     pytest.param("constant", [1, 1, 1, 1, 1, 1], marks=pytest.mark.slow),
     ("cosine", [1, 0.8535534, 0.5, 0.1464466, 0, 0])],
)  # fmt: skip
def test_learning_rate_schedules(tiny: ppo.Config, schedule: Any, factors: list[float]):
    config = dataclasses.replace(tiny, total_timesteps=4 * 32, lr_schedule=schedule)
    _, metrics = trained(config, ppo.HParams(learning_rate=0.5), 6)  # two past the end
    np.testing.assert_allclose(metrics["learning_rate"], 0.5 * np.array(factors), atol=1e-7)


# Metrics


def test_episode_metrics_equal_a_loop_over_episodes():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(3, 20, 4)).astype(np.float32)
    done = rng.random((3, 20, 4)) < 0.1
    done[1] = False
    actors = ActorState(
        keys=jax.random.split(jax.random.key(0), 4), env_state=(), obs=jnp.zeros((4, 1)),
        start=jnp.ones(4, bool), carry=(), episode_return=jnp.zeros(4),
        episode_length=jnp.zeros(4, jnp.int32), discounted_return=jnp.zeros(4),
    )  # fmt: skip
    total, length = np.zeros(4), np.zeros(4)
    for k in range(3):
        returns, lengths = [], []
        for t in range(20):
            total, length = total + reward[k, t], length + 1
            for n in np.flatnonzero(done[k, t]):
                returns.append(total[n])
                lengths.append(length[n])
                total[n] = length[n] = 0.0
        actors, metrics = count_episodes(actors, jnp.asarray(reward[k]), jnp.asarray(done[k]))
        assert metrics["episodes"] == len(returns)
        if not returns:
            assert np.isnan(metrics["episode_return"])
            assert np.isnan(metrics["episode_length"])
            continue
        assert metrics["episode_return"] == pytest.approx(np.mean(returns), abs=1e-5)
        assert metrics["episode_length"] == pytest.approx(np.mean(lengths), abs=1e-5)
    np.testing.assert_allclose(actors.episode_return, total, atol=1e-5)
    np.testing.assert_array_equal(actors.episode_length, length)


def test_total_timesteps_is_rounded_up_and_the_true_count_reported(key: jax.Array):
    config = ppo.Config(total_timesteps=1000, num_envs=4, num_steps=100, num_minibatches=4)
    assert config.num_updates == 3
    _, metrics = jax.jit(ppo.make_train(config))(key, ppo.HParams())
    np.testing.assert_array_equal(metrics["env_steps"], [400, 800, 1200])


def test_step_counts_do_not_overflow():
    config = ppo.Config(total_timesteps=10**11, num_envs=1024, num_steps=1024)
    steps = env_steps(config, jnp.int32(config.num_updates))
    assert float(steps) == pytest.approx(config.num_updates * config.batch_size, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e12])
def test_explained_variance_at_every_scale(scale: float):
    rng = np.random.default_rng(0)
    target, noise = rng.normal(3, 1, (2, 40, 5)) * scale
    mask = (rng.random((40, 5)) < 0.7).astype(np.float32)
    for value in (target, np.full_like(target, 7.0 * scale), target + 0.3 * noise):
        kept, error = target[mask > 0], (target - value)[mask > 0]
        expected = 1 - np.var(error) / np.var(kept)
        found = explained_variance(*(jnp.asarray(x, jnp.float32) for x in (value, target, mask)))
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.1, -3e7])
def test_explained_variance_of_constant_targets_is_nan(target: float):
    """Also if targets differ by rounding, here in the last bit."""
    targets = jnp.full(64, target, jnp.float32).at[0].multiply(1 + 2**-23)
    assert np.isnan(explained_variance(jnp.arange(64.0), targets, jnp.ones(64)))


WIDE = """
import dataclasses, jax, numpy as np, purejaxppo as ppo
tiny = ppo.Config(
    total_timesteps=96, num_envs=4, num_steps=8, num_minibatches=2, hidden_sizes=(8,),
    normalize_obs=True, normalize_reward=True,
)

def train(config):
    return lambda key: ppo.make_train(config)(key, ppo.HParams())

key = jax.random.key(0)
_, metrics = jax.jit(train(tiny))(key)
assert np.isfinite(metrics["policy_loss"]).all()
for changes in (
    {"env_id": "Breakout-MinAtar", "memory": "lstm"},
    {"env_id": "Pendulum-v1", "action_distribution": "tanh_normal", "objective": "trpo"},
):
    state, metrics = jax.eval_shape(train(dataclasses.replace(tiny, **changes)), key)
    ours = state.learner, state.actors.episode_return, state.actors.episode_length, metrics
    wide = [x for x in jax.tree.leaves(ours) if str(x.dtype) in ("float64", "int64")]
    assert not wide, (changes, wide)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("one_cache")
def test_learner_and_metrics_stay_32_bit_in_64_bit_mode():
    """Arrays of the environment may have 64 bits."""
    variables = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WIDE], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Learning where the answer is known


def test_multi_discrete_actions_learn_the_best_pair():
    config = ppo.Config(num_envs=16, num_steps=8, hidden_sizes=(16,), lr_schedule="constant")
    _, metrics = trained(config, ppo.HParams(learning_rate=1e-2, ent_coef=0.0), 60, Combination())
    assert metrics["episode_return"][0] < 0.4
    assert metrics["episode_return"][-1] > 0.95


@pytest.mark.parametrize("kind", ["normal", "tanh_normal"])
def test_continuous_actions_learn_the_best_one_within_bounds(kind: Any):
    config = ppo.Config(
        num_envs=16, num_steps=8, hidden_sizes=(16,), lr_schedule="constant",
        action_distribution=kind, log_std_init=-0.5,
    )  # fmt: skip
    state, metrics = trained(config, ppo.HParams(learning_rate=3e-3, ent_coef=0.0), 150, Target())
    assert np.min(metrics["episode_return"]) > -10.0  # it received no action out of bounds
    agent = ppo.make_agent(config, state, env=Target())
    action, _ = agent.act(jax.random.key(0), jnp.ones((1, 2)), (), deterministic=True)
    assert action.shape == (1, 1)
    assert action[0, 0] == pytest.approx(1.0, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "low", "high"), [("gru", 0.9, 1.0), ("gtrxl", 0.9, 1.0), ("none", -0.35, 0.35)]
)
def test_memory_chain_needs_a_memory(memory: Any, low: float, high: float):
    """The answer is visible in the first steps and needed in the last: a policy without a memory
    has an expected return of 0."""
    config = ppo.Config(
        env_id="MemoryChain-bsuite", memory=memory, num_envs=32, num_steps=32,
        total_timesteps=60 * 1024, hidden_sizes=(32,), memory_size=32,
    )  # fmt: skip
    state, _ = trained(config, ppo.HParams(learning_rate=3e-3), 60)
    returns = ppo.evaluate(config, state, jax.random.key(1), num_episodes=256)
    assert low <= returns.mean() <= high


def test_time_limits_can_count_as_terminations(tiny: ppo.Config):
    """Reward 1 per step and a limit of 5: targets are returns to the limit, 1 + 0.9 + ..., to which
    bootstrapping would add the critic's value."""
    hparams = ppo.HParams(gamma=0.9, gae_lambda=1.0)
    targets = {}
    for bootstraps in (True, False):
        config = dataclasses.replace(tiny, bootstrap_time_limits=bootstraps, num_steps=20)
        learner = ppo.make_learner(config, ConstantChain())
        state = jax.jit(learner.init)(jax.random.key(0), hparams)
        collect = partial(collected, parts_of(config, ConstantChain()))
        _, rollout, _ = jax.jit(collect)(state)
        assert np.asarray(rollout.truncated)[4::5].all()
        targets[bootstraps] = np.asarray(gae(rollout, hparams)[1])
    left = np.array([sum(0.9**k for k in range(n)) for n in (5, 4, 3, 2, 1)] * 4)
    np.testing.assert_allclose(targets[False], np.repeat(left[:, None], 4, 1), rtol=1e-5)
    assert np.abs(targets[True] - targets[False]).min() > 1e-4
