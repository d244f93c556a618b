"""Random orders without sorting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

ROUNDS = 8
_SMALLEST = 256


def random_order(key: Key[Array, ""], n: int) -> Int[Array, " n"]:
    """The numbers 0 to n - 1 in a random order.

    A keyed Feistel network (Luby and Rackoff 1988) permutes the numbers below a power of two; one
    that lands at n or above is sent through again until it does not (cycle walking, Black and
    Rogaway 2002), which keeps it a permutation. Each number finds its place alone, so this is
    elementwise arithmetic where a sort, on CPU, takes as long as learning from the batch.

    Below 256, where a network reaches few of all orders, the order is `jax.random.permutation`'s,
    which sorts.
    """
    if n < _SMALLEST:
        return jax.random.permutation(key, n)
    bits = (n - 1).bit_length()
    round_keys = jax.random.bits(key, (ROUNDS,), jnp.uint32)
    order = _feistel(jnp.arange(n, dtype=jnp.uint32), bits, round_keys)
    if n < 1 << bits:
        order = jax.lax.while_loop(
            lambda order: jnp.any(order >= n),
            lambda order: jnp.where(order >= n, _feistel(order, bits, round_keys), order),
            order,
        )
    return order.astype(jnp.int32)


def _feistel(x: Array, bits: int, round_keys: Array) -> Array:
    """A permutation of the numbers of `bits` bits: two halves take turns at being changed by a
    hash of the other."""
    halves = (bits // 2, bits - bits // 2)
    changed, other = x >> halves[1], x & (1 << halves[1]) - 1
    for i in range(ROUNDS):
        mask = (1 << halves[i % 2]) - 1
        changed, other = other, changed ^ (_hash(other ^ round_keys[i]) & mask)
    return (changed << halves[1]) | other


def _hash(x: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011): each bit of x moves each bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
