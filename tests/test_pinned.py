"""Pinned results of updates on fixed data, which optimisations for speed must not change.

The numbers were computed by the update before the first optimisation, with unflattened parameters
and samples in order. They are this package's own output, so they detect changes but do not show
what is right; `test_parity.py` does that.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import parts_of

import purejaxppo as ppo
from purejaxppo.advantages import gae
from purejaxppo.learner import make_batch
from purejaxppo.types import LearnerState, Rollout

SETTINGS: dict[str, dict[str, Any]] = {
    "discrete": {"env_id": "CartPole-v1"},
    "continuous": {"env_id": "Pendulum-v1", "clip_schedule": "linear"},
    "memory": {"env_id": "CartPole-v1", "memory": "gru", "memory_size": 3},
    "grid": {"env_id": "Catch-bsuite", "encoder": "mlp", "shared_trunk": True},
}
PINNED: dict[str, list[float]] = {
    "discrete": [0.009783, 0.358892, 1.135992, 0.65638, -1.550372, 3.580959, 0.260321, 0.101192],
    "continuous": [
        0.022666,
        0.736387,
        -0.474773,
        0.408147,
        1.170039,
        -0.151119,
        0.475434,
        0.619326,
        -0.585673,
    ],
    "memory": [
        0.019989,
        0.152315,
        1.03871,
        1.769324,
        2.258643,
        5.872993,
        -0.800413,
        -3.170781,
        1.453368,
        -4.725542,
        -0.43449,
        -1.119581,
        1.015967,
        -3.186799,
        0.218291,
        -0.954047,
        -1.443377,
        2.16805,
        3.521546,
        -0.227716,
        -0.661148,
        2.535974,
        2.382925,
        0.275711,
        -0.415426,
        4.477349,
        -0.357351,
        -0.200284,
    ],
    "grid": [0.077715, -1.332076, -0.656578, -1.396552, 0.830637, 4.64752],
}


def sums_after_one_update(settings: dict[str, Any]) -> np.ndarray:
    """A weighted sum of each parameter array after 3 epochs of one minibatch each, for which the
    order of samples does not matter."""
    config = ppo.Config(
        num_envs=3, num_steps=5, total_timesteps=150, update_epochs=3, num_minibatches=1,
        hidden_sizes=(4,), **settings,
    )  # fmt: skip
    hparams = ppo.HParams(learning_rate=1e-2, vf_clip_eps=0.3, critic_learning_rate=2e-2)
    parts = parts_of(config)
    env, network = parts.env, parts.network
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda x: normal(*x.shape), shapes)
    size = (5, 3)
    flags = [jnp.asarray(random.random(size) < 0.2) for _ in range(3)]
    discrete = hasattr(env.action_space, "n")
    rollout = Rollout(
        obs=normal(*size, *env.observation_space.shape),
        start=flags[0],
        action=jnp.asarray(random.integers(0, 2, size)) if discrete else normal(*size, 1),
        log_prob=normal(*size) - 1,
        value=normal(*size),
        next_value=normal(*size),
        reward=normal(*size),
        terminated=flags[1],
        truncated=flags[2],
        mask=jnp.ones(size),
        carry=jax.tree.map(lambda x: normal(*x.shape), network.initial_carry(3)),
    )
    learner = LearnerState(
        jax.random.key(1), params, parts.optimizer.init(hparams, params), (), (), jnp.int32(2)
    )
    batch = make_batch(rollout, gae(rollout, hparams))
    params = jax.jit(parts.improve)(learner, batch, hparams, ())[0].params
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)]
    return np.asarray([np.sin(np.arange(1, x.size + 1)) @ x for x in leaves])


@pytest.mark.parametrize("name", SETTINGS)
def test_pinned_update(name: str):
    np.testing.assert_allclose(sums_after_one_update(SETTINGS[name]), PINNED[name], atol=2e-5)
