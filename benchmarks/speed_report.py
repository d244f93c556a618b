"""Generate the tables and the figure of the speed benchmark from its results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

COLORS = {"ours": "C0", "ours, conv": "#8ab8dd", "rejax": "C1", "sbx": "C2", "sb3": "C3"}


class Target(NamedTuple):
    name: str
    goal: float
    unit: str
    value: Callable[[dict[str, Any]], Any]
    """Maps the cases to the result: one number, or median, lowest and highest."""
    at_least: bool = True


TRAINING_STEPS = 500_000


def over(case: str, peer: str) -> Callable[[dict[str, Any]], list[float]]:
    return lambda cases: cases[case]["contestants"][peer]["ours_over"]


def memory_growth(cases: dict[str, Any]) -> float:
    """Growth of resident memory if it was measured, else of XLA's estimate."""
    short, long = (cases["memory"]["runs"][x] for x in ("64 x 0.5M", "64 x 5M"))
    key = "peak_rss_mb" if long["peak_rss_mb"] else "xla_mb"
    return long[key] / short[key]


TARGETS = (
    Target("speed over rejax, CartPole, 4 environments", 1.5, "x", over("cartpole-4", "rejax")),
    Target("speed over rejax, CartPole, 64 environments", 2.5, "x", over("cartpole-64", "rejax")),
    Target(
        "speed over rejax, CartPole, 1024 environments", 2.5, "x", over("cartpole-1024", "rejax")
    ),
    Target(
        "speed over rejax, Breakout-MinAtar, 64 environments, dense layers",
        1.5,
        "x",
        over("breakout-64", "rejax"),
    ),
    Target("speed over rejax, CartPole, 16 seeds", 2.5, "x", over("seeds-16", "rejax")),
    Target("speed over Stable-Baselines3, CartPole, 1 seed", 40, "x", over("cartpole-4", "sb3")),
    Target("speed over SBX, CartPole, 1 seed", 40, "x", over("cartpole-4", "sbx")),
    Target(
        "speed over Stable-Baselines3, Gymnasium's CartPole in Python, 8 environments",
        2,
        "x",
        over("gymnasium-cartpole-8", "sb3"),
    ),
    Target(
        "speed over Stable-Baselines3, Gymnasium's Acrobot in Python, 8 environments",
        2,
        "x",
        over("gymnasium-acrobot-8", "sb3"),
    ),
    Target("time to solve CartPole, SBX over ours, warm cache", 15, "x", over("solve", "sbx")),
    Target(
        "compile time at the second start",
        1.0,
        " s",
        lambda cases: cases["cartpole-4"]["contestants"]["ours"]["warm_compile_seconds"],
        at_least=False,
    ),
    Target(
        "peak memory, 64 seeds of 5M steps over 0.5M steps", 1.1, "x", memory_growth, at_least=False
    ),
    Target(
        "fraction of the limit, CartPole, 1024 environments",
        0.5,
        "",
        lambda cases: cases["cartpole-1024"]["limit"]["fraction"],
    ),
)


def table(results: dict[str, Any]) -> str:
    """All tables as Markdown; results that were not measured are left out."""
    cases = results["cases"]
    parts = [speeds(cases)]
    if results["hardware"]["name"] == "speed":
        parts = [targets(cases), *parts, extras(cases)]
    return "\n\n".join(part for part in [*parts, footnote(results)] if part)


def headline(results: dict[str, Any]) -> str:
    """A short table of speedups over other libraries, for the README."""
    cases, hardware = results["cases"], results["hardware"]
    names = {"rejax": "Rejax", "sbx": "SBX", "sb3": "Stable-Baselines3"}
    lines = ["| case | steps/s | times as fast as |", "|---|---|---|"]
    for case, title in HEADLINES.items():
        found = cases[case]["contestants"]
        ratios = ", ".join(
            f"{names[who]} {bracketed(found[who]['ours_over'], '.2f')}"
            for who in names
            if who in found
        )
        lines.append(f"| {title} | {found['ours']['steps_per_second'][0]:,.0f} | {ratios} |")
    return "\n".join(lines) + (
        "\n\nMedian [lowest, highest] of interleaved runs with default calls, on "
        f"{hardware['cores']} cores of {hardware['cpu']}. `make bench` repeats it."
    )


HEADLINES = {
    "cartpole-4": "CartPole, 4 environments",
    "cartpole-64": "CartPole, 64 environments",
    "breakout-64": "Breakout-MinAtar, 64 environments, dense layers",
    "seeds-16": "CartPole, 16 seeds",
}


def targets(cases: dict[str, Any]) -> str:
    lines = ["| target | goal | reached | met |", "|---|---|---|---|"]
    for target in TARGETS:
        try:
            value = target.value(cases)
        except KeyError:
            continue
        values = value if isinstance(value, list) else [value]
        met = values[0] >= target.goal if target.at_least else values[0] <= target.goal
        sign = "≥" if target.at_least else "≤"
        lines.append(
            f"| {target.name} | {sign} {target.goal:g}{target.unit} | "
            f"{bracketed(values, '.2f', target.unit)} | {'yes' if met else 'no'} |"
        )
    return "\n".join(lines)


def speeds(cases: dict[str, Any]) -> str:
    lines = [
        "| case | contestant | cores | steps/s | steps per CPU second | ours / theirs | compile | "
        "compile (cached) | return after steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        if name in ("solve", "memory"):
            continue
        for who, r in case["contestants"].items():
            again, judged = r.get("warm_compile_seconds"), r.get("evaluation")
            lines.append(
                f"| {name} | {who} | {r.get('devices', '')} | "
                f"{bracketed(r['steps_per_second'], ',.0f')} | "
                f"{r['steps_per_cpu_second']:,.0f} | {bracketed(r['ours_over'], '.2f')} | "
                f"{r['compile_seconds']:.1f} s | {f'{again:.1f} s' if again else ''} | "
                f"{'{mean:.1f} after {after_steps:,}'.format(**judged) if judged else ''} |"
            )
    return "\n".join(lines)


def extras(cases: dict[str, Any]) -> str:
    """Lists of limits, times to a solution, and memory."""
    lines = []
    for name, limit in ((n, c["limit"]) for n, c in cases.items() if "limit" in c):
        one = limit["one_core"]
        lines.append(
            f"- Limit of {name}: {limit['steps_per_second']:,.0f} steps/s; ours reaches "
            f"{limit['fraction']:.2f} of it. Per core, with {limit['cores']} in use: "
            f"{one['random_steps_per_second']:,.0f} random steps/s, {one['gflops']:.0f} GFLOP/s; "
            f"{one['flops_per_step']:,} operations per step."
        )
    for case in (c for name, c in cases.items() if name.startswith("seeds")):
        rates = [
            f"{r['steps_per_second'][0] * 60 / TRAINING_STEPS:.1f} by {who}"
            for who, r in case["contestants"].items()
        ]
        lines.append(
            f"- Runs of {TRAINING_STEPS:,} steps per minute, {case['seeds']} in parallel: "
            f"{', '.join(rates)}."
        )
    for who, r in cases.get("solve", {}).get("contestants", {}).items():
        steps = [f"{x:,}" if (x := run["solved_after_steps"]) else "never" for run in r["runs"]]
        lines.append(
            f"- CartPole solved by {who}: {bracketed(r['seconds'], '.1f', ' s')} from the start of "
            f"the process; environment steps: {'; '.join(steps)}."
        )
    for name, r in cases.get("memory", {}).get("runs", {}).items():
        rss = f", {r['peak_rss_mb']:,.0f} MB peak resident memory" if r["peak_rss_mb"] else ""
        lines.append(f"- Memory of {name}: {r['xla_mb']:,.1f} MB by XLA's estimate{rss}.")
    return "\n".join(lines)


def footnote(results: dict[str, Any]) -> str:
    hardware = results["hardware"]
    races = [c for name, c in results["cases"].items() if name not in ("solve", "memory")]
    versions = {
        f"{package} {number}": None
        for case in races
        for r in case["contestants"].values()
        for package, number in r["versions"].items()
        if package in ("purejaxppo", "rejax", "sbx-rl", "stable-baselines3", "torch", "jax")
    }
    counts = {
        name: len(c["contestants"]["ours"]["runs"])
        for name, c in results["cases"].items()
        if name not in ("solve", "memory")
    }
    rounds = max(counts.values(), default=0)
    fewer = [f"{name}: {count}" for name, count in counts.items() if count < rounds]
    noted = f" ({', '.join(fewer)})" if fewer else ""
    devices = sorted({c["contestants"]["ours"]["device"] for c in races})
    elsewhere = {
        name: c["cpu"] for name, c in results["cases"].items()
        if c.get("cpu", hardware["cpu"]) != hardware["cpu"]
    }  # fmt: skip
    others = "".join(f" {name} was measured on {cpu}." for name, cpu in elsewhere.items())
    return (
        f"Median [lowest, highest] of {rounds} rounds{noted} in which the contestants train in "
        "turn; ratios are computed per round. Ours is the default call, which chooses how many "
        "cores to use; peers run with their defaults. Seeds train in parallel and their steps are "
        f"summed. Compile times include tracing. On {', '.join(devices)}, {hardware['cores']} "
        f"cores of {hardware['cpu']}, with {', '.join(versions)}.{others}"
    )


def bracketed(values: list[float], form: str, unit: str = "") -> str:
    """`median [lowest, highest]`, or a single number."""
    first = f"{values[0]:{form}}{unit}"
    return first if len(values) == 1 else f"{first} [{values[1]:{form}}, {values[2]:{form}}]"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot steps per second of each case, and over the number of seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    races = {n: c for n, c in results["cases"].items() if n not in ("solve", "memory")}
    scaling = {n: c for n, c in races.items() if c["contestants"].keys() >= {"ours", "rejax"}}
    single = {n: c for n, c in races.items() if c["seeds"] == 1 and not n.startswith("seeds")}
    seeds = {n: c for n, c in scaling.items() if n.startswith("seeds") or n == "cartpole-4"}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    bars(left, single)
    lines(right, seeds)
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def bars(axes: Any, cases: dict[str, Any]) -> None:
    width, labelled = 0.19, set()
    for at, case in enumerate(cases.values()):
        for i, (who, r) in enumerate(case["contestants"].items()):
            median, low, high = r["steps_per_second"]
            x = at + (i - (len(case["contestants"]) - 1) / 2) * width
            axes.bar(
                x,
                median,
                width * 0.92,
                color=COLORS[who],
                label=None if who in labelled else who,
                yerr=[[median - low], [high - median]],
                error_kw={"lw": 1, "alpha": 0.7},
            )
            labelled.add(who)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("environment steps per second")
    axes.set_title("One run")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 2, top * 4)
    axes.legend(loc="upper left", ncols=3, frameon=False)


def lines(axes: Any, cases: dict[str, Any]) -> None:
    ordered = sorted(cases.values(), key=lambda case: case["seeds"])
    counts = [case["seeds"] for case in ordered]
    for who in ("ours", "rejax"):
        rates = [case["contestants"][who]["steps_per_second"] for case in ordered]
        median, low, high = zip(*rates, strict=True) if rates else ((), (), ())
        axes.plot(counts, median, "o-", color=COLORS[who], label=who)
        axes.fill_between(counts, low, high, color=COLORS[who], alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [f"{count}" for count in counts])
    axes.set_xlabel("seeds trained in parallel")
    axes.set_ylabel("environment steps per second, summed")
    axes.set_title("CartPole, 4 environments per seed")
    axes.legend(frameon=False)
