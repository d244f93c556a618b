"""Single runs and several seeds on 4 virtual devices."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.host import conduct
from purejaxppo.host.configfile import RunSettings, Settings, load_settings
from purejaxppo.host.parallel import choose_spread, with_devices
from purejaxppo.host.program import Evaluation, compile_program, stacked_hparams
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
"""Every minibatch is the whole batch, so it is the same however it is divided."""


def trained(config: ppo.Config, devices: int, num_seeds: int = 1) -> tuple[TrainState, Any]:
    run = RunSettings(devices=devices, num_seeds=num_seeds)
    hparams = ppo.HParams(learning_rate=1e-2)
    settings = Settings(config, hparams, run)
    program, numbers = compile_program(settings, ppo.make_task(config)), stacked_hparams(settings)
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
        pytest.param({"objective": "trpo", "cg_iterations": 3}, marks=pytest.mark.slow),
        pytest.param({"objective": "ppo_kl_adaptive"}, marks=pytest.mark.slow),
        pytest.param(
            {
                "objective": "reinforce_baseline", "baseline": "mean", "num_steps": 500,
                "update_epochs": 1, "total_timesteps": 5 * 8 * 500,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_learns_the_same_on_1_2_and_4_devices(settings: dict[str, Any]):
    """Parameters, normalisation statistics and metrics after 5 updates, up to the order of sums.
    Summing gradients that should be averaged, or separate statistics per device, would change the
    first digits."""
    config = dataclasses.replace(WHOLE, **settings)
    alone, rows = trained(config, 1)
    if not config.whole_episodes:  # the initial statistics come from one rollout
        assert alone.learner.obs_stats.total == (config.num_updates + 1) * config.batch_size
    for devices in (4,) if settings else (2, 4):
        states, spread_rows = trained(config, devices)
        assert_close(states.learner, alone.learner, atol=1e-5, rtol=1e-5)
        assert_close(states.actors, alone.actors, atol=1e-4, rtol=1e-4)
        assert_close(spread_rows, rows, atol=2e-4, rtol=2e-4)


def test_seeds_and_environments_are_both_spread():
    """2 seeds on 2 devices each, up to the order of sums."""
    alone, rows = trained(WHOLE, 1, num_seeds=2)
    states, spread_rows = trained(WHOLE, 4, num_seeds=2)
    assert_close(states.learner, alone.learner, atol=1e-5, rtol=1e-5)
    assert_close(states.actors, alone.actors, atol=1e-4, rtol=1e-4)
    assert_close(spread_rows, rows, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
def test_shuffling_on_each_device_learns():
    """Each minibatch has an equal part from each device; episode lengths grow as on one device."""
    config = dataclasses.replace(WHOLE, num_minibatches=4, total_timesteps=8 * 16 * 100)
    for devices in (1, 4):
        _, rows = trained(config, devices)
        lengths = np.asarray(rows["episode_length"])[:, 0]
        assert np.nanmean(lengths[-20:]) > 2 * np.nanmean(lengths[:10])


@pytest.mark.parametrize("devices", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_bits_on_1_2_and_4_devices_and_alone(devices: int, fused: Any):
    config = dataclasses.replace(WHOLE, num_minibatches=4)
    one_by_one, rows = trained(config, 1, num_seeds=4)
    assert_close(trained(config, devices, num_seeds=4), (one_by_one, rows), atol=0, rtol=0)
    key = jax.random.split(jax.random.key(0), 4)[2]
    alone, _ = fused(ppo.make_train(config), key, ppo.HParams(learning_rate=1e-2))
    assert_close(jax.tree.map(lambda x: x[2], one_by_one), alone, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "run", "message"),
    [
        (ppo.Config(), {"devices": 5}, "devices = 5: only 4 available"),
        (ppo.Config(), {"devices": 3}, "num_envs = 4 is not divisible by devices = 3"),
        (
            ppo.Config(num_envs=8, num_minibatches=4, memory="gru"),
            {"devices": 4},
            "use fewer devices or minibatches",
        ),
        (ppo.Config(), {"devices": 4, "num_seeds": 6}, "num_seeds = 6 cannot be divided evenly"),
    ],
)
def test_uneven_divisions_are_refused_before_anything_is_written(
    config: ppo.Config, run: dict[str, Any], message: str, tmp_path: Any
):
    with pytest.raises(ppo.ConfigError, match=message):
        ppo.run(config, run_dir=tmp_path / "run", progress=False, **run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("variables", "expected"), [({}, 0), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)])
def test_every_core_is_a_device_unless_configured(variables: dict[str, str], expected: int):
    """In a separate process, where JAX has not started; importing the package must not start it."""
    script = (
        "import os, jax, purejaxppo\n"
        "from purejaxppo.host.parallel import use_all_cores\n"
        "use_all_cores()\n"
        "print(jax.device_count(), len(os.sched_getaffinity(0)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | variables, capture_output=True, check=True
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
    settings = Settings(WHOLE, run=RunSettings(**run))
    assert choose_spread(settings, ppo.make_task(WHOLE)).mesh.size == used


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, 1),  # 128 samples per minibatch: the exchange of gradients costs more than it saves
        ({"num_envs": 64}, 4),
        ({"num_envs": 62}, 2),  # not divisible by 4 or 3
        ({"num_envs": 61}, 1),
        ({"num_envs": 64, "num_minibatches": 64}, 1),
        ({"hidden_sizes": (256, 256)}, 1),  # many parameters to exchange
        # Each minibatch has two sequences, one for each of two devices.
        ({"num_envs": 64, "num_steps": 512, "memory": "gru", "num_minibatches": 32}, 2),
    ],
    ids=str,
)
def test_a_single_run_uses_the_cores_that_make_it_faster(changes: dict[str, Any], devices: int):
    settings = Settings(ppo.Config(**changes))
    task = ppo.make_task(settings.config)
    assert with_devices(settings, task).run.devices == devices
    for chosen in (1, 2):
        run = RunSettings(devices=chosen)
        if task.why_not_divided(chosen) is None:
            assert with_devices(Settings(settings.config, run=run), task).run.devices == chosen
    several = Settings(settings.config, run=RunSettings(num_seeds=2))
    assert with_devices(several, task).run.devices == 0


@pytest.mark.slow
def test_the_number_of_cores_is_shown_and_recorded(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
):
    """A run can be repeated only if it is known, since the minibatches depend on it."""
    config = ppo.Config(
        total_timesteps=2 * 16 * 1024, num_envs=16, num_steps=1024, num_minibatches=2,
        update_epochs=1,
    )  # fmt: skip
    first = ppo.run(config, run_dir=tmp_path / "a", eval_episodes=1)
    assert "; on 4 of 4 CPU cores\n" in capsys.readouterr().out
    settings = load_settings(tmp_path / "a/config.toml")
    assert settings.run.devices == 4
    again = ppo.run(config, devices=settings.run.devices, eval_episodes=1, progress=False)
    alone = ppo.run(config, devices=1, eval_episodes=1, progress=False)
    for x, y, z in zip(
        *(jax.tree.leaves(r.states.learner.params) for r in (first, again, alone)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z) or not np.any(x)


@pytest.mark.slow
def test_a_spread_run_resumes_on_the_same_number_of_devices(tmp_path: Path):
    config = dataclasses.replace(
        WHOLE, num_minibatches=2, total_timesteps=2 * 8 * 16, lr_schedule="constant"
    )
    ppo.run(config, run_dir=tmp_path / "a", devices=2, eval_episodes=1, progress=False)
    steps = 4 * 8 * 16
    resumed = ppo.resume(tmp_path / "a", total_timesteps=steps, progress=False)
    config = dataclasses.replace(config, total_timesteps=steps)
    whole = ppo.run(config, devices=2, eval_episodes=1, progress=False)
    for x, y in zip(
        *(jax.tree.leaves(r.states.learner.params) for r in (resumed, whole)), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("devices", [1, 2])
def test_training_pauses_during_an_evaluation_if_devices_exchange_data(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On CPU, XLA aborts a run if one of its devices gets no thread for 40 seconds."""
    evaluating, during, patience = threading.Event(), [], 60.0 if devices == 1 else 2.0
    evaluate, compiled = Evaluation.__call__, conduct.compile_program

    def noted(self: Evaluation, *args: Any, **options: Any) -> np.ndarray:
        evaluating.set()
        returns = evaluate(self, *args, **options)
        evaluating.clear()
        return returns

    def watched(*args: Any, **options: Any) -> Any:
        program = compiled(*args, **options)

        def chunk(*args: Any) -> Any:
            during.append(bool(during) and evaluating.wait(patience))
            return program.chunk(*args)

        return program._replace(chunk=chunk)

    monkeypatch.setattr(Evaluation, "__call__", noted)
    monkeypatch.setattr(conduct, "compile_program", watched)
    ppo.run(
        dataclasses.replace(WHOLE, total_timesteps=2 * 8 * 16), run_dir=tmp_path / "run",
        devices=devices, checkpoint_every=1, checkpoint_unit="updates", eval_episodes=1,
        progress=False,
    )  # fmt: skip
    assert during == [False, devices == 1]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_stop_before_the_first_update_trains_and_saves_one(
    devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = conduct.compile_program

    def stopped(*args: Any, **options: Any) -> Any:
        program = compiled(*args, **options)

        def begin(*args: Any) -> TrainState:
            signal.raise_signal(signal.SIGINT)
            return program.begin(*args)

        return program._replace(begin=begin)

    monkeypatch.setattr(conduct, "compile_program", stopped)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(WHOLE, run_dir=tmp_path / "run", devices=devices, progress=False)
    assert int(ppo.load(tmp_path / "run").state.learner.updates) == 1
