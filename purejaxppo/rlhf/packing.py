"""Packs token sequences into rows of equal length, so that little is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from purejaxppo.checks import ConfigError


class Tokens(NamedTuple):
    """A sequence of tokens: a prompt and its completion, stop token included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        return self.prompt + self.completion


class Rows(NamedTuple):
    """R rows of T tokens. A row holds up to M items, each of K sequences (2 for a pair)."""

    tokens: Int[np.ndarray, "R T"]
    start: Bool[np.ndarray, "R T"]
    """Where a sequence begins; set at all tokens of padding."""
    sequence: Int[np.ndarray, "R T"]
    """Index of the token's sequence within its row, K times the index of the item plus the index
    within the item; -1 for padding."""
    completion: Bool[np.ndarray, "R T"]
    """Whether the token belongs to a completion."""
    last: Int[np.ndarray, "R M K"]
    """Index of the last token of each sequence."""
    real: Float[np.ndarray, "R M"]
    """1 for items, 0 where the row has fewer."""
    item: Int[np.ndarray, "R M"]
    """Number of the item; 0 where there is none."""


def pack(items: Sequence[Sequence[Tokens]], length: int) -> Rows:
    """Pack items into rows of `length` tokens; the sequences of an item stay in one row.

    Items are placed in descending order of their length, each into the first row with room
    (first-fit decreasing; Johnson 1973).

    Args:
        items: each a list of K sequences.

    Raises:
        ConfigError: if an item has more than `length` tokens.
    """
    sizes = np.array([sum(len(x.all) for x in item) for item in items])
    if sizes.max() > length:
        raise ConfigError(
            f"row_length = {length}: the longest of {len(items)} examples has {sizes.max()} tokens;"
            f" use at least {sizes.max()}"
        )
    return _filled(items, _place(sizes, length), length)


def alone(items: Sequence[Sequence[Tokens]]) -> Rows:
    """Rows of one item each, in order, as long as the longest."""
    longest = max(sum(len(x.all) for x in item) for item in items)
    return _filled(items, [[number] for number in range(len(items))], longest)


def _filled(items: Sequence[Sequence[Tokens]], placed: list[list[int]], length: int) -> Rows:
    most, each = max(map(len, placed)), len(items[0])
    shape = (len(placed), length)
    rows = Rows(
        np.zeros(shape, np.int32), np.ones(shape, bool), np.full(shape, -1, np.int32),
        np.zeros(shape, bool), np.zeros((len(placed), most, each), np.int32),
        np.zeros((len(placed), most), np.float32), np.zeros((len(placed), most), np.int32),
    )  # fmt: skip
    for r, numbers in enumerate(placed):
        at = 0
        for m, number in enumerate(numbers):
            rows.real[r, m], rows.item[r, m] = 1.0, number
            for k, sequence in enumerate(items[number]):
                _write(rows, (r, m, k), at, sequence)
                at += len(sequence.all)
    return rows


def _write(rows: Rows, place: tuple[int, int, int], at: int, sequence: Tokens) -> None:
    """Write a sequence to a row, from the position `at`."""
    r, m, k = place
    end = at + len(sequence.all)
    rows.tokens[r, at:end] = sequence.all
    rows.start[r, at + 1 : end] = False
    rows.sequence[r, at:end] = m * rows.last.shape[2] + k
    rows.completion[r, at + len(sequence.prompt) : end] = True
    rows.last[r, m, k] = end - 1


def _place(sizes: np.ndarray, length: int) -> list[list[int]]:
    """The numbers of the items in each row."""
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for number in np.argsort(-sizes, kind="stable"):
        fits = np.flatnonzero(room >= sizes[number])
        if fits.size:
            row = int(fits[0])
        else:
            row, room = len(rows), np.append(room, length)
            rows.append([])
        rows[row].append(int(number))
        room[row] -= sizes[number]
    return rows


def padding_share(rows: Rows) -> float:
    """Share of the tokens that are padding."""
    return float(np.mean(rows.sequence < 0))
