"""Actor-critic networks: Flax Linen modules behind one `Network` type."""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.base import is_box, is_discrete, parts_of
from purejaxppo.masks import honour_mask, is_masked, without_mask
from purejaxppo.types import Network, Policy, PyTree
from purejaxppo.window import Window, empty_cache

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
_SMALLEST_PIXEL_IMAGE = 36
PART_SIZE = 2**17
"""Maximum number of outputs of the widest layer for one part of a batch on CPU (0.5 MB)."""


@cache
def orthogonal(gain: float) -> Callable[..., Array]:
    """Orthogonal initialiser scaled by `gain`, one draw at a time under `vmap`.

    Batched QR factorisation on CPU can block forever with few cores; the sequential form gives
    the same bits. The initialiser is cached and jitted because Flax traces it in every `apply` to
    check shapes.
    """
    initializer = nn.initializers.orthogonal(gain)

    @partial(jax.jit, static_argnames=("shape", "dtype"))
    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        draw = jax.custom_batching.sequential_vmap(lambda key: initializer(key, shape, dtype))
        return draw(key)

    return init


@jax.custom_vjp
def product(x: Float[Array, "R F"], kernel: Float[Array, "F G"]) -> Float[Array, "R G"]:
    """`x @ kernel`, with a gradient that avoids fused transposes on CPU.

    The kernel's gradient is `x.T @ g`. On CPU, XLA is faster if it first transposes the narrower of
    the two and then multiplies, but fuses both steps unless a barrier separates them.
    """
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    kernel_gradient = jax.lax.platform_dependent(
        x, g, cpu=_transposed_product_on_cpu, default=lambda x, g: x.T @ g
    )
    return g @ kernel.T, kernel_gradient


def _transposed_product_on_cpu(x: Float[Array, "R F"], g: Float[Array, "R G"]) -> Array:
    barrier = jax.lax.optimization_barrier
    if g.shape[1] < min(16, x.shape[1]):
        return barrier(barrier(g.T) @ x).T
    return barrier(x.T) @ g


product.defvjp(_product_forward, _product_backward)


def dense(features: int, gain: float, name: str | None = None) -> nn.Dense:
    """A dense layer of rows, initialised orthogonally."""
    return nn.Dense(
        features,
        kernel_init=orthogonal(gain),
        dot_general=lambda x, kernel, *_, **__: product(x, kernel),
        name=name,
    )


class PatchConv(nn.Module):
    """A convolution of stride 1 without padding, as one product of all patches with the kernel.

    For a few small kernels this is many times faster on CPU than XLA's own convolution, especially
    inside a scan and under `vmap`. Parameters are those of `nn.Conv`.
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w features"]:
        k, channels = self.size, x.shape[-1]
        kernel = self.param("kernel", orthogonal(math.sqrt(2)), (k, k, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        height, width = x.shape[1] - k + 1, x.shape[2] - k + 1
        shifted = [x[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
        patches = jnp.concatenate(shifted, axis=-1).reshape((-1, k * k * channels))
        out = product(patches, kernel.reshape(-1, self.features)) + bias
        return out.reshape((x.shape[0], height, width, self.features))


class Encoder(nn.Module):
    """Maps observations to features: optional convolutions, then dense layers."""

    convolutions: bool
    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs: Float[Array, "B ..."]) -> Float[Array, "B F"]:
        act = ACTIVATIONS[self.activation]
        x = obs
        if self.convolutions:
            for convolution in _convolutions(x.shape[1:3]):
                x = act(convolution(x))
        x = x.reshape((x.shape[0], -1))
        for size in self.hidden_sizes:
            x = act(dense(size, math.sqrt(2))(x))
        return x


class PartsEncoder(nn.Module):
    """Encodes each named entry of an observation by its own `Encoder` with one dense layer. The
    dense layers that follow read these features joined with the other entries."""

    kinds: tuple[tuple[str, str], ...]
    """Names of entries and their kinds of encoder, `mlp` or `cnn`."""
    hidden_sizes: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, obs: Mapping[str, Float[Array, "B ..."]]) -> Float[Array, "B F"]:
        features = dict(obs)
        for name, kind in self.kinds:
            encoder = Encoder(
                kind == "cnn", self.hidden_sizes[:1], self.activation, name=f"encoder_{name}"
            )
            features[name] = encoder(obs[name])
        flat = [x.reshape((x.shape[0], -1)) for _, x in sorted(features.items())]
        joined = Encoder(False, self.hidden_sizes, self.activation, name="joined")
        return joined(jnp.concatenate(flat, axis=-1))


def _convolutions(image: tuple[int, ...]) -> list[nn.Module]:
    """The layers of Mnih et al. 2015 for pixel images, a small one (Young and Tian 2019, MinAtar)
    for grids. Call it inside a compact module, so that they become its submodules."""
    if min(image) < _SMALLEST_PIXEL_IMAGE:
        return [PatchConv(16, min(3, *image), name="Conv_0")]
    return [
        nn.Conv(
            features,
            (size, size),
            (stride, stride),
            padding="VALID",
            kernel_init=orthogonal(math.sqrt(2)),
            name=f"Conv_{i}",
        )
        for i, (features, size, stride) in enumerate([(32, 8, 4), (64, 4, 2), (64, 3, 1)])
    ]


class Memory(nn.Module):
    """A recurrent cell over `[T, B, F]`; its carry is reset before each step with `start` set."""

    kind: str
    size: int

    @nn.compact
    def __call__(
        self, carry: PyTree, features: Float[Array, "T B F"], start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "T B H"]]:
        inner = orthogonal(1.0)
        if self.kind == "gru":
            cell = nn.GRUCell(self.size, recurrent_kernel_init=inner, name="cell")
        else:
            cell = nn.OptimizedLSTMCell(self.size, recurrent_kernel_init=inner, name="cell")

        def step(cell: nn.Module, carry: PyTree, inputs: tuple[Array, Array]) -> Any:
            x, start = inputs
            carry = jax.tree.map(lambda leaf: jnp.where(start[:, None], 0.0, leaf), carry)
            return cell(carry, x)

        over_time = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return over_time(cell, carry, (features, start))


class Trunk(nn.Module):
    """An encoder and an optional memory, over rows: R = T * B."""

    encoder: Callable[..., Encoder | PartsEncoder]
    memory: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "R F"]]:
        features = self.encoder(name="encoder")(obs)
        if self.memory is None:
            return carry, features
        memory: Any = self.memory(name="memory")
        carry, features = memory(carry, features.reshape((*start.shape, -1)), start)
        return carry, features.reshape((start.size, -1))


class ActorCritic(nn.Module):
    """Policy outputs and value over rows: R = T * B.

    Rows instead of `[T, B]`, because XLA's matrix products on CPU are half as fast on three axes.
    The critic's own parameters have names that begin with `critic`.
    """

    trunk: Callable[..., Trunk]
    shared: bool
    num_outputs: int
    num_free: int
    log_std_init: float

    @nn.compact
    def __call__(
        self, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "R P"], Float[Array, " R"]]:
        if self.shared:
            carry, actor = self.trunk(name="shared")(carry, obs, start)
            critic = actor
        else:
            actor_carry, critic_carry = carry or ((), ())
            actor_carry, actor = self.trunk(name="actor")(actor_carry, obs, start)
            critic_carry, critic = self.trunk(name="critic")(critic_carry, obs, start)
            carry = (actor_carry, critic_carry) if carry else ()
        policy_outputs = dense(self.num_outputs, 0.01, "actor_head")(actor)
        if self.num_free:
            init = nn.initializers.constant(self.log_std_init)
            free = self.param("actor_log_std", init, (self.num_free,), jnp.float32)
            free = jnp.broadcast_to(free, (policy_outputs.shape[0], self.num_free))
            policy_outputs = jnp.concatenate([policy_outputs, free], axis=-1)
        value = dense(1, 1.0, "critic_head")(critic)
        return carry, policy_outputs, value[..., 0]


def make_network(config: Config, observation_space: Any, policy: Policy) -> Network:
    """Make the actor-critic that the config describes.

    Raises:
        ConfigError: if the observation space is not supported, or the encoder does not fit its
            shape.
    """
    spaces = parts_of(observation_space)
    masked = is_masked(spaces)
    spaces = without_mask(spaces) if masked else spaces
    read, shapes = _observation_reader(config, spaces)
    trunk = partial(Trunk, _encoder(config, shapes), _memory(config))
    module = ActorCritic(
        trunk, config.shared_trunk, policy.num_outputs, policy.num_free, config.log_std_init
    )

    def initial_carry(n: int) -> PyTree:
        if config.memory == "none":
            return ()
        one = _empty_memory(config, n)
        return one if config.shared_trunk else (one, one)

    def one_row() -> tuple[PyTree, PyTree, Bool[Array, "1 1"]]:
        obs = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), shapes)
        return initial_carry(1), obs, jnp.ones((1, 1), bool)

    def init(key: Key[Array, ""]) -> PyTree:
        return module.init(key, *one_row())["params"]

    def apply(
        params: PyTree, carry: PyTree, obs: PyTree, start: Bool[Array, "T B"]
    ) -> tuple[PyTree, Float[Array, "T B P"], Float[Array, "T B"]]:
        rows = jax.tree.map(lambda x, one: x.reshape((-1, *one.shape)), read(obs), shapes)
        result: Any = module.apply({"params": params}, carry, rows, start)
        carry, policy_outputs, value = result
        return carry, policy_outputs.reshape((*start.shape, -1)), value.reshape(start.shape)

    def layers(key: Key[Array, ""]) -> PyTree:
        variables = module.init(key, *one_row())
        return module.apply(variables, *one_row(), capture_intermediates=True)[1]

    made = jax.tree.leaves(jax.eval_shape(layers, jax.random.key(0)))
    width, sequential = max(x.size for x in made), config.memory != "none"
    network = Network(init, initial_carry, apply, width, sequential)
    return honour_mask(network, policy) if masked else network


def _memory(config: Config) -> Callable[..., nn.Module] | None:
    """The module of the memory, which takes its name."""
    if config.memory == "none":
        return None
    if config.memory == "gtrxl":
        return partial(Window, config.memory_size, config.memory_layers, config.memory_heads)
    return partial(Memory, config.memory, config.memory_size)


def _empty_memory(config: Config, rows: int) -> PyTree:
    """The memory's carry at the start of an episode."""
    if config.memory == "gtrxl":
        size, layers = config.memory_size, config.memory_layers
        return empty_cache(rows, layers, config.memory_window, size)
    state = jnp.zeros((rows, config.memory_size), jnp.float32)
    return state if config.memory == "gru" else (state, state)


def parts_in_cache(network: Network, num_rows: int, divisible: int) -> int:
    """Number of equal parts into which to divide a batch of rows, along an axis of length
    `divisible`, so that on CPU the layers' outputs for one part fit into a core's cache.

    For CPU programs only: select by `jax.lax.platform_dependent`, since a program may be traced on
    a different backend than the one it is compiled for.
    """
    wanted = max(1, num_rows * network.width // PART_SIZE)
    return next(n for n in range(min(wanted, divisible), 0, -1) if divisible % n == 0)


def _observation_reader(config: Config, space: Any) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """A function that converts observations to floats, and the shapes of a converted observation.
    The entries of a dictionary stay separate if `encoder` names some of them."""
    parts = parts_of(space)
    if not config.encoders:
        read, shape = _flat_reader(config, parts)
        return read, jax.ShapeDtypeStruct(shape, jnp.float32)
    known = parts if isinstance(parts, dict) else {}
    for name in config.encoders:
        if name not in known:
            has = f"has the entries {', '.join(known)}" if known else "is a single array"
            raise ConfigError(
                f"encoder = {config.encoder!r}: there is no entry {name!r} to encode; the "
                f"observation {has}"
            )
    readers = {name: _flat_reader(config, part) for name, part in parts.items()}
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (_, shape) in readers.items()
    }
    return lambda obs: {name: read(obs[name]) for name, (read, _) in readers.items()}, shapes


def _flat_reader(config: Config, space: Any) -> tuple[Callable[[PyTree], Array], tuple[int, ...]]:
    """Return a function that converts observations to floats, and the converted shape. The entries
    of a dictionary are flattened and joined, in the order of their names."""
    parts = parts_of(space)
    if isinstance(parts, dict) and parts:
        readers = {name: _flat_reader(config, parts[name]) for name in sorted(parts)}
        size = sum(math.prod(shape) for _, shape in readers.values())
        return partial(_joined, readers), (size,)
    if is_discrete(space):
        return lambda obs: jax.nn.one_hot(obs, space.n, dtype=jnp.float32), (int(space.n),)
    if is_box(space):
        return _floats, tuple(space.shape)
    raise ConfigError(
        f"the observation space {space} of {config.env_id} is not supported; supported are Box "
        "and Discrete, and dictionaries and tuples of them"
    )


def _joined(readers: Mapping[str, Any], obs: Mapping[str, Any]) -> Array:
    """Entries `[T, B, ...]` of an observation as `[T, B, F]`."""
    read = [(reader(obs[name]), len(shape)) for name, (reader, shape) in readers.items()]
    return jnp.concatenate([x.reshape((*x.shape[: x.ndim - n], -1)) for x, n in read], axis=-1)


def _floats(obs: Array) -> Array:
    """Convert to float32; 8-bit pixels from 0 to 255 are scaled to 0 to 1."""
    return obs.astype(jnp.float32) / 255.0 if obs.dtype == jnp.uint8 else obs.astype(jnp.float32)


def _encoder(config: Config, shapes: PyTree) -> Callable[..., Encoder | PartsEncoder]:
    """The module that encodes observations of these shapes, and takes its name."""
    more = {"hidden_sizes": config.hidden_sizes, "activation": config.activation}
    if not config.encoders:
        return partial(Encoder, _uses_convolutions(config, shapes.shape), **more)
    for name, kind in config.encoders.items():
        shape = list(shapes[name].shape)
        if kind == "cnn" and len(shape) != 3:
            raise ConfigError(
                f"encoder = {config.encoder!r}: cnn reads images [height, width, channels], but "
                f"the entry {name} has the shape {shape}; use {name}=mlp, or leave it out"
            )
    return partial(PartsEncoder, tuple(sorted(config.encoders.items())), **more)


def _uses_convolutions(config: Config, shape: tuple[int, ...]) -> bool:
    if config.encoder == "cnn" and len(shape) != 3:
        raise ConfigError(
            f"encoder = 'cnn' reads observations [height, width, channels], but those of "
            f"{config.env_id} have the shape {list(shape)}; use auto or mlp, or give an entry of "
            "the observation its own encoder, such as view=cnn"
        )
    return config.encoder == "cnn" or (config.encoder == "auto" and len(shape) == 3)
