"""Resuming runs: exact continuation, refused changes, and the checkpoints that are kept."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import evaluated, logged
from flax import struct
from regression import line_task, longer, peaked_task
from toy_envs import Params, RandomWalk

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.host import checkpoint, checkpoints, loop
from purejaxppo.host.configfile import RunSettings, load_settings
from purejaxppo.host.saver import Saver
from purejaxppo.host.signals import StopRequest
from purejaxppo.types import Learner

conduct = importlib.import_module("purejaxppo.host.conduct")
LENGTH = 12
CONFIG = ppo.Config(
    env_id="RandomWalk", total_timesteps=LENGTH * 32, num_steps=8, hidden_sizes=(8,),
    normalize_obs=True, normalize_reward=True, num_minibatches=2,
)  # fmt: skip
LINE = line_task(longer(total_timesteps=LENGTH * 8))


@struct.dataclass
class BadKey(Params):
    bad_key: int = 0


class OneBadEpisode(RandomWalk):
    """Has NaN rewards or observations in the episode that starts with a given key."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    @property
    def default_params(self) -> BadKey:
        return BadKey()

    def step_env(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        nan = jnp.where(state.key[0] == jnp.uint32(params.bad_key), jnp.nan, 0.0)
        if self.what == "obs":
            return obs + nan, state, reward, terminated, info
        return obs, state, reward + nan, terminated, info


def run(directory: Path, **options: Any) -> ppo.Result:
    settings = {"num_seeds": 3, "eval_episodes": 4, "checkpoint_every": 4, "progress": False}
    settings |= {"checkpoint_unit": "updates", "env": RandomWalk()} | options
    return ppo.run(settings.pop("config", CONFIG), run_dir=directory, **settings)


def resume(directory: Path, **options: Any) -> ppo.Result:
    return ppo.resume(directory, **({"env": RandomWalk(), "progress": False} | options))


def cut(directory: Path, updates: int) -> None:
    """Make a run look as if its process had died after the checkpoint at `updates`."""
    for folder in (directory / "checkpoints").iterdir():
        if int(folder.name) > updates:
            shutil.rmtree(folder)
    (directory / "summary.json").unlink()
    path = directory / "metrics.csv"
    if updates < LENGTH:  # in the middle of a line
        path.write_bytes(path.read_bytes()[:-7])


def summary(directory: Path) -> dict[str, Any]:
    """Read the summary without durations, which differ between runs."""
    held = json.loads((directory / "summary.json").read_text())
    times = ("compile_seconds", "run_seconds", "steps_per_second", "digest")
    return {name: value for name, value in held.items() if name not in times}


def assert_same(one: ppo.Result, other: ppo.Result) -> None:
    for x, y in zip(jax.tree.leaves(one.states), jax.tree.leaves(other.states), strict=True):
        assert x.dtype == y.dtype
        assert bool(np.all(np.asarray(x == y)))
    assert one.metrics.keys() == other.metrics.keys()
    for name in one.metrics.keys() - {"seconds"}:
        np.testing.assert_array_equal(one.metrics[name], other.metrics[name])
    np.testing.assert_array_equal(one.returns, other.returns)
    np.testing.assert_array_equal(one.returns_deterministic, other.returns_deterministic)
    assert one.failed == other.failed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ppo.Result, Path]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    config = dataclasses.replace(CONFIG, memory="gru", memory_size=4)
    return run(directory, config=config, keep=9), directory


@pytest.fixture
def copy(whole: tuple[ppo.Result, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole[1], tmp_path / "copy é x"))


@pytest.mark.parametrize("updates", [4, 8, 12])
def test_a_resumed_run_equals_an_undisturbed_one(whole: Any, copy: Path, updates: int):
    undisturbed, directory = whole
    cut(copy, updates)
    assert_same(resume(copy), undisturbed)
    assert (copy / "config.toml").read_bytes() == (directory / "config.toml").read_bytes()
    assert logged(copy) == logged(directory)
    assert evaluated(copy) == evaluated(directory)
    assert summary(copy) == summary(directory)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(whole: Any, copy: Path):
    cut(copy, 0)
    (copy / "checkpoints/000000004.saving").mkdir()
    with pytest.warns(RunWarning, match=r"skipped .*000000004.saving: an unfinished save"):
        assert_same(resume(copy), whole[0])
    assert not (copy / "checkpoints/000000004.saving").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_nan_in_one_seed_does_not_affect_others_and_is_kept_on_resume(tmp_path: Path, what: str):
    """NaN in one episode of one of 8 seeds: the one in progress after 8 of 12 updates."""
    config = dataclasses.replace(CONFIG, num_envs=1, num_minibatches=1, total_timesteps=8 * LENGTH)
    env = OneBadEpisode(what)
    options: dict[str, Any] = {"config": config, "env": env, "num_seeds": 8, "keep": 9}
    good = run(tmp_path / "good", **options)
    at_8 = ppo.load(tmp_path / "good", seed=5, which=8, env=env).state
    params = BadKey(bad_key=int(at_8.actors.env_state.key[0, 0]))
    bad = run(tmp_path / "bad", env_params=params, **options)
    assert list(bad.failed) == [5]
    update = bad.failed[5]
    assert 4 < update <= 10
    assert bad.summary["failed_seeds"] == {"5": {"update": update, "last_good_update": update - 1}}
    assert not good.failed
    for x, y in zip(jax.tree.leaves(good.states), jax.tree.leaves(bad.states), strict=True):
        same = np.asarray(x == y).reshape(8, -1).all(axis=1)
        assert np.delete(same, 5).all()
    assert int(bad.states.learner.updates[5]) == update - 1
    for updates in (4, 8):
        other = Path(shutil.copytree(tmp_path / "bad", tmp_path / f"cut{updates}"))
        cut(other, updates)
        assert_same(resume(other, env=env, env_params=params), bad)
        assert logged(other) == logged(tmp_path / "bad")


def of_seed(states: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], states)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", pytest.param("constant", marks=pytest.mark.slow)])
def test_extending_stretches_schedules_over_the_new_length(
    tmp_path: Path, schedule: Any, request: pytest.FixtureRequest
):
    fused = request.getfixturevalue("fused") if schedule == "constant" else None
    config = dataclasses.replace(CONFIG, lr_schedule=schedule)
    short = run(tmp_path / "a", config=config)
    longer = dataclasses.replace(config, total_timesteps=2 * config.total_timesteps)
    result = resume(tmp_path / "a", total_timesteps=longer.total_timesteps)
    left = 0.5 if schedule == "linear" else 1.0
    rate = result.metrics["learning_rate"][0]
    np.testing.assert_array_equal(rate[:LENGTH], short.metrics["learning_rate"][0])
    np.testing.assert_allclose(rate[LENGTH], 2.5e-4 * left, rtol=1e-6)
    assert load_settings(tmp_path / "a/config.toml").config == longer
    assert result.summary["extended"] == [
        {"updates": LENGTH, "total_timesteps": longer.total_timesteps}
    ]
    with pytest.raises(ppo.ConfigError, match="has already trained 768 environment steps"):
        resume(tmp_path / "a", total_timesteps=767 - 31)
    if schedule == "constant":
        learner = ppo.make_learner(longer, RandomWalk())
        before, there = (of_seed(r.states, 1) for r in (short, result))
        state, _ = fused(
            lambda state, hparams: ppo.train_chunk(learner, state, hparams, LENGTH),
            before,
            ppo.HParams(),
        )
        jax.tree.map(np.testing.assert_array_equal, state.learner.params, there.learner.params)


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(tmp_path: Path):
    run(tmp_path / "a", config=LINE, env=None, tensorboard=True, keep=9)
    cut(tmp_path / "a", 8)
    time.sleep(1.1)  # the names of event files have the time in seconds
    resume(tmp_path / "a", env=None, task=LINE)
    files = sorted((tmp_path / "a/tensorboard/seed_0").iterdir(), key=lambda p: p.stat().st_mtime)
    assert len(files) == 2
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    starts = []
    content = files[1].read_bytes()
    while content:  # TFRecord: length, its checksum, content, its checksum
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
        content = content[16 + size :]
    assert starts == [8 * 8 + 1]


# Kept checkpoints


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    task = peaked_task(longer(total_timesteps=40 * 8), best=20)
    run(tmp_path / "a", config=task, env=None, checkpoint_every=5, keep=2, eval_episodes=16)
    manifests = {
        int(p.parent.name): json.loads(p.read_text())["eval_return"]
        for p in (tmp_path / "a/checkpoints").glob("*/manifest.json")
    }
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    best = summary["best_checkpoint"]
    assert best["updates"] == 20
    assert set(manifests) == {20, 35, 40}
    assert manifests[best["updates"]] == best["eval_return_mean"] == max(manifests.values())
    assert manifests[40] == pytest.approx(summary["eval_return_mean"], rel=1e-6)
    state = ppo.load(tmp_path / "a", which="best", task=task).state
    assert int(state.learner.updates) == 20
    assert int(ppo.load(tmp_path / "a", which=35, task=task).state.learner.updates) == 35
    with pytest.raises(ppo.ConfigError, match=r"no complete checkpoint after 36 updates found"):
        ppo.load(tmp_path / "a", which=36, task=task)


@pytest.mark.slow
def test_checkpoint_intervals_of_seconds_and_infinity(tmp_path: Path):
    config = dataclasses.replace(CONFIG, total_timesteps=1000 * 32)
    often = run(
        tmp_path / "a", config=config, checkpoint_every=1e-9, checkpoint_unit="seconds", keep=99
    )
    assert len(list((tmp_path / "a/checkpoints").iterdir())) > 1
    once = run(tmp_path / "b", config=config, checkpoint_every=float("inf"))
    assert [p.name for p in (tmp_path / "b/checkpoints").iterdir()] == ["000001000"]
    assert_same(often, once)


def test_an_evaluation_lost_to_a_kill_is_done_on_resume(tmp_path: Path):
    """So the best checkpoint is the same, and kept, wherever the run was killed."""
    task = peaked_task(LINE.config, best=4)
    alone = run(tmp_path / "a", config=task, env=None, keep=9)
    assert alone.summary["best_checkpoint"]["updates"] == 4
    for updates in (4, 8):
        other = Path(shutil.copytree(tmp_path / "a", tmp_path / f"b{updates}"))
        cut(other, updates)
        path = other / f"checkpoints/{updates:09d}"
        checkpoint.record_evaluation(checkpoint.read(path), None)
        text = (other / "config.toml").read_text()
        (other / "config.toml").write_text(text.replace("keep = 9", "keep = 1"))
        resume(other, env=None, task=task)
        assert summary(other)["best_checkpoint"] == alone.summary["best_checkpoint"]
        assert (other / "checkpoints/000000004").exists()


def test_repeated_stops_leave_only_the_kept_checkpoints(tmp_path: Path, whole: Any):
    result, directory = whole
    found, _ = checkpoints.find(directory)
    settings = dataclasses.replace(found.settings, run=RunSettings(num_seeds=3, keep=2))
    for updates in range(1, 6):
        saver = Saver(
            tmp_path, settings, lambda _: np.zeros((3, 1)), None, StopRequest(), held=None
        )
        saver.finish(dataclasses.replace(found.position, updates=updates), result.states)
        saver.close()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "000000004",
        "000000005",
    ]


def test_checkpoints_are_complete_whichever_seeds_failed(tmp_path: Path):
    """Seeds 2 and 10 sort differently as numbers and as strings."""
    ppo.run(LINE, ppo.HParams(learning_rate=1e30), num_seeds=11, run_dir=tmp_path, progress=False)
    found, _ = checkpoints.find(tmp_path)
    assert sorted(found.position.failed) == list(range(11))


def test_the_newest_checkpoint_is_never_removed(tmp_path: Path, whole: Any):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    newest, _ = checkpoints.find(tmp_path)
    (newest.path / "manifest.json").write_text("{}")
    checkpoints.prune(tmp_path, newest.position.updates, 1)
    assert newest.path.exists()


def test_checkpoint_folders_are_sorted_as_numbers(tmp_path: Path):
    for name in ("999999999", "1000000000", "000000005", "x", "5.saving"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ppo.ConfigError, match="existing: 5, 999999999, 1000000000"):
        checkpoints.find(tmp_path)


def odd_task(config: Any = LINE.config) -> ppo.Task:
    """Its state has an empty leaf, and names that coincide when joined by dots."""

    def learner(axis: str | None) -> Learner:
        inner = line_task(config).learner(axis)

        def init(key: Any, hparams: Any, data: Any = ()) -> ppo.TrainState:
            odd = {
                "a": {"b": jnp.ones(2)},
                "a.b": jax.random.normal(key),
                "none": jnp.zeros((0, 3)),
            }
            return inner.init(key, hparams, data)._replace(actors=odd)

        def update(state: ppo.TrainState, hparams: Any, data: Any = ()) -> Any:
            new, metrics = inner.update(state, hparams, data)
            return new._replace(actors=state.actors), metrics

        return Learner(init, update)

    return dataclasses.replace(
        line_task(config), learner=learner, with_config=odd_task,
        why_not_divided=lambda devices: "odd" if devices > 1 else None,
    )  # fmt: skip


def test_states_of_any_structure_are_restored(tmp_path: Path):
    result = run(tmp_path / "a", config=odd_task(), env=None)
    state = ppo.load(tmp_path / "a", odd_task(), seed=None).state
    assert jax.tree.structure(state) == jax.tree.structure(result.states)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(result.states), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert bool(np.all(np.asarray(x == y)))


# Refused changes


def test_a_different_run_is_refused_with_the_settings_that_differ(copy: Path):
    path = copy / "config.toml"
    text = path.read_text()
    sizes = ("hidden_sizes = [8]", "hidden_sizes = [8, 8]")
    for change, words in (
        (sizes, r"hidden_sizes is \(8, 8\) and was \(8,\)"),
        (("num_seeds = 3", "num_seeds = 4"), "num_seeds is 4 and was 3"),
        (("num_steps = 8", "num_steps = 16"), "num_steps is 16 and was 8"),
    ):
        path.write_text(text.replace(*change))
        with pytest.raises(ppo.ConfigError, match=words):
            resume(copy)
    path.write_text(text.replace("gamma = 0.99", "gamma = 0.9"))
    resume(copy)


def test_changed_hyperparameters_are_named(copy: Path, capsys: Any):
    cut(copy, 8)
    path = copy / "config.toml"
    path.write_text(path.read_text().replace("gamma = 0.99", "gamma = 0.5"))
    resume(copy, progress=True)
    text = capsys.readouterr().out
    assert "resuming from update 8" in text
    assert "gamma = 0.5 from here on (was 0.99)" in text


def test_another_environment_is_refused_with_the_leaves_that_differ(copy: Path):
    with pytest.raises(ppo.ConfigError, match=r"does not fit .*obs_stats.mean is float32\[3, 2\]"):
        ppo.load(copy, env=Wide())


class Wide(RandomWalk):
    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> jax.Array:
        return jnp.ones(3)

    def observation_space(self, params: Any) -> Any:
        return super().observation_space(params).__class__(0, 1, (3,))


def test_an_environment_object_must_be_passed_again(copy: Path):
    for function in (ppo.resume, ppo.load):
        with pytest.raises(ppo.ConfigError, match="must be passed again"):
            function(copy)


def test_seeds_out_of_range_are_refused(copy: Path):
    for seed, words in ((-1, "must be at least 0"), (3, "the run has seeds 0 to 2")):
        with pytest.raises(ppo.ConfigError, match=f"seed = {seed}: {words}"):
            ppo.load(copy, seed=seed, env=RandomWalk())


def test_metrics_too_short_for_every_checkpoint_are_refused(copy: Path):
    path = copy / "metrics.csv"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ppo.ConfigError, match="does not hold the metrics up to the checkpoint"):
        resume(copy)
    path.unlink()
    with pytest.raises(ppo.ConfigError, match="No such file"):
        resume(copy)


@pytest.mark.parametrize("change", ["digit", "quote"])
def test_changed_metrics_are_refused(copy: Path, change: str):
    path = copy / "metrics.csv"
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"0,2,", b"0,3," if change == "digit" else b'0,"2,', 1)[: len(content)]
    )
    with pytest.raises(ppo.ConfigError, match="it has changed since"):
        resume(copy)


def test_a_finished_run_without_checkpoints_is_not_restarted(copy: Path):
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.csv").read_bytes()
    with pytest.raises(ppo.ConfigError, match="its checkpoints are missing"):
        resume(copy)
    assert (copy / "metrics.csv").read_bytes() == before
    (copy / "checkpoints").write_text("")
    with pytest.raises(ppo.ConfigError, match="cannot be read: Not a directory"):
        resume(copy)


def test_an_environment_object_is_refused_if_a_name_was_used(tmp_path: Path):
    config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(8,))
    run(tmp_path / "a", config=config, env=None)
    with pytest.raises(ppo.ConfigError, match="was not passed to the original run of CartPole-v1"):
        resume(tmp_path / "a")


def test_invalid_directory_names_are_refused(tmp_path: Path):
    for function in (ppo.resume, ppo.load):
        with pytest.raises(ppo.ConfigError, match="File name too long"):
            function("x" * 300)
    with pytest.raises(ppo.ConfigError, match="the name is not valid UTF-8"):
        run(tmp_path / os.fsdecode(b"n\xff"))


@pytest.mark.parametrize("which", ["oldest", 4.0, None, -1, True])
def test_invalid_checkpoint_arguments_are_refused(copy: Path, which: Any):
    with pytest.raises(ppo.ConfigError, match="must be newest, best, or a number of updates"):
        ppo.load(copy, which=which, env=RandomWalk())


# Agents, devices


def test_loaded_states_work_with_make_agent_and_evaluate(whole: Any):
    result, directory = whole
    config, hparams, state = ppo.load(directory, env=RandomWalk())
    assert hparams == ppo.HParams()
    agent = ppo.make_agent(config, state, RandomWalk())
    obs = jnp.ones((5, 2))
    action, _ = agent.act(jax.random.key(0), obs, agent.initial_carry(5))
    assert action.shape == (5,)
    one = jax.tree.map(lambda x: x[0], result.states)
    key = jax.random.key(1)
    np.testing.assert_array_equal(
        ppo.evaluate(config, state, key, 8, env=RandomWalk()),
        ppo.evaluate(config, one, key, 8, env=RandomWalk()),
    )


ON_DEVICES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np, purejaxppo as ppo
from pathlib import Path
from purejaxppo.host import checkpoint, checkpoints
from purejaxppo.host.load import restore_states
found, _ = checkpoints.find(Path(sys.argv[1]))
task = ppo.make_task(found.settings.config)
states = restore_states(found, task.learner(None), task)
assert len(jax.devices()) == 4
mesh = jax.make_mesh((4,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.device_put(states, jax.NamedSharding(mesh, jax.P("seeds")))
checkpoint.save(Path(sys.argv[2]), found.position, found.settings, spread)
"""


@pytest.mark.slow
def test_checkpoints_move_from_one_device_to_four_and_back(tmp_path: Path):
    config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(8,))
    run(tmp_path / "one", config=config, env=None, num_seeds=4)
    (tmp_path / "four").mkdir()
    command = [sys.executable, "-c", ON_DEVICES, str(tmp_path / "one"), str(tmp_path / "four")]
    subprocess.run(command, check=True)
    one, four = (ppo.load(tmp_path / name, seed=None).state for name in ("one", "four"))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert y.sharding.device_set == {jax.devices()[0]}
        assert bool(np.all(np.asarray(x == y)))


class Clock:
    """A replacement for `time`, whose clock moves only when a test sets `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.3, 2.0])
def test_a_chunk_takes_half_a_second_or_is_one_update(
    monkeypatch: pytest.MonkeyPatch, seconds: float
):
    """Each update takes `seconds`, and ten times longer in the first call."""
    clock, counts = Clock(), []
    compile_program = conduct.compile_program

    def slow(*arguments: Any, **more: Any) -> Any:
        program = compile_program(*arguments, **more)

        def chunk(states: Any, hparams: Any, count: int) -> Any:
            clock.now += count * seconds * (1 if counts else 10)
            counts.append(count)
            return program.chunk(states, hparams, count)

        return program._replace(chunk=chunk)

    monkeypatch.setattr(conduct, "compile_program", slow)
    for module in (conduct, loop):
        monkeypatch.setattr(module, "time", clock)
    config = longer(total_timesteps=300 * 8)
    ppo.run(line_task(config), progress=False)
    assert sum(counts) == config.num_updates
    assert counts[0] == 1
    assert all(count * seconds <= loop.CHUNK_SECONDS or count == 1 for count in counts)
    assert len(counts) <= 3 + config.num_updates * max(seconds / 0.25, 1 / 1024)
