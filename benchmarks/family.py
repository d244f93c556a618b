"""Compare all objectives on four environments, each with its own hyperparameter search.

    python benchmarks/family.py [--only ENV_ID] [--rates] [--table-only]

Each pair of environment and objective gets a random search of `TRIALS` trials with `SEARCH_SEEDS`
seeds each, and then `NUM_SEEDS` fresh seeds with the best hyperparameters. Pairs that are already
in the results file are skipped. Speeds are measured at the end, and again with `--rates`, in a
short run of one seed; nothing else may run on the machine then.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from tables import IMAGES, write_table

import purejaxppo as ppo
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.stats import bootstrap_interval, interquartile_mean
from purejaxppo.sweeps.space import apply

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results/family.json", IMAGES / "family.png"
TRIALS, SEARCH_SEEDS, NUM_SEEDS = 12, 2, 20
SEARCH_SEED, FINAL_SEED = 1, 1000
RATE_STEPS = 200_000

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"config": "cartpole", "steps": 500_000, "limit": 500, "threshold": 475.0},
    "Acrobot-v1": {"config": "acrobot", "steps": 500_000, "limit": 500, "threshold": -100.0},
    "Pendulum-v1": {"config": "pendulum", "steps": 500_000, "limit": 200, "threshold": -200.0},
    "Breakout-MinAtar": {
        "config": "breakout", "steps": 500_000, "limit": 1000, "threshold": 5.0,
        "encoder": "mlp",
    },
}  # fmt: skip
"""Breakout uses dense layers, which are several times faster on CPU, and gymnax's time limit."""

ONE_EPOCH: dict[str, Any] = {"update_epochs": 1, "num_minibatches": 1}
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reinforce": ({"advantage_normalization": "none"} | ONE_EPOCH, {}),
    "reinforce_baseline": ({"advantage_normalization": "none"} | ONE_EPOCH, {}),
    "a2c": ({"num_envs": 16, "num_steps": 16} | ONE_EPOCH, {}),
    "trpo": (
        {"num_envs": 16, "num_steps": 128, "update_epochs": 10, "num_minibatches": 16},
        {"trpo_delta": ppo.loguniform(0.003, 0.1), "cg_damping": ppo.loguniform(0.01, 0.3)},
    ),
    "ppo_kl": ({}, {"kl_beta": ppo.loguniform(0.1, 30.0)}),
    "ppo_kl_adaptive": ({}, {"target_kl": ppo.loguniform(0.003, 0.1)}),
    "ppo_clip": ({}, {"clip_eps": ppo.uniform(0.05, 0.4)}),
}
"""For each objective, changes to the environment's config, and additions to `SPACE`. `reinforce`
does not normalise returns, since that would act as a baseline."""
SPACE = {
    "learning_rate": ppo.loguniform(1e-4, 2e-2),
    "gae_lambda": ppo.uniform(0.8, 1.0),
    "ent_coef": ppo.loguniform(1e-4, 3e-2),
}


def space_of(objective: str) -> dict[str, Any]:
    read = SPACE | OBJECTIVES[objective][1]
    if objective.startswith("reinforce"):
        del read["gae_lambda"]
    return read


def config_of(env_id: str, objective: str) -> tuple[ppo.Config, ppo.HParams]:
    about = ENVIRONMENTS[env_id]
    settings = load_settings(HERE.parent / "configs" / f"{about['config']}.toml")
    changes = OBJECTIVES[objective][0]
    if objective.startswith("reinforce"):
        # Twice the time limit, so that episodes from the first half of a rollout always count.
        changes = changes | {"num_envs": 4, "num_steps": 2 * about["limit"]}
    config = dataclasses.replace(
        settings.config, objective=objective, total_timesteps=about["steps"],
        encoder=about.get("encoder", "auto"), **changes,
    )  # fmt: skip
    return config, settings.hparams


def measure(env_id: str, objective: str) -> dict[str, Any]:
    about, (config, hparams) = ENVIRONMENTS[env_id], config_of(env_id, objective)
    began = time.perf_counter()
    found = ppo.sweep(
        config, space_of(objective), hparams=hparams, seed=SEARCH_SEED,
        trials=TRIALS, num_seeds=SEARCH_SEEDS, eval_episodes=32, progress=False,
    )  # fmt: skip
    searched = time.perf_counter() - began
    assert found.best is not None
    result = ppo.run(
        found.config, found.hparams, seed=FINAL_SEED, num_seeds=NUM_SEEDS, progress=False
    )
    returns = result.returns.mean(axis=1)
    returns[list(result.failed)] = np.nan
    steps = steps_to(result.metrics, about["threshold"])
    return {
        "values": found.best.trial.values,
        "search_seconds": searched,
        "returns": returns.tolist(),
        "steps_to_threshold": [None if np.isnan(x) else int(x) for x in steps],
        "curve": curve_of(result.metrics),
    }


def rate(env_id: str, objective: str, values: dict[str, Any]) -> float:
    """Environment steps per second of a single run on one core."""
    config, hparams = config_of(env_id, objective)
    config, hparams = apply(values, config, hparams)
    config = dataclasses.replace(config, total_timesteps=RATE_STEPS)
    result = ppo.run(config, hparams, eval_episodes=1, progress=False)
    return result.summary["steps_per_second"]


def steps_to(metrics: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    """`[S]` environment steps until the mean return reaches the threshold, NaN if it never does.

    The mean is over the last updates that contain at least 100 episodes.
    """
    found = []
    for returns, episodes, steps in zip(
        *(metrics[name] for name in ("episode_return", "episodes", "env_steps")), strict=True
    ):
        sums = np.where(episodes > 0, np.nan_to_num(returns) * episodes, 0.0)
        totals, counts = (np.append(0.0, np.cumsum(x)) for x in (sums, np.nan_to_num(episodes)))
        before = np.searchsorted(counts, counts[1:] - 100.0)
        before = np.minimum(before, np.arange(len(episodes)))
        mean = (totals[1:] - totals[before]) / np.maximum(counts[1:] - counts[before], 1)
        reached = np.flatnonzero((mean >= threshold) & (counts[1:] >= 100))
        found.append(steps[reached[0]] if reached.size else np.nan)
    return np.array(found)


def curve_of(metrics: dict[str, np.ndarray], points: int = 50) -> dict[str, list[float]]:
    """Learning curve of `points` points: interquartile mean over seeds of training returns."""
    steps = metrics["env_steps"][0]
    edges = np.linspace(0, steps[-1], points + 1)
    place = np.clip(np.digitize(steps, edges) - 1, 0, points - 1)
    rows = []
    for i in range(points):
        part = metrics["episode_return"][:, place == i]
        seen = np.isfinite(part)
        mean = np.where(seen, part, 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        mean = mean[seen.any(axis=1)]
        rows.append(float(interquartile_mean(mean)) if mean.size else float("nan"))
    centres = (edges[1:] + edges[:-1]) / 2
    keep = np.isfinite(rows)
    return {"steps": centres[keep].tolist(), "return": np.array(rows)[keep].tolist()}


def measured(results: dict[str, Any]) -> list[str]:
    """Environments on which all objectives have been measured."""
    rows = results["rows"]
    return [e for e in ENVIRONMENTS if all(f"{e} {name}" in rows for name in OBJECTIVES)]


def table(results: dict[str, Any]) -> str:
    lines = [
        "| environment | objective | return, interquartile mean [95% interval] | seeds at "
        "threshold | steps to threshold | seconds to threshold |",
        "|---|---|---|---|---|---|",
    ]
    for env_id in measured(results):
        about = ENVIRONMENTS[env_id]
        for objective in OBJECTIVES:
            row = results["rows"][f"{env_id} {objective}"]
            returns = np.array(row["returns"], float)
            low, high = bootstrap_interval(returns, interquartile_mean)
            steps = [x for x in row["steps_to_threshold"] if x is not None]
            to_it, seconds = "-", "-"
            if len(steps) > len(returns) / 2:
                every = [np.inf if x is None else x for x in row["steps_to_threshold"]]
                to_it = f"{np.median(every):,.0f}"
                seconds = f"{np.median(every) / row['steps_per_core_second']:.1f}"
            lines.append(
                f"| {env_id} (>= {about['threshold']:g}) | `{objective}` | "
                f"{float(interquartile_mean(returns)):.1f} [{low:.1f}, {high:.1f}] | "
                f"{len(steps)} of {len(returns)} | {to_it} | {seconds} |"
            )
    lines += [
        "",
        f"{NUM_SEEDS} seeds each, with the best of {TRIALS} random sets of hyperparameters, each "
        f"tried with {SEARCH_SEEDS} seeds for the same 500,000 steps. Returns are means over 128 "
        "evaluation episodes. Steps and seconds (on one core) are medians over seeds until the "
        "mean of the last 100 training episodes reached the threshold. "
        f"{results['machine']}. `make bench-family` repeats it.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    env_ids = measured(results)
    rows = -(-len(env_ids) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 3.75 * rows), constrained_layout=True, squeeze=False
    )
    colors = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
    for axis, env_id in zip(axes.flat, env_ids, strict=False):
        for color, objective in zip(colors, OBJECTIVES, strict=False):
            curve = results["rows"][f"{env_id} {objective}"]["curve"]
            axis.plot(curve["steps"], curve["return"], label=objective, color=color, lw=1.6)
        axis.axhline(ENVIRONMENTS[env_id]["threshold"], color="0.6", lw=0.8, ls="--")
        axis.set_title(env_id)
        axis.set_xlabel("environment steps")
        axis.set_ylabel("training return (interquartile mean)")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
    for axis in axes.flat[len(env_ids) :]:
        axis.remove()
    axes.flat[0].legend(fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def fill(results: dict[str, Any], env_ids: list[str], again: bool) -> None:
    """Measure all missing pairs; then missing speeds, or all speeds if `again`."""

    def save() -> None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    rows = results["rows"]
    pairs = [(env_id, objective) for env_id in env_ids for objective in OBJECTIVES]
    for env_id, objective in pairs:
        if (name := f"{env_id} {objective}") not in rows:
            rows[name] = measure(env_id, objective)
            save()
            print(name, f"{np.nanmean(rows[name]['returns']):.2f}", flush=True)
    for env_id, objective in pairs:
        row = rows[f"{env_id} {objective}"]
        if again or "steps_per_core_second" not in row:
            row["steps_per_core_second"] = rate(env_id, objective, row["values"])
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(ENVIRONMENTS), metavar="ENV_ID")
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"rows": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not args.table_only:
        cores, python = os.cpu_count(), platform.python_version()
        results["machine"] = f"{cores} CPU cores, jax {jax.__version__}, Python {python}"
        fill(results, [args.only] if args.only else list(ENVIRONMENTS), args.rates)
    draw(results)
    write_table("family", table(results))


if __name__ == "__main__":
    main()
