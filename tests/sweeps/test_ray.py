"""Sweeps on a Ray cluster of two nodes, one of which a test kills."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Process
from ray.cluster_utils import Cluster

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.sweeps.onray import Slots, count_slots, wave_resources
from purejaxppo.sweeps.settings import SweepSettings

# JAX warns because nodes are forked from a process that already uses it.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
SWEEP = (
    "sweep --hidden-sizes 16 --num-steps 32 --update-epochs 2 --total-timesteps 400000 "
    "--sample learning_rate=loguniform:1e-4,1e-2 --trials 4 --strategy halving --eta 2 --rungs 1 "
    "--checkpoint-every 0.5 --eval-episodes 8"
).split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes with one core each, which the commands of a test join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "RAY_worker_niceness", "0"
        )  # otherwise waves would wait for tests that run in parallel
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/xla").absolute()))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        head = {"num_cpus": 1, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            started.add_node(num_cpus=1)
            patch.setenv("RAY_ADDRESS", started.address)
            yield started
        finally:
            started.shutdown()


def trainers(directory: Path, before: set[Path]) -> dict[int, int]:
    """Process ids of training processes with a new checkpoint, by parent process id."""
    found = {}
    for wave in directory.glob("waves/*"):
        new = set(wave.glob("checkpoints/*/manifest.json")) - before
        if new and not (wave / "summary.json").exists():
            number = (wave / ".lock").read_text().split()[1]
            with suppress(OSError):
                status = Path("/proc", number, "status").read_text()
                found[int(status.partition("PPid:")[2].split()[0])] = int(number)
    return found


def without_waves(directory: Path) -> list[str]:
    lines = (directory / "results.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("disturbed", [False, True])
def test_stopped_sweep_that_loses_a_node_equals_a_local_sweep(
    cluster: Any, tmp_path: Path, disturbed: bool
):
    """Two waves run at a time. If disturbed, the sweep is stopped first, and loses a node after it
    is resumed."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    process = Process(tmp_path, *SWEEP, "--engine", "ray", "--run-dir", shared)
    if disturbed:
        process.until(lambda: trainers(shared, set()))
        process.popen.send_signal(signal.SIGTERM)
        assert process.end() == 143
        assert "stopped; to resume: purejaxppo resume" in process.text()

        before = set(shared.glob("waves/*/checkpoints/*/manifest.json"))
        (started,) = cluster.list_all_nodes()[1].all_processes["raylet"]
        raylet = started.process.pid
        process = Process(tmp_path, "resume", shared)
        worker = process.until(lambda: trainers(shared, before).get(raylet))
        os.kill(raylet, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
    assert process.end() == 0, process.text()
    assert ("its machine was lost" in process.text()) == disturbed

    assert main([*SWEEP, "--run-dir", str(alone)]) == 0
    assert without_waves(shared) == without_waves(alone)
    with np.load(shared / "curves.npz") as one, np.load(alone / "curves.npz") as other:
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    assert (shared / "winner.toml").read_text() == (alone / "winner.toml").read_text()


def test_slots_are_counted_from_the_resources_of_machines():
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources | {"memory": 1e9}}

    wanted = wave_resources(SweepSettings(engine="ray", wave_cpus=2, wave_gpus=1))
    nodes = [node(CPU=16.0, GPU=3.0), node(CPU=5.0, GPU=8.0), node(CPU=64.0)]
    assert count_slots(nodes, wanted) == Slots(total=3 + 2, max_per_node=3)
    assert count_slots([*nodes, node(alive=False, CPU=8.0, GPU=8.0)], wanted).total == 5
    with pytest.raises(ppo.ConfigError, match=r"ask for 2 CPU, 1 GPU, .*available: 64 CPU, 0 GPU"):
        count_slots([nodes[2]], wanted)
    chips = wave_resources(SweepSettings(engine="ray", wave_tpus=4))
    assert count_slots([node(CPU=96.0, TPU=8.0)], chips) == Slots(2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wave-cpus", "7"], "ask for 7 CPU, and no machine of the cluster has that"),
        (["--wave-gpus", "1"], "ask for 1 CPU, 1 GPU, and no machine of the cluster has that"),
        (["--wave-cpus", "0"], "wave_cpus = 0: must be at least 1"),
        (["--devices", "3"], "devices = 3: with engine = ray a wave has 1"),
    ],
)
def test_impossible_resources_are_refused_and_nothing_is_written(
    cluster: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    where = ["--engine", "ray", "--run-dir", str(tmp_path / "s")]
    assert main([*SWEEP, *where, *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_unreachable_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main([*SWEEP, "--engine", "ray", "--run-dir", str(tmp_path / "s")]) == 2
    assert "RAY_ADDRESS = '127.0.0.1:1' cannot be joined" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_address_without_a_cluster_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("purejaxppo.sweeps.onray.ANSWER_SECONDS", 3.0)
        assert main([*SWEEP, "--engine", "ray", "--run-dir", str(tmp_path / "s")]) == 2
    assert "cannot be joined" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


def test_ray_needs_a_run_directory_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ppo.ConfigError, match="give run_dir, on a disk that all machines share"):
        ppo.sweep(ppo.Config(), {"gamma": [0.9, 0.99]}, engine="ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*SWEEP, "--engine", "ray", "--run-dir", str(tmp_path / "s")]) == 2
    assert "pip install 'purejaxppo[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
