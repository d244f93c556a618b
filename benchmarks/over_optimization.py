"""Over-optimise a learned reward, exactly: optima, best of n responses, and trained policies.

    taskset -c 0 python benchmarks/over_optimization.py [--table-only | --preferences-only]

The problem is that of `tests/rlhf/overoptimized.py`. Results go to
`benchmarks/results/over_optimization.json`, a figure and a table into the documentation.
"""

import argparse
import importlib
import itertools
import json
import os
import platform
import sys
import time
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
from tables import IMAGES, ROOT, write_table

import purejaxppo as ppo
from purejaxppo.host.stats import mean_interval

sys.path.insert(0, str(ROOT / "tests/rlhf"))
exact: Any = importlib.import_module("overoptimized")

RESULTS, PICTURE = ROOT / "benchmarks/results/over_optimization.json", "over-optimization.png"
PROBLEMS, SEEDS, UPDATES = 10, 3, 200
OBJECTIVES = ("ppo_clip", "rloo")
PENALTIES = (1.0, 0.3, 0.1)
DIRECT = {"dpo": ("sigmoid", (1.0, 0.3, 0.1)), "ipo": ("ipo", (0.3, 0.1, 0.03))}
"""Direct preference optimisation: losses, and their values of `kl_coef`."""
STEPS = 400
"""Updates of direct preference optimisation, of 64 pairs each."""
TRAINED = (100, 1600)
"""Numbers of pairs of the proxies that policies are trained on."""


def as_lists(points: Any) -> dict[str, Any]:
    return {name: np.asarray(x).round(5).tolist() for name, x in points._asdict().items()}


def curves(setting: Any, proxy: Any) -> dict[str, Any]:
    scores = proxy.scores()
    optima, best_of = exact.curve_of(setting, scores), exact.best_of_curve(setting, scores)
    return {
        "optima": as_lists(optima),
        "best_of": as_lists(best_of),
        "law": as_lists(exact.fit_law(optima)),
        "correlation": float(np.exp(setting.log_ref) @ (scores * setting.gold)),
    }


def over_problems() -> dict[str, Any]:
    """Curves of several random problems, for each number of pairs."""
    found: dict[str, Any] = {str(n): [] for n in exact.PAIRS}
    for seed in range(PROBLEMS):
        setting = exact.setting_of(seed)
        for n in exact.PAIRS:
            found[str(n)].append(curves(setting, exact.fit_proxy(setting, n, seed)))
    return found


def with_decoders() -> dict[str, Any]:
    """Curves of one problem whose reference is a decoder, and policies trained on it."""
    fitted = exact.fit_decoder(0)
    setting = exact.decoder_setting(fitted, 0)
    proxies = {n: exact.fit_proxy(setting, n, 0) for n in exact.PAIRS}
    found: dict[str, Any] = {
        "curves": {str(n): curves(setting, proxy) for n, proxy in proxies.items()}, "points": [],
    }  # fmt: skip
    for objective in OBJECTIVES:
        train = exact.trainer(exact.config_of(objective, UPDATES), fitted)
        for n, beta, seed in itertools.product(TRAINED, PENALTIES, range(SEEDS)):
            log_pi = train(seed, beta, proxies[n])
            names = {"objective": objective, "pairs": n, "kl_coef": beta, "seed": seed}
            found["points"].append(names | measured(setting, proxies[n].scores(), log_pi))
            print(found["points"][-1], flush=True)
    return found


def from_preferences() -> list[dict[str, Any]]:
    """Policies trained on the pairs by direct preference optimisation: for the problem of
    `with_decoders`, whose number is 0, with several seeds, and for further problems with one."""
    trainers = {
        name: exact.preference_trainer(exact.dpo_config_of(loss, STEPS))
        for name, (loss, _) in DIRECT.items()
    }
    found = []
    for problem, n in itertools.product(range(PROBLEMS), TRAINED):
        fitted = exact.fit_decoder(problem)
        setting = exact.decoder_setting(fitted, problem)
        scores = exact.fit_proxy(setting, n, problem).scores()
        texts = exact.texts_of(setting, *exact.labels_of(setting, n, problem))
        runs = [(name, beta) for name, (_, betas) in DIRECT.items() for beta in betas]
        for (name, beta), seed in itertools.product(runs, range(1 if problem else SEEDS)):
            log_pi = trainers[name](seed, beta, fitted, texts)
            names = {"problem": problem, "objective": name, "pairs": n, "kl_coef": beta}
            found.append(names | {"seed": seed} | measured(setting, scores, log_pi))
            print(found[-1], flush=True)
    return found


def measured(setting: Any, scores: Any, log_pi: Any) -> dict[str, Any]:
    """A policy's point, and the optimum with the same divergence."""
    point = exact.point_of(setting, scores, log_pi)
    curve = exact.at_divergence(setting, scores, point.divergence)
    return as_lists(point) | {"on_curve": as_lists(curve)}


# Tables and plots


def table(results: dict[str, Any]) -> str:
    lines = [
        "| pairs | correlation of proxy and gold | highest gold | at KL | gold at beta = 0.02 | "
        "gold falls in | best of 1,024 | R^2 |",
        "|---|" + "---|" * 7,
    ]
    for n, rows in results["problems"].items():
        gold = np.array([row["optima"]["gold"] for row in rows])
        kl = np.array([row["optima"]["divergence"] for row in rows])
        peak = gold.argmax(axis=1)[:, None]
        best = [row["best_of"]["gold"][-1] for row in rows]
        r2 = [row["law"]["explained"] for row in rows]
        fallen = gold.max(axis=1) - gold[:, -1]
        cells = [
            f"{int(n):,}", f"{np.mean([row['correlation'] for row in rows]):.2f}",
            _interval(gold.max(axis=1)), f"{np.take_along_axis(kl, peak, 1).mean():.1f}",
            _interval(gold[:, -1]), f"{np.sum(fallen > 0.01)} of {len(rows)}",
            f"{np.mean(best):.2f}", f"{np.mean(r2):.2f} ({min(r2):.2f})",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Means over {PROBLEMS} random problems, with 95% intervals in square brackets and the "
        "lowest value in round ones. Gold falls in a problem if it ends more than 0.01 below its "
        "highest value. R^2 is that of the fit d (alpha - beta log d).",
        "",
        *_distances(results),
        "",
        *_from_preferences(results["preferences"]),
    ]
    return "\n".join(lines)


def _distances(results: dict[str, Any]) -> list[str]:
    """Trained policies: their divergence, and the distance from the curve."""
    lines = [
        "| pairs | objective | `kl_coef` | KL (optimum) | proxy | gold | proxy minus curve | "
        "gold minus curve |",
        "|---|" + "---|" * 7,
    ]
    decoder, seconds = results["decoder"], results["seconds"] + results["preference_seconds"]
    for key, points in _groups(_of_figure(results)).items():
        n, beta, objective = key
        mean = {k: np.mean([p[k] for p in points]) for k in ("divergence", "proxy", "gold")}
        kl = f"{mean['divergence']:.2f}"
        if objective in OBJECTIVES:
            kl += f" ({_optimum_kl(decoder['curves'][str(n)]['optima'], beta):.2f})"
        cells = [
            f"{n:,}", f"`{objective}`", f"{beta:g}", kl, f"{mean['proxy']:.2f}",
            f"{mean['gold']:.2f}",
        ]  # fmt: skip
        for name in ("proxy", "gold"):
            gap = [p[name] - p["on_curve"][name] for p in points]
            largest = max(gap, key=abs)
            cells.append(f"{np.mean(gap):+.3f} ({largest:+.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Means over {SEEDS} seeds, with the largest difference in brackets. The curve is that of "
        "the optima, at the divergence that the policy reached. A decoder of one layer of width "
        f"32; {UPDATES} updates of 256 responses, or for `dpo` and `ipo`, {STEPS} updates of 64 "
        f"pairs. The whole benchmark takes {seconds / 60:.0f} minutes; {results['machine']}. "
        "`make bench-over-optimization` reproduces it.",
    ]


def _from_preferences(points: list[Any]) -> list[str]:
    """Direct preference optimisation over problems."""
    lines = [
        "| pairs | objective | `kl_coef` | KL | gold | gold of the curve | gold minus curve | "
        "below the curve in |",
        "|---|" + "---|" * 7,
    ]
    for (n, beta, name), rows in _groups([p for p in points if p["seed"] == 0]).items():
        gold = np.array([p["gold"] for p in rows])
        curve = np.array([p["on_curve"]["gold"] for p in rows])
        cells = [
            f"{n:,}", f"`{name}`", f"{beta:g}", f"{np.mean([p['divergence'] for p in rows]):.2f}",
            f"{gold.mean():.2f}", f"{curve.mean():.2f}", _interval(gold - curve, "+"),
            f"{np.sum(gold < curve)} of {len(rows)}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Direct preference optimisation on {PROBLEMS} random problems, with 95% intervals in "
        "square brackets. The curve is that of each problem, at the divergence that the policy "
        "reached.",
    ]


def _of_figure(results: dict[str, Any]) -> list[Any]:
    """Policies trained on the problem of the figure."""
    return results["decoder"]["points"] + [p for p in results["preferences"] if not p["problem"]]


def _optimum_kl(optima: dict[str, Any], beta: float) -> float:
    """Interpolated between logarithms."""
    log_kl = np.log(optima["divergence"][::-1])
    return float(np.exp(np.interp(np.log(beta), np.log(exact.BETAS[::-1]), log_kl)))


def _groups(points: list[Any]) -> dict[tuple[int, float, str], list[Any]]:
    """Points of the seeds of each run."""
    names = [*OBJECTIVES, *DIRECT]
    found: dict[Any, list[Any]] = {}
    for p in sorted(points, key=lambda p: (p["pairs"], names.index(p["objective"]), -p["kl_coef"])):
        found.setdefault((p["pairs"], p["kl_coef"], p["objective"]), []).append(p)
    return found


def _interval(values: Any, sign: str = "") -> str:
    mean, low, high = (f"{x:{sign}.2f}" for x in mean_interval(np.asarray(values)))
    return f"{mean} [{low}, {high}]"


def draw(results: dict[str, Any]) -> None:
    mpl.use("Agg")
    from matplotlib.figure import Figure

    decoder, colors = results["decoder"], {"proxy": "C7", "gold": "C1"}
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    every = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (n, rows) in zip(every, decoder["curves"].items(), strict=True):
        for name, color in colors.items():
            for kind, style in (("optima", "-"), ("best_of", "--")):
                d = np.sqrt(np.maximum(rows[kind]["divergence"], 0.0))
                axes.plot(d, rows[kind][name], style, color=color, lw=1.6)
        for (pairs, _, objective), points in _groups(_of_figure(results)).items():
            if str(pairs) == n:
                for name in colors if objective in OBJECTIVES else ("gold",):
                    _mark(axes, points, name, MARKS[objective] | {"color": colors[name]})
        axes.set_title(f"proxy fitted to {int(n):,} pairs", fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("distance from the reference: square root of KL (nats)", fontsize=10)
    figure.supylabel("score (standard deviations of the reference)", fontsize=10)
    figure.legend(
        handles=_legend(colors), ncols=4, loc="outside upper center", frameon=False, fontsize=9.5
    )
    figure.savefig(IMAGES / PICTURE, dpi=110)


_FILLED: dict[str, Any] = {"mec": "black", "mew": 0.7}
MARKS: dict[str, dict[str, Any]] = {
    "ppo_clip": {"marker": "o", "ms": 5, "zorder": 4} | _FILLED,
    "rloo": {"marker": "^", "ms": 11, "zorder": 5, "mfc": "none", "mec": "black", "mew": 1.1},
    "dpo": {"marker": "s", "ms": 7, "zorder": 3, "mfc": "C0"} | _FILLED,
    "ipo": {"marker": "D", "ms": 6.5, "zorder": 3, "mfc": "C2"} | _FILLED,
}
"""Policies of `ppo_clip` and `rloo` lie close together, so the second mark surrounds the first."""


def _mark(axes: Any, points: list[Any], name: str, mark: dict[str, Any]) -> None:
    """One point: mean over seeds with 95% intervals."""
    x, low_x, high_x = mean_interval(np.sqrt([p["divergence"] for p in points]))
    y, low, high = mean_interval(np.array([p[name] for p in points]))
    sides: dict[str, Any] = {"xerr": [[x - low_x], [high_x - x]], "yerr": [[y - low], [high - y]]}
    axes.errorbar(x, y, **sides, lw=1, ls="", ecolor="black", **mark)


def _legend(colors: dict[str, str]) -> list[Any]:
    """Lines in the first row, marks in the second."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, lw=3, label=name) for name, color in colors.items()]
    for label, style in (("optimum, KL penalty", "-"), ("best of n = 1 to 1,024", "--")):
        lines.append(Line2D([], [], color="black", ls=style, lw=1.4, label=label))
    marks = []
    for objective, mark in MARKS.items():
        label = objective if objective in OBJECTIVES else f"{objective} (gold)"
        look: dict[str, Any] = {"mfc": "white"} | mark
        marks.append(Line2D([], [], label=label, ls="", **look))
    return [handle for column in zip(lines, marks, strict=True) for handle in column]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--table-only", action="store_true", help="read the results")
    only.add_argument(
        "--preferences-only", action="store_true",
        help="train by direct preference optimisation, and read the other results",
    )  # fmt: skip
    given, began = parser.parse_args(), time.perf_counter()
    ppo.enable_compilation_cache()
    if given.table_only or given.preferences_only:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        results: dict[str, Any] = {"problems": over_problems(), "decoder": with_decoders()}
        results["seconds"] = time.perf_counter() - began
    if not given.table_only:
        began = time.perf_counter()
        results["preferences"] = from_preferences()
        results["preference_seconds"] = time.perf_counter() - began
        cores = len(os.sched_getaffinity(0))
        words = f"{cores} CPU core{'s' * (cores > 1)}"
        results["machine"] = f"{words}, jax {jax.__version__}, Python {platform.python_version()}"
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results)
    write_table("over-optimization", table(results), "over_optimization")


if __name__ == "__main__":
    main()
