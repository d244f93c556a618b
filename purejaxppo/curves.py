"""Learning curves from metrics, ready to plot."""

from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from purejaxppo.checks import nearest
from purejaxppo.config import ConfigError
from purejaxppo.inputs import whole_number

POINTS = 200


def curve(
    metrics: Mapping[str, ArrayLike], name: str = "episode_return", points: int = POINTS
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "*batch P"]]:
    """A metric over environment steps, without gaps, as NumPy arrays:

        plt.plot(*ppo.curve(metrics))

    Updates are divided into P equal stretches. A point is the mean over the finite values of its
    stretch: an update in which no episode ended has an `episode_return` of NaN. A stretch without a
    finite value repeats the previous point; points before the first value are NaN.

    Args:
        metrics: of `train`, `train_chunk` or `run`: `[U]`, or with leading axes that `jax.vmap`
            added, `[S, U]`, `[K, S, U]`.
        points: maximum of P; P is U if that is smaller.

    Returns:
        the environment steps of one run at the end of each stretch `[P]`, and the values
        `[..., P]`.

    Raises:
        ConfigError: if there is no such metric or no update, or `points` is not an integer from 1.
    """
    if name not in metrics:
        near = nearest(name, metrics)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(sorted(metrics))}"
        raise ConfigError(f"name = {name!r}: no such metric; {hint}")
    points = whole_number("points", points, 1)
    steps = np.asarray(metrics["env_steps"], float)
    if not steps.size:
        raise ConfigError("metrics contain no updates: a curve needs at least one")
    # All runs have the same step counts, but a failed run stops counting.
    steps = np.fmax.reduce(steps.reshape((-1, steps.shape[-1])))
    return means_of_stretches(steps, np.asarray(metrics[name], float), points)


def means_of_stretches(
    env_steps: Float[np.ndarray, " U"], values: Float[np.ndarray, "*batch U"], points: int
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "*batch P"]]:
    """`curve` of arrays, without checks."""
    stretches = np.array_split(np.arange(len(env_steps)), min(points, len(env_steps)))
    means: list[np.ndarray] = []
    for stretch in stretches:
        part = values[..., stretch]
        seen = np.isfinite(part)
        total, count = np.where(seen, part, 0.0).sum(axis=-1), seen.sum(axis=-1)
        before = means[-1] if means else np.full(total.shape, np.nan)
        means.append(np.where(count > 0, total / np.maximum(count, 1), before))
    ends = [env_steps[stretch[-1]] for stretch in stretches]
    return np.asarray(ends), np.stack(means, axis=-1)
