"""Jumanji: puzzles, routing and packing, most with masks of legal actions.

Jumanji reports its time limits as terminations. The adapter gives the environment a limit that is
one step longer, and truncates at the limit itself.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from purejaxppo.config import ConfigError
from purejaxppo.envs.base import MultiDiscrete
from purejaxppo.envs.params import changed_values
from purejaxppo.envs.single import Single, is_key
from purejaxppo.envs.spaces import box, discrete
from purejaxppo.masks import ACTION_MASK
from purejaxppo.types import PyTree

_ONE_HOT = 64
"""Single integers with at most this many values are one-hot; others are scaled to [0, 1]."""


def names() -> list[str]:
    from jumanji import registration

    return sorted(registration.registered_environments())


def make(name: str, params: Mapping[str, float | int | bool]) -> Single:
    from jumanji import registration

    env: Any = registration.make(name)
    limit: Any = getattr(env, "time_limit", None)
    settable = limit is not None and "time_limit" in inspect.signature(type(env)).parameters
    defaults = {"time_limit": limit} if settable else {}
    changed = changed_values(f"jumanji/{name}", defaults, params)
    if settable:
        limit = changed.get("time_limit", limit)
        env = registration.make(name, time_limit=limit + 1)
    choices = _choices(name, env)

    def reset(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
        state, now = env.reset(key)
        return (state, jnp.zeros((), jnp.int32)), _observe(now.observation, env.observation_spec)

    def step(key: Key[Array, ""], state: PyTree, action: Array) -> Any:
        inner, steps = state
        inner, now = env.step(inner, choices.to_env(action))
        steps = steps + 1
        obs = _observe(now.observation, env.observation_spec)
        terminated = now.last() & (jnp.max(now.discount) == 0)
        over = now.last() if limit is None else now.last() | (steps >= limit)
        truncated = over & ~terminated
        return (inner, steps), obs, jnp.sum(now.reward), terminated, truncated

    return Single(
        name="", observation_space=_space(env.observation_spec), action_space=choices.space,
        max_episode_steps=limit, reset=reset, step=step, render=_renderer(env), slow_reset=True,
        parameters=defaults,
    )  # fmt: skip


_DOTS_PER_INCH = 40
"""Jumanji's figures are 10 inches wide."""


def _renderer(env: Any) -> Callable[[PyTree], np.ndarray] | None:
    """Jumanji's viewer, which draws into a figure of ours rather than on a display."""
    names = ("_viewer", "_env_viewer", "viewer")
    viewer: Any = next(getattr(env, name) for name in names if hasattr(env, name))
    kind = type(viewer).__name__
    if kind == "MMSTViewer":  # its pictures are empty
        return None
    figures: list[Any] = []
    images: list[np.ndarray] = []

    def figure_and_axes(*_: Any, **given: Any) -> Any:
        if not figures:
            figures.append(_make_figure(viewer, **given))
        return figures[0]

    def keep(figure: Any) -> None:
        figure.canvas.draw()
        images[:] = [np.array(figure.canvas.buffer_rgba())[..., :3]]

    def render(state: PyTree) -> np.ndarray:
        viewer._get_fig_ax, viewer._display = figure_and_axes, keep
        now = state[0]
        if kind != "PacManViewer":  # which computes with JAX; others read single numbers
            now = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), now)
        env.render(now)
        return images[0]

    return render


def _make_figure(viewer: Any, **given: Any) -> Any:
    """A figure and its axes, as the `_get_fig_ax` of the viewer makes them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = type(viewer).__name__
    figure = Figure(viewer.figure_size, dpi=_DOTS_PER_INCH, layout="constrained", **given)
    FigureCanvasAgg(figure)
    if kind == "RubiksCubeViewer":
        return figure, list(figure.subplots(3, 2).flat)
    axes: Any = figure.add_subplot(projection="3d" if kind == "BinPackViewer" else None)
    if kind == "SearchAndRescueViewer":
        from jumanji.environments.swarms.common.viewer import format_plot

        return format_plot(figure, axes, viewer.env_size)
    return figure, axes


class _Choices(NamedTuple):
    """A space of actions, and what the environment takes instead."""

    space: Any
    to_env: Any


def _choices(name: str, env: Any) -> _Choices:
    """One choice; several independent ones; or, if the mask is of combinations, one choice of a
    combination."""
    spec = env.action_spec
    mask = getattr(env.observation_spec, ACTION_MASK, None)
    flags: Any = () if mask is None else tuple(mask.shape)
    whole = jnp.issubdtype(spec.dtype, jnp.integer)
    if not whole:
        size = int(np.prod(spec.shape))
        low, high = (jnp.broadcast_to(x, spec.shape).ravel() for x in (spec.minimum, spec.maximum))
        return _Choices(box((size,), low, high), lambda a: a.reshape(spec.shape))
    if spec.shape == ():
        return _Choices(discrete(spec.num_values), lambda a: a)
    if hasattr(spec, "num_values"):
        sizes = tuple(int(n) for n in np.ravel(spec.num_values))
    else:  # MultiCVRP gives bounds instead, of which the upper one is not allowed
        agents, choices = flags
        sizes = (choices,) * agents
    if flags == sizes:
        return _Choices(
            discrete(np.prod(sizes)), lambda a: jnp.stack(jnp.unravel_index(a, sizes), axis=-1)
        )
    if flags in ((), (len(sizes), max(sizes))) and (not flags or len(set(sizes)) == 1):
        return _Choices(MultiDiscrete(sizes), lambda a: a.astype(spec.dtype))
    raise ConfigError(f"env_id = 'jumanji/{name}': its mask {flags} does not fit {sizes} actions")


def _observe(found: Any, specs: Any) -> PyTree:
    """An observation as a dictionary; a single entry alone."""
    parts = {}
    for name, spec in _named(specs):
        value = getattr(found, name)
        if name == ACTION_MASK:
            parts[name] = value.reshape(-1)
        elif _named(spec):
            parts[name] = _observe(value, spec)
        elif _is_one(spec) and spec.num_values > _ONE_HOT:
            parts[name] = value / (spec.num_values - 1)
        else:
            parts[name] = value
    return next(iter(parts.values())) if len(parts) == 1 else parts


def _space(specs: Any) -> Any:
    """The space of `_observe`."""
    parts = {}
    for name, spec in _named(specs):
        if name == ACTION_MASK:
            parts[name] = box((int(np.prod(spec.shape)),), 0, 1, jnp.bool_)
        elif _named(spec):
            parts[name] = _space(spec)
        elif _is_one(spec) and spec.num_values > _ONE_HOT:
            parts[name] = box((), 0.0, 1.0)
        elif _is_one(spec):
            parts[name] = discrete(spec.num_values)
        else:
            low, high = (
                getattr(spec, x, y) for x, y in (("minimum", -np.inf), ("maximum", np.inf))
            )
            parts[name] = box(spec.shape, low, high, spec.dtype)
    return next(iter(parts.values())) if len(parts) == 1 else parts


def _named(spec: Any) -> list[tuple[str, Any]]:
    """The parts of a spec; none if it is of an array."""
    return list(getattr(spec, "_specs", {}).items())


def _is_one(spec: Any) -> bool:
    return hasattr(spec, "num_values") and spec.shape == ()
