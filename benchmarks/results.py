"""Train each shipped config with 10 seeds, and write the README's table of results.

    python benchmarks/results.py [NAME ...] [--table-only]

Names are those of files in `configs/`; without one, all that have a row in the table. Results go to
`benchmarks/results/learning.json`, a row per config with its versions and device; the README's
table is made from that file alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from readme import write_table

import purejaxppo as ppo
from purejaxppo.host.configfile import load_settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/learning.json"
NUM_SEEDS = 10
# The mean over seeds of the final 128-episode evaluation that each config was made to reach.
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
    """The summary of a run of `configs/NAME.toml` with 10 seeds."""
    settings = load_settings(ROOT / "configs" / f"{name}.toml")
    return ppo.run(settings.config, settings.hparams, num_seeds=NUM_SEEDS).summary


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, and where and with what they were measured."""
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
        f"Final evaluation of 128 episodes, sampled actions, {NUM_SEEDS} seeds trained side by "
        f"side; seconds are of all of them together, after compiling, on "
        f"{one['device']['cpu_count']} {one['device']['platform'].upper()} cores that had other "
        f"work too ({versions}). `make results` repeats it.",
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
