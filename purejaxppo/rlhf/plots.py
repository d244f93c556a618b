"""Plots of the reports of language runs."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from purejaxppo.curves import means_of_stretches
from purejaxppo.host.plots import bare_axes
from purejaxppo.task import FinishedRun, Plot

STRETCHES = 60
"""Maximum number of points of a curve."""
KL_LABEL = "KL from the reference (nats per response)"
PROGRESS = "viridis"
"""Colours of the progress of a run."""

Bins = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Predicted frequency, observed frequency and share of pairs of each bin, as
`purejaxppo.rlhf.texts.reliability` returns them."""


class Curve(NamedTuple):
    """Points of S seeds over a run."""

    updates: np.ndarray
    """`[P]`."""
    kl: Float[np.ndarray, "S P"]
    score: Float[np.ndarray, "S P"]

    @property
    def mean(self) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
        """Means over seeds."""
        return self.kl.mean(axis=0), self.score.mean(axis=0)


def frontier_plots(batch_size: int, has_gold: bool, run: FinishedRun) -> list[Plot]:
    """The score of the training responses, and the gold score of evaluations, against the KL
    divergence from the reference; nothing if fewer than two updates have finite values.

    Args:
        batch_size: tokens per update.
        has_gold: whether evaluations have a different score.
    """
    training = training_curve(run.metrics)
    if len(training.updates) < 2:
        return []
    gold = gold_curve(run) if has_gold and len(run.evaluations[0]) else None
    caption = (
        "Mean score of the training responses against their KL divergence from the reference: "
        "log pi - log pi_ref, summed over the tokens of a response; it is 0 for the reference "
        "itself. Colours show how long the policy has been trained. Compare runs at the same "
        "divergence: the higher the score, the better (Gao et al. 2022, arXiv:2210.10760)."
    )
    if len(training.kl) > 1:
        caption += " Grey lines: single seeds; points: means over seeds."
    if gold is not None:
        caption += (
            " Diamonds: the task's own score (gold) of responses to held-out prompts, on its own "
            "scale; the policy is not trained on it. If it falls while the score in training "
            "rises, the policy exploits errors of the reward (over-optimisation)."
        )
    draw = partial(draw_frontier, batch_size, training, gold)
    return [Plot("frontier", "Score against KL divergence", caption, draw)]


def training_curve(metrics: dict[str, np.ndarray]) -> Curve:
    """KL divergences and scores as means over at most 60 stretches of the run; stretches in which a
    seed has no finite values are left out."""
    kl, score = (np.asarray(metrics[name], float) for name in ("reference_kl", "score"))
    seen = np.isfinite(kl) & np.isfinite(score)
    updates, curves = means_of_stretches(
        np.arange(1, kl.shape[1] + 1), np.where(seen, np.stack([kl, score]), np.nan), STRETCHES
    )
    known = np.isfinite(curves).all(axis=(0, 1))
    return Curve(updates[known], *curves[..., known])


def gold_curve(run: FinishedRun) -> Curve:
    """Evaluations at the mean KL divergence over seeds of the policies that were evaluated. The
    responses of update u + 1 are those of the policy after u updates; for the last policy, those of
    the last update are used."""
    updates, scores = run.evaluations
    kl = np.asarray(run.metrics["reference_kl"], float)
    at = kl[:, np.minimum(updates, kl.shape[1] - 1)].mean(axis=0)
    known = np.isfinite(at) & np.isfinite(scores)
    return Curve(updates[known], at[None, known], scores[None, known])


def draw_frontier(batch_size: int, training: Curve, gold: Curve | None, axes: Any) -> None:
    """Draw scores against KL divergences, with colours for progress; several seeds as grey lines
    and their mean."""
    from matplotlib.ticker import EngFormatter  # slow to import

    if len(training.kl) > 1:
        axes.plot(training.kl.T, training.score.T, color="0.8", lw=0.8, zorder=1)
    tokens = training.updates * batch_size
    kl, score = training.mean
    axes.plot(kl, score, color="0.45", lw=1, zorder=2)
    shared = {"cmap": PROGRESS, "vmin": 0, "vmax": tokens[-1]}
    points = axes.scatter(kl, score, c=tokens, s=22, zorder=3, label="score in training", **shared)
    for k, marker, label in ((0, "o", "start"), (-1, "s", "end")):
        axes.plot(
            kl[k], score[k], marker, ms=10, mfc="none", mec="black", mew=1.2, zorder=4, label=label
        )
    if gold is not None:
        x, y = gold.mean
        axes.plot(x, y, ":", color="0.45", lw=1, zorder=2)
        at = gold.updates * batch_size
        axes.scatter(
            x, y, c=at, s=40, marker="D", ec="black", lw=0.8, zorder=3, label="gold score", **shared
        )
    bare_axes(axes, KL_LABEL, "score")
    axes.legend(loc="best", frameon=False)
    axes.figure.colorbar(points, ax=axes, label="tokens", format=EngFormatter(sep=""))


def reliability_plot(bins: Bins, errors: np.ndarray, pairs: int, prediction: str) -> Plot:
    """A reliability diagram, of all seeds together.

    Args:
        errors: expected calibration error of each seed.
        pairs: number of held-out pairs.
        prediction: formula of the prediction.
    """
    error, several = float(errors.mean()), len(errors) > 1
    caption = (
        "How often labellers prefer the text that the model prefers, against the predicted "
        f"probability, {prediction}, for {pairs:,} held-out pairs in ten bins"
        f"{', all seeds together' if several else ''}. Below the diagonal, the model is too sure; "
        "above, not sure enough. Vertical lines: 95% Wilson intervals. Bars: share of the pairs in "
        f"each bin. Expected calibration error{', mean over seeds' if several else ''}: "
        f"{error:.3f}. It is the mean distance from the diagonal, weighted by the share of pairs "
        "(Naeini et al. 2015)."
    )
    return Plot(
        "reliability", "Reliability", caption, partial(draw_reliability, bins, error, pairs)
    )


def draw_reliability(bins: Bins, error: float, pairs: int, axes: Any) -> None:
    """Draw observed against predicted frequencies, and the share of pairs per bin."""
    from matplotlib.ticker import PercentFormatter  # slow to import

    predicted, observed, share = bins
    place = np.minimum(((predicted - 0.5) * 20).astype(int), 9)
    axes.bar(
        0.5 + place / 20, share, 0.05, align="edge", color="0.88", ec="white", zorder=1,
        label="share of pairs",
    )  # fmt: skip
    axes.plot([0.5, 1], [0.5, 1], "--", color="0.4", lw=1, zorder=2, label="calibrated")
    low, high = wilson_interval(observed, share * pairs)
    axes.vlines(predicted, low, high, color="C0", lw=1.2, zorder=3)
    axes.plot(predicted, observed, "o", color="C0", ms=6, zorder=4, label="observed")
    bare_axes(axes, "predicted probability", "observed frequency")
    axes.set(xlim=(0.5, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"expected calibration error {error:.3f}", loc="left", fontsize=10)


def wilson_interval(
    share: Float[np.ndarray, " B"], count: Float[np.ndarray, " B"]
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """95% interval of a probability, from the observed share of `count` trials (Wilson 1927)."""
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return middle - half, middle + half
