"""Generates responses to prompts, one token at a time with cached keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from purejaxppo.distributions import categorical
from purejaxppo.types import Network, PyTree


class Prompts(NamedTuple):
    """Token sequences `[N, L]`, padded on the left."""

    tokens: Int[Array, "N L"]
    lengths: Int[Array, " N"]
    """Number of tokens without padding, at least 1."""

    def take(self, rows: Int[Array, " M"]) -> "Prompts":
        """The prompts of these rows."""
        return Prompts(self.tokens[rows], self.lengths[rows])


class Responses(NamedTuple):
    """What was generated: R is the maximum number of tokens."""

    tokens: Int[Array, "N R"]
    lengths: Int[Array, " N"]
    """Number of tokens up to and including the stop token, or R. Later tokens mean nothing."""
    stopped: Bool[Array, " N"]
    """Whether the stop token was generated."""
    log_prob: Float[Array, "N R"]
    """Log-probability of each token, as computed while generating."""


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
) -> Responses:
    """Generate one response per prompt.

    Noise is drawn in each step: drawn at once it would be `[R, N, V]`.

    Args:
        keys: one per prompt; a response depends only on its own key.
        temperature: logits are divided by it.
        deterministic: take the most likely token. May be traced.
    """
    rows = prompts.lengths.shape[0]
    carry, logits = read_prompts(network, params, prompts, temperature)
    policy = categorical(logits.shape[-1])

    def sample(keys: Key[Array, " N"], logits: Float[Array, "N V"]) -> tuple[Array, Array]:
        noise = jax.vmap(policy.noise)(keys)
        token = policy.sample(logits, jnp.where(deterministic, 0.0, noise))
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


def read_prompts(
    network: Network, params: PyTree, prompts: Prompts, temperature: Any
) -> tuple[PyTree, Float[Array, "N V"]]:
    """Fill the caches with the prompts; also returns the logits of the first response token."""
    length = prompts.tokens.shape[1]
    start = jnp.arange(length)[:, None] == length - prompts.lengths
    carry = network.initial_carry(prompts.lengths.shape[0])
    obs = observe(prompts.tokens.T, temperature)
    carry, logits, _ = network.apply(params, carry, obs, start)
    return carry, logits[-1]


def observe(token: Int[Array, "T N"], temperature: Any) -> dict[str, Array]:
    """The decoder's observation of tokens."""
    return {
        "token": token,
        "temperature": jnp.full(token.shape, 1.0, jnp.float32) * temperature,
    }
