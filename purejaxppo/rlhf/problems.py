"""Problems whose answers can be checked, on numbers of single digits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from purejaxppo.rlhf.decoder import Architecture, make_decoder
from purejaxppo.rlhf.generate import Prompts
from purejaxppo.rlhf.problem import Problem, Sample
from purejaxppo.types import PyTree


def random_reference(architecture: Architecture, seed: int = 0) -> PyTree:
    """Parameters of an untrained decoder."""
    return make_decoder(architecture).init(jax.random.key(seed))


def sort_digits(length: int = 4, digits: int = 8, num_prompts: int = 4096) -> Problem:
    """Sort digits: the prompt `3 1 2 1 =` has the answer `1 1 2 3`."""
    return _on_digits("sort", lambda x: np.sort(x, axis=1), length, digits, num_prompts)


def reverse_digits(length: int = 4, digits: int = 8, num_prompts: int = 4096) -> Problem:
    """Reverse digits: the prompt `3 1 2 1 =` has the answer `1 2 1 3`."""
    return _on_digits("reverse", lambda x: x[:, ::-1], length, digits, num_prompts)


def _on_digits(
    name: str,
    answer: Callable[[np.ndarray], np.ndarray],
    length: int,
    digits: int,
    num_prompts: int,
) -> Problem:
    """Tokens are the digits, `=` and the stop token. Of `num_prompts` random prompts, duplicates
    are removed and a fifth is held out."""
    equals, stop = digits, digits + 1
    numbers = np.random.default_rng(0).integers(0, digits, size=(num_prompts, length))
    numbers = np.unique(numbers, axis=0)
    numbers = np.random.default_rng(1).permutation(numbers)
    prompts = np.concatenate([numbers, np.full((len(numbers), 1), equals)], axis=1)
    answers = np.concatenate([answer(numbers), np.full((len(numbers), 1), stop)], axis=1)
    held_out = len(numbers) // 5

    def part(rows: slice) -> tuple[Prompts, Array]:
        tokens = jnp.asarray(prompts[rows], jnp.int32)
        lengths = jnp.full(len(tokens), length + 1, jnp.int32)
        return Prompts(tokens, lengths), jnp.asarray(answers[rows], jnp.int32)

    test, test_answers = part(slice(held_out))
    train, train_answers = part(slice(held_out, None))
    return Problem(
        name=name, prompts=train, score=share_of_right_tokens, vocab_size=digits + 2,
        stop_token=stop, reference=random_reference, extras=train_answers, held_out=test,
        held_out_extras=test_answers,
    )  # fmt: skip


def share_of_right_tokens(sample: Sample) -> Float[Array, " N"]:
    """The fraction of the answer's tokens, its stop token included, that the response has in their
    places; 1 for an exact answer. `Sample.extras` are the answers `[N, M]`, with M at most R."""
    answer = sample.extras
    size = answer.shape[1]
    counted = jnp.arange(size) < sample.responses.lengths[:, None]
    right = (sample.responses.tokens[:, :size] == answer) & counted
    return jnp.mean(right.astype(jnp.float32), axis=1)
