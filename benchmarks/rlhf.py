"""Train decoders on the shipped tasks with all objectives, and measure the speed.

For each task and objective, a sweep of the same size chooses the hyperparameters. Results go to
`benchmarks/results/rlhf.json`, tables and plots into the documentation.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from tables import IMAGES, ROOT, write_table

import purejaxppo as ppo
from purejaxppo import rlhf
from purejaxppo.checks import EnvParams
from purejaxppo.host.stats import mean_interval

RESULTS = ROOT / "benchmarks/results/rlhf.json"
OBJECTIVES = tuple(rlhf.TOKEN_OBJECTIVES)
MAIN = ("ppo_clip", "reinforce_pp", "rloo", "grpo", "gspo")
NUM_SEEDS, TRIALS, EPISODES = 5, 6, 256
TASKS: dict[str, dict[str, Any]] = {
    "sort": {"params": {"shortest": 3, "longest": 4, "digits": 6}, "length": 5, "tokens": 400_000,
             "of": OBJECTIVES},
    "reverse": {"params": {"shortest": 3, "longest": 3, "digits": 8}, "length": 4,
                "tokens": 250_000, "of": MAIN},
    "sum": {"params": {"shortest": 3, "longest": 4, "digits": 4}, "length": 3, "tokens": 500_000,
            "of": MAIN},
    "arithmetic": {"params": {"digits": 5, "carries": False}, "length": 3, "tokens": 600_000,
                   "of": MAIN},
    "countdown": {"params": {"numbers": 2, "largest": 9, "products": False, "reorder": False},
                  "length": 4, "tokens": 500_000, "of": MAIN},
}  # fmt: skip
SPACE = {
    "learning_rate": ppo.loguniform(7e-4, 3e-3),
    "ent_coef": ppo.loguniform(3e-3, 0.1),
    "clip_eps": ppo.choice([0.1, 0.2, 0.4]),
}
SHAPES = ((64, 2, 8), (128, 2, 8), (64, 4, 8), (64, 2, 32), (128, 4, 32))
"""Width, layers and maximum response length of the decoders whose speed is measured."""


def config_of(task: str, objective: Any) -> rlhf.RLHFConfig:
    about = TASKS[task]
    return rlhf.RLHFConfig(
        objective, task, EnvParams(about["params"]), response_length=about["length"],
        num_prompts=64, num_minibatches=8, num_layers=1, total_timesteps=about["tokens"],
    )  # fmt: skip


def hparams_of(**changes: Any) -> rlhf.RLHFHParams:
    return rlhf.RLHFHParams(**({"kl_coef": 0.0, "clip_eps": 0.2} | changes))


def search(task: str, objective: str) -> dict[str, float]:
    """The best of a few random settings, by the score of one seed."""
    found = ppo.sweep(
        config_of(task, objective), SPACE, hparams=hparams_of(), trials=TRIALS,
        eval_episodes=EPISODES, progress=False, seed=1,
    )  # fmt: skip
    assert found.best is not None
    return {name: float(value) for name, value in found.best.trial.values.items()}


def measure(task: str, objective: str, values: dict[str, float]) -> dict[str, Any]:
    began = time.perf_counter()
    result = ppo.run(
        config_of(task, objective), hparams_of(**values), num_seeds=NUM_SEEDS,
        eval_episodes=EPISODES, progress=False, seed=7,
    )  # fmt: skip
    score = result.metrics["score"]
    points = np.unique(np.linspace(0, score.shape[1] - 1, 60).astype(int))
    each = config_of(task, objective).batch_size
    return {
        "exact": np.mean(result.returns_deterministic >= 1 - 1e-6, axis=1).tolist(),
        "exact_sampled": np.mean(result.returns >= 1 - 1e-6, axis=1).tolist(),
        "seconds": time.perf_counter() - began,
        "curve": {
            "tokens": ((points + 1) * each).tolist(),
            "score": np.round(score[:, points], 4).tolist(),
        },
    }


def before(task: str) -> float:
    """Share of exact answers of the reference."""
    made = config_of(task, "grpo").make_task()
    learner = made.learner(None)
    state = jax.jit(learner.init)(jax.random.key(0), hparams_of(), made.data)
    returns = jax.jit(
        lambda state, key: ppo.evaluate(made, state, key, EPISODES, deterministic=True)
    )(state, jax.random.key(1))
    return float(np.mean(np.asarray(returns) >= 1 - 1e-6))


def fill(results: dict[str, Any]) -> None:
    """Measure all missing rows."""

    def save() -> None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for task, about in TASKS.items():
        if task not in results["before"]:
            results["before"][task] = before(task)
        for objective in about["of"]:
            if (name := f"{task} {objective}") not in results["rows"]:
                values = search(task, objective)
                row: dict[str, Any] = {**measure(task, objective, values), "settings": values}
                results["rows"][name] = row
                save()
                print(
                    name, np.round(row["exact"], 3), values, f"{row['seconds']:.0f} s", flush=True
                )


# Speed


def speed_of(width: int, layers: int, length: int) -> dict[str, Any]:
    """Seconds and floating-point operations of the parts of an update, on this process's cores."""
    from purejaxppo.rlhf.actor import TokenActor
    from purejaxppo.rlhf.task import architecture_of

    config = rlhf.RLHFConfig(
        "grpo", "sort", num_prompts=32, num_minibatches=8, width=width, num_layers=layers,
        response_length=length,
    )  # fmt: skip
    problem, hparams = rlhf.PROBLEMS["sort"](), hparams_of()
    task = rlhf.make_rlhf_task(config, problem)
    learner, data = task.learner(None), task.data
    network = rlhf.make_decoder(architecture_of(config, problem))
    actor = TokenActor(config, problem, network)
    state = jax.jit(learner.init)(jax.random.key(0), hparams, data)
    began = time.perf_counter()
    update = jax.jit(lambda state: learner.update(state, hparams, data)).lower(state).compile()
    compile_seconds = time.perf_counter() - began
    sample = jax.jit(
        lambda state: actor.sample(state.learner.params, state.actors, hparams, data)[1]
    )
    collect = jax.jit(lambda state: actor.collect(state.learner, state.actors, hparams, data)[1])
    whole, generated, collected = (_seconds(f, state) for f in (update, sample, collect))
    memory: Any = update.memory_analysis()
    positions = config.num_sequences * (problem.prompt_length + length - 1)
    weights = layers * (4 + 8) * width**2 + width * problem.vocab_size
    steps = problem.prompt_length + length
    forward = positions * 2 * (weights + layers * 2 * steps * width)
    return {
        "width": width, "layers": layers, "length": length,
        "tokens": config.batch_size, "positions": positions,
        "generate": generated, "read": collected - generated, "learn": whole - collected,
        "operations": {"generate": forward, "read": 2 * forward, "learn": 3 * forward},
        "compile": compile_seconds, "matmul": _matmul_rate(),
        "bytes": memory.temp_size_in_bytes / positions,
    }  # fmt: skip


def _seconds(function: Any, state: Any) -> float:
    """Seconds per call: the minimum of several means over a few calls."""
    jax.block_until_ready(function(state))
    means = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([function(state) for _ in range(3)])
        means.append((time.perf_counter() - began) / 3)
    return min(means)


def _matmul_rate() -> float:
    """Floating-point operations per second of a product of two 1,024 x 1,024 matrices."""
    x = jax.numpy.ones((1024, 1024))
    return 2 * 1024**3 / _seconds(jax.jit(lambda x: x @ x), x)


def speeds() -> list[dict[str, Any]]:
    """Measure all shapes, each in its own process on one core."""
    found = []
    for shape in SHAPES:
        words = [sys.executable, __file__, "--shape", *map(str, shape)]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
        print(shape, flush=True)
    return found


# Tables and plots


def exact_table(results: dict[str, Any]) -> str:
    names = [name for name in TASKS if f"{name} grpo" in results["rows"]]
    lines = [
        "| objective | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---|" + "---|" * len(names),
        "| before | " + " | ".join(f"{results['before'][name]:.1%}" for name in names) + " |",
    ]
    for objective in OBJECTIVES:
        cells = [_cell(results["rows"].get(f"{name} {objective}")) for name in names]
        lines.append(f"| `{objective}` | " + " | ".join(cells) + " |")
    sizes = ", ".join(f"{TASKS[name]['tokens'] // 1000}k for `{name}`" for name in names)
    lines += [
        "",
        f"Share of held-out prompts answered exactly (greedy): mean of {NUM_SEEDS} seeds, with the "
        f"lowest seed in brackets. All objectives generate the same number of tokens: {sizes}. "
        "Learning rate, entropy bonus and clip range of each objective and task are the best of "
        f"{TRIALS} random samples. The decoders have one layer of width 64 and start from random "
        f"weights; there is no KL penalty. One run of "
        f"{NUM_SEEDS} seeds takes {_range(results)}. {results['machine']}. `make bench-rlhf` "
        "reproduces the table.",
    ]
    return "\n".join(lines)


def _cell(row: Any) -> str:
    return "-" if row is None else f"{np.mean(row['exact']):.1%} ({min(row['exact']):.0%})"


def _range(results: dict[str, Any]) -> str:
    seconds = [row["seconds"] for row in results["rows"].values()]
    return f"{min(seconds):.0f} to {max(seconds):.0f} s"


def speed_table(results: dict[str, Any]) -> str:
    lines = [
        "| width, layers, response | tokens/s | generated/s | trained/s | generation | log-probs | "
        "training | share of matmul rate | bytes per token | compile |",
        "|---|" + "---|" * 9,
    ]
    for row in results["speeds"]:
        parts = [row[name] for name in ("generate", "read", "learn")]
        total, operations = sum(parts), sum(row["operations"].values())
        cells = [
            f"{row['width']}, {row['layers']}, {row['length']}",
            *(f"{row['tokens'] / x / 1e3:.1f}k" for x in (total, parts[0], parts[2])),
            *(f"{x / total:.0%}" for x in parts),
            f"{operations / total / row['matmul']:.0%}", f"{row['bytes']:,.0f}",
            f"{row['compile']:.0f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "One core, `grpo`, 512 responses per update to prompts of at most 5 tokens, 8 minibatches. "
        "Every response counts at its maximum length. Generation, log-probs and training are their "
        "shares of the time of an update; log-probs are the forward passes of policy and reference "
        "over whole sequences. The share of matmul rate compares the operations per second of the "
        "decoder's matrix products, counted by hand, with those of a product of 1,024 x 1,024 "
        f"matrices on the same core. {results['machine']}.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    mpl.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    for objective in OBJECTIVES:
        rows = {n: results["rows"].get(f"{n} {objective}") for n in TASKS}
        shown = {name: row for name, row in rows.items() if row is not None}
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, row) in enumerate(shown.items()):
            tokens, score = np.array(row["curve"]["tokens"]), np.array(row["curve"]["score"])
            mean, low, high = mean_interval(score.T)
            axes.plot(tokens, mean, color=f"C{color}", label=name)
            axes.fill_between(tokens, low, high, color=f"C{color}", alpha=0.2, lw=0)
        axes.set_xlabel("generated tokens (per seed)")
        axes.set_ylabel("score")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title(f"{objective}: mean of {NUM_SEEDS} seeds, 95% interval")
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(IMAGES / f"rlhf-{objective}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if args.shape:
        print(json.dumps(speed_of(*args.shape)))
        return
    results: dict[str, Any] = {"before": {}, "rows": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not args.table_only:
        cores, python = os.cpu_count(), platform.python_version()
        results["machine"] = f"{cores} CPU cores, jax {jax.__version__}, Python {python}"
        if "speeds" not in results:
            results["speeds"] = speeds()
        ppo.enable_compilation_cache()
        fill(results)
    draw(results)
    write_table("exact", exact_table(results), "rlhf")
    write_table("token-speed", speed_table(results), "rlhf")


if __name__ == "__main__":
    if "--shape" in sys.argv:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main()
