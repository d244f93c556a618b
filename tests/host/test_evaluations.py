"""Evaluations at intervals: `eval.csv`, the best checkpoint, and both after a resume."""

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import evaluated, logged
from toy_envs import ConstantChain, RandomWalk

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.evaluation import FINAL_EVALUATION, FRESH_EVALUATION, evaluation_keys
from purejaxppo.host.checkpoint import Position
from purejaxppo.host.evaluations import EvalLog, evaluation_curve
from purejaxppo.host.rundir import unsealed

LENGTH = 12
CONFIG = ppo.Config(
    env_id="RandomWalk", total_timesteps=LENGTH * 32, num_steps=8, hidden_sizes=(8,),
    num_minibatches=2,
)  # fmt: skip


def run(directory: Path, **options: Any) -> ppo.Result:
    given: dict[str, Any] = {
        "num_seeds": 2, "eval_episodes": 4, "eval_every": 3, "checkpoint_every": 4,
        "checkpoint_unit": "updates", "keep": 9, "progress": False, "env": RandomWalk(),
    }  # fmt: skip
    return ppo.run(CONFIG, ppo.HParams(learning_rate=0.1), run_dir=directory, **(given | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ppo.Result, Path]:
    directory = tmp_path_factory.mktemp("whole") / "run"
    return run(directory), directory


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "eval.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_evaluation_has_a_row_per_seed_and_matches_its_checkpoint(whole: Any):
    """Compares with `ppo.evaluate` of the saved states, on the same episodes."""
    result, directory = whole
    table = rows(directory)
    sampled = [row for row in table if row["actions"] == "sampled"]
    assert [(int(r["update"]), int(r["seed"])) for r in sampled] == [
        (update, seed) for update in (3, 6, 9, 12) for seed in (0, 1)
    ]
    keys = evaluation_keys(0, 2, FINAL_EVALUATION)
    for row in sampled:
        update, seed = int(row["update"]), int(row["seed"])
        assert int(row["env_steps"]) == update * 32
        state = ppo.load(directory, seed=seed, which=update, env=RandomWalk()).state
        returns = np.asarray(ppo.evaluate(CONFIG, state, keys[seed], 4, env=RandomWalk()))
        assert float(row["return_mean"]) == pytest.approx(returns.mean(), rel=1e-5)
        assert float(row["return_std"]) == pytest.approx(returns.std(), rel=1e-4, abs=1e-5)
        assert row["episodes"] == "4"
    last = [row for row in table if row["actions"] == "deterministic"]
    assert [int(row["update"]) for row in last] == [12, 12]
    found = [float(row["return_mean"]) for row in last]
    np.testing.assert_allclose(found, result.returns_deterministic.mean(axis=1), rtol=1e-6)


def test_actions_are_sampled_or_deterministic_as_labelled(whole: Any):
    result, directory = whole
    key = evaluation_keys(0, 2, FINAL_EVALUATION)[1]
    state = ppo.load(directory, seed=1, env=RandomWalk()).state
    for deterministic, found in ((False, result.returns), (True, result.returns_deterministic)):
        alone = ppo.evaluate(CONFIG, state, key, 4, deterministic=deterministic, env=RandomWalk())
        np.testing.assert_allclose(found[1], alone, rtol=1e-5)
    assert not np.allclose(result.returns, result.returns_deterministic)
    for name in ("eval_return", "eval_return_deterministic"):
        assert len(result.summary[f"{name}_per_seed"]) == 2


@pytest.mark.parametrize(("seed", "best"), [(0, 12), (4, 9)])
def test_the_best_checkpoint_is_kept_and_reported_on_fresh_episodes(
    tmp_path: Path, seed: int, best: int
):
    result = run(tmp_path / "run", keep=1, seed=seed)
    means = {
        update: np.mean([float(r["return_mean"]) for r in rows(tmp_path / "run")
                         if int(r["update"]) == update and r["actions"] == "sampled"])
        for update in (3, 6, 9, 12)
    }  # fmt: skip
    assert best == max(means, key=lambda update: (means[update], update))
    left = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()}
    assert left == {best, 12}
    entry = result.summary["best_checkpoint"]
    assert entry["updates"] == best
    assert entry["eval_return_mean"] == pytest.approx(means[best])
    keys = evaluation_keys(seed, 2, FRESH_EVALUATION)
    fresh = [
        ppo.evaluate(
            CONFIG, ppo.load(tmp_path / "run", seed=s, which=best, env=RandomWalk()).state,
            keys[s], 4, env=RandomWalk(),
        ).mean()
        for s in (0, 1)
    ]  # fmt: skip
    assert entry["fresh_return_mean"] == pytest.approx(np.mean(fresh), rel=1e-5)


def test_evaluations_do_not_change_training(whole: Any, tmp_path: Path):
    run(tmp_path / "run", eval_every=math.inf, checkpoint_every=math.inf)
    assert logged(tmp_path / "run") == logged(whole[1])


@pytest.mark.parametrize("updates", [3, 8, 9])
def test_a_resumed_run_evaluates_like_an_undisturbed_one(whole: Any, tmp_path: Path, updates: int):
    """As if killed after the checkpoint at `updates`, before its evaluation was recorded, while
    writing a row."""
    copy = Path(shutil.copytree(whole[1], tmp_path / "copy"))
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > updates:
            shutil.rmtree(folder)
    (copy / "summary.json").unlink()
    path = copy / "eval.csv"
    path.write_bytes(path.read_bytes()[:-7])
    ppo.resume(copy, env=RandomWalk(), progress=False)
    assert evaluated(copy) == evaluated(whole[1])


def test_timed_evaluations_each_have_a_row(tmp_path: Path):
    run(tmp_path / "run", eval_every=1e-3, eval_unit="seconds")
    updates = [int(row["update"]) for row in rows(tmp_path / "run")]
    assert updates == sorted(updates)
    assert len(set(updates)) > 1
    assert updates[-1] == LENGTH


def test_rows_of_a_failed_write_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log, returns = EvalLog(tmp_path, 32), {"sampled": np.ones((2, 4))}
    log.add(Position(1), returns)
    before = (tmp_path / "eval.csv").read_bytes()

    def full(file: Any, content: bytes) -> None:
        file.write(content[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("purejaxppo.host.evaluations.append", full)
        with pytest.raises(OSError, match="No space left"):
            log.add(Position(2), returns)
    assert (tmp_path / "eval.csv").read_bytes() == before
    log.add(Position(2), returns)
    log.add(Position(2), returns)  # ignored
    assert [int(row["update"]) for row in rows(tmp_path)] == [1, 1, 2, 2]
    steps, means = evaluation_curve(tmp_path)
    np.testing.assert_array_equal((steps, means), ([32, 64], [1, 1]))


def test_eval_every_without_a_run_directory_is_refused():
    with pytest.raises(ppo.ConfigError, match=r"eval_every = 3.0: .* give run_dir"):
        ppo.run(CONFIG, eval_every=3, env=RandomWalk())


class Endless(ConstantChain):
    """Episodes never end, and there is no time limit."""

    @property
    def default_params(self) -> Any:
        return None

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        return jax.numpy.bool_(False)

    def observation_space(self, params: Any) -> Any:
        return super().observation_space(None)


def test_episodes_that_never_end_have_no_return(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("purejaxppo.evaluation.MAX_STEPS_WITHOUT_LIMIT", 20)
    with pytest.warns(
        RunWarning, match="8 of 8 evaluation episodes are left out of the means: they did not end"
    ):
        result = ppo.run(CONFIG, num_seeds=2, eval_episodes=4, env=Endless(), progress=False)
    assert np.isnan(result.returns).all()
    assert result.summary["eval_return_mean"] is None
    assert result.summary["unfinished_eval_episodes"] == 8


def test_resuming_a_finished_run_changes_nothing(whole: Any, tmp_path: Path):
    copy = Path(shutil.copytree(whole[1], tmp_path / "copy"))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(copy.rglob("*"))}
    result = ppo.resume(copy, env=RandomWalk(), progress=False)
    lock = copy / ".lock"
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(copy.rglob("*"))}
    assert {p for p in before if before[p] != after[p]} <= {lock}
    assert before.keys() == after.keys()
    assert result.summary == unsealed(copy / "summary.json")
    for x, y in zip(jax.tree.leaves(result.states), jax.tree.leaves(whole[0].states), strict=True):
        assert bool(np.all(np.asarray(x == y)))
    assert result.returns.shape == (2, 0)


def test_the_command_line_reports_a_finished_run(tmp_path: Path, capsys: Any):
    small = "--total-timesteps=64 --num-steps=8 --hidden-sizes=4 --num-minibatches=2".split()
    directory = str(tmp_path / "r")
    assert main(["train", "--run-dir", directory, *small]) == 0
    capsys.readouterr()
    assert main(["resume", directory]) == 0
    out = capsys.readouterr().out
    assert "already finished: 64 of 64 environment steps per seed; nothing to do" in out
    assert f"to train longer: purejaxppo resume {directory} --total-timesteps N" in out
    assert main(["resume", directory, "--total-timesteps", "96"]) == 0
    assert "resuming from update 2" in capsys.readouterr().out
