"""One training and many over 4 pretend devices."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.host.configfile import RunSettings, Settings
from purejaxppo.host.parallel import choose_spread
from purejaxppo.host.program import compile_program, stacked_hparams
from purejaxppo.types import TrainState

WHOLE = ppo.Config(
    total_timesteps=5 * 8 * 16,
    num_envs=8,
    num_steps=16,
    num_minibatches=1,
    update_epochs=2,
    hidden_sizes=(8,),
    normalize_obs=True,
    normalize_reward=True,
)
"""Every minibatch is the whole batch, so that it is the same however it is dealt out."""


def trained(config: ppo.Config, devices: int, num_seeds: int = 1) -> tuple[TrainState, Any]:
    run = RunSettings(devices=devices, num_seeds=num_seeds)
    hparams = ppo.HParams(learning_rate=1e-2)
    settings = Settings(config, hparams, run)
    program, numbers = compile_program(settings), stacked_hparams(settings)
    states, rows = program.chunk(program.begin(numbers), numbers, config.num_updates)
    return program.gather(states), rows


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"memory": "gru", "memory_size": 4}, marks=pytest.mark.slow),
        {"objective": "trpo", "cg_iterations": 3},
        pytest.param({"objective": "ppo_kl_adaptive"}, marks=pytest.mark.slow),
        {
            "objective": "reinforce_baseline", "baseline": "mean", "num_steps": 500,
            "update_epochs": 1, "total_timesteps": 5 * 8 * 500,
        },
    ],
    ids=str,
)  # fmt: skip
def test_a_training_learns_the_same_over_1_2_and_4_devices(settings: dict[str, Any]):
    """Parameters, normalisers and metrics after 5 updates, up to the order of sums. With
    gradients summed where they should be averaged, or statistics of each device's own, they
    differ in the first digits."""
    config = dataclasses.replace(WHOLE, **settings)
    alone, rows = trained(config, 1)
    if config.objective not in EPISODIC:  # the first statistics are one rollout's
        assert alone.learner.obs_stats.total == (config.num_updates + 1) * config.batch_size
    for devices in (4,) if settings else (2, 4):
        states, spread_rows = trained(config, devices)
        assert_close(states.learner, alone.learner, atol=1e-5, rtol=1e-5)
        assert_close(states.actors, alone.actors, atol=1e-4, rtol=1e-4)
        assert_close(spread_rows, rows, atol=2e-4, rtol=2e-4)


def test_seeds_and_environments_are_spread_at_once():
    """2 seeds of 2 devices each, up to the order of sums."""
    alone, rows = trained(WHOLE, 1, num_seeds=2)
    states, spread_rows = trained(WHOLE, 4, num_seeds=2)
    assert_close(states.learner, alone.learner, atol=1e-5, rtol=1e-5)
    assert_close(states.actors, alone.actors, atol=1e-4, rtol=1e-4)
    assert_close(spread_rows, rows, atol=2e-4, rtol=2e-4)


def test_devices_shuffle_for_themselves_and_learn():
    """Minibatches are then of equal parts; the episode's length grows as it does on one."""
    config = dataclasses.replace(WHOLE, num_minibatches=4, total_timesteps=8 * 16 * 100)
    for devices in (1, 4):
        _, rows = trained(config, devices)
        lengths = np.asarray(rows["episode_length"])[:, 0]
        assert np.nanmean(lengths[-20:]) > 2 * np.nanmean(lengths[:10])


def test_a_seed_comes_out_the_same_over_1_2_and_4_devices_and_alone(fused: Any):
    config = dataclasses.replace(WHOLE, num_minibatches=4)
    one_by_one, rows = trained(config, 1, num_seeds=4)
    for devices in (2, 0):
        states, spread_rows = trained(config, devices, num_seeds=4)
        assert_close((states, spread_rows), (one_by_one, rows), atol=0, rtol=0)
    key = jax.random.split(jax.random.key(0), 4)[2]
    alone, _ = fused(ppo.make_train(config), key, ppo.HParams(learning_rate=1e-2))
    assert_close(jax.tree.map(lambda x: x[2], one_by_one), alone, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "run", "message"),
    [
        (ppo.Config(), {"devices": 5}, "devices = 5: there are 4"),
        (ppo.Config(), {"devices": 3}, "num_envs = 4 is not divisible by devices = 3"),
        (
            ppo.Config(num_envs=8, num_minibatches=4, memory="gru"),
            {"devices": 4},
            "fewer of either",
        ),
        (ppo.Config(), {"devices": 4, "num_seeds": 6}, "num_seeds = 6 cannot be dealt out evenly"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused_first(
    config: ppo.Config, run: dict[str, Any], message: str, tmp_path: Any
):
    with pytest.raises(ppo.ConfigError, match=message):
        ppo.run(config, run_dir=tmp_path / "run", progress=False, **run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("told", "expected"), [({}, 0), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)])
def test_every_core_is_a_device_unless_told_otherwise(told: dict[str, str], expected: int):
    """In a process of its own, where nothing has started JAX: importing the package must not."""
    script = (
        "import os, jax, purejaxppo\n"
        "from purejaxppo.host.parallel import use_all_cores\n"
        "use_all_cores()\n"
        "print(jax.device_count(), len(os.sched_getaffinity(0)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | told, capture_output=True, check=True
    )
    devices, cores = map(int, process.stdout.split())
    assert devices == (expected or cores)


@pytest.mark.parametrize(
    ("run", "used"),
    [
        ({"num_seeds": 4}, 4),
        ({"num_seeds": 6}, 3),
        ({"num_seeds": 7}, 1),
        ({}, 1),
        ({"devices": 2}, 2),
        ({"num_seeds": 4, "devices": 2}, 2),
        ({"num_seeds": 2, "devices": 4}, 4),
    ],
)
def test_how_many_devices_are_used(run: dict[str, int], used: int):
    assert choose_spread(Settings(WHOLE, run=RunSettings(**run))).mesh.size == used
