"""Train each shipped config with 10 seeds, and write the table of results.

    python benchmarks/results.py [NAME ...] [--table-only]

Names are those of files in `configs/`; the default is all configs in `TARGETS`. Results go to
`benchmarks/results/learning.json`, with the versions and device of each run; the table is generated
from that file alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import write_table

import purejaxppo as ppo
from purejaxppo.host.configfile import load_settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/learning.json"
NUM_SEEDS = 10
# Target of each config: mean over seeds of the final evaluation over 128 episodes.
TARGETS = {
    "cartpole": 495.0,
    "acrobot": -80.0,
    "pendulum": -170.0,
    "mountain_car": -115.0,
    "mountain_car_continuous": 92.0,
    "catch": 0.98,
    "breakout": None,
}


def train(name: str) -> dict[str, Any]:
    """Train `configs/NAME.toml` with 10 seeds and return the summary."""
    settings = load_settings(ROOT / "configs" / f"{name}.toml")
    return ppo.run(settings.config, settings.hparams, num_seeds=NUM_SEEDS).summary


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table with a footnote on how they were measured."""
    lines = [
        "| config | environment | steps | return [95% interval] | worst seed | target | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, target in TARGETS.items():
        if name not in results:
            continue
        r = results[name]
        low, high = r["eval_return_interval_95"]
        lines.append(
            f"| `{name}` | {r['env_id']} | {r['env_steps']:,} | {r['eval_return_mean']:.2f} "
            f"[{low:.2f}, {high:.2f}] | {min(r['eval_return_per_seed']):.2f} | "
            f"{'' if target is None else f'>= {target:g}'} | {r['run_seconds']:.0f} |"
        )
    one = next(iter(results.values()))
    versions = ", ".join(f"{k} {one['versions'][k]}" for k in ("jax", "flax", "gymnax"))
    lines += [
        "",
        f"Final evaluation over 128 episodes per seed with sampled actions; {NUM_SEEDS} seeds are "
        f"trained in parallel. Seconds are for all seeds together, without compilation, on "
        f"{one['device']['cpu_count']} {one['device']['platform'].upper()} cores that were shared "
        f"with other work ({versions}). `make results` repeats it.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.names) - set(TARGETS):
        parser.error(f"no such config: {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if args.table_only else args.names or list(TARGETS):
        results[name] = train(name)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table("results", table(results))


if __name__ == "__main__":
    main()
