"""Compare the search strategies of sweeps at the same number of environment steps.

    python benchmarks/search.py [--repeats N] [--resume] [--table-only]

Each strategy searches four hyperparameters of Acrobot `--repeats` times with different seeds. Its
result is the winner's return on at least 1,024 fresh episodes, since the return that selected the
winner is optimistic, the more so the more trials there were.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import write_table

import purejaxppo as ppo
from purejaxppo.host.stats import mean_interval

RESULTS = Path(__file__).parent / "results/search.json"
CONFIG = ppo.Config("Acrobot-v1", total_timesteps=61_440)
SPACE = {
    "learning_rate": ppo.loguniform(1e-5, 1e-1),
    "ent_coef": ppo.loguniform(1e-4, 1e-1),
    "gae_lambda": ppo.uniform(0.8, 1.0),
    "clip_eps": ppo.uniform(0.05, 0.5),
}
TRIALS = 27
STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"trials": TRIALS},
    "sobol": {"trials": TRIALS},
    "optuna": {"trials": TRIALS, "batch": 6},
    "halving": {"trials": 104, "rungs": 2},
    "pbt": {"trials": TRIALS, "interval": 6},
}
"""With halving, 104 trials start, which take about as many steps as 27 full ones."""


def search(strategy: Any, seed: int) -> dict[str, float]:
    """Search once; return the winner's fresh return and selection return."""
    began = time.perf_counter()
    result = ppo.sweep(
        CONFIG, SPACE, strategy=strategy, seed=seed, progress=False, **STRATEGIES[strategy]
    )
    updates = sum(outcome.updates for outcome in result.outcomes)
    assert result.best is not None
    return {
        "fresh_return": result.best_return,
        "selection_return": result.best.score,
        "env_steps": updates * CONFIG.batch_size,
        "seconds": time.perf_counter() - began,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| strategy | trials | environment steps | return [95% interval] | over random | "
        "selection return |",
        "|---|---|---|---|---|---|",
    ]
    random = np.array([run["fresh_return"] for run in results["runs"]["random"]])
    for name, runs in results["runs"].items():
        best = np.array([run["fresh_return"] for run in runs])
        selected = np.mean([run["selection_return"] for run in runs])
        mean, low, high = mean_interval(best)
        more, least, most = mean_interval(best - random)
        gain = "" if name == "random" else f"{more:+.1f} [{least:+.1f}, {most:+.1f}]"
        lines.append(
            f"| {name} | {STRATEGIES[name]['trials']} | {runs[0]['env_steps']:,} | "
            f"{mean:.1f} [{low:.1f}, {high:.1f}] | {gain} | {selected:.1f} |"
        )
    lines += [
        "",
        f"{CONFIG.env_id}, {CONFIG.num_updates * CONFIG.batch_size:,} steps per full run; "
        f"{', '.join(SPACE)}. Means over {len(random)} searches with different seeds, paired with "
        "random search of the same seed. The return is the winner's on 1,024 fresh episodes; its "
        "selection return is optimistic. `make bench-search` repeats it.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--resume", action="store_true", help="continue the saved searches")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in STRATEGIES}
        if args.resume:
            runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
        for seed in range(len(runs["random"]), args.repeats):
            for name, found in runs.items():
                found.append(search(name, seed))
                print(seed, name, json.dumps(found[-1]), flush=True)
            RESULTS.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")
    write_table("search", table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
