"""The decoder: one token at a time equals whole sequences, padding, and its parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.rlhf.decoder import Architecture, _rotate, make_decoder

SMALL = Architecture(vocab_size=7, context=12, num_layers=2, width=16, num_heads=4)
LLAMA = dataclasses.replace(
    SMALL, num_kv_heads=2, positions="rotary", norm="rms", activation="swiglu",
    tied_embeddings=False, critic="shared",
)  # fmt: skip


def observations(tokens: Any, temperature: float = 1.0) -> Any:
    return {"token": tokens, "temperature": jnp.full(tokens.shape, temperature)}


def shaken(params: Any) -> Any:
    """Parameters of a size at which every part matters; the critic's head begins at zero."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def tokens_and_starts(lengths: list[int], width: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `[T, B]`, padded on the left."""
    tokens = jax.random.randint(jax.random.key(1), (width, len(lengths)), 0, 7)
    starts = jnp.arange(width)[:, None] == width - jnp.array(lengths)
    return tokens, starts


@pytest.mark.parametrize("architecture", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_one_token_at_a_time_equals_whole_sequences(architecture: Architecture):
    network = make_decoder(architecture)
    params = shaken(network.init(jax.random.key(0)))
    tokens, starts = tokens_and_starts([10, 6, 9], 10)
    _, logits, value = network.apply(params, (), observations(tokens), starts)
    carry, apply = network.initial_carry(3), jax.jit(network.apply)
    prompt = 4
    carry, first_logits, first_value = apply(
        params, carry, observations(tokens[:prompt]), starts[:prompt]
    )
    found, values = [first_logits], [first_value]
    for t in range(prompt, 10):
        carry, one, v = apply(params, carry, observations(tokens[t][None]), starts[t][None])
        found.append(one)
        values.append(v)
    real = np.cumsum(starts, axis=0) > 0
    np.testing.assert_allclose(jnp.concatenate(found)[real], logits[real], atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(values)[real], value[real], atol=1e-5)
    assert np.abs(value[real]).max() > 0.1


@pytest.mark.parametrize("architecture", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_padding_on_the_left_changes_nothing(architecture: Architecture):
    network = make_decoder(architecture)
    params = shaken(network.init(jax.random.key(0)))
    tokens, starts = tokens_and_starts([5], 5)
    _, plain, value = network.apply(params, (), observations(tokens), starts)
    for pad in (0, 3):
        padded = jnp.concatenate([jnp.full((4, 1), pad), tokens])
        begins = jnp.concatenate([jnp.zeros((4, 1), bool), starts])
        _, logits, values = network.apply(params, (), observations(padded), begins)
        np.testing.assert_allclose(logits[4:], plain, atol=1e-5)
        np.testing.assert_allclose(values[4:], value, atol=1e-5)


def test_no_token_reads_later_ones():
    network = make_decoder(SMALL)
    params = shaken(network.init(jax.random.key(0)))
    tokens, starts = tokens_and_starts([8], 8)
    other = tokens.at[5:].set((tokens[5:] + 1) % 7)
    _, before, _ = network.apply(params, (), observations(tokens), starts)
    _, after, _ = network.apply(params, (), observations(other), starts)
    np.testing.assert_array_equal(before[:5], after[:5])
    assert np.abs(before[5:] - after[5:]).max() > 0.1


def attention_by_hand(params: Any, x: np.ndarray, heads: int) -> np.ndarray:
    """Causal attention of one sequence `[T, W]`, in loops."""
    project = {
        name: x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        for name in ("query", "key", "value")
    }
    width = x.shape[1] // heads
    out = np.zeros_like(x)
    for h in range(heads):
        q, k, v = (project[name][:, h * width : (h + 1) * width] for name in project)
        for t in range(len(x)):
            scores = np.array([q[t] @ k[j] / np.sqrt(width) for j in range(t + 1)])
            weights = np.exp(scores - scores.max())
            out[t, h * width : (h + 1) * width] = (weights / weights.sum()) @ v[: t + 1]
    return out @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])


def norm_by_hand(params: Any, x: np.ndarray) -> np.ndarray:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return scaled * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_logits_equal_a_plain_implementation():
    one = dataclasses.replace(SMALL, num_layers=1)
    network = make_decoder(one)
    params = shaken(network.init(jax.random.key(0)))
    tokens, starts = tokens_and_starts([6], 6)
    _, logits, _ = network.apply(params, (), observations(tokens, temperature=0.5), starts)
    trunk = params["actor"]
    x = np.asarray(trunk["embedding"]["embedding"])[np.asarray(tokens[:, 0])]
    x = x + np.asarray(trunk["position"]["embedding"])[:6]
    block = trunk["block_0"]
    x = x + attention_by_hand(block, norm_by_hand(block["norm_attention"], x), 4)
    y = norm_by_hand(block["norm_mlp"], x) @ np.asarray(block["up"]["kernel"])
    y = np.asarray(jax.nn.gelu(y + np.asarray(block["up"]["bias"])))
    x = x + y @ np.asarray(block["down"]["kernel"]) + np.asarray(block["down"]["bias"])
    x = norm_by_hand(trunk["norm"], x)
    expected = x @ np.asarray(trunk["embedding"]["embedding"]).T / 0.5
    np.testing.assert_allclose(logits[:, 0], expected, atol=1e-4)


def test_rotary_scores_depend_on_distances_only():
    x = jax.random.normal(jax.random.key(2), (1, 1, 2, 8))

    def score(first: int, second: int) -> float:
        q, k = _rotate(x, jnp.array([[first, second]]))[0, 0]
        return float(q @ k)

    assert score(0, 3) == pytest.approx(score(50, 53), rel=1e-4)
    assert score(0, 3) != pytest.approx(score(0, 4), rel=1e-2)


def test_parts_of_an_architecture_are_counted():
    def size(**changes: Any) -> int:
        network = make_decoder(dataclasses.replace(SMALL, **changes))
        params = jax.eval_shape(network.init, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(params))

    one = 7 * 16 + 12 * 16 + 2 * (4 * (16 * 16 + 16) + 2 * 32 + 16 * 64 + 64 + 64 * 16 + 16) + 32
    assert size(critic="none") == one
    assert size(critic="shared") == one + 17
    assert size(critic="separate") == 2 * one + 17
    assert size(critic="none", tied_embeddings=False) == one + 7 * 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 3}, "width = 16 is not divisible by num_heads = 3"),
        ({"num_kv_heads": 3}, "num_heads = 4 is not divisible by num_kv_heads = 3"),
        ({"num_heads": 16, "positions": "rotary"}, "rotary positions need an even number"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        dataclasses.replace(SMALL, **changes)
