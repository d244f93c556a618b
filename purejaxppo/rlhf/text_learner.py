"""The learner of runs on texts: AdamW on batches of packed rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key

from purejaxppo.collectives import all_sum, own_rows
from purejaxppo.improve import scheduled
from purejaxppo.learner import keep_if_finite
from purejaxppo.metrics import env_steps
from purejaxppo.optimizer import Optimizer
from purejaxppo.rlhf.text_config import TextConfig
from purejaxppo.rlhf.text_losses import TextLoss, Texts
from purejaxppo.shuffle import rows_without_replacement
from purejaxppo.types import KeyLike, Learner, LearnerState, Metrics, PyTree, TrainState


def make_text_learner(
    config: TextConfig,
    loss: TextLoss,
    init_params: Callable[[Key[Array, ""], PyTree], PyTree],
    axis: str | None,
) -> Learner:
    """Make the learner; an update is one step on `batch_rows` rows, drawn without replacement.

    Args:
        init_params: `(key, data) -> params`.
        axis: a mesh axis over which the rows of a batch are spread.
    """

    def init(key: KeyLike, hparams: Any, data: PyTree = ()) -> TrainState:
        config.check_hparams(hparams)
        params_key, key = jax.random.split(key)
        params = jax.tree.map(jnp.asarray, init_params(params_key, data))
        learner = LearnerState(
            key=key, params=params, opt_state=ADAMW.init(hparams, params), obs_stats=(),
            reward_stats=(), updates=jnp.zeros((), jnp.int32), objective_state=(),
        )  # fmt: skip
        return TrainState(learner, ())

    def update(state: TrainState, hparams: Any, data: PyTree = ()) -> tuple[TrainState, Metrics]:
        learner: LearnerState = state.learner
        texts: Texts = data["train"]
        size = texts.rows.tokens.shape[0]
        number = learner.updates * config.batch_rows + jnp.arange(config.batch_rows)
        number = own_rows(number, axis)
        chosen = rows_without_replacement(learner.key, number, config.batch_rows, size)
        batch = jax.tree.map(lambda x: x[chosen], texts)
        gradient, metrics = gradient_of_batch(
            loss, learner.params, batch, hparams, parts=config.accumulation, axis=axis
        )
        rate = hparams.learning_rate * learning_rate_factor(config, learner.updates)
        packed, unpack = ADAMW.pack(learner.params)
        transform = adamw(hparams, learner.params, rate)
        steps, opt_state = transform.update(ADAMW.pack(gradient)[0], learner.opt_state, packed)
        new = learner._replace(
            params=unpack(optax.apply_updates(packed, steps)), opt_state=opt_state,
            updates=learner.updates + 1,
        )  # fmt: skip
        metrics |= {
            "env_steps": env_steps(config, new.updates),
            "learning_rate": jnp.asarray(rate, jnp.float32),
        }
        return keep_if_finite(metrics, TrainState(new, ()), state)

    return Learner(init, update)


def gradient_of_batch(
    loss: TextLoss, params: PyTree, batch: Texts, hparams: Any, *, parts: int, axis: str | None
) -> tuple[PyTree, Metrics]:
    """The gradient of the mean loss over a batch, computed in `parts` parts, and metrics."""

    def total(params: PyTree, part: Texts) -> tuple[Array, Any]:
        found = loss(params, part, hparams)
        return found.loss, found

    def sums_of(part: Texts) -> PyTree:
        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params, part)
        return gradient, found

    if parts == 1:
        sums = sums_of(batch)
    else:
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(sums_of, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, sums_of(part)), None), zeros, split
        )
    gradient, found = all_sum(sums, axis)
    weight = jnp.maximum(found.weight, 1.0)
    gradient = jax.tree.map(lambda x: x / weight, gradient)
    metrics = {name: x / weight for name, x in (found.metrics | {"loss": found.loss}).items()}
    metrics["log_likelihood"] = -metrics["loss"]
    return gradient, metrics | {"grad_norm": optax.global_norm(gradient)}


def adamw(hparams: Any, params: PyTree, rate: Any) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam with decoupled weight decay of matrices (Loshchilov and
    Hutter 2019, arXiv:1711.05101), on the flat vector of parameters."""
    decayed, _ = ravel_pytree(jax.tree.map(lambda x: jnp.full(x.shape, float(x.ndim > 1)), params))

    def step(direction: PyTree, packed: PyTree | None = None) -> PyTree:
        return -rate * (direction + hparams.weight_decay * decayed * packed)

    return optax.chain(
        optax.clip_by_global_norm(hparams.max_grad_norm),
        optax.scale_by_adam(eps=hparams.adam_eps),
        optax.stateless(step),
    )


ADAMW = Optimizer(lambda hparams, params: adamw(hparams, params, 0.0), as_vector=True)


def learning_rate_factor(config: TextConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Factor of the learning rate: a linear warm-up over the share `warmup` of the updates, then
    the schedule."""
    total = config.num_updates
    warm = math.ceil(config.warmup * total)
    rising = jnp.minimum((updates + 1) / max(1, warm), 1.0)
    later = jnp.maximum(updates - warm, 0)
    return rising * scheduled(config.lr_schedule, later, max(1, total - warm))
