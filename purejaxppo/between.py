"""Python code between two calls of compiled programs."""

from collections.abc import Callable
from typing import NamedTuple

from purejaxppo.types import PyTree


class HostCall(NamedTuple):
    """What a compiled function of one state needs from Python.

    The function is `(*arguments, data) -> result`. First `ask` is compiled and called, then
    `answer` runs in Python, and then the function is called with `tell(data, question, answer)`.
    """

    ask: Callable[..., PyTree]
    """`(*arguments, data) -> question`: arrays for Python and for the function. Compiled."""
    answer: Callable[[PyTree], PyTree]
    """`question -> answer`: arrays of one state. Raises `HostCallError`. May be called from several
    threads."""
    answer_shape: Callable[[PyTree], PyTree]
    """Shapes of a question -> shapes of the answer."""
    tell: Callable[[PyTree, PyTree, PyTree], PyTree]
    """`(data, question, answer) -> data`. Compiled."""
