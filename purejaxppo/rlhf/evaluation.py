"""The results of evaluating a policy: numbers, JSON and a table."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from purejaxppo.rlhf.estimates import Estimate
from purejaxppo.rlhf.samples import finite

_LARGEST_N = 10_000
"""No larger n is suggested for best-of-n."""
_LABEL, _COLUMN = 21, 27


class PolicyScores(NamedTuple):
    """Scores of the responses of one policy."""

    score: Estimate
    exact: Estimate | None
    """Share of exact answers; None if the answers of the task cannot be exact."""
    pass_at_k: Mapping[int, Estimate]
    """By k, the probability that at least one of k responses is exact; see `rlhf.pass_at_k`."""


class BestOfN(NamedTuple):
    """Best-of-n sampling from the reference; see `rlhf.best_of_n`."""

    n: int
    score: Estimate
    kl_bound: float
    """Upper bound log n - (n - 1) / n on its KL divergence from the reference, in nats."""


class PolicyEvaluation(NamedTuple):
    """An evaluation of a policy. All intervals are 95% intervals over prompts."""

    run_dir: str
    against: str | None
    """What the policy is compared with: "reference", or the directory of a different run. None if
    the run has no reference."""
    score_name: str
    """Where the reported scores come from: a task, or the directory of a reward model."""
    num_prompts: int
    num_responses: int
    """Responses of the policy to each prompt."""
    opponent_responses: int
    """Responses of the reference or of the other run to each prompt; 0 without one."""
    temperature: float
    policy: PolicyScores
    opponent: PolicyScores | None
    """Scores of the reference or of the other run."""
    win_rate: Estimate | None
    """Share of pairs of responses to the same prompt in which the policy's has the higher score;
    ties count half."""
    ties: float | None
    """Share of pairs with equal scores."""
    kl: Estimate | None
    """KL divergence of the policy from the reference, in nats per response: the mean over responses
    of the policy of log pi - log pi_ref, both at the sampling temperature."""
    selected_by: str | None
    """The score by which best-of-n selects: the one that the run was trained on. Runs of `rlhf sft`
    and `rlhf dpo` have none, and use the reported score."""
    best_of: tuple[BestOfN, ...]
    """Best-of-n of the reference, by ascending n."""
    best_of_at_kl: Estimate | None
    """Score of best-of-n at the policy's KL divergence, interpolated between the bounds of adjacent
    n. None if the divergence is above the bound of the largest n."""
    lead_at_kl: Estimate | None
    """Score of the policy minus `best_of_at_kl`."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON types; NaN becomes None."""
        return _as_json(self)

    def table(self) -> str:
        """The results as text of at most 80 columns, except for long names of runs."""
        lines = [*_heading(self), "", *_scores(self), *_comparison(self)]
        if self.best_of:
            lines += ["", *_best_of(self)]
        return "\n".join(lines)


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            return {name: _as_json(x) for name, x in value._asdict().items()}  # pyright: ignore
        return [_as_json(x) for x in value]
    if isinstance(value, Mapping):
        return {str(name): _as_json(x) for name, x in value.items()}
    return finite(value) if isinstance(value, float) else value


def _heading(found: PolicyEvaluation) -> list[str]:
    each = f"{found.num_responses} response{'s' if found.num_responses > 1 else ''} to each"
    if found.opponent_responses not in (0, found.num_responses):
        each += f" ({found.opponent_responses} of the reference)"
    prompts = "1 prompt" if found.num_prompts == 1 else f"{found.num_prompts} prompts"
    brackets = "one prompt gives no intervals"
    if found.num_prompts > 1:
        brackets = "[low, high]: 95% interval over prompts"
    return [
        f"policy: {found.run_dir}",
        f"score: {found.score_name}",
        f"{prompts}, {each}, temperature {found.temperature:g}",
        brackets,
    ]


def _scores(found: PolicyEvaluation) -> list[str]:
    columns = [found.policy] + ([found.opponent] if found.opponent is not None else [])
    titles = ["policy", "reference" if found.against == "reference" else "other run"]
    lines = [_row("", titles[: len(columns)])]
    lines.append(_row("mean score", [_number(x.score) for x in columns]))
    exact = [x.exact for x in columns if x.exact is not None]
    if exact:
        lines.append(_row("exact (pass@1)", [_percent(x) for x in exact]))
    for k in found.policy.pass_at_k:
        if k > 1:
            lines.append(_row(f"pass@{k}", [_percent(x.pass_at_k[k]) for x in columns]))
    return lines


def _comparison(found: PolicyEvaluation) -> list[str]:
    lines = []
    if found.win_rate is not None:
        assert found.ties is not None
        lines.append(_row("win rate", [_percent(found.win_rate), _verdict(found.win_rate)]))
        lines.append(_row("ties (count half)", [f"{100 * found.ties:5.1f}%"]))
    if found.kl is not None:
        lines.append(_row("KL from reference", [_number(found.kl), "nats per response"]))
    if found.against not in (None, "reference"):
        lines.append(f"other run: {found.against}")
    if found.against is None:
        lines += [
            "",
            "no comparison: this run started from random weights, so it has no reference;",
            "compare it with another run by --against RUN_DIR",
        ]
    return lines


def _verdict(win_rate: Estimate) -> str:
    if math.isnan(win_rate.low):
        return ""
    inside = win_rate.low <= 0.5 <= win_rate.high
    return "50% is inside the interval" if inside else "50% is outside the interval"


def _best_of(found: PolicyEvaluation) -> list[str]:
    lines = [
        f"best of n responses of the reference, selected by {found.selected_by}",
        f"{'n':>6}  {'KL at most':>10}  mean score",
    ]
    for x in found.best_of:
        lines.append(f"{x.n:6}  {x.kl_bound:10.2f}  {_number(x.score)}")
    assert found.kl is not None
    kl, largest = max(found.kl.mean, 0.0), found.best_of[-1].n
    if found.best_of_at_kl is None or found.lead_at_kl is None:
        lines.append(f"the policy's KL, {kl:.2f}, is above that of n = {largest}")
        needed = math.exp(min(kl, 100.0) + 1)
        if needed < _LARGEST_N:
            lines[-1] += f"; n = {needed:.0f} reaches it"
        return lines
    return [
        *lines,
        f"at the policy's KL, {kl:.2f}: {_number(found.best_of_at_kl).strip()}",
        f"policy minus best of n there: {_number(found.lead_at_kl, sign=True).strip()}",
    ]


def _row(label: str, cells: list[str]) -> str:
    return (f"{label:{_LABEL}}" + "".join(f"{cell:{_COLUMN}}" for cell in cells)).rstrip()


def _number(x: Estimate, *, sign: bool = False) -> str:
    shown = f"{x.mean:+.3f}" if sign else f"{x.mean:6.3f}"
    return shown if math.isnan(x.low) else f"{shown} [{x.low:.3f}, {x.high:.3f}]"


def _percent(x: Estimate) -> str:
    shown = f"{100 * x.mean:5.1f}%"
    return shown if math.isnan(x.low) else f"{shown} [{100 * x.low:.1f}%, {100 * x.high:.1f}%]"
