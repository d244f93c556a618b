"""Real faults in separate processes: kills, signals, full disks, read-only directories."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE, Process, assert_same_end, evaluated, rows

import purejaxppo as ppo
from purejaxppo.host import checkpoints

pytestmark = pytest.mark.usefixtures("one_cache")

SIMPLE = "--total-timesteps=1500000 --checkpoint-every=0.2 --eval-episodes=8".split()
STATEFUL = (
    "--num-seeds=8 --memory=gru --memory-size=8 --hidden-sizes=16 --total-timesteps=150000 "
    "--normalize-obs --normalize-reward --checkpoint-every=0.2 --eval-episodes=8"
).split()
PIXELS = (
    "--env-id=Catch-bsuite --hidden-sizes=32 --total-timesteps=200000 --memory=lstm "
    "--checkpoint-every=5 --checkpoint-unit=updates --eval-episodes=8"
).split()
LANGUAGE = (
    "rlhf sort --num-layers=1 --width=16 --num-heads=2 --num-prompts=8 --group-size=8 "
    "--total-timesteps=61440 --checkpoint-every=10 --checkpoint-unit=updates --eval-episodes=8"
).split()
TEXTS = (
    "letters --num-layers=1 --width=16 --num-heads=2 --row-length=32 --batch-rows=4 "
    "--total-timesteps=15360 --checkpoint-every=10 --checkpoint-unit=updates --eval-episodes=8"
).split()
SFT, REWARD, DPO = (
    ["rlhf", kind, *TEXTS, f"--num-seeds={seeds}"]
    for kind, seeds in (("sft", 1), ("reward", 2), ("dpo", 1))
)
LONG = ["--total-timesteps=1000000000", "--eval-episodes=8"]


@pytest.fixture(autouse=True)
def handle_sigint() -> None:
    """Tests started in a shell's background ignore SIGINT, and so would their child processes."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Root may write everywhere, unless its process lacks these capabilities.
POWERLESS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")


def command(run: Path, arguments: Sequence[str]) -> list[Any]:
    """The command line of a run: of `train` if the arguments begin with an option."""
    name = ["train"] if arguments[0].startswith("-") else []
    return [*name, *arguments, "--run-dir", run]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from arguments to the directory of an undisturbed run. It trains in a
    separate process, which compiles the same programs as the disturbed ones."""
    done: dict[tuple[str | None, ...], Path] = {}

    def train(*arguments: str) -> Path:
        key = (os.environ.get("XLA_FLAGS"), *arguments)
        if key not in done:
            folder = tmp_path_factory.mktemp("alone")
            process = Process(folder, *command(folder / "run", arguments))
            assert process.end() == 0, process.text()
            done[key] = folder / "run"
        return done[key]

    return train


TIMED = ("compile_seconds", "run_seconds", "steps_per_second", "digest")
"""Entries of `summary.json` that differ between equal runs."""


def assert_same_results(one: Path, other: Path) -> None:
    """Compare all results of two runs that save checkpoints after the same updates. A kill after an
    evaluation may lose its samples."""
    assert_same_end(one, other)
    assert evaluated(one) == evaluated(other)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (one, other)]
    first, second = ({k: x for k, x in s.items() if k not in TIMED} for s in summaries)
    assert first == second
    if (one / "samples.jsonl").exists():
        whole, found = ((d / "samples.jsonl").read_text().splitlines() for d in (one, other))
        assert set(found) <= set(whole)
        assert found[-1] == whole[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started = []

    def begin(*arguments: Any, **options: Any) -> Process:
        started.append(Process(tmp_path, *arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()


# Killed


def kill_and_resume(
    start: Any, alone: Path, killed: Path, arguments: list[str], kills: int, seed: int
) -> int:
    """Kill a run repeatedly, at random moments of its start and its training, and resume it each
    time. If it finishes before enough kills, compare it with an undisturbed run and start again.

    Returns:
        how often it resumed from a checkpoint.
    """
    moments = random.Random(seed)
    given = command(killed, arguments)
    done = resumed = 0
    while done < kills:
        process, before = start(*given), rows(killed)
        if moments.random() < 0.2:  # during the start
            time.sleep(moments.uniform(0.0, 5.0))
        else:
            while rows(killed) in (0, before) and process.popen.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0.0, 1.5))
        process.popen.send_signal(signal.SIGKILL)
        finished = process.end() == 0
        done += not finished
        resumed += "resuming from update" in process.text()
        given = ["resume", killed]
        if finished or not (killed / "config.toml").exists():
            given = command(killed, arguments)
        if finished:
            assert_same_end(alone, killed)
            killed.rename(killed.with_name(f"killed {done}"))
    process = start(*given)
    assert process.end() == 0, process.text()
    return resumed + ("resuming from update" in process.text())


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            (
                "--num-envs=8 --hidden-sizes=16 --normalize-obs --eval-episodes=8 --num-seeds=2 "
                "--total-timesteps=153600 --checkpoint-every=15 --checkpoint-unit=updates"
            ).split(),
            marks=pytest.mark.faults,
        ),
        pytest.param(
            [
                *STATEFUL, "--total-timesteps=10240", "--checkpoint-every=4",
                "--checkpoint-unit=updates",
            ],
            marks=pytest.mark.faults,
        ),
        pytest.param(LANGUAGE, marks=pytest.mark.faults),
        pytest.param(SFT, marks=pytest.mark.faults),
        pytest.param(REWARD, marks=pytest.mark.slow),
        pytest.param(DPO, marks=pytest.mark.faults),
    ],
    ids=["plain", "stateful", "language", "sft", "reward", "dpo"],
)  # fmt: skip
def test_killed_after_a_checkpoint(
    start: Any, undisturbed: Any, tmp_path: Path, arguments: list[str]
):
    alone, run = undisturbed(*arguments), tmp_path / "r"
    process = start(*command(run, arguments))
    process.until(lambda: checkpoints.has_any(run))
    process.popen.send_signal(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    process = start("resume", run)
    assert process.end() == 0, process.text()
    assert "resuming from update" in process.text()
    assert_same_results(alone, run)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "kills"),
    [(SIMPLE, 20), (STATEFUL, 20), (PIXELS, 20), (LANGUAGE, 20), (SFT, 5), (REWARD, 5), (DPO, 5)],
    ids=["plain", "stateful", "lstm", "language", "sft", "reward", "dpo"],
)
def test_killed_repeatedly(
    start: Any,
    undisturbed: Any,
    tmp_path: Path,
    arguments: list[str],
    kills: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("XLA_FLAGS")  # these runs are long enough for optimised programs to pay
    alone, run = undisturbed(*arguments), tmp_path / "r"
    assert kill_and_resume(start, alone, run, arguments, kills=kills, seed=1) > 0
    same = assert_same_results if "--checkpoint-unit=updates" in arguments else assert_same_end
    same(alone, run)


# Stop signals


STOPPED = "--total-timesteps=40000 --eval-episodes=8 --hidden-sizes 128 128".split()
MOMENTS: dict[str, Callable[[Path, Process], Any]] = {
    "compiling": lambda run, p: "\ncompiling\n" in p.out.read_text(),
    "chunk": lambda run, p: rows(run) > 20,
    "saving": lambda run, p: rows(run) > 20 and list((run / "checkpoints").glob("*.saving*")),
}


def stop_and_resume(
    start: Any, folder: Path, moment: str, signum: int, arguments: Sequence[str] = STOPPED
) -> Path:
    """Stop a run with a signal, resume it to its end, and return its directory."""
    run = folder / "ru n é"
    often = ["--checkpoint-every=1e-9"] if moment == "saving" else []
    process = start(*command(run, [*arguments, *often]))
    process.until(lambda: MOMENTS[moment](run, process))
    process.popen.send_signal(signum)
    assert process.end() == 128 + signum, process.text()
    assert f"stopped; to resume: purejaxppo resume '{run}'" in process.text()
    if moment != "compiling":
        found, skipped = checkpoints.find(run)
        assert found.position.updates * found.settings.num_runs == rows(run) > 0
        assert not skipped
    process = start("resume", run.relative_to(folder))
    assert process.end() == 0, process.text()
    return run


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_saves_and_exits_with_143(
    start: Any, undisturbed: Any, tmp_path: Path, moment: str
):
    run = stop_and_resume(start, tmp_path, moment, signal.SIGTERM)
    assert_same_end(undisturbed(*STOPPED), run)


@pytest.mark.faults
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigint_saves_and_exits_with_130(start: Any, undisturbed: Any, tmp_path: Path, moment: str):
    run = stop_and_resume(start, tmp_path, moment, signal.SIGINT)
    assert_same_end(undisturbed(*STOPPED), run)


@pytest.mark.faults
@pytest.mark.parametrize(
    "arguments", [LANGUAGE, SFT, REWARD, DPO], ids=["policy", "sft", "reward", "dpo"]
)
def test_a_language_model_run_saves_on_sigterm(
    start: Any, undisturbed: Any, tmp_path: Path, arguments: list[str]
):
    run = stop_and_resume(start, tmp_path, "chunk", signal.SIGTERM, arguments)
    assert_same_end(undisturbed(*arguments), run)


EVALUATED = "--num-envs=64 --eval-episodes=1000000 --env-id=Pendulum-v1 --hidden-sizes=256".split()
"""Arguments with which each evaluation takes minutes."""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_stop_does_not_wait_for_the_evaluation_of_a_checkpoint(
    start: Any, tmp_path: Path, devices: int
):
    """On one device training continues during the evaluation; on two devices it waits for it."""
    run, often = tmp_path / "r", ["--checkpoint-every=0.1", f"--devices={devices}"]
    process = start("train", "--run-dir", run, *often, *LONG[:1], *EVALUATED)
    process.until(lambda: checkpoints.has_any(run))
    time.sleep(1.0)
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 143
    assert checkpoints.find(run)[0].position.updates == rows(run)


@pytest.mark.faults
def test_a_stop_does_not_wait_for_the_final_evaluation(start: Any, tmp_path: Path):
    run = tmp_path / "r"
    process = start("train", "--run-dir", run, "--total-timesteps=8192", *EVALUATED)
    process.until(lambda: checkpoints.has_any(run))
    time.sleep(1.0)
    process.popen.send_signal(signal.SIGINT)
    assert process.end() == 130
    assert "to resume: purejaxppo resume" in process.text()


def test_a_second_signal_exits_at_once(start: Any, tmp_path: Path):
    process = start("train", "--run-dir", tmp_path / "r", *LONG, "--no-compilation-cache")
    process.until(lambda: MOMENTS["compiling"](tmp_path, process))
    process.popen.send_signal(signal.SIGINT)
    process.until(
        lambda: (
            "SIGINT: stopping; press Ctrl-C again to quit immediately" in process.err.read_text()
        )
    )
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 143
    assert "to resume" not in process.text()
    assert rows(tmp_path / "r") == 0


@pytest.mark.slow
def test_a_signal_during_run_in_python_saves_and_raises(tmp_path: Path):
    """In a script that calls `run`, a signal raises Python's own exceptions."""
    code = """
import sys, signal, threading, time, os, purejaxppo as ppo
from pathlib import Path
run = Path(sys.argv[1])
def send():
    while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_bytes()) < 2000:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
before = signal.getsignal(signal.SIGINT)
threading.Thread(target=send).start()
try:
    ppo.run(ppo.Config(total_timesteps=10**9), run_dir=run, progress=False)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is before
    assert int(ppo.load(run).state.learner.updates) > 0
    print("saved")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "r")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "saved\n"


# Full disks


WIDE = "--hidden-sizes 128 128 --num-steps=512 --checkpoint-every=0.5 --devices=1".split()


def limit_files(process: Process, size: int = resource.RLIM_INFINITY) -> None:
    """Limit the size in bytes of all files that the process writes."""
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_training_continues_on_a_full_disk_and_keeps_checkpoints(start: Any, tmp_path: Path):
    run = tmp_path / "r"
    process = start("train", "--run-dir", run, *LONG, *WIDE)
    first = process.until(lambda: checkpoints.has_any(run) and checkpoints.find(run)[0])
    limit_files(process, 200_000)
    process.until(lambda: "training continues, and earlier checkpoints" in process.err.read_text())
    assert re.search(r"cannot be written: .*File too large", process.text())
    last, _ = checkpoints.find(run)
    assert last.position.updates >= first.position.updates
    limit_files(process)
    process.until(lambda: checkpoints.find(run)[0].position.updates > last.position.updates)
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 143


@pytest.mark.faults
@pytest.mark.parametrize("what", ["checkpoint", "metrics", "tensorboard"])
def test_a_run_ended_by_a_full_disk_can_be_resumed(
    start: Any, undisturbed: Any, tmp_path: Path, what: str
):
    arguments = [*WIDE, "--total-timesteps=60000", "--eval-episodes=8"]
    run, logged = tmp_path / "r", ["--tensorboard"] if what == "tensorboard" else []
    process = start("train", "--run-dir", run, *arguments, *logged)
    process.until(lambda: rows(run) > 10)
    limit_files(process, 200_000 if what == "checkpoint" else (run / "metrics.csv").stat().st_size)
    assert process.end() == 1
    said = "" if what == "checkpoint" else "metrics"
    assert f"{said} cannot be written: " in process.text()
    assert not checkpoints.unfinished(run)
    assert f"free space, then: purejaxppo resume {run}" in process.text()
    assert start("resume", run).end() == 0
    assert_same_end(undisturbed(*arguments), run)


@pytest.mark.slow
def test_an_unwritable_checkpoint_folder_gives_a_message(start: Any, tmp_path: Path):
    """The process exits without waiting for orbax's threads."""
    run = tmp_path / "r"
    prefix = POWERLESS if os.geteuid() == 0 else ()
    process = start("train", "--run-dir", run, *LONG, "--checkpoint-every=0.5", prefix=prefix)
    process.until(lambda: checkpoints.has_any(run))
    (run / "checkpoints").chmod(0o555)
    process.until(lambda: "training continues" in process.err.read_text())
    process.popen.send_signal(signal.SIGTERM)
    assert process.end() == 1
    assert "cannot be written: " in process.text()
    (run / "checkpoints").chmod(0o755)
    assert checkpoints.find(run)[0].position.updates > 0


@pytest.mark.faults
def test_a_run_survives_a_closed_output_pipe(tmp_path: Path):
    arguments = ["train", "--run-dir", str(tmp_path / "r"), "--total-timesteps=20000"]
    with subprocess.Popen(
        [sys.executable, "-m", "purejaxppo", *arguments, "--eval-episodes=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert (tmp_path / "r/summary.json").exists()


# Directories


@pytest.mark.parametrize("command", ["resume", pytest.param("train", marks=pytest.mark.faults)])
def test_a_second_process_is_refused_and_names_the_first(start: Any, tmp_path: Path, command: str):
    run = tmp_path / "r"
    first = start("train", "--run-dir", run, *LONG)
    first.until(lambda: rows(run))
    pid, out = first.popen.pid, first.out.rename(tmp_path / "first stdout")
    again = {"resume": ["resume", run], "train": ["train", "--run-dir", run, *LONG]}
    second = start(*again[command])
    assert second.end() == 2
    assert f"is in use by process {pid} on " in second.text()
    assert "; wait for it, stop it" in second.text()
    assert first.popen.poll() is None
    first.popen.send_signal(signal.SIGTERM)
    assert first.end() == 143
    assert "stopped" in out.read_text()


@pytest.mark.slow
def test_a_read_only_directory_is_refused_before_compiling_but_can_be_read(
    start: Any, tmp_path: Path
):
    run = tmp_path / "r"
    config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(8,))
    ppo.run(config, run_dir=run, eval_episodes=2, progress=False)
    prefix = POWERLESS if os.geteuid() == 0 else ()
    for path in [*run.rglob("*"), run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for command in (["resume", run], ["train", "--run-dir", run / "new", *LONG]):
            process = start(*command, prefix=prefix)
            assert process.end() == 2
            assert "cannot be written: Permission denied" in process.text()
            assert "compil" not in process.text()
        process = start("eval", run, "--episodes=4", prefix=prefix)
        assert process.end() == 0
        assert "seed 0: return" in process.text()
    finally:
        for path in [run, *run.rglob("*")]:
            path.chmod(0o755)
