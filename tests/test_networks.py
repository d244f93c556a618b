"""Networks: initialisation, sequences against single steps, and observations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

import purejaxppo as ppo
from purejaxppo.distributions import make_policy
from purejaxppo.envs.base import MultiDiscrete
from purejaxppo.networks import PatchConv, make_network, product
from purejaxppo.types import Network
from purejaxppo.window import Block, empty_cache

VECTOR = spaces.Box(-1, 1, (3,))


def network_for(space: object = VECTOR, **settings: object) -> Network:
    config = ppo.Config(**{"hidden_sizes": (16, 16), "memory_size": 8} | settings)
    return make_network(config, space, make_policy(config, spaces.Discrete(4)))


def gain_of(kernel: jax.Array) -> np.ndarray:
    """Singular values of a kernel with all inputs flattened."""
    return np.linalg.svd(np.asarray(kernel).reshape(-1, kernel.shape[-1]), compute_uv=False)


def test_orthogonal_initialisation_with_the_standard_gains(key: jax.Array):
    params = network_for(spaces.Box(0, 1, (10, 10, 4)), memory="gru").init(key)
    trunk = params["actor"]["encoder"]
    for layer in ("Conv_0", "Dense_0", "Dense_1"):
        np.testing.assert_allclose(gain_of(trunk[layer]["kernel"]), np.sqrt(2), rtol=1e-4)
        np.testing.assert_array_equal(trunk[layer]["bias"], 0)
    np.testing.assert_allclose(gain_of(params["actor_head"]["kernel"]), 0.01, rtol=1e-4)
    np.testing.assert_allclose(gain_of(params["critic_head"]["kernel"]), 1.0, rtol=1e-4)
    np.testing.assert_allclose(
        gain_of(params["actor"]["memory"]["cell"]["hr"]["kernel"]), 1.0, rtol=1e-4
    )


def test_patch_conv_is_a_convolution(key: jax.Array):
    x = jax.random.normal(key, (5, 10, 7, 4))
    ours, theirs = PatchConv(6, 3), nn.Conv(6, (3, 3), padding="VALID")
    params = ours.init(key, x)
    params["params"]["bias"] += 0.5
    np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 3, 5), (40, 3, 2), (40, 20, 17), (40, 1, 1)])
def test_gradients_of_a_product_equal_transposed_products(shape: tuple[int, int, int]):
    rows, inputs, outputs = shape
    random = np.random.default_rng(0)
    x, kernel, g = (
        random.normal(size=size).astype(np.float32)
        for size in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )

    def pulled(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(product, x, kernel)
        return out, *pull(jnp.asarray(g))

    expected = (x @ kernel, g @ kernel.T, x.T @ g)
    for computed, value in zip(jax.jit(pulled)(x, kernel), expected, strict=True):
        np.testing.assert_allclose(computed, value, atol=1e-4)
    stacked = (jnp.stack([jnp.asarray(z), 2 * jnp.asarray(z)]) for z in (x, kernel))
    for computed, value in zip(jax.jit(jax.vmap(pulled))(*stacked), expected, strict=True):
        np.testing.assert_allclose(computed[0], value, atol=1e-4)


def test_width_is_that_of_the_widest_layer():
    assert network_for(hidden_sizes=(16, 40, 8)).width == 40
    assert network_for(spaces.Box(0, 1, (10, 9, 4))).width == 8 * 7 * 16


def test_a_seed_is_initialised_equally_alone_and_under_vmap():
    network = network_for()
    keys = jax.random.split(jax.random.key(3), 4)
    together = jax.vmap(network.init)(keys)
    alone = [network.init(key) for key in keys]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    jax.tree.map(np.testing.assert_array_equal, together, stacked)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("memory", ["none", "gru", "lstm", "gtrxl"])
def test_a_sequence_equals_its_single_steps(memory: str, shared: bool):
    """With episodes that start inside the sequence, at different times in each row."""
    window = {"memory_window": 3, "memory_layers": 2} if memory == "gtrxl" else {}
    network = network_for(memory=memory, shared_trunk=shared, **window)
    key = jax.random.key(1)
    params, obs = network.init(key), jax.random.normal(key, (12, 5, 3))
    start = jax.random.bernoulli(key, 0.25, (12, 5))
    carry = jax.tree.map(lambda x: x + jnp.asarray(0.3, x.dtype), network.initial_carry(5))
    end, outputs, value = network.apply(params, carry, obs, start)
    apply = jax.jit(network.apply)
    for t in range(12):
        carry, one, v = apply(params, carry, obs[t][None], start[t][None])
        np.testing.assert_allclose(one[0], outputs[t], atol=1e-6)
        np.testing.assert_allclose(v[0], value[t], atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), carry, end)


def test_a_window_is_attention_over_the_last_steps():
    """Against attention computed with NumPy over whole sequences."""
    size, heads, window, steps = 8, 2, 3, 7
    block = Block(heads)
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(steps, 1, size)).astype(np.float32)
    cache = empty_cache(1, 1, window, size)
    seen = np.zeros((1, window), bool)
    params: Any = block.init(jax.random.key(0), xs[0], cache.keys[:, 0], cache.values[:, 0], seen)
    place = rng.normal(size=(heads, window)).astype(np.float32)
    params["params"]["place"] = jnp.asarray(place)
    p = jax.tree.map(np.asarray, params["params"])

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return scaled * p[name]["scale"] + p[name]["bias"]

    def gate(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        g, sigmoid = p[name], lambda x: 1 / (1 + np.exp(-x))

        def both(part: str, x: np.ndarray) -> np.ndarray:
            return (y @ g[f"{part}_y"]["kernel"] + g[f"{part}_y"]["bias"]
                    + x @ g[f"{part}_x"]["kernel"])  # fmt: skip

        r, z = sigmoid(both("reset", x)), sigmoid(both("update", x) - 2.0)
        return (1 - z) * x + z * np.tanh(both("new", r * x))

    keys, values = cache.keys[:, 0], cache.values[:, 0]
    for t in range(steps):
        seen = np.arange(window)[None] >= window - (t + 1)
        found, keys, values = block.apply(params, xs[t], keys, values, seen)
        past = norm("LayerNorm_0", xs[max(0, t + 1 - window) : t + 1, 0])
        k, v = dense("key", past), dense("value", past)
        q = dense("query", norm("LayerNorm_0", xs[t, 0]))
        read = []
        for h in range(heads):
            part = slice(h * size // heads, (h + 1) * size // heads)
            scores = k[:, part] @ q[part] / np.sqrt(size // heads) + place[h, -len(past) :]
            weight = np.exp(scores - scores.max())
            read.append(weight / weight.sum() @ v[:, part])
        attended = np.maximum(dense("out", np.concatenate(read)), 0)
        x = gate("gate_attention", xs[t, 0], attended)
        hidden = np.maximum(dense("Dense_0", norm("LayerNorm_1", x)), 0)
        expected = gate("gate_mlp", x, np.maximum(dense("Dense_1", hidden), 0))
        np.testing.assert_allclose(found[0], expected, atol=2e-5)


@pytest.mark.parametrize("memory", ["gru", "lstm", "gtrxl"])
def test_start_resets_the_memory(memory: str):
    network = network_for(memory=memory)
    key = jax.random.key(2)
    params, obs = network.init(key), jax.random.normal(key, (6, 1, 3))
    start = jnp.arange(6)[:, None] == 3
    _, before, _ = network.apply(params, network.initial_carry(1), obs, start)
    _, after, _ = network.apply(params, network.initial_carry(1), obs[3:], jnp.zeros((3, 1), bool))
    _, remembered, _ = network.apply(params, network.initial_carry(1), obs, start & False)
    np.testing.assert_allclose(before[3:], after, atol=1e-6)
    assert np.abs(remembered[3:] - after).max() > 1e-5


def test_actor_and_critic_share_parameters_if_configured(key: jax.Array):
    assert set(network_for(shared_trunk=True).init(key)) == {"shared", "actor_head", "critic_head"}
    separate = {"actor", "critic", "actor_head", "critic_head"}
    assert set(network_for(shared_trunk=False).init(key)) == separate


def test_pixels_are_scaled_to_0_to_1(key: jax.Array):
    network = network_for(spaces.Box(0, 255, (40, 40, 3), jnp.uint8))
    params, start = network.init(key), jnp.ones((1, 1), bool)
    assert "Conv_2" in params["actor"]["encoder"]
    pixels = jax.random.randint(key, (1, 1, 40, 40, 3), 0, 256).astype(jnp.uint8)
    _, outputs, _ = network.apply(params, (), pixels, start)
    _, expected, _ = network.apply(params, (), pixels.astype(jnp.float32) / 255, start)
    np.testing.assert_array_equal(outputs, expected)


def test_discrete_observations_are_one_hot(key: jax.Array):
    network = network_for(spaces.Discrete(5))
    kernel = network.init(key)["actor"]["encoder"]["Dense_0"]["kernel"]
    assert kernel.shape == (5, 16)
    assert network.apply(network.init(key), (), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))


@pytest.mark.parametrize(
    ("space", "settings", "words"),
    [
        (VECTOR, {"encoder": "cnn"}, r"\[3\]; use auto or mlp"),
        (spaces.Dict({"a": MultiDiscrete((2, 3))}), {}, "dictionaries and tuples of them"),
    ],
)
def test_unsupported_observations_are_refused(space: object, settings: dict, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        network_for(space, **settings)
