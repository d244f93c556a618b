"""Measure the cost of checkpoints: time taken from training, size on disk, time to resume.

    python benchmarks/checkpoints.py [--table-only]

Each case is trained `PAIRS` times without and with checkpoints, one after the other. The cost of
one checkpoint, including its evaluation, is the difference in time divided by their number. Results
go to `benchmarks/results/checkpoints.json`, from which the table is generated.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tables import write_table

import purejaxppo as ppo
from purejaxppo.host.configfile import RunSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/checkpoints.json"
PAIRS = 5
CHECKPOINTS = 10
CASES: dict[str, tuple[ppo.Config, int]] = {
    "CartPole, 1 seed": (ppo.Config(total_timesteps=1_000_000), 1),
    "CartPole, 64 seeds": (ppo.Config(total_timesteps=50_000), 64),
    "Breakout-MinAtar, 1 seed": (
        ppo.Config(
            "Breakout-MinAtar", total_timesteps=160_000, num_envs=64, hidden_sizes=(128,),
            activation="relu",
        ),
        1,
    ),
}  # fmt: skip


def measure(config: ppo.Config, num_seeds: int, folder: Path) -> dict[str, Any]:
    """Measure one case; the seconds are per checkpoint."""
    every = config.num_updates // (CHECKPOINTS + 1)
    never = float("inf")
    options: dict[str, Any] = {"num_seeds": num_seeds, "checkpoint_unit": "updates"}
    warm = ppo.run(
        config, run_dir=folder / "warm", checkpoint_every=every, progress=False, **options
    )
    wall, cpu = [], []
    for pair in range(PAIRS):
        took = []
        for unit, interval in (("without", never), ("with", every)):
            directory = folder / f"{unit} {pair}"
            began = time.process_time()
            result = ppo.run(
                config, run_dir=directory, checkpoint_every=interval, progress=False, **options
            )
            took.append((result.summary["run_seconds"], time.process_time() - began))
        count = (config.num_updates - 1) // every
        wall.append((took[1][0] - took[0][0]) / count)
        cpu.append((took[1][1] - took[0][1]) / count)
    saved = next((folder / "with 0/checkpoints").iterdir())
    return {
        "wall_seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "bytes": sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()),
        "resume_seconds": spread([resume_seconds(folder / "warm") for _ in range(PAIRS)]),
        "environment": {k: warm.summary[k] for k in ("device", "versions")},
    }


def resume_seconds(run: Path) -> float:
    """Seconds from the start of a process, with a warm compilation cache, until training continues.

    Resumes a copy of `run` without its last checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(shutil.copytree(run, Path(folder) / "cut"))
        shutil.rmtree(max((cut / "checkpoints").iterdir()))
        began = time.perf_counter()
        command = [sys.executable, "-u", "-m", "purejaxppo", "resume", str(cut)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = process.stdout or []
            seconds = [time.perf_counter() - began for x in lines if x.startswith("compiled in")]
    return seconds[0]


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [round(x, 4) for x in (statistics.median(values), min(values), max(values))]


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table with a footnote on how they were measured."""
    every = RunSettings().checkpoint_every
    lines = [
        "| run | size | one checkpoint takes from training | CPU time | share at the default "
        "interval | time to resume |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        wall, cpu, resumed = r["wall_seconds"], r["cpu_seconds"], r["resume_seconds"]
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.2f} MB | {wall[0]:.2f} s [{wall[1]:.2f}, {wall[2]:.2f}]"
            f" | {cpu[0]:.2f} s [{cpu[1]:.2f}, {cpu[2]:.2f}] | {100 * wall[0] / every:.2f}% | "
            f"{resumed[0]:.1f} s [{resumed[1]:.1f}, {resumed[2]:.1f}] |"
        )
    one = next(iter(results.values()))["environment"]
    versions = ", ".join(f"{k} {one['versions'][k]}" for k in ("jax", "flax", "gymnax"))
    device = one["device"]
    lines += [
        "",
        f"Median [lowest, highest] of {PAIRS} pairs of runs, with and without {CHECKPOINTS} or "
        "more checkpoints; a checkpoint includes its evaluation over 128 episodes per seed; the "
        f"default interval is {every:.0f} s; a resume is timed from the start of the process, "
        f"with a warm compilation cache, until training continues. {device['cpu_count']} "
        f"{device['platform'].upper()} cores ({versions}). `make bench-checkpoints` repeats it.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table-only", action="store_true")
    if not parser.parse_args().table_only:
        results = {}
        for name, (config, num_seeds) in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                results[name] = measure(config, num_seeds, Path(folder))
            print(name, json.dumps(results[name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table("checkpoints", table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
