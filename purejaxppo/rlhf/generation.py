"""Generates responses to prompts, token by token with a KV cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.distributions import categorical
from purejaxppo.types import Network, PyTree


class Prompts(NamedTuple):
    """Prompts as token sequences `[N, L]`, left-padded."""

    tokens: Int[Array, "N L"]
    lengths: Int[Array, " N"]
    """Number of tokens without padding, at least 1."""

    def take(self, rows: Int[Array, " M"]) -> "Prompts":
        """The prompts of these rows."""
        return Prompts(self.tokens[rows], self.lengths[rows])


class Responses(NamedTuple):
    """Generated responses; R is the maximum number of tokens."""

    tokens: Int[Array, "N R"]
    lengths: Int[Array, " N"]
    """Number of tokens up to and including the stop token, or R. Ignore later tokens."""
    stopped: Bool[Array, " N"]
    """Whether the stop token was generated."""
    log_prob: Float[Array, "N R"]
    """Log-probability of each token, as computed during generation."""


class _Step(NamedTuple):
    carry: PyTree
    token: Int[Array, " N"]
    stopped: Bool[Array, " N"]
    lengths: Int[Array, " N"]


def generate(
    network: Network,
    params: PyTree,
    keys: Key[Array, " N"],
    prompts: Prompts,
    *,
    max_tokens: int,
    stop_token: int,
    temperature: Any = 1.0,
    deterministic: Any = False,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Responses:
    """Generate one response per prompt.

    The sampling noise is drawn step by step; an array for all steps would be `[R, N, V]`.

    Args:
        keys: one per prompt; a response depends only on its own key.
        temperature: divides the logits.
        deterministic: take the most likely token (greedy decoding). May be traced.
        top_k: sample only from the `top_k` most likely tokens; 0 samples from all.
        top_p: sample only from the most likely tokens with this total probability (nucleus
            sampling, Holtzman et al. 2019, arXiv:1904.09751). Log-probabilities are always those of
            the full distribution, so do not train on responses sampled with `top_k` or `top_p`.
    """
    rows = prompts.lengths.shape[0]
    carry, logits = read_prompts(network, params, prompts, temperature)
    policy = categorical(logits.shape[-1])

    def sample(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> tuple[Array, Array]:
        noise = jax.vmap(policy.noise)(keys)
        likely = truncated(logits, top_k, top_p)
        token = policy.sample(likely, jnp.where(deterministic, 0.0, noise))
        return token, jnp.asarray(policy.distribution(logits).log_prob(token))

    def step(now: _Step, keys: Key[Array, " N"]) -> tuple[_Step, tuple[Array, Array]]:
        obs = observe(now.token[None], temperature)
        carry, logits, _ = network.apply(params, now.carry, obs, jnp.zeros((1, rows), bool))
        token, log_prob = sample(keys, logits[0])
        lengths = now.lengths + ~now.stopped
        return _Step(carry, token, now.stopped | (token == stop_token), lengths), (token, log_prob)

    step_keys = jax.vmap(lambda key: jax.random.split(key, max_tokens), out_axes=1)(keys)
    token, log_prob = sample(step_keys[0], logits)
    begun = _Step(carry, token, token == stop_token, jnp.ones(rows, jnp.int32))
    last, (tokens, log_probs) = jax.lax.scan(step, begun, step_keys[1:])
    return Responses(
        tokens=jnp.concatenate([token[None], tokens]).T,
        lengths=last.lengths,
        stopped=last.stopped,
        log_prob=jnp.concatenate([log_prob[None], log_probs]).T,
    )


def truncated(logits: Float[Array, "N V"], top_k: int, top_p: float) -> Float[Array, "N V"]:
    """Set the logits outside top-k and top-p to the lowest float; keeps the most likely token."""
    if top_k < 1 and top_p >= 1.0:
        return logits
    ranked = jnp.sort(logits, axis=-1)[..., ::-1]
    kept = jnp.ones(logits.shape, bool)
    if top_k >= 1:
        kept &= logits >= ranked[..., min(top_k, logits.shape[-1]) - 1, None]
    if top_p < 1.0:
        probs = jax.nn.softmax(ranked)
        before = jnp.cumsum(probs, axis=-1) - probs
        lowest = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        kept &= logits >= jnp.minimum(lowest, ranked[..., :1])
    return jnp.where(kept, logits, jnp.finfo(logits.dtype).min)


def read_prompts(
    network: Network, params: PyTree, prompts: Prompts, temperature: Any
) -> tuple[PyTree, Float[Array, "N V"]]:
    """Fill the KV caches with the prompts; also returns the logits of the first response token."""
    length = prompts.tokens.shape[1]
    start = jnp.arange(length)[:, None] == length - prompts.lengths
    carry = network.initial_carry(prompts.lengths.shape[0])
    obs = observe(prompts.tokens.T, temperature)
    carry, logits, _ = network.apply(params, carry, obs, start)
    return carry, logits[-1]


def response_log_probs(
    network: Network,
    params: PyTree,
    prompts: Prompts,
    tokens: Int[Array, "N R"],
    lengths: Int[Array, " N"],
    *,
    temperature: Any = 1.0,
) -> Float[Array, " N"]:
    """Log-probabilities of whole responses: the sum over their first `lengths` tokens."""
    every = jnp.concatenate([prompts.tokens, tokens], axis=1).T
    step = jnp.arange(len(every) - 1)[:, None] - (prompts.tokens.shape[1] - 1)
    obs, start = observe(every[:-1], temperature), step == 1 - prompts.lengths
    _, logits, _ = network.apply(params, (), obs, start)
    each = categorical(logits.shape[-1]).distribution(logits).log_prob(every[1:])
    return jnp.sum(jnp.where((step >= 0) & (step < lengths), each, 0.0), axis=0)


def observe(token: Int[Array, "T N"], temperature: Any) -> dict[str, Array]:
    """The decoder's observation: tokens and their temperature."""
    return {
        "token": token,
        "temperature": jnp.full(token.shape, 1.0, jnp.float32) * temperature,
    }
