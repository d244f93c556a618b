"""Random orders without sorting."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

ROUNDS = 8
_SMALLEST = 256
_VECTOR = 8
"""Arrays are computed in a multiple of this size: XLA on CPU uses no vector instructions for an odd
number of elements."""


def random_order(key: Key[Array, ""], n: int) -> Int[Array, " n"]:
    """The numbers 0 to n - 1 in a random order.

    A keyed Feistel network (Luby and Rackoff 1988) permutes the numbers below a * b, the least
    product of at least n whose factors are close to each other (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains", method 3). A number that lands at n or above, of which there are
    at most a * b - n, a few, is sent through again until it does not (their cycle walking), which
    keeps it a permutation. Each number finds its place alone, so this is elementwise arithmetic
    where a sort, on CPU, takes as long as learning from the batch.

    Below 256, where a network reaches few of all orders, the order is `jax.random.permutation`'s,
    which sorts.
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


def _sides(n: int) -> tuple[int, int]:
    """The a <= b <= 2 a whose product is the least of at least n, the closest if there are several;
    for powers of two, powers of two."""
    candidates = [(a, -(-n // a)) for a in range(math.isqrt(n), 0, -1) if -(-n // a) <= 2 * a]
    return min(candidates, key=math.prod)


def _walk(order: Array, n: int, sides: tuple[int, int], round_keys: Array) -> Array:
    """Send what landed at n or above through the network until it does not.

    From the few numbers of n and above, each walk is followed back to where it began below n, and
    on to where it ends, so that the work does not grow with n. Those that only lead to each other
    begin nowhere: after as many steps as there are numbers they are left where they are.
    """
    above = jnp.arange(n, math.prod(sides), dtype=jnp.uint32)

    def follow(inverse: bool) -> Array:
        def going_on(state: tuple[Array, Array]) -> Array:
            return (state[0] < len(above)) & jnp.any(state[1] >= n)

        def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
            i, x = state
            return i + 1, jnp.where(x >= n, _feistel(x, sides, round_keys, inverse=inverse), x)

        return jax.lax.while_loop(going_on, step, (jnp.zeros((), jnp.int32), above))[1]

    return order.at[follow(True)].set(follow(False), mode="drop")


def _feistel(x: Array, sides: tuple[int, int], keys: Array, *, inverse: bool = False) -> Array:
    """A permutation of the numbers below the product of two sides: quotient and remainder take
    turns at being changed by a hash of the other."""
    changed, other = x // sides[1], x % sides[1]
    for i in reversed(range(ROUNDS)) if inverse else range(ROUNDS):
        if inverse:
            changed, other = _add(other, _hash(changed ^ keys[i]), sides[i % 2], -1), changed
        else:
            changed, other = other, _add(changed, _hash(other ^ keys[i]), sides[i % 2])
    return changed * sides[1] + other


def _add(x: Array, number: Array, size: int, sign: int = 1) -> Array:
    """`x` below `size`, with any number added or subtracted within `size`, at most 2^16; bit by bit
    where it is a power of two."""
    if size & (size - 1) == 0:
        return x ^ (number & (size - 1))
    # number * size / 2^32 in halves of 16 bits: remainders take many times as long on CPU.
    low = ((number & 0xFFFF) * size) >> 16
    scaled = ((number >> 16) * size + low) >> 16
    total = x + (scaled if sign > 0 else size - scaled)
    return jnp.where(total >= size, total - size, total)


def _hash(x: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011): each bit of x moves each bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
