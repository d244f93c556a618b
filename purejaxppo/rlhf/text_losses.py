"""Losses of learning from texts: next-token prediction, Bradley-Terry and direct preference
optimisation.

Axis letters: B rows of T packed tokens; M items per row, of K sequences each (see `packing.Rows`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from purejaxppo.rlhf.generation import observe
from purejaxppo.rlhf.packing import Rows
from purejaxppo.rlhf.text_config import DPOConfig, RewardConfig, SFTConfig, TextConfig
from purejaxppo.types import Network, PyTree

CHOSEN, REJECTED = 0, 1
"""Indices of the sequences of a pair."""


class Texts(NamedTuple):
    """Packed rows and what else the losses read of them."""

    rows: Rows
    margin: Float[Array, "B M"]
    """Required difference of the scores of a pair; 0 for demonstrations."""
    reference: Float[Array, "B M K"]
    """Log-probabilities of the completions under the reference; 0 if the loss does not read
    them."""


class Totals(NamedTuple):
    """Sums over tokens or items, so that parts of a batch can be added."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    """Number of tokens or items."""
    metrics: dict[str, Float[Array, ""]]
    """Sums whose means over the same number are metrics."""


TextLoss = Callable[[PyTree, Texts, Any], Totals]
"""`(params, texts, hparams) -> totals`."""


def make_text_loss(config: TextConfig, network: Network) -> TextLoss:
    """The loss that a config describes."""
    if isinstance(config, SFTConfig):
        return _next_token_loss(config, network)
    if isinstance(config, RewardConfig):
        return _bradley_terry(network)
    assert isinstance(config, DPOConfig)
    return _direct_preference(config, network)


def _next_token_loss(config: SFTConfig, network: Network) -> TextLoss:
    """Negative log-likelihood per token (cross entropy)."""

    def loss(params: PyTree, texts: Texts, hparams: Any) -> Totals:
        rows = texts.rows
        counted = ~rows.start & (rows.completion | (config.loss_on == "all"))
        log_prob, likely = log_probs_of_tokens(network, params, rows)
        correct = jnp.sum(likely & counted)
        total = -jnp.sum(jnp.where(counted, log_prob, 0.0))
        return Totals(total, jnp.sum(counted * 1.0), {"token_accuracy": correct * 1.0})

    return loss


def _bradley_terry(network: Network) -> TextLoss:
    """-log sigmoid(r_chosen - r_rejected - margin) per pair (Bradley and Terry 1952; Ouyang et al.
    2022, arXiv:2203.02155, eq. 1), plus centring (r_chosen + r_rejected)^2 (Eisenstein et al. 2023,
    arXiv:2312.09244)."""

    def loss(params: PyTree, texts: Texts, hparams: Any) -> Totals:
        score = scores(network, params, texts.rows)
        margin = score[..., CHOSEN] - score[..., REJECTED]
        each = -jax.nn.log_sigmoid(margin - texts.margin)
        each += hparams.centring * jnp.square(jnp.sum(score, axis=-1))
        return _over_pairs(texts.rows, each, margin)

    return loss


def _direct_preference(config: DPOConfig, network: Network) -> TextLoss:
    """With h = log ratio of the chosen completion - log ratio of the rejected one, per pair:
    -log sigmoid(beta h - margin) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7, without a margin),
    or (h - 1 / (2 beta))^2 for ipo (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""

    def loss(params: PyTree, texts: Texts, hparams: Any) -> Totals:
        gap = implicit_margin(network, params, texts)
        each = preference_loss(config, gap, hparams.kl_coef, texts.margin)
        return _over_pairs(texts.rows, each, gap)

    return loss


def preference_loss(config: DPOConfig, gap: Array, beta: Any, margin: Any) -> Array:
    """The loss of pairs by the difference of their log ratios."""
    if config.loss == "ipo":
        return jnp.square(gap - 0.5 / beta)
    return -jax.nn.log_sigmoid(beta * gap - margin)


def implicit_margin(network: Network, params: PyTree, texts: Texts) -> Float[Array, "B M"]:
    """Log ratio of the chosen completion minus that of the rejected one."""
    ratio = completion_log_probs(network, params, texts.rows) - texts.reference
    return ratio[..., CHOSEN] - ratio[..., REJECTED]


def _over_pairs(rows: Rows, each: Float[Array, "B M"], margin: Float[Array, "B M"]) -> Totals:
    real = jnp.asarray(rows.real)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(real > 0, x, 0.0))

    metrics = {"accuracy": total(preferred(margin)), "margin": total(margin)}
    return Totals(total(each), jnp.sum(real), metrics)


def preferred(margin: Float[Array, " *N"]) -> Float[Array, " *N"]:
    """1 where the chosen text is ahead, 0.5 for ties, 0 elsewhere."""
    return (margin > 0) + 0.5 * (margin == 0)


def log_probs_of_tokens(
    network: Network, params: PyTree, rows: Rows
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """The log-probability of each token given the earlier ones of its sequence, and whether it is
    the most likely one. Without meaning at the first token of a sequence."""
    tokens = jnp.asarray(rows.tokens).T
    _, logits, _ = network.apply(params, (), observe(tokens, 1.0), jnp.asarray(rows.start).T)
    every = jax.nn.log_softmax(logits[:-1])
    picked = jnp.take_along_axis(every, tokens[1:, :, None], axis=-1)[..., 0]
    likely = jnp.argmax(every, axis=-1) == tokens[1:]
    pad = ((1, 0), (0, 0))
    return jnp.pad(picked, pad).T, jnp.pad(likely, pad).T


def completion_log_probs(network: Network, params: PyTree, rows: Rows) -> Float[Array, "B M K"]:
    """Log-probabilities of completions given their prompts."""
    log_prob, _ = log_probs_of_tokens(network, params, rows)
    counted = jnp.asarray(rows.completion) & ~jnp.asarray(rows.start)
    return per_sequence(rows, jnp.where(counted, log_prob, 0.0))


def per_sequence(rows: Rows, values: Float[Array, "B T"]) -> Float[Array, "B M K"]:
    """Sums over the tokens of each sequence."""
    count = rows.last.shape[-2] * rows.last.shape[-1]
    own = jnp.asarray(rows.sequence)[..., None] == jnp.arange(count)
    return jnp.einsum("btn,bt->bn", own * 1.0, values).reshape(rows.last.shape)


def scores(network: Network, params: PyTree, rows: Rows) -> Float[Array, "B M K"]:
    """The reward model's score of each sequence: its value at the last token."""
    _, _, value = network.apply(
        params, (), observe(jnp.asarray(rows.tokens).T, 1.0), jnp.asarray(rows.start).T
    )
    last = jnp.asarray(rows.last).reshape(len(rows.last), -1)
    return jnp.take_along_axis(value.T, last, axis=1).reshape(rows.last.shape)
