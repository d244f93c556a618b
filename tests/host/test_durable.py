"""Robustness of runs and sweeps: damaged files, concurrent readers, removed directories."""

import dataclasses
import errno
import json
import os
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import Process, assert_same_end, logged, rows, some, some_or_all
from toy_envs import RandomWalk

from faults import scenario  # isort: skip

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.host import checkpoint, checkpoints, rundir
from purejaxppo.host.configfile import dump_settings
from purejaxppo.host.evaluations import EvalLog, evaluation_curve
from purejaxppo.host.load import find_states
from purejaxppo.host.memory import _group_bytes
from purejaxppo.host.rundir import BusyError, GoneError, StorageError, locked
from purejaxppo.sweeps.engine import resume_sweep

CONFIG = ppo.Config(total_timesteps=6 * 32, num_steps=8, hidden_sizes=(8,))
EVERY_2: dict[str, Any] = {
    "checkpoint_every": 2, "checkpoint_unit": "updates", "keep": 9, "eval_episodes": 2,
    "progress": False,
}  # fmt: skip
DERIVED = ("results.csv", "curves.npz", "winner.json", "winner.toml", "finished.json")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    ppo.run(CONFIG, run_dir=directory, **EVERY_2)
    return directory


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def sweep(directory: Path) -> ppo.SweepResult:
    """Run a sweep of two waves, since the trials have different shapes."""
    return ppo.sweep(
        CONFIG, {"num_steps": [8, 16], "gamma": [0.9, 0.99]}, run_dir=directory, eval_episodes=2,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweeps") / "sweep"
    sweep(directory)
    assert len(list((directory / "waves").iterdir())) == 2
    return directory


@pytest.fixture
def sweep_copy(finished_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    scenario.speed_up(monkeypatch.setattr)
    return Path(shutil.copytree(finished_sweep, tmp_path / "sweep"))


def derived(directory: Path) -> dict[str, Any]:
    """Read the results of a sweep; curves as arrays, since a zip file contains dates."""
    found: dict[str, Any] = {
        name: (directory / name).read_bytes()
        for name in ("results.csv", "winner.json", "winner.toml")
    }
    with np.load(directory / "curves.npz") as curves:
        return found | {name: curves[name].tobytes() for name in curves}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Sweeps


@pytest.mark.parametrize("name", DERIVED)
def test_results_are_rebuilt_from_waves(sweep_copy: Path, finished_sweep: Path, name: str):
    (sweep_copy / name).unlink()
    resume_sweep(sweep_copy, progress=False)
    assert derived(sweep_copy) == derived(finished_sweep)


def test_resume_writes_results_that_could_not_be_written(tmp_path: Path):
    directory = tmp_path / "sweep"
    (directory / "results.csv.part").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"results\.csv'.*cannot be written.*resume"):
        sweep(directory)
    (directory / "results.csv.part").rmdir()
    resume_sweep(directory, progress=False)
    assert len((directory / "results.csv").read_text().splitlines()) == 1 + 4


def test_a_failure_to_make_the_waves_folder_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make = Path.mkdir

    def full(path: Path, *given: Any, **more: Any) -> None:
        if path.name == "waves":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(path, *given, **more)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StorageError, match=r"waves': cannot be created: No space left.*resume"):
        sweep(tmp_path / "sweep")


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half-finished"])
@some_or_all
def test_a_damaged_file_of_a_sweep_gives_the_same_results_or_one_message(
    sweep_copy: Path, finished_sweep: Path, half: bool, count: int | None
):
    before, whole = derived(finished_sweep), sweep_copy.rename(sweep_copy.with_name("whole"))
    if half:
        for name in (*DERIVED, "waves/0001/summary.json"):
            (whole / name).unlink()
    for path, change in damaged_copies(whole, sweep_copy, count):
        refusal = refusal_of(partial(resume_sweep, sweep_copy, progress=False))
        if refusal is None:
            assert derived(sweep_copy) == before, (path, change)
        can_be_rebuilt = path.name in (*DERIVED, "summary.json", ".lock") or path.suffix in PICTURES
        assert refusal is None or not can_be_rebuilt, (path, change, refusal)


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half-finished"])
@some_or_all
def test_a_damaged_file_of_a_run_gives_the_same_results_or_one_message(
    run_copy: Path,
    finished_run: Path,
    half: bool,
    count: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    scenario.speed_up(monkeypatch.setattr)
    whole = run_copy.rename(run_copy.with_name("whole"))
    if half:
        (whole / "summary.json").unlink()
        shutil.rmtree(whole / "checkpoints/000000006")
    for path, change in damaged_copies(whole, run_copy, count):
        refusal = refusal_of(partial(ppo.resume, run_copy, progress=False))
        if refusal is None and path.name != "eval.csv":
            assert_same_end(run_copy, finished_run)
        can_be_rebuilt = path.name in ("summary.json", ".lock") or path.suffix in PICTURES
        if path.is_relative_to("checkpoints"):  # the others are complete
            can_be_rebuilt = True
        assert refusal is None or not can_be_rebuilt, (path, change, refusal)


PICTURES = (".png", ".html")
CHANGES = ("flip", "cut", "empty", "json", "missing")


def damaged_copies(whole: Path, copy: Path, count: int | None) -> Iterator[tuple[Path, str]]:
    """For each file and kind of damage, make `copy` a copy of the directory with that file damaged;
    yield the file's relative path and the kind."""
    rng = np.random.default_rng(0)
    paths = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    for path, change in some([(p, change) for p in paths for change in CHANGES], count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        damaged, content = copy / path, (whole / path).read_bytes()
        if change == "missing":
            damaged.unlink()
        elif change == "flip" and content:
            flip(damaged, int(rng.integers(len(content))))
        else:
            damaged.write_bytes({"cut": content[:-9], "json": b"{}"}.get(change, b""))
        yield path, change


def refusal_of(function: Callable[[], Any]) -> str | None:
    """Return the first line of the error message of a call, if any. Further lines may only list
    skipped checkpoints."""
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except ppo.ConfigError as error:
        message = str(error)
    first, *others = message.splitlines() or [None]
    assert all(line and line.startswith("  ") for line in others), message
    return first


@pytest.mark.parametrize("name", ["results.csv", "curves.npz", "winner.json", "finished.json"])
def test_readers_of_a_damaged_sweep_say_how_to_rebuild_it(
    sweep_copy: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    flip(sweep_copy / name, 9)
    assert main(["plot", str(sweep_copy)]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert f"to rebuild it: purejaxppo resume {sweep_copy}" in said


def test_a_sweep_without_its_plan_is_refused(sweep_copy: Path):
    """A new plan might not match the trials that its waves trained."""
    (sweep_copy / "plan.json").unlink()
    with pytest.raises(ppo.ConfigError, match=r"plan.json': is missing, although waves were"):
        resume_sweep(sweep_copy, progress=False)


def test_a_sweep_does_not_overwrite_results_of_an_earlier_one(sweep_copy: Path):
    for name in ("sweep.toml", "plan.json"):
        (sweep_copy / name).unlink()
    shutil.rmtree(sweep_copy / "waves")
    with pytest.raises(ppo.ConfigError, match=r"already holds a run \(results.csv"):
        sweep(sweep_copy)


def test_a_sweep_being_retrained_is_not_finished(sweep_copy: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("purejaxppo.sweeps.engine._Engine._train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resume_sweep(sweep_copy, progress=False)
    with pytest.raises(ppo.ConfigError, match="the sweep is not finished"):
        ppo.load_trial(sweep_copy)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"env_steps": 1e999}', '{"env_steps": 192, "env_steps_planned": 192}', None],
    ids=["nested", "infinite", "unsealed", "other return"],
)
def test_a_damaged_summary_is_rewritten(run_copy: Path, finished_run: Path, text: str | None):
    path = run_copy / "summary.json"
    changed = path.read_text().replace(
        '"eval_return_per_seed": [\n  ', '"eval_return_per_seed": [\n  9'
    )
    assert changed != path.read_text()
    path.write_text(changed if text is None else text)
    ppo.resume(run_copy, progress=False)
    summaries = [json.loads((x / "summary.json").read_text()) for x in (run_copy, finished_run)]
    assert summaries[0]["eval_return_per_seed"] == summaries[1]["eval_return_per_seed"]


def test_a_changed_sweep_definition_is_refused(sweep_copy: Path):
    path = sweep_copy / "sweep.toml"
    path.write_text(path.read_text().replace("gae_lambda = 0.95", "gae_lambda = 0.9"))
    with pytest.raises(ppo.ConfigError, match=r"sweep.toml': was changed since the sweep began"):
        resume_sweep(sweep_copy, progress=False)


def test_a_wave_without_a_summary_is_evaluated_again(sweep_copy: Path, finished_sweep: Path):
    (sweep_copy / "waves/0001/summary.json").unlink()
    (sweep_copy / "waves/0001/config.toml").unlink()
    resume_sweep(sweep_copy, progress=False)
    assert derived(sweep_copy) == derived(finished_sweep)


def test_a_locked_sweep_is_not_resumed(sweep_copy: Path):
    with (
        locked(sweep_copy),
        pytest.raises(BusyError, match="is in use by"),
    ):
        resume_sweep(sweep_copy, progress=False)


@pytest.mark.faults
def test_only_one_of_two_processes_resumes_a_sweep(tmp_path: Path, one_cache: None):
    directory, arguments = tmp_path / "s", [
        "--total-timesteps=2000000", "--grid=num_steps=8,16", "--checkpoint-every=0.2",
        "--eval-episodes=2", "--hidden-sizes=8",
    ]  # fmt: skip
    process = Process(tmp_path, "sweep", "--run-dir", directory, *arguments)
    process.until(lambda: checkpoints.has_any(directory / "waves/0000"))
    process.popen.kill()
    process.end()
    processes = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        processes.append(Process(tmp_path / str(k), "resume", directory))
    assert sorted(process.end() for process in processes) == [0, 2]
    assert "is in use by" in "".join(process.text() for process in processes)
    assert main(["plot", str(directory)]) == 0


@pytest.mark.faults
def test_a_killed_population_ends_like_an_undisturbed_one(tmp_path: Path, one_cache: None):
    moments, arguments = random.Random(0), [
        "--total-timesteps=200000", "--num-envs=2", "--hidden-sizes=8", "--strategy=pbt",
        "--trials=5", "--interval=10", "--sample=learning_rate=loguniform:1e-4,1e-2",
        "--eval-episodes=8", "--checkpoint-every=0.2",
    ]  # fmt: skip
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = Process(tmp_path, "sweep", "--run-dir", alone, *arguments)
    assert process.end() == 0, process.text()
    command: list[Any] = ["sweep", "--run-dir", killed, *arguments]
    for _ in range(10):
        process = Process(tmp_path, *command)
        metrics = killed / "waves/0000/metrics.f32"
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.popen.poll() is None:
            if metrics.exists() and metrics.stat().st_size != before:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 1.0))
        process.popen.kill()
        if process.end() == 0:
            break
        command = ["resume", killed]
    process = Process(tmp_path, "resume", killed)
    assert process.end() == 0, process.text()
    assert derived(killed) == derived(alone)


def test_a_finished_wave_is_not_read_from_an_older_checkpoint(
    sweep_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    """An older checkpoint may remain if it was being read when it should have been removed."""
    shutil.rmtree(sweep_copy / "waves/0000")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "prune", lambda *_: None)
        patch.setattr("purejaxppo.host.loop.Loop._action_due", lambda *_: 1)
        resume_sweep(sweep_copy, progress=False)
    older, *_, last = sorted((sweep_copy / "waves/0000/checkpoints").iterdir())
    assert older != last
    flip(next(p for p in last.rglob("*") if p.parent.name == "d"), 9)
    with pytest.raises(ppo.ConfigError, match="remove this folder to train the wave again"):
        ppo.load_trial(sweep_copy, 0)


def test_swapped_wave_folders_are_refused(sweep_copy: Path):
    waves = sweep_copy / "waves"
    for old, new in (("0000", "x"), ("0001", "0000"), ("x", "0001")):
        (waves / old).rename(waves / new)
    with pytest.raises(ppo.ConfigError, match="was trained with other settings than planned"):
        resume_sweep(sweep_copy, progress=False)


# Runs


@pytest.mark.faults
def test_only_one_of_four_processes_gets_a_directory(tmp_path: Path, one_cache: None):
    processes = []
    for k in range(4):
        (tmp_path / str(k)).mkdir()
        arguments = ["--run-dir", tmp_path / "r", "--total-timesteps=20000", "--eval-episodes=2"]
        processes.append(Process(tmp_path / str(k), "train", *arguments))
    assert sorted(process.end() for process in processes) == [0, 2, 2, 2]
    for process in processes:
        lost = process.popen.returncode == 2
        assert ("is in use by" in process.text() or "already holds" in process.text()) == lost
    assert ppo.load(tmp_path / "r").state.learner.updates == 40


@pytest.mark.faults
def test_a_run_can_be_read_while_it_trains(tmp_path: Path, one_cache: None):
    run = tmp_path / "r"
    process = Process(
        tmp_path, "train", "--run-dir", run, "--total-timesteps=1000000000", "--eval-episodes=1",
        "--checkpoint-every=1", "--checkpoint-unit=updates", "--keep=1", "--hidden-sizes=8",
    )  # fmt: skip
    try:
        process.until(lambda: checkpoints.has_any(run))
        for k in range(20):
            assert ppo.load(run).state.learner.updates > 0
            assert main(["eval", str(run), "--episodes=1"]) == 0
            assert main(["export", str(run), str(tmp_path / f"{k}.bin")]) == 0
        process.popen.terminate()
        assert process.end() == 143
    finally:
        process.popen.kill()


def test_checkpoints_are_synced_before_older_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: set[str] = set()
    fsync, prune = os.fsync, checkpoints.prune

    def noted(handle: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()).replace(".saving", ""))
        fsync(handle)

    def checked(run_dir: Path, newest: int, keep: int) -> None:
        folder = run_dir / "checkpoints" / f"{newest:09d}"
        needed = {str(p) for p in (folder, *folder.rglob("*")) if p.name != "manifest.json"}
        assert {*needed, str(run_dir), str(run_dir / "checkpoints")} <= synced
        prune(run_dir, newest, keep)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(checkpoints, "prune", checked)
    ppo.run(CONFIG, run_dir=tmp_path / "run", **EVERY_2 | {"keep": 1})


def test_a_damaged_checkpoint_is_not_kept_as_the_best(run_copy: Path):
    """Otherwise the second best would be removed, and no usable one would remain."""
    folders = sorted((run_copy / "checkpoints").iterdir())
    for folder, value in zip(folders, (2.0, 3.0, 1.0), strict=True):
        checkpoint.record_evaluation(checkpoint.read(folder), value)
    flip(next(p for p in folders[1].rglob("*") if p.parent.name == "d"), 9)
    checkpoints.prune(run_copy, newest=6, keep=1)
    assert sorted((run_copy / "checkpoints").iterdir()) == [folders[0], folders[2]]


def test_a_full_disk_during_resume_is_one_message(run_copy: Path, monkeypatch: pytest.MonkeyPatch):
    (run_copy / "summary.json").unlink()

    def full(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("purejaxppo.host.evaluations.write_whole", full)
    with pytest.raises(StorageError, match=r"eval.csv': cannot be written: No space left.*resume"):
        ppo.resume(run_copy, progress=False)


@pytest.mark.parametrize("make", [True, False])
def test_a_directory_renamed_during_locking_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: bool
):
    directory, lock = tmp_path / "r", rundir._lock_directory
    directory.mkdir()

    def locks_late(handle: int) -> None:
        directory.rename(tmp_path / "elsewhere")
        directory.mkdir()
        lock(handle)

    monkeypatch.setattr(rundir, "_lock_directory", locks_late)
    with pytest.raises(GoneError, match="was removed or renamed"), locked(directory, make=make):
        pass


def test_a_checkpoint_being_read_is_not_removed(run_copy: Path):
    oldest = run_copy / "checkpoints/000000002"
    with checkpoints.pinned(oldest) as exists:
        assert exists
        checkpoints.prune(run_copy, newest=6, keep=1)
        assert oldest.exists()
    checkpoints.prune(run_copy, newest=6, keep=1)
    assert not oldest.exists()
    with checkpoints.pinned(oldest) as exists:
        assert not exists


@pytest.mark.slow
def test_a_run_can_be_read_while_it_removes_checkpoints(run_copy: Path, tmp_path: Path):
    """Imitates a run with `keep = 1` that saves as fast as possible."""
    source = Path(shutil.copytree(run_copy / "checkpoints/000000006", tmp_path / "source"))
    checkpoints.prune(run_copy, newest=6, keep=1)
    stop = threading.Event()

    def write() -> None:
        for number in range(7, 1000):
            if stop.is_set():
                return
            part = run_copy / "checkpoints" / f"{number:09d}.saving"
            shutil.copytree(source, part)
            part.rename(part.with_suffix(""))
            checkpoints.prune(run_copy, newest=number, keep=1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            find_states(run_copy, "newest", lambda x: ppo.make_task(x.config))
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("how", ["removed", pytest.param("renamed", marks=pytest.mark.faults)])
def test_removing_the_directory_ends_the_run(tmp_path: Path, how: str, one_cache: None):
    run = tmp_path / "r"
    process = Process(
        tmp_path, "train", "--run-dir", run, "--total-timesteps=1000000000", "--eval-episodes=8",
        "--checkpoint-every=0.5",
    )  # fmt: skip
    try:
        process.until(lambda: rows(run) > 5)
        if how == "renamed":
            run.rename(tmp_path / "new")
        while run.exists():  # removing fails if a file is created meanwhile
            shutil.rmtree(run, ignore_errors=True)
        assert process.end() == 1
    finally:
        process.popen.kill()
    assert "was removed or renamed while the run was writing" in process.text()
    assert not run.exists()


@pytest.mark.parametrize("remade", ["empty", "with a file"])
def test_a_directory_removed_during_a_save_does_not_come_back(
    tmp_path: Path, remade: str, monkeypatch: pytest.MonkeyPatch
):
    write = checkpoint._write_arrays

    def removed_meanwhile(path: Path, *rest: Any) -> None:
        shutil.rmtree(tmp_path / "run")
        if remade == "with a file":
            (tmp_path / "run").mkdir()
            (tmp_path / "run/mine").touch()
        write(path, *rest)

    monkeypatch.setattr(checkpoint, "_write_arrays", removed_meanwhile)
    with pytest.raises(GoneError, match="was removed or renamed"):
        ppo.run(CONFIG, run_dir=tmp_path / "run", **EVERY_2)
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert left == ([] if remade == "empty" else [Path("run"), Path("run/mine")])


def test_deleting_the_lock_file_does_not_release_the_lock(run_copy: Path):
    with locked(run_copy):
        (run_copy / ".lock").unlink()
        with pytest.raises(BusyError, match="is in use by"), locked(run_copy):
            pass
    with locked(run_copy):
        pass


def test_truncated_metrics_invalidate_only_later_checkpoints(run_copy: Path, finished_run: Path):
    lines = (run_copy / "metrics.csv").read_text().splitlines(keepends=True)
    (run_copy / "metrics.csv").write_text("".join(lines[:6]))
    with pytest.warns(RunWarning, match=r"skipped .*metrics.csv.* checkpoint after 6 updates: "):
        ppo.resume(run_copy, progress=False)
    assert logged(run_copy) == logged(finished_run)


def test_a_checkpoint_of_a_different_run_is_skipped(run_copy: Path, tmp_path: Path):
    other = dataclasses.replace(CONFIG, hidden_sizes=(4,), total_timesteps=8 * 32)
    ppo.run(other, run_dir=tmp_path / "other", **EVERY_2)
    shutil.copytree(tmp_path / "other/checkpoints/000000008", run_copy / "checkpoints/000000008")
    with pytest.warns(
        RunWarning, match="skipped .*000000008.*belongs to a different run: hidden_sizes"
    ):
        ppo.resume(run_copy, progress=False)
    with pytest.warns(
        RunWarning, match="skipped .*000000008.*belongs to a different run: hidden_sizes"
    ):
        assert ppo.load(run_copy).config == CONFIG


def test_a_failed_plot_loses_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plot today")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("purejaxppo.host.summary.learning_curve", broken)
        with pytest.warns(RunWarning, match="cannot be drawn: no plot today"):
            ppo.run(CONFIG, run_dir=run, **EVERY_2)
    assert (run / "summary.json").exists()
    assert not (run / "learning_curve.png").exists()
    ppo.resume(run, progress=False)
    assert (run / "learning_curve.png").exists()


@pytest.mark.slow
def test_names_are_escaped_in_plots_and_reports(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    config = dataclasses.replace(CONFIG, env_id=r"my_$env$_$\frac$<script>alert(1)</script>")
    ppo.run(config, env=RandomWalk(), run_dir=tmp_path / "run", **EVERY_2)
    ppo.sweep(
        config, {"gamma": [0.9, 0.99]}, env=RandomWalk(), run_dir=tmp_path / "s", eval_episodes=2,
        progress=False,
    )  # fmt: skip
    assert not [w for w in recwarn if issubclass(w.category, RunWarning)]
    page = (tmp_path / "s/report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_run_too_large_for_memory_is_refused_before_compiling(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("purejaxppo.host.conduct.compile_program", None)
    config = ppo.Config(num_envs=2_000_000_000, num_steps=1, num_minibatches=1)
    with pytest.raises(
        ppo.ConfigError, match=r"^2000000000 environments .*at least .* GB .* are free"
    ):
        ppo.run(config, progress=False)


def test_a_program_too_large_for_memory_is_not_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("purejaxppo.host.memory.free_bytes", lambda *_: 10_000)
    monkeypatch.setattr("purejaxppo.host.conduct.check_memory", lambda *_: None)
    with pytest.raises(
        ppo.ConfigError, match=r"will not fit into memory: training needs .* GB on each"
    ):
        ppo.run(CONFIG, progress=False)


def test_running_out_of_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr("purejaxppo.host.loop.Loop.train", exhausted)
    run = tmp_path / "run"
    with pytest.raises(
        ppo.ConfigError,
        match=r"will not fit into memory: training needs more \(.*\) on each device",
    ):
        ppo.run(CONFIG, run_dir=run, progress=False)
    assert [path.name for path in run.iterdir()] == [
        ".lock"
    ]  # so that the corrected command can use it


def test_a_save_interrupted_by_a_signal_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
):
    write, calls = checkpoint._write_arrays, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_arrays", interrupted)
    ppo.run(CONFIG, run_dir=tmp_path / "run", **EVERY_2)
    assert len(calls) == 1 + 3
    assert not [w for w in recwarn if issubclass(w.category, RunWarning)]


def test_file_sizes_and_message_lengths_are_limited(tmp_path: Path, capsys: Any):
    with pytest.raises(ppo.ConfigError) as refused:
        ppo.run(ppo.Config(env_id="x" * 10_000_000), progress=False)
    assert len(str(refused.value)) < 5000
    path = tmp_path / "config.toml"
    path.write_text("#" * 20_000_000)
    assert main(["train", str(path), "--run-dir", str(tmp_path / "r")]) == 2
    assert "has 20,000,000 bytes, more than the limit of 16,777,216" in capsys.readouterr().err


def test_the_file_cache_of_a_control_group_counts_as_free(tmp_path: Path):
    assert _group_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 300\nactive_file 400\n")
    assert _group_bytes(tmp_path) == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_bytes(tmp_path) is None


@pytest.mark.parametrize("change", ["damaged", "foreign"])
def test_an_unusable_best_checkpoint_does_not_end_a_run(run_copy: Path, change: str):
    """The next best is reported, and the other results are unchanged."""
    summary = json.loads((run_copy / "summary.json").read_text())
    (run_copy / "summary.json").unlink()
    best = run_copy / "checkpoints/000000004"
    if change == "foreign":
        found = checkpoint.read(best)
        other = dataclasses.replace(found.settings.run, seed=1)
        manifest = checkpoint.manifest_of(best) | {
            "settings": dump_settings(dataclasses.replace(found.settings, run=other))
        }
        checkpoint._write_manifest(best, manifest)
    checkpoint.record_evaluation(
        checkpoint.checkpoint_of(best, checkpoint.manifest_of(best)), 999.0
    )
    if change == "damaged":
        flip(next(p for p in best.rglob("*") if p.parent.name == "d"), 9)
    with pytest.warns(RunWarning, match="skipped .*000000004"):
        ppo.resume(run_copy, progress=False)
    again = json.loads((run_copy / "summary.json").read_text())
    assert again["eval_return_per_seed"] == summary["eval_return_per_seed"]
    assert again["best_checkpoint"]["updates"] != 4


@pytest.mark.parametrize("left", ["", "seed,upd"])
def test_an_evaluation_file_without_rows_is_empty(run_copy: Path, left: str):
    (run_copy / "eval.csv").write_text(left)
    assert evaluation_curve(run_copy)[0].size == 0
    EvalLog(run_copy, 32)
    assert (run_copy / "eval.csv").read_text().startswith("seed,update,")


@pytest.mark.parametrize(("old", "new"), [("update", "updaye"), ("sampled,", "sampled,x")])
def test_changed_evaluations_are_refused(run_copy: Path, old: str, new: str):
    path = run_copy / "eval.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    (run_copy / "summary.json").unlink()
    with pytest.raises(ppo.ConfigError, match=r"eval.csv': was changed: .*restore a copy"):
        ppo.resume(run_copy, progress=False)
