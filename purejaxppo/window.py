"""A transformer over a sliding window, as the memory of a policy."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from purejaxppo.types import PyTree

_GATE_BIAS = 2.0
"""Bias with which a gate begins close to the identity (Parisotto et al. 2019, section 4.2)."""


class Cache(NamedTuple):
    """Keys and values of the last W steps in each of L layers, the newest last."""

    keys: Float[Array, "B L W D"]
    values: Float[Array, "B L W D"]
    age: Int[Array, " B"]
    """Number of steps of the episode so far; older entries of the window are masked."""


def empty_cache(rows: int, layers: int, window: int, size: int) -> Cache:
    zeros = jnp.zeros((rows, layers, window, size), jnp.float32)
    return Cache(zeros, zeros, jnp.zeros(rows, jnp.int32))


class Gate(nn.Module):
    """The GRU-type gate of GTrXL (Parisotto et al. 2019, arXiv:1910.06764, section 3.2).

    r = sigmoid(W_r y + U_r x), z = sigmoid(W_z y + U_z x - b), h = tanh(W_h y + U_h (r x)),
    g(x, y) = (1 - z) x + z h
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], y: Float[Array, "B D"]) -> Float[Array, "B D"]:
        size = x.shape[-1]

        def both(name: str, x: Array) -> Array:
            own = nn.Dense(size, name=f"{name}_y")(y)
            return own + nn.Dense(size, use_bias=False, name=f"{name}_x")(x)

        r, z = nn.sigmoid(both("reset", x)), nn.sigmoid(both("update", x) - _GATE_BIAS)
        return (1 - z) * x + z * nn.tanh(both("new", r * x))


class Block(nn.Module):
    """Attention over the window, then an MLP, each behind a layer norm and a gate."""

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B D"], keys: Array, values: Array, seen: Bool[Array, "B W"]
    ) -> tuple[Float[Array, "B D"], Array, Array]:
        size, window = x.shape[-1], keys.shape[1]
        inner = nn.LayerNorm()(x)
        new = (nn.Dense(size, name=name)(inner) for name in ("key", "value"))
        keys, values = (_pushed(old, row) for old, row in zip((keys, values), new, strict=True))
        query = nn.Dense(size, name="query")(inner)

        def split(x: Array) -> Array:
            return x.reshape((*x.shape[:-1], self.heads, -1))

        scores = jnp.einsum("bhd,bwhd->bhw", split(query), split(keys))
        place = self.param("place", nn.initializers.zeros, (self.heads, window))
        scores = scores / math.sqrt(size // self.heads) + place
        scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
        read = jnp.einsum("bhw,bwhd->bhd", nn.softmax(scores), split(values))
        attended = nn.Dense(size, name="out")(read.reshape(x.shape))
        x = Gate(name="gate_attention")(x, nn.relu(attended))
        hidden = nn.relu(nn.Dense(2 * size)(nn.LayerNorm()(x)))
        return Gate(name="gate_mlp")(x, nn.relu(nn.Dense(size)(hidden))), keys, values


def _pushed(old: Float[Array, "B W D"], new: Float[Array, "B D"]) -> Float[Array, "B W D"]:
    """The window with a new last row, without the first."""
    return jnp.concatenate([old[:, 1:], new[:, None]], axis=1)


class Blocks(nn.Module):
    """One step of all blocks."""

    layers: int
    heads: int

    @nn.compact
    def __call__(
        self, cache: Cache, x: Float[Array, "B D"], start: Bool[Array, " B"]
    ) -> tuple[Cache, Float[Array, "B D"]]:
        window = cache.keys.shape[2]
        age = jnp.where(start, 0, cache.age) + 1
        seen = jnp.arange(window) >= window - age[:, None]
        every_key, every_value = [], []
        for i in range(self.layers):
            block = Block(self.heads, name=f"block_{i}")
            x, keys, values = block(x, cache.keys[:, i], cache.values[:, i], seen)
            every_key.append(keys)
            every_value.append(values)
        keys, values = (jnp.stack(each, axis=1) for each in (every_key, every_value))
        return Cache(keys, values, jnp.minimum(age, window)), x


class Window(nn.Module):
    """Gated transformer blocks over the last steps of an episode, `[T, B, F]`.

    Steps are read one after another, as when acting, so that both give the same numbers. A position
    in the window has a learned bias per head.
    """

    size: int
    layers: int
    heads: int

    @nn.compact
    def __call__(
        self, carry: Cache, features: Float[Array, "T B F"], start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "T B D"]]:
        x = nn.Dense(self.size, name="in")(features)
        blocks = Blocks(self.layers, self.heads, name="blocks")

        def step(blocks: Any, cache: Cache, inputs: tuple[Array, Array]) -> Any:
            return blocks(cache, *inputs)

        over_time = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return over_time(blocks, carry, (x, start))
