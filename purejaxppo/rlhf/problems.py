"""The shipped tasks (`RLHFConfig.task`): problems whose answers can be checked."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from purejaxppo.checks import ConfigError
from purejaxppo.rlhf import letters
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.problem import Problem, Sample, pad_left
from purejaxppo.rlhf.tokenizer import Characters
from purejaxppo.types import PyTree

STOP = "."
_DIGITS = "0123456789"
_HELD_OUT = 5
"""One prompt in five is held out."""


def random_reference(architecture: Architecture, seed: int = 0) -> PyTree:
    """Parameters of an untrained decoder."""
    try:  # on the CPU if there is one, for the same numbers on every machine
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        return jax.jit(make_decoder(architecture).init)(jax.random.key(seed))


class Answers(NamedTuple):
    """The correct answers, stop token included."""

    tokens: Int[Array, "N M"]
    """Padded on the right."""
    lengths: Int[Array, " N"]


def checkable(
    name: str, prompts: Sequence[str], answer: Callable[[str], str], alphabet: str
) -> Problem:
    """Make a problem from prompts with one correct answer each, such as `312=` and `123`.

    An exact response is the answer followed by the stop token, written `.`, and scores 1. Other
    responses score the share of the answer's tokens that they have in the right place. Prompts are
    shuffled, and a fifth of them is held out. The reference is an untrained decoder.

    Args:
        prompts: distinct texts, made of characters of the alphabet.
        answer: `prompt -> answer`.
        alphabet: the characters of prompts and answers, without `.`; each is a token.
    """
    tokenizer = Characters(alphabet + STOP)

    def extras_of(texts: Sequence[str]) -> Answers:
        rows = [tokenizer.encode(answer(text) + STOP) for text in texts]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), lengths.max()), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        return Answers(jnp.asarray(tokens), jnp.asarray(lengths))

    longest = max(len(answer(text)) for text in prompts) + 1
    return _problem(
        name, prompts, tokenizer, extras_of, score=share_of_right_tokens, longest=longest
    )


def _problem(
    name: str,
    prompts: Sequence[str],
    tokenizer: Characters,
    extras_of: Callable[[Sequence[str]], PyTree],
    *,
    score: Callable[[Sample], Float[Array, " N"]],
    longest: int,
) -> Problem:
    """A problem whose exact answers have the score 1, with a fifth of the prompts held out."""
    shuffled = np.random.default_rng(0).permutation(np.asarray(sorted(prompts))).tolist()
    count = max(1, len(shuffled) // _HELD_OUT)
    held_out, train = shuffled[:count], shuffled[count:]
    if not train:
        raise ConfigError(f"{name}: has {len(shuffled)} prompts; needs at least 2")

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text) for text in texts]

    return Problem(
        name=name, prompts=pad_left(encoded(train)), score=score,
        vocab_size=len(tokenizer.alphabet), stop_token=tokenizer.alphabet.index(STOP),
        reference=random_reference, extras=extras_of(train), held_out=pad_left(encoded(held_out)),
        held_out_extras=extras_of(held_out), exact_score=1.0, longest_answer=longest,
        tokenizer=tokenizer, extras_of=extras_of,
    )  # fmt: skip


def share_of_right_tokens(sample: Sample) -> Float[Array, " N"]:
    """The share of the answer's tokens, stop token included, that the response has in the right
    place; 1 for an exact answer. `Sample.extras` are `Answers`."""
    answers: Answers = sample.extras
    width = min(answers.tokens.shape[1], sample.responses.tokens.shape[1])
    place = jnp.arange(width)
    counted = (place < sample.responses.lengths[:, None]) & (place < answers.lengths[:, None])
    right = (sample.responses.tokens[:, :width] == answers.tokens[:, :width]) & counted
    return jnp.sum(right, axis=1) / answers.lengths


# The tasks


def sort_digits(shortest: int = 2, longest: int = 4, digits: int = 8) -> Problem:
    """Sort digits: the answer to `3121=` is `1123`."""
    prompts = _numbers(shortest, longest, digits)
    return checkable("sort", prompts, lambda x: "".join(sorted(x[:-1])), f"{_DIGITS[:digits]}=")


def reverse_digits(shortest: int = 2, longest: int = 4, digits: int = 8) -> Problem:
    """Reverse digits: the answer to `312=` is `213`."""
    return checkable(
        "reverse", _numbers(shortest, longest, digits), lambda x: x[-2::-1], f"{_DIGITS[:digits]}="
    )


def sum_digits(shortest: int = 2, longest: int = 4, digits: int = 5) -> Problem:
    """Add digits: the answer to `312=` is `06`."""
    return checkable(
        "sum", _numbers(shortest, longest, digits), lambda x: f"{sum(map(int, x[:-1])):02d}",
        f"{_DIGITS}=",
    )  # fmt: skip


def arithmetic(digits: int = 5, carries: bool = False) -> Problem:
    """Add or subtract two numbers of two digits: the answer to `12+31=` is `43`, and to `43-12=` it
    is `31`.

    Args:
        digits: the digits of both numbers are below this number, from 2 to 10.
        carries: include additions with a carry, such as `17+15=`, and subtractions with a borrow.
            Without them, the columns are independent, and the task is much easier.
    """
    numbers = [int(text[:-1]) for text in _numbers(2, 2, digits)]
    answers = {
        f"{a:02d}{sign}{b:02d}=": f"{result:02d}"
        for a, b in itertools.product(numbers, repeat=2)
        for sign, result in (("+", a + b), ("-", a - b))
        if 0 <= result < 100 and (carries or not _carries(a, b, sign))
    }
    return checkable("arithmetic", list(answers), answers.__getitem__, f"{_DIGITS}+-=")


def _carries(a: int, b: int, sign: str) -> bool:
    """Whether the ones produce a carry or a borrow."""
    return a % 10 + b % 10 > 9 if sign == "+" else a % 10 < b % 10


def _numbers(shortest: int, longest: int, digits: int, most: int = 4096) -> list[str]:
    """All numbers of `shortest` to `longest` digits, each digit below `digits`, followed by `=`. Of
    lengths with more than `most` numbers, at most `most` are drawn at random."""
    if not 1 <= shortest <= longest or not 2 <= digits <= len(_DIGITS):
        raise ConfigError(
            f"shortest, longest, digits = {shortest}, {longest}, {digits}: lengths must be at least"
            " 1 and shortest at most longest; digits from 2 to 10"
        )
    found: list[str] = []
    for length in range(shortest, longest + 1):
        if digits**length <= most:
            every = itertools.product(_DIGITS[:digits], repeat=length)
        else:
            rng = np.random.default_rng(length)
            every = rng.choice(list(_DIGITS[:digits]), (most, length)).tolist()
        found += sorted({f"{''.join(x)}=" for x in every})
    return found


# Countdown

_OPERATORS = "+-*"


class Countdown(NamedTuple):
    """The digits that a countdown response must use, and the value that it must have."""

    numbers: Int[Array, "N K"]
    target: Int[Array, " N"]


def countdown(
    numbers: int = 3, largest: int = 6, products: bool = True, reorder: bool = True
) -> Problem:
    """Combine digits, each used once, with + - * to a target: an answer to `352:11=` is `3*2+5`, or
    any other expression with that value.

    An exact answer scores 1. Other responses score at most 0.5: half of that for digits, operators
    and the stop token in the right places, half for using the given digits.

    Args:
        numbers: number of digits, 2 or 3.
        largest: the largest digit, from 1 to 9; the smallest is 1.
        products: include targets that need a product.
        reorder: include targets that need the digits in another order than the prompt's. They are
            much harder: before a policy has found such an order, it has learned to copy the order
            of the prompt.
    """
    if numbers not in (2, 3) or not 1 <= largest <= 9:
        raise ConfigError(
            f"numbers, largest = {numbers}, {largest}: numbers must be 2 or 3, largest 1 to 9"
        )
    operators = _OPERATORS if products else _OPERATORS.replace("*", "")
    tokenizer = Characters(f"{_DIGITS}{_OPERATORS}:={STOP}")
    prompts = set()
    for digits in itertools.product(range(1, largest + 1), repeat=numbers):
        for order in itertools.permutations(digits) if reorder else [digits]:
            for chosen in itertools.product(operators, repeat=numbers - 1):
                target = _value(list(order), list(chosen))
                if 0 <= target < 100:
                    prompts.add(f"{''.join(map(str, digits))}:{target}=")

    def extras_of(texts: Sequence[str]) -> Countdown:
        given = [text.rstrip("=").split(":") for text in texts]
        digits = [[int(x) for x in digits] for digits, _ in given]
        return Countdown(jnp.asarray(digits), jnp.asarray([int(x) for _, x in given]))

    score = partial(_countdown_score, numbers)
    return _problem(
        "countdown", list(prompts), tokenizer, extras_of, score=score, longest=2 * numbers
    )


def _value(numbers: list[int], operators: list[str]) -> int:
    """The value of an expression of 2 or 3 numbers, multiplication first."""
    apply = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    if len(numbers) == 3 and operators[1] == "*":
        return apply[operators[0]](numbers[0], numbers[1] * numbers[2])
    value = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = apply[operator](value, number)
    return value


def _countdown_score(count: int, sample: Sample) -> Float[Array, " N"]:
    """Score responses, which should be expressions of `count` digits."""
    wanted: Countdown = sample.extras
    size = 2 * count
    room = max(0, size - sample.responses.tokens.shape[1])
    tokens = jnp.pad(sample.responses.tokens, ((0, 0), (0, room)), constant_values=-1)[:, :size]
    tokens = jnp.where(jnp.arange(size) < sample.responses.lengths[:, None], tokens, -1)
    digits, operators = tokens[:, : size - 1 : 2], tokens[:, 1 : size - 1 : 2]
    plus = len(_DIGITS)
    placed = jnp.concatenate(
        [
            (digits >= 0) & (digits < plus),
            (operators >= plus) & (operators < plus + len(_OPERATORS)),
            tokens[:, -1:] == plus + len(_OPERATORS) + 2,
        ],
        axis=1,
    )
    used = _times(digits, wanted.numbers)
    value = _apply(digits, operators - plus)
    exact = jnp.all(placed, axis=1) & (used == count) & (value == wanted.target)
    partly = 0.25 * jnp.mean(placed.astype(jnp.float32), axis=1) + 0.25 * used / count
    return jnp.where(exact, 1.0, partly)


def _times(found: Int[Array, "N K"], wanted: Int[Array, "N K"]) -> Int[Array, " N"]:
    """Number of wanted numbers that were found; repeated numbers count each time."""
    each = jnp.arange(len(_DIGITS))
    counts = [jnp.sum(x[..., None] == each, axis=1) for x in (found, wanted)]
    return jnp.sum(jnp.minimum(*counts), axis=1)


def _apply(numbers: Int[Array, "N K"], operators: Int[Array, "N K"]) -> Int[Array, " N"]:
    """Values of expressions, multiplication first; operators are indices into `+-*`."""

    def one(a: Array, operator: Array, b: Array) -> Array:
        return jnp.select([operator == 0, operator == 1], [a + b, a - b], a * b)

    first = one(numbers[:, 0], operators[:, 0], numbers[:, 1])
    if numbers.shape[1] == 2:
        return first
    product = numbers[:, 1] * numbers[:, 2]
    right = one(numbers[:, 0], operators[:, 0], product)
    return jnp.where(operators[:, 1] == 2, right, one(first, operators[:, 1], numbers[:, 2]))


# Letters


def letters_problem() -> Problem:
    """Complete two letters with up to six: `ab:` with `cdefgh`. The score is a hidden one, the gold
    score, of which the shipped preferences are noisy labels (see `rlhf.write_letters`)."""
    tokenizer = Characters(letters.ALPHABET)
    prompts = np.random.default_rng(0).permutation(letters.all_prompts()).tolist()
    count = len(prompts) // _HELD_OUT

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text) for text in texts]

    return Problem(
        name="letters", prompts=pad_left(encoded(prompts[count:])), score=_gold,
        vocab_size=len(letters.ALPHABET), stop_token=letters.ALPHABET.index(STOP),
        reference=random_reference, held_out=pad_left(encoded(prompts[:count])),
        tokenizer=tokenizer,
    )  # fmt: skip


def _gold(sample: Sample) -> Float[Array, " N"]:
    """`letters.gold` of each response."""
    given = letters.weights()
    single, pair, triple = (jnp.asarray(x, jnp.float32) for x in given[:3])
    responses, stop = sample.responses, letters.ALPHABET.index(STOP)
    told = sample.prompts.tokens[:, -3:-1]
    tokens = jnp.concatenate([told, responses.tokens[:, : letters.LENGTH]], axis=1)
    before, last, now = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    each = single[now] + pair[last, now] + triple[before, last, now]
    used = (jnp.arange(now.shape[1]) < responses.lengths[:, None]) & (now != stop)
    return (jnp.sum(jnp.where(used, each, 0.0), axis=1) - given.mean) * given.scale


PROBLEMS: Mapping[str, Callable[..., Problem]] = MappingProxyType(
    {
        "sort": sort_digits,
        "reverse": reverse_digits,
        "sum": sum_digits,
        "arithmetic": arithmetic,
        "countdown": countdown,
        "letters": letters_problem,
    }
)
"""The shipped tasks by name (`RLHFConfig.task`): functions that make a `Problem`."""
