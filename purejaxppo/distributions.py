"""Policies for action spaces: how outputs of the policy head become actions.

Noise is drawn independently of the parameters (Gumbel for discrete actions, standard normal for
continuous ones), so that the noise of a whole rollout can be drawn at once.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from purejaxppo.checks import is_traced
from purejaxppo.config import Config, ConfigError
from purejaxppo.envs.base import MultiDiscrete, is_box, is_discrete
from purejaxppo.types import Policy


def make_policy(config: Config, action_space: Any) -> Policy:
    """Make the policy for an action space.

    Raises:
        ConfigError: if the space is not supported, its bounds are traced, or
            `config.action_distribution` does not fit it.
    """
    if isinstance(action_space, MultiDiscrete) or is_discrete(action_space):
        if config.action_distribution != "auto":
            raise ConfigError(
                f"action_distribution = {config.action_distribution!r} is for continuous actions, "
                f"but {config.env_id} has {action_space}; use auto"
            )
        if isinstance(action_space, MultiDiscrete):
            return multi_categorical(action_space.num_categories)
        return categorical(int(action_space.n))
    if is_box(action_space) and np.issubdtype(np.dtype(action_space.dtype), np.floating):
        if is_traced(action_space.low) or is_traced(action_space.high):
            raise ConfigError(
                f"the action bounds of {config.env_id} depend on traced values (env_params under "
                "jit or vmap); pass the parameters that set the bounds as plain numbers"
            )
        low, high = (
            np.broadcast_to(np.asarray(bound, np.float32), action_space.shape)
            for bound in (action_space.low, action_space.high)
        )
        if not np.all(low < high):
            raise ConfigError(
                f"the action space {action_space} of {config.env_id}: each lower bound must be "
                "below its upper bound"
            )
        if config.action_distribution == "tanh_normal":
            return tanh_normal(config, low, high)
        return normal(low, high)
    raise ConfigError(
        f"the action space {action_space} of {config.env_id} is not supported; supported are "
        "Discrete, MultiDiscrete and Box of floats"
    )


def _best(scores: Float[Array, "*batch K"]) -> Int[Array, "*batch"]:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)  # argmax returns int64 in 64-bit mode


def categorical(num_categories: int) -> Policy:
    """A categorical policy over `num_categories` choices; sampled by the Gumbel-max trick."""
    return Policy(
        num_outputs=num_categories,
        num_free=0,
        distribution=lambda policy_outputs: distrax.Categorical(logits=policy_outputs),
        noise=lambda key: jax.random.gumbel(key, (num_categories,), jnp.float32),
        sample=lambda policy_outputs, noise: _best(policy_outputs + noise),
        to_env=lambda action: action,
    )


class IndependentCategoricals(NamedTuple):
    """Several independent categorical choices; log-probabilities and entropies add up."""

    parts: tuple[distrax.Categorical, ...]

    def log_prob(self, action: Int[Array, "*batch A"]) -> Float[Array, "*batch"]:
        terms = [part.log_prob(action[..., i]) for i, part in enumerate(self.parts)]
        return jnp.sum(jnp.stack(terms), axis=0)

    def entropy(self) -> Float[Array, "*batch"]:
        return jnp.sum(jnp.stack([part.entropy() for part in self.parts]), axis=0)

    def kl_divergence(self, other: "IndependentCategoricals") -> Float[Array, "*batch"]:
        pairs = zip(self.parts, other.parts, strict=True)
        return jnp.sum(jnp.stack([jnp.asarray(a.kl_divergence(b)) for a, b in pairs]), axis=0)

    def mode(self) -> Int[Array, "*batch A"]:
        return jnp.stack([part.mode() for part in self.parts], axis=-1)


def multi_categorical(num_categories: tuple[int, ...]) -> Policy:
    """Independent choices among `num_categories[0]`, `num_categories[1]`, ... categories."""
    spans = list(pairwise(np.cumsum([0, *num_categories]).tolist()))

    def distribution(policy_outputs: Float[Array, "*batch P"]) -> IndependentCategoricals:
        parts = (distrax.Categorical(logits=policy_outputs[..., a:b]) for a, b in spans)
        return IndependentCategoricals(tuple(parts))

    def sample(policy_outputs: Array, noise: Array) -> Int[Array, "*batch A"]:
        scores = policy_outputs + noise
        return jnp.stack([_best(scores[..., a:b]) for a, b in spans], axis=-1)

    return Policy(
        num_outputs=sum(num_categories),
        num_free=0,
        distribution=distribution,
        noise=lambda key: jax.random.gumbel(key, (sum(num_categories),), jnp.float32),
        sample=sample,
        to_env=lambda action: action,
    )


def _split_gaussian(policy_outputs: Float[Array, "*batch P"]) -> tuple[Array, Array]:
    mean, log_std = jnp.split(policy_outputs, 2, axis=-1)
    return mean, jnp.exp(log_std)


def _diagonal_normal(policy_outputs: Float[Array, "*batch P"]) -> distrax.Independent:
    mean, std = _split_gaussian(policy_outputs)
    return distrax.Independent(distrax.Normal(mean, std), reinterpreted_batch_ndims=1)


def _gaussian_parts(size: int) -> dict[str, Any]:
    """Fields that both Gaussian policies share; before `to_env`, actions are vectors `[size]`."""

    def sample(policy_outputs: Array, noise: Array) -> Float[Array, "*batch A"]:
        mean, std = _split_gaussian(policy_outputs)
        return mean + std * noise

    return {
        "num_outputs": size,
        "num_free": size,
        "noise": lambda key: jax.random.normal(key, (size,), jnp.float32),
        "sample": sample,
    }


def normal(low: np.ndarray, high: np.ndarray) -> Policy:
    """A diagonal Gaussian. The environment receives the action clipped to `[low, high]`; the
    log-probability is that of the unclipped action."""
    shape = low.shape

    def to_env(action: Float[Array, "*batch A"]) -> Array:
        return jnp.clip(action.reshape(action.shape[:-1] + shape), low, high)

    return Policy(distribution=_diagonal_normal, to_env=to_env, **_gaussian_parts(low.size))


# Weights and standard deviations of a mixture of zero-mean Gaussians. Within 3e-7, its distribution
# function is that of a logistic distribution of scale 1/2, (1 + tanh u) / 2. Fitted by least
# squares over u.
_WEIGHTS = np.array([0.0214032, 0.188030095, 0.382793961, 0.304346632, 0.0963302344, 0.00709587778])
_STDS = np.array([0.417849025, 0.566216369, 0.762761231, 1.03079552, 1.39304533, 1.89268298])


def mean_log_cosh(mean: Float[Array, "*batch"], std: Float[Array, "*batch"]) -> Array:
    """E[log cosh u] of a Gaussian u, within 1e-6 at every mean and standard deviation.

    Since (log cosh)'' is twice the density of the logistic distribution of scale 1/2, log cosh u =
    E|u + V| - log 2, where V has that distribution. V is a scale mixture of Gaussians (Andrews and
    Mallows 1974; Stefanski 1991), here of six, so u + V is a mixture of Gaussians, and for each

        E|X| = s sqrt(2 / pi) exp(-m^2 / (2 s^2)) + m erf(m / (s sqrt(2)))  with X ~ N(m, s^2).
    """
    weights, stds = (jnp.asarray(x, mean.dtype) for x in (_WEIGHTS, _STDS))
    spread = jnp.sqrt(jnp.square(std)[..., None] + jnp.square(stds))
    scaled = mean[..., None] / (math.sqrt(2) * spread)
    bump = math.sqrt(2 / math.pi) * spread * jnp.exp(-jnp.square(scaled))
    distance = bump + mean[..., None] * jax.lax.erf(scaled)
    return jnp.sum(weights * distance, axis=-1) - math.log(2)


class TanhNormal(NamedTuple):
    """A diagonal Gaussian squashed by tanh and stretched to the bounds of the action space.

    Actions are stored as u, before squashing: a = centre + half_range tanh(u). The log-probability
    then stays finite however close a is to the bounds.
    """

    base: distrax.Independent
    mean: Float[Array, "*batch A"]
    std: Float[Array, "*batch A"]
    half_range: np.ndarray

    def log_prob(self, action: Float[Array, "*batch A"]) -> Float[Array, "*batch"]:
        """The log-density of a: log N(u; mean, std) - sum log |da/du|, at `action` u."""
        return jnp.asarray(self.base.log_prob(action)) - jnp.sum(self._log_slope(action), axis=-1)

    def entropy(self) -> Float[Array, "*batch"]:
        """H(a) = H(u) + E[sum log |da/du|], where log(1 - tanh(u)^2) = -2 log cosh u."""
        slopes = jnp.log(self.half_range) - 2.0 * mean_log_cosh(self.mean, self.std)
        return jnp.asarray(self.base.entropy()) + jnp.sum(slopes, axis=-1)

    def kl_divergence(self, other: "TanhNormal") -> Float[Array, "*batch"]:
        """KL divergence of the Gaussians: squashing both in the same way does not change it."""
        return jnp.asarray(self.base.kl_divergence(other.base))

    def mode(self) -> Float[Array, "*batch A"]:
        """The median; the mode after squashing may lie at the bounds."""
        return self.mean

    def _log_slope(self, action: Array) -> Array:
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which avoids cancellation at large |u|
        slope = 2.0 * (jnp.log(2.0) - action - jax.nn.softplus(-2.0 * action))
        return slope + jnp.log(self.half_range)


def tanh_normal(config: Config, low: np.ndarray, high: np.ndarray) -> Policy:
    """A diagonal Gaussian squashed into `[low, high]`, which must be finite.

    Raises:
        ConfigError: if a bound is not finite.
    """
    # Environments mark unbounded actions by float32's largest number as well as by infinity.
    unbounded = np.maximum(np.abs(low), np.abs(high)) > 1e30
    if np.any(unbounded):
        raise ConfigError(
            f"action_distribution = 'tanh_normal' needs finite bounds, but the actions of "
            f"{config.env_id} lie in [{low.min()}, {high.max()}]; use normal"
        )
    shape = low.shape
    centre, half_range = (high + low) / 2, (high - low) / 2

    def distribution(policy_outputs: Float[Array, "*batch P"]) -> TanhNormal:
        mean, std = _split_gaussian(policy_outputs)
        return TanhNormal(_diagonal_normal(policy_outputs), mean, std, half_range.reshape(-1))

    def to_env(action: Float[Array, "*batch A"]) -> Array:
        squashed = jnp.tanh(action.reshape(action.shape[:-1] + shape))
        return jnp.clip(centre + squashed * half_range, low, high)

    return Policy(distribution=distribution, to_env=to_env, **_gaussian_parts(low.size))


def draw_noise(policy: Policy, keys: Key[Array, "*batch"]) -> Array:
    """Draw noise `[..., *shape]` from `keys[...]`, separately for each key."""
    flat = jax.vmap(policy.noise)(keys.reshape(-1))
    return flat.reshape(keys.shape + flat.shape[1:])
