"""The losses on preferences and their gradients against the same losses in PyTorch.

`tests/parity/fixture.npz` holds the inputs and PyTorch's results; `make_fixture.py` there wrote it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxppo.rlhf import DPOConfig, RewardConfig, TextHParams
from purejaxppo.rlhf.packing import Rows, Tokens, pack
from purejaxppo.rlhf.text_losses import Texts, make_text_loss
from purejaxppo.types import Network

PREFIX = "preference/"
with np.load(Path(__file__).parents[1] / "parity/fixture.npz", allow_pickle=False) as fixture:
    ARRAYS = {k.removeprefix(PREFIX): fixture[k] for k in fixture.files if k.startswith(PREFIX)}
CONFIGS: dict[str, Any] = {
    "bradley_terry": RewardConfig(),
    "sigmoid": DPOConfig(loss="sigmoid"),
    "ipo": DPOConfig(loss="ipo"),
}
ROW = 24
"""Tokens per row, so that most rows hold several pairs."""
LOST = 4 * float(np.finfo(np.float32).tiny)
"""XLA may round smaller numbers to 0."""

Case = dict[str, Any]


def case_of(loss: str, size: str) -> Case:
    """The arrays of one case by name: inputs, and PyTorch's results under `expected/`."""
    prefix = f"{loss}/{size}/"
    return {k.removeprefix(prefix): x for k, x in ARRAYS.items() if k.startswith(prefix)}


class Packed(NamedTuple):
    """The pairs of a case in rows, and the places of each token."""

    rows: Rows
    item: tuple[np.ndarray, ...]
    """Pair, sequence and index within the sequence."""
    row: tuple[np.ndarray, ...]
    """Row and index within the row."""


def packed(case: Case) -> Packed:
    def sequence(n: int, k: int) -> Tokens:
        prompt, end = case["prompt"][n, k], case["length"][n, k]
        tokens = case["tokens"][n, k].tolist()
        return Tokens(tuple(tokens[:prompt]), tuple(tokens[prompt:end]))

    rows = pack([[sequence(n, k) for k in range(2)] for n in range(len(case["tokens"]))], ROW)
    places = [
        (rows.item[r, m], k, t, r, place)
        for r, m in zip(*np.nonzero(rows.real), strict=True)
        for k in range(2)
        for t, place in enumerate(np.flatnonzero(rows.sequence[r] == 2 * m + k))
    ]
    pair, k, t, row, place = np.array(places).T
    return Packed(rows, (pair, k, t), (row, place))


def compute(loss: str, case: Case) -> dict[str, np.ndarray]:
    """The mean loss, the mean margin and the gradients by the outputs of the network, by the names
    they have under `expected/`. Outputs at padding are 50."""
    made = packed(case)
    params = {}
    for name in ("logits", "value"):
        values = np.full((*made.rows.tokens.shape, *case[name].shape[3:]), 50.0, np.float32)
        values[made.row] = case[name][made.item]
        params[name] = jnp.asarray(values)
    rows = jax.tree.map(jnp.asarray, made.rows)
    texts = Texts(rows, jnp.asarray(case["margin"])[rows.item], case["reference"][rows.item])
    network = Network(
        init=lambda key: params,
        initial_carry=lambda n: (),
        apply=lambda params, carry, obs, start: (
            carry, params["logits"].swapaxes(0, 1), params["value"].T
        ),
    )  # fmt: skip
    hparams = TextHParams(**{x: float(case[x]) for x in ("centring", "kl_coef") if x in case})

    @jax.jit
    def differentiate(params: Any, texts: Texts) -> Any:
        def mean(params: Any) -> Any:
            totals = make_text_loss(CONFIGS[loss], network)(params, texts, hparams)
            return totals.loss / totals.weight, totals.metrics["margin"] / totals.weight

        return jax.value_and_grad(mean, has_aux=True)(params)

    (found, margin), gradients = differentiate(params, texts)
    results = {"loss": np.asarray(found), "margin": np.asarray(margin)}
    for name, gradient in gradients.items():
        left = np.array(gradient)
        results[f"{name}_grad"] = np.zeros_like(case[name])
        results[f"{name}_grad"][made.item] = left[made.row]
        left[made.row] = 0.0
        assert not left.any()  # of the outputs at padding
    return results


@pytest.mark.parametrize("size", ["usual", "extreme"])
@pytest.mark.parametrize("loss", CONFIGS)
def test_loss_and_gradients_match_pytorch(loss: str, size: str):
    """Extreme margins are 80 and -80, where the smaller gradients are of the order of 1e-36."""
    case = case_of(loss, size)
    for name, computed in compute(loss, case).items():
        expected = case[f"expected/{name}"]
        np.testing.assert_allclose(computed, expected, err_msg=name, rtol=1e-5, atol=5e-7)
        if size == "extreme":
            np.testing.assert_allclose(computed, expected, err_msg=name, rtol=1e-4, atol=LOST)


@pytest.mark.parametrize("loss", CONFIGS)
def test_swapping_chosen_and_rejected_negates_the_margin(loss: str):
    case = case_of(loss, "usual")
    there, back = (
        compute(loss, case | {name: case[name][:, order] for name in
                              ("tokens", "prompt", "length", "logits", "value", "reference")})
        for order in ([0, 1], [1, 0])
    )  # fmt: skip
    assert abs(there["margin"]) > 0.1
    tolerance = 0.0 if loss == "bradley_terry" else 1e-6  # sums over tokens are rounded
    assert back["margin"] == pytest.approx(-there["margin"], rel=0, abs=tolerance)
