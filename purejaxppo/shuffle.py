"""Random orders without sorting."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

ROUNDS = 8
_SMALLEST = 256
_VECTOR = 8
"""Array sizes are rounded up to a multiple of this: XLA on CPU uses no vector instructions for an
odd number of elements."""


def random_order(key: Key[Array, ""], n: int) -> Int[Array, " n"]:
    """Return the numbers 0 to n - 1 in a random order.

    A keyed Feistel network (Luby and Rackoff 1988) permutes the numbers below a * b, the smallest
    product of at least n whose factors are close to each other (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains", method 3). The few numbers (at most a * b - n) that map to n or
    above are mapped again until they are below n (their cycle walking), so the result is a
    permutation. All of this is elementwise arithmetic; a sort, on CPU, takes as long as learning
    from the batch.

    Below 256, where a network can produce only few of all orders, this uses
    `jax.random.permutation`, which sorts.
    """
    if n < _SMALLEST:
        return jax.random.permutation(key, n)
    size = -(-n // _VECTOR) * _VECTOR
    sides = _sides(size)
    round_keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)
    order = _feistel(jnp.arange(size, dtype=jnp.uint32), sides, round_keys)
    if n < math.prod(sides):
        order = _walk(order, n, sides, round_keys)[:n]
    return order.astype(jnp.int32)


def rows_without_replacement(
    key: Key[Array, ""], number: Int[Array, " M"], count: int, size: int
) -> Int[Array, " M"]:
    """The rows of draws without replacement from `size` rows, in a new random order each epoch.

    The key and the number of the epoch determine its order, so nothing else has to be saved.

    Args:
        number: the draws, counted from 0 over the whole run; at most `count` apart.
    """
    epoch, place = number // size, number % size
    first = jnp.min(epoch)

    def order(offset: Int[Array, ""]) -> Int[Array, " P"]:
        return random_order(jax.random.fold_in(key, first + offset), size)

    orders = jax.lax.map(order, jnp.arange(-(-count // size) + 1))
    return orders[epoch - first, place]


def _sides(n: int) -> tuple[int, int]:
    """The factors a <= b <= 2 a with the smallest product of at least n, the closest pair if there
    are several; powers of two for powers of two."""
    candidates = [(a, -(-n // a)) for a in range(math.isqrt(n), 0, -1) if -(-n // a) <= 2 * a]
    return min(candidates, key=math.prod)


def _walk(order: Array, n: int, sides: tuple[int, int], round_keys: Array) -> Array:
    """Replace the entries of `order` that are n or above, by cycle walking.

    From each of the few numbers at n and above, the walk is followed back to its start below n and
    forward to its end, so the work does not grow with n. Walks that never leave these numbers have
    no start: they stop after `len(above)` steps and are ignored.
    """
    above = jnp.arange(n, math.prod(sides), dtype=jnp.uint32)

    def follow(inverse: bool) -> Array:
        def unfinished(state: tuple[Array, Array]) -> Array:
            return (state[0] < len(above)) & jnp.any(state[1] >= n)

        def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
            i, x = state
            return i + 1, jnp.where(x >= n, _feistel(x, sides, round_keys, inverse=inverse), x)

        return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), above))[1]

    return order.at[follow(True)].set(follow(False), mode="drop")


def _feistel(x: Array, sides: tuple[int, int], keys: Array, *, inverse: bool = False) -> Array:
    """Permute the numbers below the product of two sides: quotient and remainder are changed in
    turn by a hash of the other."""
    changed, other = x // sides[1], x % sides[1]
    for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        if inverse:
            changed, other = _add(other, _hash(changed ^ keys[i]), sides[i % 2], -1), changed
        else:
            changed, other = other, _add(changed, _hash(other ^ keys[i]), sides[i % 2])
    return changed * sides[1] + other


def _add(x: Array, number: Array, size: int, sign: int = 1) -> Array:
    """Add `number`, scaled to below `size`, to `x` or subtract it, modulo `size` (at most 2^16). If
    `size` is a power of two, XOR the low bits of `number` instead."""
    if size & (size - 1) == 0:
        return x ^ (number & (size - 1))
    # number * size / 2^32 in 16-bit halves: a remainder would be many times slower on CPU.
    low = ((number & 0xFFFF) * size) >> 16
    scaled = ((number >> 16) * size + low) >> 16
    total = x + (scaled if sign > 0 else size - scaled)
    return jnp.where(total >= size, total - size, total)


def _hash(x: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011): each bit of x affects each bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
