"""Compare the training speed of purejaxppo with other libraries and the limit of the machine.

    python benchmarks/speed.py [--full] [--cases NAME ...] [--repeats N] [--table-only]

All contestants of a case are compiled first, with empty caches. Then they train in turn, one at a
time, for `--repeats` rounds. Hyperparameters are the same for all. Results are written case by case
to `benchmarks/results/speed.json`, from which the tables and the figure are generated.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contestants import ENVIRONMENTS, ROOT, Contestant, output_of
from speed_report import headline, plot, table
from tables import IMAGES, write_table

RESULTS = ROOT / "benchmarks/results"
CORES = os.cpu_count() or 1
NUM_STEPS = 128
PYTHON = "gymnasium/"
"""The prefix of environments that ours steps in Python."""
QUICK_SOLVE_ROUNDS = 3
FULL_LENGTH = 2
"""Factor by which runs are longer with `--full`."""


@dataclass(frozen=True)
class Case:
    """Runs that are compared with each other."""

    num_envs: int
    steps: dict[str, int]
    """Environment steps per run and seed, for each contestant."""
    env: str = "CartPole-v1"
    seeds: int = 1
    limit: bool = False
    only_full: bool = False

    def spec(self, name: str, scale: float) -> dict[str, Any]:
        batch = self.num_envs * NUM_STEPS
        return {
            "env": self.env if name.startswith("ours") else self.env.removeprefix(PYTHON),
            "num_envs": self.num_envs,
            "num_steps": NUM_STEPS,
            "total": batch * max(1, round(self.steps[name] * scale / batch)),
            "seeds": self.seeds,
            "encoder": "mlp" if name == "ours" else "auto",
        }


def both(steps: int) -> dict[str, int]:
    return {"ours": steps, "rejax": steps}


CASES = {
    "cartpole-4": Case(4, both(512_000) | {"sbx": 20_000, "sb3": 20_000}, limit=True),
    "cartpole-64": Case(64, both(1_048_576), limit=True),
    "cartpole-1024": Case(1024, both(2_097_152), limit=True),
    "breakout-64": Case(64, both(81_920) | {"ours, conv": 32_768}, "Breakout-MinAtar"),
    "pendulum-4": Case(4, both(256_000), "Pendulum-v1"),
    "gymnasium-cartpole-8": Case(
        8, {"ours": 81_920, "sbx": 20_480, "sb3": 20_480}, f"{PYTHON}CartPole-v1"
    ),
    "gymnasium-acrobot-8": Case(
        8, {"ours": 40_960, "sbx": 20_480, "sb3": 20_480}, f"{PYTHON}Acrobot-v1"
    ),
    "seeds-4": Case(4, both(128_000), seeds=4),
    "seeds-16": Case(4, both(64_000), seeds=16),
    "seeds-64": Case(4, both(32_000), seeds=64, only_full=True),
    "seeds-256": Case(4, both(8_000), seeds=256, only_full=True),
}
ACCELERATOR_CASES = (
    {f"cartpole-{n}": Case(n, both(128 * n * 16)) for n in (64, 1024, 8192, 65_536)}
    | {
        f"breakout-{n}": Case(
            n, both(128 * n * 8) | {"ours, conv": 128 * n * 8}, "Breakout-MinAtar"
        )
        for n in (64, 1024)
    }
    | {f"seeds-{n}": Case(4, both(25_600), seeds=n) for n in (1, 16, 256, 4096)}
)
SOLVE = {
    "env": "CartPole-v1",
    "num_envs": 4,
    "num_steps": NUM_STEPS,
    "learning_rate": 2.5e-4,
    "threshold": 475,
    "limit": 500_000,
}
MEMORY = {"1 x 0.5M": (1, 500_000), "64 x 0.5M": (64, 500_000), "64 x 5M": (64, 5_000_000)}
"""Number of seeds, and environment steps per seed."""


@dataclass
class Benchmark:
    """Options of this script, and its results together with those of earlier calls."""

    full: bool
    repeats: int
    scale: float
    accelerator: bool
    path: Path
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))

    def cases(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Measuring functions of all available cases, by name."""
        table = ACCELERATOR_CASES if self.accelerator else CASES
        measured: dict[str, Callable[[], dict[str, Any]]] = {
            name: lambda case=case: self.race(case)
            for name, case in table.items()
            if self.full or not case.only_full
        }
        return measured if self.accelerator else measured | {
            "solve": self.solve,
            "memory": self.memory,
        }  # fmt: skip

    def measure(self, name: str) -> None:
        measured = self.cases()[name]()
        self.results.setdefault("cases", {})[name] = measured | {
            "date": datetime.now(UTC).date().isoformat(),
            "full": self.full,
            "cpu": processor(),
        }
        self.results.setdefault("hardware", hardware(self.path.stem))
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")

    def race(self, case: Case) -> dict[str, Any]:
        """Measure all contestants of a case in turn, and the limit of the machine."""
        names = [n for n in case.steps if not self.accelerator or runs_on_accelerator(n)]
        scale = self.scale * (FULL_LENGTH if self.full else 1)
        with ExitStack() as stack:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            racers = {
                name: stack.enter_context(
                    Contestant(name, case.spec(name, scale), cache / name, self.accelerator)
                )
                for name in names
            }
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for _ in range(self.repeats):
                for name, racer in racers.items():
                    runs[name].append(racer.ask("go"))
            rows = {name: row(racers[name].ready, runs[name], runs["ours"]) for name in names}
            for name in (n for n in names if n.startswith("ours")):
                rows[name]["devices"] = racers[name].ask("devices")["value"]
            compiled = not case.env.startswith(PYTHON)
            for name in names if compiled and case.seeds == 1 and not self.accelerator else []:
                rows[name]["evaluation"] = racers[name].ask("return")["value"]
            with Contestant(
                "ours", case.spec("ours", scale), cache / "ours", self.accelerator
            ) as second:
                rows["ours"]["warm_compile_seconds"] = second.ready["compile_seconds"]
        measured: dict[str, Any] = {"seeds": case.seeds, "contestants": rows}
        if case.limit and not self.accelerator:
            measured["limit"] = limit(case, rows["ours"])
        return measured

    def solve(self) -> dict[str, Any]:
        """Measure seconds from the start of a process until it has solved CartPole.

        If ours does not solve it, its time counts as infinite; if a peer does not, its time until
        it gave up counts.
        """
        names = ["ours, cold cache", "ours, warm cache", "sbx", *(["sb3"] if self.full else [])]
        rounds = self.repeats if self.full else min(self.repeats, QUICK_SOLVE_ROUNDS)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for seed in range(rounds):
            spec = SOLVE | {"seed": seed, "limit": round(SOLVE["limit"] * self.scale)}
            with tempfile.TemporaryDirectory() as cache:
                for name in names:
                    began = time.perf_counter()
                    who = name.split(",")[0]
                    found = output_of(who, f"solve_{who}.py", spec, Path(cache))
                    runs[name].append({"wall": time.perf_counter() - began, **found})
        warm = [
            run["wall"] if run["solved_after_steps"] else float("inf")
            for run in runs["ours, warm cache"]
        ]
        return {
            "spec": SOLVE,
            "contestants": {
                name: {
                    "seconds": spread([run["wall"] for run in runs[name]]),
                    "ours_over": spread(
                        [run["wall"] / w for run, w in zip(runs[name], warm, strict=True)]
                    ),
                    "runs": runs[name],
                }
                for name in names
            },
        }

    def memory(self) -> dict[str, Any]:
        """Measure peak memory of our process and XLA's estimate; long runs only with `--full`."""
        measured = {}
        for name, (seeds, steps) in MEMORY.items():
            case = Case(4, {"ours": steps}, seeds=seeds)
            spec = case.spec("ours", self.scale)
            with (
                tempfile.TemporaryDirectory() as cache,
                Contestant("ours", spec, Path(cache)) as ours,
            ):
                run = ours.ask("go") if self.full or seeds == 1 else {}
                measured[name] = {
                    "xla_mb": ours.ask("xla_mb")["value"],
                    "peak_rss_mb": run.get("peak_rss_mb"),
                }
        return {"runs": measured}


def row(
    ready: dict[str, Any], runs: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> dict[str, Any]:
    """Results of a contestant; `ours_over` is our speed divided by its speed, per round."""
    rates = [run["steps"] / run["wall"] for run in runs]
    our_rates = [run["steps"] / run["wall"] for run in ours]
    return ready | {
        "steps_per_second": spread(rates),
        "steps_per_cpu_second": statistics.median(run["steps"] / run["cpu"] for run in runs),
        "ours_over": spread([a / b for a, b in zip(our_rates, rates, strict=True)]),
        "return": runs[-1]["return"],
        "peak_rss_mb": runs[-1]["peak_rss_mb"],
        "runs": runs,
    }


def limit(case: Case, ours: dict[str, Any]) -> dict[str, Any]:
    """Upper limit of steps per second, and the fraction of it that ours reaches.

    The limit assumes environment steps and arithmetic at the machine's measured rates, on the cores
    that ours uses.
    """
    spec = case.spec("ours", 1.0)
    with tempfile.TemporaryDirectory() as cache:
        one = output_of("ours", "limit.py", spec, Path(cache))
    arithmetic = one["flops_per_step"] / (one["gflops"] * 1e9)
    bound = ours["devices"] / (1 / one["random_steps_per_second"] + arithmetic)
    return {
        "one_core": one,
        "cores": ours["devices"],
        "steps_per_second": bound,
        "fraction": ours["steps_per_second"][0] / bound,
    }


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def runs_on_accelerator(name: str) -> bool:
    return name.startswith("ours") or (name == "rejax" and (ENVIRONMENTS / "rejax").exists())


def hardware(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "cpu": processor(),
        "cores": CORES,
        "platform": platform.platform(),
    }


def processor() -> str:
    """CPU name, family, model and vector extension; CPUs with the same name can differ."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    found = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", path.read_text().split("\n\n")[0], re.M))
    flags = found.get("flags", "").split()
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2"}
    widest = next((name for flag, name in vectors.items() if flag in flags), "no AVX2")
    family = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{found.get('model name', platform.processor())}, {family}, {widest}"


def accelerator_name() -> str:
    """JAX's name of the accelerator, for file names; a subprocess asks, to free it again."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return re.sub(r"[^A-Za-z0-9]+", "-", done.stdout.strip())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="longer runs, more cases and libraries")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="measure only these; keep other results"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--table-only", action="store_true", help="only write the tables")
    parser.add_argument(
        "--accelerator", action="store_true", help="measure on JAX's default device"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="to try this script: runs X times as long, results only in .bench",
    )
    args = parser.parse_args()
    if args.repeats < 1 or args.scale <= 0:
        parser.error("--repeats and --scale must be above 0")
    return args


def main() -> None:
    args = parse()
    folder = RESULTS if args.scale == 1 else ENVIRONMENTS
    stem = f"speed-{accelerator_name()}" if args.accelerator else "speed"
    path = folder / f"{stem}.json"
    benchmark = Benchmark(args.full, args.repeats, args.scale, args.accelerator, path)
    available = list(benchmark.cases())
    names = [] if args.table_only else args.cases or available
    if unknown := set(names) - set(available):
        raise SystemExit(f"no such case: {', '.join(unknown)}; choose from {', '.join(available)}")
    if names == available:
        benchmark.results.pop("hardware", None)
    for name in names:
        began = time.perf_counter()
        benchmark.measure(name)
        print(f"{name}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    pictures = IMAGES if folder == RESULTS else folder
    plot(benchmark.results, pictures / f"{stem}.png")
    text = table(benchmark.results)
    print(text)
    if folder == RESULTS and not args.accelerator:
        write_table("speed", text)
        write_table("headline", headline(benchmark.results), script="speed")


if __name__ == "__main__":
    main()
