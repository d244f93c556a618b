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
"""Scale of the gold score, in standard deviations over random texts."""


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
    made = Weights(single, pair, 0.35 * triple, 0.0, 1.0)
    texts = rng.integers(len(LETTERS), size=(_SAMPLE, 2 + LENGTH))
    sums = weighted_sum(made, texts)
    return made._replace(mean=float(sums.mean()), scale=_SHARPNESS / float(sums.std()))


def weighted_sum(given: Weights, tokens: Int[np.ndarray, "N T"]) -> Float[np.ndarray, " N"]:
    """The weighted sum of texts: the two letters of the prompt, then the completion."""
    before, last, now = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    each = given.single[now] + given.pair[last, now] + given.triple[before, last, now]
    return each.sum(axis=1)


def gold(prompt: str, completion: str) -> float:
    """The gold score of a text. Raises `ValueError` for other characters than letters, colons and
    stops."""
    letters = completion.partition(".")[0][:LENGTH]
    tokens = np.array([[ALPHABET.index(x) for x in prompt[:2] + letters]])
    made = weights()
    return (float(weighted_sum(made, tokens)[0]) - made.mean) * made.scale


def all_prompts() -> list[str]:
    """All 64 prompts."""
    return [f"{a}{b}:" for a in LETTERS for b in LETTERS]


def _completions(count: int, rng: np.random.Generator) -> list[str]:
    """Random completions of 3 to 6 letters; letters follow each other with random probabilities,
    the same for every call."""
    likely = np.random.default_rng(_WEIGHTS_SEED + 1).dirichlet(np.ones(len(LETTERS)), len(LETTERS))
    found = []
    for length in rng.integers(3, LENGTH + 1, size=count):
        text = [int(rng.integers(len(LETTERS)))]
        while len(text) < length:
            text.append(int(rng.choice(len(LETTERS), p=likely[text[-1]])))
        found.append("".join(LETTERS[x] for x in text))
    return found


def demonstrations(count: int = 2000, seed: int = 0) -> list[Demonstration]:
    """Random prompts with random completions, whatever their score."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice(all_prompts(), count)
    return [
        Demonstration(str(p), c) for p, c in zip(prompts, _completions(count, rng), strict=True)
    ]


def preferences(count: int = 8000, seed: int = 0) -> list[Preference]:
    """Pairs of random completions. The first is preferred with the probability
    sigmoid(gold(first) - gold(second)) (Bradley and Terry 1952); the column `probability` is that
    of the label given."""
    rng = np.random.default_rng(seed)
    found: list[Preference] = []
    while len(found) < count:
        prompt = str(rng.choice(all_prompts()))
        one, other = _completions(2, rng)
        if one == other:
            continue
        chance = 1 / (1 + np.exp(gold(prompt, other) - gold(prompt, one)))
        if rng.random() >= chance:
            one, other, chance = other, one, 1 - chance
        columns = {"probability": round(float(chance), 6)}
        found.append(Preference(prompt, one, other, columns=columns))
    return found


def write_letters(folder: str | Path) -> None:
    """Write the example data as JSON Lines: `prompts.jsonl`, `demonstrations.jsonl` and
    `preferences.jsonl`. The folder is made if it does not exist."""
    to = Path(folder)
    to.mkdir(parents=True, exist_ok=True)
    write_records(to / "prompts.jsonl", [Prompt(text) for text in all_prompts()])
    write_records(to / "demonstrations.jsonl", demonstrations())
    write_records(to / "preferences.jsonl", preferences())
