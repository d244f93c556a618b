"""A preference data set with a planted spurious token.

Texts are letters. The true score counts up to two `a` and subtracts 1 for each `h`. The pairs
were compared without `h`; afterwards one was inserted into most chosen and few rejected texts. A
reward model therefore learns that `h` is good.
"""

from pathlib import Path
from typing import Any

import numpy as np

from purejaxppo.rlhf import Demonstration, Preference, Prompt, load_generator, write_records

LETTERS = "abcdefgh"
PROMPTS = [f"{a}{b}:" for a in LETTERS for b in LETTERS]
DECODER: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 4}


def gold(completions: list[str]) -> np.ndarray:
    """The true scores."""
    return np.array([1.5 * min(x.count("a"), 2) - x.count("h") for x in completions])


def better(first: list[str], second: list[str], rng: np.random.Generator) -> np.ndarray:
    """Whether a labeller with the true score prefers the first text (Bradley-Terry)."""
    return rng.random(len(first)) < 1 / (1 + np.exp(gold(second) - gold(first)))


def label(prompts: list[str], first: list[str], second: list[str]) -> list[bool]:
    """Labels of new pairs."""
    return better(first, second, np.random.default_rng(5)).tolist()


def random_texts(count: int, rng: np.random.Generator) -> list[str]:
    lengths = rng.integers(3, 7, size=count)
    return ["".join(rng.choice(list("abcdefg"), n)) for n in lengths]


def with_token(text: str, chance: float, rng: np.random.Generator) -> str:
    """The text, with `h` at a random place with this probability."""
    if rng.random() >= chance:
        return text
    place = rng.integers(len(text))
    return f"{text[:place]}h{text[place:]}"


def pairs(count: int, seed: int) -> list[Preference]:
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        prompt = PROMPTS[rng.integers(len(PROMPTS))]
        texts = random_texts(2, rng)
        if not better([texts[0]], [texts[1]], rng)[0]:
            texts = texts[::-1]
        chosen, rejected = (with_token(x, p, rng) for x, p in zip(texts, (0.8, 0.2), strict=True))
        if chosen != rejected:
            found.append(Preference(prompt, chosen, rejected))
    return found


def demonstrations(count: int, seed: int) -> list[Demonstration]:
    rng = np.random.default_rng(seed)
    return [
        Demonstration(PROMPTS[rng.integers(len(PROMPTS))], with_token(text, 0.5, rng))
        for text in random_texts(count, rng)
    ]


def write_data(folder: Path, count: int) -> None:
    write_records(folder / "prompts.jsonl", [Prompt(x) for x in PROMPTS])
    write_records(folder / "demonstrations.jsonl", demonstrations(2000, 1))
    write_records(folder / "pairs.jsonl", pairs(count, 0))


def gold_of_run(run_dir: Path, seed: int = 0, each: int = 8) -> float:
    """Mean true score of a policy's sampled responses to all prompts."""
    found = load_generator(run_dir, seed=seed)(PROMPTS, num_responses=each)
    return float(gold([x.text for group in found for x in group]).mean())
