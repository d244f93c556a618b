"""The environment suites. Does not import JAX."""

from collections.abc import Mapping
from typing import NamedTuple


class Suite(NamedTuple):
    """A suite of environments."""

    package: str
    """The module that the suite installs."""
    extra: str
    """The optional dependency of this package that installs it."""
    unavailable: Mapping[str, str] = {}
    """Environments that cannot be made, and why."""


SUITES = {
    "brax": Suite("brax", "brax", {"fast": "has no physics backend"}),
    "craftax": Suite("craftax", "craftax"),
    "jumanji": Suite("jumanji", "jumanji", {"Sokoban-v0": "downloads its levels"}),
    "navix": Suite("navix", "navix"),
    "pgx": Suite(
        "pgx",
        "pgx",
        {
            "backgammon": "its players do not alternate",
            "kuhn_poker": "has hidden information",
            "leduc_holdem": "has hidden information",
            "sparrow_mahjong": "has three players",
        },
    ),
    "playground": Suite("mujoco_playground", "playground"),
    "xminigrid": Suite("xminigrid", "xminigrid"),
}
"""Suites by prefix."""
PYTHON = ("gymnasium", "envpool")
"""Prefixes of environments that are stepped in Python."""


def is_python(env_id: str) -> bool:
    """Whether an environment is stepped in Python, by its prefix."""
    prefix, slash, _ = env_id.partition("/")
    return bool(slash) and prefix in PYTHON


def names_a_world(text: str) -> bool:
    """Whether a text begins with the prefix of a suite."""
    prefix, slash, _ = text.partition("/")
    return bool(slash) and prefix in (*SUITES, *PYTHON)
