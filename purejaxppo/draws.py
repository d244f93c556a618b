"""Distributions from which parameters of an environment are drawn. Does not import JAX."""

from typing import NamedTuple

from purejaxppo.checks import ConfigError

SIZES = {"uniform": 2, "loguniform": 2, "choice": 0}
"""Kinds of distributions, and the number of values that each takes; 0: at least one."""


class Draw(NamedTuple):
    """A parameter and its distribution."""

    name: str
    kind: str
    values: tuple[float, ...]


def parse_draw(text: str) -> Draw:
    """Parse `masspole=uniform:0.05,0.5`, `loguniform:LOW,HIGH` or `choice:A,B,C`.

    Raises:
        ConfigError: if it has another form.
    """
    name, _, rest = text.partition("=")
    kind, _, numbers = rest.partition(":")
    try:
        values = tuple(float(x) for x in numbers.split(","))
    except ValueError:
        values = ()
    size = SIZES.get(kind)
    if not name or size is None or not values or size not in (0, len(values)):
        raise ConfigError(
            f"randomize = {text!r}: must be NAME=uniform:LOW,HIGH, NAME=loguniform:LOW,HIGH or "
            "NAME=choice:A,B,C, such as masspole=uniform:0.05,0.5"
        )
    if kind != "choice" and not values[0] < values[1]:
        raise ConfigError(f"randomize = {text!r}: the lower bound must be below the upper one")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"randomize = {text!r}: bounds of loguniform must be above 0")
    return Draw(name, kind, values)


def parse_draws(texts: tuple[str, ...]) -> tuple[Draw, ...]:
    """Parse several, of different parameters."""
    draws = tuple(map(parse_draw, texts))
    names = [draw.name for draw in draws]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"randomize: {', '.join(twice)} given twice; name each parameter once")
    return draws
