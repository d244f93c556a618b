"""Several processes on one machine that train one run together."""

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Process, assert_same_end, rows

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host import checkpoints, loop
from purejaxppo.host.processes import Processes, joined
from purejaxppo.host.signals import StopRequest

pytestmark = pytest.mark.usefixtures("one_cache")
LONG = "--num-envs=8 --hidden-sizes=16 --normalize-obs --eval-episodes=4 --total-timesteps=60000"
ENDED_WITHIN = 20.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def flags(process_id: int, port: int, num_processes: int = 2) -> list[str]:
    return [
        f"--coordinator=127.0.0.1:{port}", f"--num-processes={num_processes}",
        f"--process-id={process_id}",
    ]  # fmt: skip


@pytest.fixture
def start_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts both processes of a command, each with one device."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    started: list[Process] = []

    def begin(*arguments: Any) -> list[Process]:
        port = free_port()
        for i in range(2):
            folder = tmp_path / f"process {len(started)}"
            folder.mkdir()
            started.append(Process(folder, *arguments, *flags(i, port)))
        return started[-2:]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.wait()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_equal_one_with_two_devices_even_after_a_kill(
    start_two: Any, tmp_path: Path, killed: bool
):
    """Bit for bit: parameters, statistics, metrics and evaluation."""
    run, alone, before = tmp_path / "two", tmp_path / "one", 0
    both = start_two("train", *LONG.split(), "--run-dir", run, "--checkpoint-every=0.3")
    if killed:
        first, second = both
        first.until(lambda: checkpoints.has_any(run))
        second.popen.send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert first.end() == 1
        assert time.monotonic() - began < ENDED_WITHIN
        assert "lost process 1, so this process exits" in first.text()
        before = rows(run)
        both = start_two("resume", run)
    for process in both:
        assert process.end() == 0, process.text()
    assert rows(run) > before
    assert main(["train", *LONG.split(), "--run-dir", str(alone), "--devices=2"]) == 0
    assert_same_end(alone, run)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both(start_two: Any, tmp_path: Path):
    run = tmp_path / "r"
    first, second = start_two(
        "train", *LONG.split(), "--total-timesteps=1000000000", "--run-dir", run
    )
    first.until(lambda: rows(run) > 2)
    second.popen.send_signal(signal.SIGTERM)
    assert (first.end(), second.end()) == (143, 143), first.text() + second.text()
    assert "stopped; to resume: purejaxppo resume" in first.text()
    assert checkpoints.find(run)[0].position.updates == rows(run)


def test_a_signal_during_an_exchange_counts_at_the_next_one(monkeypatch: pytest.MonkeyPatch):
    """The other processes did not hear of it; if one stopped alone, they would wait forever."""
    stop = StopRequest()

    def agree_late(*numbers: int) -> np.ndarray:
        stop.signum = signal.SIGTERM
        return np.asarray([numbers, [0] * len(numbers)])

    monkeypatch.setattr(loop, "agree", agree_late)
    assert not loop.agreed(stop)
    assert loop.agreed(stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--coordinator=here", "coordinator = 'here': must be HOST:PORT"),
        ("--coordinator=127.0.0.1:1 --num-processes=1", "num_processes = 1: must be at least 2"),
        ("--coordinator=127.0.0.1:1 --num-processes=2 --process-id=2", "below num_processes = 2"),
        ("--num-processes=2", "several processes need a coordinator"),
        (
            "--coordinator=127.0.0.1:1 --num-processes=2 --process-id=1 --wait-seconds=0.3",
            "no answer from process 0 within 0.3 s",
        ),
    ],
)
def test_invalid_options_are_refused_before_jax_starts(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "--run-dir", str(tmp_path / "r"), *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_waiting_for_a_missing_process_times_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    command = ["train", "--run-dir", str(tmp_path / "r"), *flags(0, free_port())]
    assert main([*command, "--wait-seconds=0.3"]) == 2
    assert "only 1 connected within 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "identity", "task", "message"),
    [
        (3, 1, "train", "num_processes: the processes were given [2, 3]"),
        (2, 1, "something else", "the processes have different settings"),
    ],
)
def test_processes_that_disagree_all_exit(count: int, identity: int, task: str, message: str):
    """Uses threads, since none of them gets as far as starting JAX."""
    coordinator, results = f"127.0.0.1:{free_port()}", []

    def meet(count: int, identity: int, task: str) -> None:
        try:
            with joined(Processes(coordinator, count, identity, wait_seconds=10.0), task):
                results.append("joined")
        except ppo.ConfigError as error:
            results.append(str(error))

    other = threading.Thread(target=meet, args=(count, identity, task))
    other.start()
    meet(2, 0, "train")
    other.join()
    assert [message in text for text in results] == [True, True]
