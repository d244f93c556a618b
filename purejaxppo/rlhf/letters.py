"""The shipped example for preferences: texts of letters with a hidden score.

A prompt is two letters and a colon, a completion up to six letters. The gold score is a sum over
letters, pairs and triples of adjacent letters, with random weights; the last letter of the prompt
counts as the letter before the first. Labellers prefer texts with a higher gold score, with the
probabilities of the Bradley-Terry model.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from purejaxppo.rlhf.records import Demonstration, Preference, Prompt, write_records

LETTERS = "abcdefgh"
ALPHABET = f"{LETTERS}:."
"""The tokens: letters, the end of the prompt, and the stop token."""
LENGTH = 6
_WEIGHTS_SEED, _SAMPLE = 7, 20_000
_SHARPNESS = 2.0
"""Standard deviation of the gold score over random texts."""
_TRIPLES = 0.2
"""Standard deviation of the weights of triples; those of letters and of pairs have 1."""
Ints = Int[np.ndarray, "..."]


class Weights(NamedTuple):
    """Weights of the gold score; token indices as in `ALPHABET`."""

    single: Float[np.ndarray, " V"]
    pair: Float[np.ndarray, "V V"]
    triple: Float[np.ndarray, "V V V"]
    mean: float
    """The weighted sum's mean over random texts."""
    scale: float
    """The factor that makes the standard deviation over random texts `_SHARPNESS`."""


@lru_cache(maxsize=1)
def weights() -> Weights:
    """The hidden weights. Colons lower the score."""
    rng = np.random.default_rng(_WEIGHTS_SEED)
    size = len(ALPHABET)
    single, pair, triple = (rng.normal(size=(size,) * n) for n in (1, 2, 3))
    single[len(LETTERS) :] = -3.0
    made = Weights(single, pair, _TRIPLES * triple, 0.0, 1.0)
    texts = rng.integers(len(LETTERS), size=(_SAMPLE, 2 + LENGTH))
    sums = scores(made, texts, np.full(_SAMPLE, LENGTH))
    return made._replace(mean=float(sums.mean()), scale=_SHARPNESS / float(sums.std()))


def scores(given: Weights, tokens: Ints, lengths: Ints) -> Float[np.ndarray, " N"]:
    """Gold scores of texts.

    Args:
        tokens: the two letters of the prompt, then the completion, `[N, 2 + T]`.
        lengths: the numbers of letters of the completions, at most T.
    """
    before, last, now = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    each = given.single[now] + given.pair[last, now] + given.triple[before, last, now]
    used = np.arange(now.shape[1]) < lengths[:, None]
    return (np.sum(np.where(used, each, 0.0), axis=1) - given.mean) * given.scale


def gold(prompt: str, completion: str) -> float:
    """The gold score of a text. Raises `ValueError` for other characters than letters, colons and
    stops."""
    letters = completion.partition(".")[0][:LENGTH]
    tokens = np.array([[ALPHABET.index(x) for x in prompt[:2] + letters]])
    return float(scores(weights(), tokens, np.array([len(letters)]))[0])


def all_prompts() -> list[str]:
    """All 64 prompts."""
    return [f"{a}{b}:" for a in LETTERS for b in LETTERS]


def _completions(count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Tokens `[N, LENGTH]` of random completions, and their lengths, 3 to 6. Letters follow each
    other with random probabilities, the same for every call."""
    likely = np.random.default_rng(_WEIGHTS_SEED + 1).dirichlet(np.ones(len(LETTERS)), len(LETTERS))
    upto = np.cumsum(likely, axis=1)[:, :-1]
    lengths = rng.integers(3, LENGTH + 1, size=count)
    tokens = rng.integers(len(LETTERS), size=(count, LENGTH))
    for i in range(1, LENGTH):
        drawn = rng.random(count)
        tokens[:, i] = np.sum(drawn[:, None] > upto[tokens[:, i - 1]], axis=1)
    return tokens, lengths


def _texts(tokens: Ints, lengths: Ints) -> list[str]:
    """The first letters of each row of tokens `[N, T]`."""
    rows = np.array(list(ALPHABET))[tokens]
    return ["".join(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def demonstrations(count: int = 2000, seed: int = 0) -> list[Demonstration]:
    """Random prompts with random completions, whatever their score."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice(all_prompts(), count)
    completions = _texts(*_completions(count, rng))
    return [Demonstration(str(p), c) for p, c in zip(prompts, completions, strict=True)]


def preferences(count: int = 60_000, seed: int = 0) -> list[Preference]:
    """Pairs of random completions. The first is preferred with the probability
    sigmoid(gold(first) - gold(second)) (Bradley and Terry 1952); the column `probability` is that
    of the label given."""
    rng = np.random.default_rng(seed)
    found: list[Preference] = []
    while len(found) < count:
        found += _pairs(count - len(found), rng)
    return found


def _pairs(count: int, rng: np.random.Generator) -> list[Preference]:
    """Labelled pairs; those whose completions are equal are left out."""
    prompts = rng.integers(len(LETTERS), size=(count, 2))
    drawn = [_completions(count, rng) for _ in range(2)]
    one, other = (
        scores(weights(), np.concatenate([prompts, tokens], axis=1), lengths)
        for tokens, lengths in drawn
    )
    chance = 1 / (1 + np.exp(other - one))
    first = rng.random(count) < chance
    told = np.where(first, chance, 1 - chance).round(6)
    asked = [f"{text}:" for text in _texts(prompts, np.full(count, 2))]
    found = []
    for prompt, a, b, swap, p in zip(
        asked, *(_texts(*x) for x in drawn), ~first, told, strict=True
    ):
        chosen, rejected = (b, a) if swap else (a, b)
        if a != b:
            found.append(Preference(prompt, chosen, rejected, columns={"probability": float(p)}))
    return found


def write_letters(folder: str | Path) -> None:
    """Write the example data as JSON Lines: `prompts.jsonl`, `demonstrations.jsonl` and
    `preferences.jsonl`. The folder is made if it does not exist."""
    to = Path(folder)
    to.mkdir(parents=True, exist_ok=True)
    write_records(to / "prompts.jsonl", [Prompt(text) for text in all_prompts()])
    write_records(to / "demonstrations.jsonl", demonstrations())
    write_records(to / "preferences.jsonl", preferences())
