"""Controllers that adapt the weight of the KL penalty to the KL divergence of each update."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from purejaxppo.objectives.base import KLController
from purejaxppo.objectives.kl import BETA_RANGE, adapted_beta
from purejaxppo.rlhf.config import RLHFConfig
from purejaxppo.types import LearnerState

_MAX_ERROR = 0.2
"""The proportional controller clips the relative error to this magnitude."""


def make_controller(config: RLHFConfig) -> KLController:
    """Make the controller that `config.kl_control` names.

    The divergence is the mean over responses of the sum over tokens of log pi - log pi_ref, in
    nats. The state is the weight. A fixed weight has no state, so that a resumed run can use a
    different one.
    """
    if config.kl_control == "fixed":
        return KLController(
            init=lambda hparams: (),
            value=lambda state, hparams: hparams.kl_coef,
            update=lambda state, kl, hparams: state,
        )

    def halving(beta: Any, kl: Array, hparams: Any) -> Array:
        return adapted_beta(beta, kl, hparams.kl_target)

    def in_proportion(beta: Any, kl: Array, hparams: Any) -> Array:
        return proportional(beta, kl, hparams, config.num_sequences)

    return KLController(
        init=lambda hparams: jnp.asarray(hparams.kl_coef, jnp.float32),
        value=lambda state, hparams: state,
        update=halving if config.kl_control == "halving" else in_proportion,
        read_once=frozenset({"kl_coef"}),
    )


def proportional(beta: Array, kl: Array, hparams: Any, responses: int) -> Array:
    """The next weight (Ziegler et al. 2019, arXiv:1909.08593, section 2.2, with the step of its
    code):

        beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

    with n the number of responses of an update, and `kl_horizon` in responses. Unlike there, the
    weight is at most halved in one update, since a short horizon would make it negative, and it is
    clipped to `BETA_RANGE`.
    """
    error = jnp.clip(kl / hparams.kl_target - 1.0, -_MAX_ERROR, _MAX_ERROR)
    factor = jnp.maximum(1.0 + error * responses / hparams.kl_horizon, 0.5)
    return jnp.clip(beta * factor, *BETA_RANGE)


def current(
    config: RLHFConfig, controller: KLController, learner: LearnerState, hparams: Any
) -> Any:
    """The hyperparameters of an update, with the current `kl_coef` and, if no clip range is set,
    the objective's default."""
    beta = controller.value(learner.objective_state, hparams)
    return dataclasses.replace(hparams.with_clip_of(config.token_objective), kl_coef=beta)
