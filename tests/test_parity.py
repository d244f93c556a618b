"""The PPO loss and its gradients against the same loss in PyTorch.

`parity/fixture.npz` holds the inputs and PyTorch's results; `parity/make_fixture.py` wrote it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.distributions import categorical, multi_categorical, normal, tanh_normal
from purejaxppo.improve import make_loss
from purejaxppo.learner import make_batch
from purejaxppo.types import Batch, Network, Policy, Rollout

with np.load(Path(__file__).parent / "parity" / "fixture.npz", allow_pickle=False) as fixture:
    ARRAYS = dict(fixture)
CASES = [
    f"{family}/{value_loss}"
    for family in ("categorical", "normal", "tanh_normal", "multi_categorical")
    for value_loss in ("unclipped", "clipped")
]
# float32 against float64; gradients of a mean over 64 samples are of the order of 1e-2.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-7}

Case = dict[str, Any]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """The arrays of one case by name: inputs, and PyTorch's results under `expected/`."""
    prefix = f"{request.param}/"
    arrays = {k.removeprefix(prefix): x for k, x in ARRAYS.items() if k.startswith(prefix)}
    return arrays | {"family": request.param.split("/")[0]}


def policy_for(case: Case) -> Policy:
    size = case["outputs"].shape[-1]
    if case["family"] == "categorical":
        return categorical(size)
    if case["family"] == "multi_categorical":
        return multi_categorical((3, 4))
    if case["family"] == "normal":
        return normal(np.full(size // 2, -1.0), np.full(size // 2, 1.0))
    return tanh_normal(ppo.Config(), case["low"], case["high"])


def batch_of(case: Case) -> Batch:
    """A batch `[1, B, ...]` from arrays `[B, ...]`; fields that the loss does not read are NaN."""
    unread = jnp.full_like(case["value"][None], jnp.nan)
    no = jnp.zeros(unread.shape, bool)
    rollout = Rollout(
        obs=unread,
        start=no,
        action=jnp.asarray(case["action"])[None],
        log_prob=jnp.asarray(case["old_log_prob"])[None],
        value=jnp.asarray(case["old_value"])[None],
        next_value=unread,
        reward=unread,
        terminated=no,
        truncated=no,
        mask=jnp.ones_like(unread),
        carry=(),
    )
    advantage, target = (jnp.asarray(case[name])[None] for name in ("advantage", "target"))
    return make_batch(rollout, (advantage, target))


def compute(case: Case) -> dict[str, np.ndarray]:
    """The loss, its terms and its gradients, by the names they have under `expected/`."""
    params = {name: jnp.asarray(case[name])[None] for name in ("outputs", "value")}
    names = ("clip_eps", "vf_clip_eps", "vf_coef", "ent_coef")
    hparams = ppo.HParams(**{name: float(case[name]) for name in names if name in case})
    network = Network(
        init=lambda key: params,
        initial_carry=lambda n: (),
        apply=lambda params, carry, obs, start: (carry, params["outputs"], params["value"]),
    )

    @jax.jit
    def differentiate(params, batch):
        def loss(params):
            of_batch = make_loss(ppo.OBJECTIVES["ppo_clip"], network, policy_for(case))
            return of_batch(params, batch, hparams, jnp.sum(batch.weight), ())

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, metrics), gradients = differentiate(params, batch_of(case))
    terms = {name: metrics[name] for name in ("policy_loss", "value_loss", "entropy")}
    by_name = {f"{name}_grad": gradient[0] for name, gradient in gradients.items()}
    return {"loss": loss} | terms | by_name


def test_loss_and_gradients_match_pytorch(case: Case):
    for name, computed in compute(case).items():
        expected = case[f"expected/{name}"]
        np.testing.assert_allclose(computed, expected, err_msg=name, **TOLERANCE)


def test_log_probabilities_match_pytorch(case: Case):
    distribution = policy_for(case).distribution(jnp.asarray(case["outputs"]))
    log_prob = distribution.log_prob(jnp.asarray(case["action"]))
    np.testing.assert_allclose(log_prob, case["expected/log_prob"], **TOLERANCE)


def test_samples_lie_on_every_branch_of_the_loss(case: Case):
    """At least 3 samples lie on each side of every clip, so that agreement is meaningful."""
    ratio = np.exp(case["expected/log_prob"] - case["old_log_prob"])
    inside = abs(ratio - 1) < case["clip_eps"]
    for side in (inside, ~inside & (ratio < 1), ~inside & (ratio > 1)):
        for sign in (-1, 1):
            assert np.sum(side & (np.sign(case["advantage"]) == sign)) >= 3
    if "vf_clip_eps" in case:
        change, eps = case["value"] - case["old_value"], case["vf_clip_eps"]
        held = case["old_value"] + np.clip(change, -eps, eps)
        larger = abs(held - case["target"]) > abs(case["value"] - case["target"])
        for outside in (change < -eps, change > eps):
            assert np.sum(outside & larger) >= 3
            assert np.sum(outside & ~larger) >= 3
