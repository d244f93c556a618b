"""A decoder-only transformer as a `Network`: it predicts the next token and a value.

Axis letters besides those of `types`: V vocabulary, W width, H heads, K key/value heads, D width of
a head, C tokens that a cache can hold. Inside the modules, sequences are `[B, T]`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.types import Network, PyTree

_LOWEST = -1e30
"""Attention score of a masked key; finite, so that gradients stay finite."""


class Cache(NamedTuple):
    """KV cache: keys and values of the tokens read so far. The carry of a decoder in generation.

    Heads come before tokens: reading `[B, K, C, D]` takes a third of the time of `[B, C, K, D]` on
    CPU.
    """

    keys: tuple[Float[Array, "B K C D"], ...]
    """One array per layer."""
    values: tuple[Float[Array, "B K C D"], ...]
    first: Int[Array, " B"]
    """Index of the sequence's first token; earlier ones are padding."""
    length: Int[Array, " B"]
    """Number of tokens read, padding included; the same for all rows."""


def make_decoder(architecture: Architecture) -> Network:
    """Make the network `(params, carry, obs, start) -> (carry, logits[T, B, V], value[T, B])`.

    `obs` has the leaves `token` and `temperature` `[T, B]`; the temperature divides the logits.
    With the carry `()`, the network processes whole sequences. Where `start` is set, a new sequence
    begins, whose tokens do not attend to earlier ones. This masks padding, which is therefore on
    the left of prompts. With KV caches as the carry (`initial_carry(n)`), the network continues the
    cached sequences.
    """
    module = _ActorCritic(architecture)

    def obs(rows: int, steps: int) -> PyTree:
        ones = jnp.ones((steps, rows), jnp.float32)
        return {"token": ones.astype(jnp.int32), "temperature": ones}

    def init(key: Key[Array, ""]) -> PyTree:
        return module.init(key, (), obs(1, 1), jnp.ones((1, 1), bool))["params"]

    def apply(
        params: PyTree, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "T B V"], Float[Array, "T B"]]:
        applied: Any = module.apply({"params": params}, carry, obs, start)
        return applied

    widest = max(architecture.vocab_size, _mlp_width(architecture))
    caches = 2 if architecture.critic == "separate" else 1
    return Network(
        init=init,
        initial_carry=lambda n: tuple(_empty(architecture, n) for _ in range(caches)),
        apply=apply,
        width=widest,
        sequential=True,
        steps_at_once=True,
    )


def _empty(architecture: Architecture, rows: int) -> Cache:
    shape = (rows, architecture.kv_heads, architecture.context, architecture.head_width)
    zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in range(architecture.num_layers))
    counts = jnp.zeros(rows, jnp.int32)
    return Cache(zeros, zeros, counts, counts)


def _mlp_width(architecture: Architecture) -> int:
    return architecture.mlp_width or 4 * architecture.width


class _ActorCritic(nn.Module):
    architecture: Architecture

    @nn.compact
    def __call__(
        self, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Array, Array]:
        made = self.architecture
        caches: list[Any] = list(carry) if carry else [None, None]
        token, start = obs["token"].T, start.T
        actor = _Trunk(made, name="actor")
        caches[0], x, embedding = actor(caches[0], token, start)
        if made.tied_embeddings:
            logits = embedding.attend(x)
        else:
            logits = _dense(made.vocab_size, 0.16, bias=False, name="actor_head")(x)
        logits = logits / obs["temperature"].T[..., None]
        value = jnp.zeros(token.shape, jnp.float32)
        if made.critic == "separate":
            caches[1], x, _ = _Trunk(made, name="critic")(caches[1], token, start)
        if made.critic != "none":
            value = _dense(1, 0.0, name="critic_head")(x)[..., 0]
        return tuple(caches) if carry else (), logits.swapaxes(0, 1), value.T


class _Trunk(nn.Module):
    """Embeddings, blocks and the final norm: tokens `[B, T]` to features `[B, T, W]`. Also returns
    the token embedding."""

    architecture: Architecture

    @nn.compact
    def __call__(
        self, cache: Cache | None, token: Int[Array, "B T"], start: Bool[Array, "B T"]
    ) -> tuple[Cache | None, Float[Array, "B T W"], nn.Embed]:
        made = self.architecture
        length = jnp.zeros((), jnp.int32) if cache is None else cache.length[0]
        index = length + jnp.arange(token.shape[1])
        begins = jnp.where(start, index, 0 if cache is None else cache.first[:, None])
        first = jax.lax.cummax(begins, axis=1)
        position = index - first
        key_index = jnp.arange(token.shape[1] if cache is None else made.context)
        visible = (key_index >= first[..., None]) & (key_index <= index[:, None])

        embed = partial(nn.Embed, features=made.width, embedding_init=nn.initializers.normal(0.02))
        embedding = embed(made.vocab_size, name="embedding")
        x = embedding(token)
        if made.positions == "learned":
            x += embed(made.context, name="position")(position)
        keys, values = [], []
        for i in range(made.num_layers):
            held = None if cache is None else (cache.keys[i], cache.values[i])
            block = _Block(made, name=f"block_{i}")
            x, (key, value) = block(x, position, visible, held, length)
            keys.append(key)
            values.append(value)
        x = _norm(made, "norm")(x)
        if cache is None:
            return None, x, embedding
        read = cache.length + token.shape[1]
        return Cache(tuple(keys), tuple(values), first[:, -1], read), x, embedding


class _Block(nn.Module):
    """A pre-norm transformer block: attention and an MLP, each added to the residual stream."""

    architecture: Architecture

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T W"],
        position: Int[Array, "B T"],
        visible: Bool[Array, "B T C"],
        held: tuple[Array, Array] | None,
        length: Int[Array, ""],
    ) -> tuple[Float[Array, "B T W"], tuple[Array, Array]]:
        made = self.architecture
        residual = 1 / math.sqrt(2 * made.num_layers)  # scaled by depth, as in GPT-2
        y = _norm(made, "norm_attention")(x)
        heads = made.num_heads, made.kv_heads, made.kv_heads
        names = "query", "key", "value"
        q, k, v = (
            _split_heads(_dense(n * made.head_width, name=name)(y), n)
            for n, name in zip(heads, names, strict=True)
        )
        if made.positions == "rotary":
            q, k = _rotate(q, position), _rotate(k, position)
        if held is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=2)
                for old, new in zip(held, (k, v), strict=True)
            )
        x += _dense(made.width, residual, name="out")(_attend(q, k, v, visible))
        y = _norm(made, "norm_mlp")(x)
        hidden = _dense(_mlp_width(made), name="up")(y)
        if made.activation == "swiglu":
            hidden = hidden * nn.silu(_dense(_mlp_width(made), name="gate")(y))
        else:
            hidden = nn.gelu(hidden)
        return x + _dense(made.width, residual, name="down")(hidden), (k, v)


def _attend(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    visible: Bool[Array, "B T C"],
) -> Float[Array, "B T W"]:
    """Softmax attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), with H / K query heads per
    key/value head (Ainslie et al. 2023, arXiv:2305.13245)."""
    rows, heads, steps, width = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, steps, width)
    scores = jnp.einsum("bkgtd,bkcd->bkgtc", grouped, k) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _LOWEST))
    read = jnp.einsum("bkgtc,bkcd->bkgtd", weights, v).reshape(rows, heads, steps, width)
    return read.swapaxes(1, 2).reshape(rows, steps, heads * width)


def _split_heads(x: Float[Array, "B T F"], heads: int) -> Float[Array, "B heads T D"]:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _rotate(x: Float[Array, "B H T D"], position: Int[Array, "B T"]) -> Float[Array, "B H T D"]:
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, eq. 34). Entry i is paired with
    entry i + D / 2, as in Llama."""
    half = x.shape[-1] // 2
    angle = position[:, None, :, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    low, high = x[..., :half], x[..., half:]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _norm(architecture: Architecture, name: str) -> nn.Module:
    kind = nn.LayerNorm if architecture.norm == "layer" else nn.RMSNorm
    return kind(name=name)


def _dense(features: int, scale: float = 1.0, *, bias: bool = True, name: str) -> nn.Dense:
    """A dense layer whose weights have the standard deviation scale / sqrt(inputs)."""
    scaled = nn.initializers.variance_scaling(scale**2, "fan_in", "normal") if scale else None
    init = scaled or nn.initializers.zeros
    return nn.Dense(features, use_bias=bias, kernel_init=init, name=name)
