"""Train on environments of suites with 5 seeds, and compare the returns with published ones.

    python benchmarks/world_scores.py [PREFIX ...] [--table-only]

A prefix selects the environments whose name starts with it; the default is all. Results go to
`benchmarks/results/world_scores.json`; the table is generated from that file and from that of
`results.py`, which has the runs of Breakout and classic control. MuJoCo Playground is not part of
the locked packages: install it with `pip install 'purejaxppo[playground]'`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import results as learning
from tables import write_table
from worlds import processor

import purejaxppo as ppo
from purejaxppo.host.configfile import load_settings

RESULTS = learning.ROOT / "benchmarks/results/world_scores.json"
NUM_SEEDS = 5
KEPT = (
    "env_id", "num_seeds", "eval_episodes", "eval_return_mean", "eval_return_interval_95",
    "eval_return_per_seed", "unfinished_eval_episodes", "failed_seeds", "env_steps",
    "compile_seconds", "run_seconds", "versions",
)  # fmt: skip
"""What is kept of the summary of a run."""


class Source(NamedTuple):
    """Where published returns come from."""

    name: str
    url: str


GYMNAX = Source("gymnax", "https://github.com/RobertTLange/gymnax#readme")
CRAFTAX = Source("Craftax", "https://github.com/MichaelTMatthews/Craftax#-scoreboard")
SLM_LAB = Source(
    "SLM-Lab",
    "https://github.com/kengz/SLM-Lab-doc/blob/4b271685/benchmark-results/playground-benchmark.md",
)
NAVIX = Source(
    "Navix", "https://github.com/epignatelli/navix/tree/80465d7c/baselines/rejax/results"
)
NAVIX_EMPTY = Source("Navix", "https://github.com/epignatelli/navix/tree/3857a3bc/baselines/rejax")


class Published(NamedTuple):
    """A published return."""

    number: float
    text: str
    source: Source


class Entry(NamedTuple):
    """An environment, the config that it is trained with, and what has been published."""

    env_id: str
    config: str
    published: Published | None = None
    changed: Mapping[str, Any] = {}
    """Settings of the config that differ from the file."""
    maximum: float | None = None
    """Highest possible return, if returns are compared in percent of it."""
    eval_episodes: int = 128
    """Episodes of the final evaluation; fewer where they are long and slow."""
    learning_rate: float | None = None
    """The learning rate, if it differs from the file."""


ENTRIES = (
    Entry("jumanji/Snake-v1", "worlds/jumanji"),
    Entry("jumanji/Game2048-v1", "worlds/jumanji"),
    Entry(
        "navix/Navix-Empty-Random-8x8-v0", "worlds/navix",
        Published(0.998, "0.998, PPO, 1M steps, 32 seeds", NAVIX_EMPTY),
    ),
    Entry(
        "navix/Navix-DoorKey-8x8-v0", "worlds/navix",
        Published(0.997, "0.997 ± 0.012, PPO, 1M steps, 32 seeds", NAVIX),
    ),
    Entry(
        "navix/Navix-FourRooms-v0", "worlds/navix",
        Published(0.139, "0.139 ± 0.083, PPO, 1M steps, 32 seeds", NAVIX),
        {"shared_trunk": True},
    ),
    Entry(
        "playground/CartpoleBalance", "worlds/physics",
        Published(968.2, "968, PPO, 100M steps, 4 seeds", SLM_LAB),
        {"total_timesteps": 1_000_000},
    ),
    Entry(
        "playground/CartpoleSwingup", "worlds/physics",
        Published(729.1, "729, PPO, 100M steps, 4 seeds", SLM_LAB),
    ),
    Entry(
        "craftax/Craftax-Symbolic-v1", "worlds/craftax",
        Published(4.97, "2.2%, PPO, 1M steps; 2.3%, PPO with a memory", CRAFTAX),
        maximum=226.0, eval_episodes=32,
    ),
    Entry("craftax/Craftax-Classic-Symbolic-v1", "worlds/craftax", eval_episodes=32),
    Entry("brax/spring/hopper", "worlds/physics", None, {"total_timesteps": 1_000_000}),
    Entry("brax/spring/halfcheetah", "worlds/physics", None, {"total_timesteps": 1_000_000}),
    Entry(
        "Asterix-MinAtar", "minatar", Published(15.0, "15, PPO or ES, 10M steps", GYMNAX),
        {"total_timesteps": 1_000_000},
    ),
    Entry(
        "Freeway-MinAtar", "minatar", Published(58.0, "58, PPO or ES, 10M steps", GYMNAX),
        {"total_timesteps": 1_000_000},
    ),
    Entry(
        "SpaceInvaders-MinAtar", "minatar", Published(131.0, "131, PPO or ES, 10M steps", GYMNAX),
        {"total_timesteps": 5_000_000}, learning_rate=1e-3,
    ),
    Entry(
        "Pendulum-v1", "pendulum", Published(-130.0, "-130, PPO or ES, 1M steps", GYMNAX),
        {"total_timesteps": 1_000_000},
    ),
    Entry(
        "MountainCar-v0", "mountain_car", Published(-118.0, "-118, PPO or ES, 500k steps", GYMNAX),
        {"total_timesteps": 500_000},
    ),
)  # fmt: skip
CLASSIC = {
    "breakout": Published(28.0, "28, PPO or ES, 10M steps", GYMNAX),
    "acrobot": Published(-80.0, "-80, PPO or ES, 500k steps", GYMNAX),
    "mountain_car_continuous": Published(92.0, "92, PPO or ES, 1M steps", GYMNAX),
}
"""Published returns for the configs of `results.py`."""


def train(entry: Entry) -> dict[str, Any]:
    """Train with 5 seeds and return what is kept of the summary."""
    settings = load_settings(learning.ROOT / "configs" / f"{entry.config}.toml")
    assert isinstance(settings.config, ppo.Config)
    config = dataclasses.replace(settings.config, env_id=entry.env_id, **entry.changed)
    hparams, changed = settings.hparams, dict(entry.changed)
    if entry.learning_rate is not None:
        hparams = dataclasses.replace(hparams, learning_rate=entry.learning_rate)
        changed["learning_rate"] = entry.learning_rate
    began = time.perf_counter()
    summary = ppo.run(
        config, hparams, num_seeds=NUM_SEEDS, eval_episodes=entry.eval_episodes,
        progress=False,
    ).summary  # fmt: skip
    return {name: summary[name] for name in KEPT} | {
        "config": entry.config, "changed": changed,
        "wall_seconds": round(time.perf_counter() - began, 1), "cores": summary["device"]["used"],
        "processor": processor(),
    }  # fmt: skip


def row(result: dict[str, Any], published: Published | None, maximum: float | None = None) -> str:
    """One line of the table."""
    low, high = result["eval_return_interval_95"]
    numbers = (result["eval_return_mean"], low, high, min(result["eval_return_per_seed"]))
    digits = 3 if max(abs(x) for x in numbers) < 2 else 1
    mean, low, high, worst = (f"{x:.{digits}f}" for x in numbers)
    share = "" if maximum is None else f", {100 * result['eval_return_mean'] / maximum:.1f}%"
    source = "none found"
    if published is not None:
        source = f"{published.text} ([{published.source.name}]({published.source.url}))"
    ours = f"{mean} [{low}, {high}]{share} | {worst}"
    return f"| `{result['env_id']}` | {result['env_steps']:,} | {ours} | {source} |"


def table(found: dict[str, dict[str, Any]], classic: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table with a footnote on how they were measured."""
    lines = [
        "| environment | steps | return [95% interval] | worst seed | published |",
        "|---|---|---|---|---|",
    ]
    lines += [row(found[e.env_id], e.published, e.maximum) for e in ENTRIES if e.env_id in found]
    lines += [row(classic[name], x) for name, x in CLASSIC.items() if name in classic]
    one, processors = next(iter(found.values())), {x["processor"] for x in found.values()}
    versions = ", ".join(f"{k} {one['versions'][k]}" for k in ("jax", "flax", "gymnax"))
    lines += [
        "",
        f"Final evaluation over {one['eval_episodes']} episodes per seed (Craftax: 32) with "
        f"sampled actions. {NUM_SEEDS} seeds ({learning.NUM_SEEDS} on Breakout, Acrobot and "
        f"MountainCarContinuous, whose runs are those of [the shipped configs]"
        f"(#returns-of-the-shipped-configs)). Percentages are of the highest possible return. "
        f"{' and '.join(sorted(processors))}, one core, {versions}. "
        "`make results-worlds` repeats it.",
    ]
    return "\n".join(lines)


def _read(path: Any) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="such as navix/")
    parser.add_argument("--table-only", action="store_true")
    given = parser.parse_args()
    prefixes = tuple(given.prefixes) or ("",)
    if not (chosen := [e for e in ENTRIES if e.env_id.startswith(prefixes)]):
        parser.error(f"no environment starts with {' or '.join(prefixes)}")
    for entry in [] if given.table_only else chosen:
        result = train(entry)
        print(entry.env_id, result["eval_return_per_seed"], result["wall_seconds"], flush=True)
        found = _read(RESULTS) | {entry.env_id: result}
        found = {e.env_id: found[e.env_id] for e in ENTRIES if e.env_id in found}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_table("world-scores", table(_read(RESULTS), _read(learning.RESULTS)), "world_scores")


if __name__ == "__main__":
    main()
