"""Work is counted, not timed: the compiled program of an update must not grow unnoticed.

Each bound is 10% above the count when it was set. If a change needs more for a good reason, count
again and explain it in `benchmarks/NOTES.md`.
"""

import re
from typing import Any

import jax
import pytest

import purejaxppo as ppo

CASES: dict[str, dict[str, Any]] = {
    "CartPole": {"env_id": "CartPole-v1"},
    "Pendulum": {"env_id": "Pendulum-v1"},
    "Breakout": {"env_id": "Breakout-MinAtar", "num_envs": 8},
}
OPERATIONS = {"CartPole": 730, "Pendulum": 690, "Breakout": 945}
LIVE_BYTES = {"CartPole": 510_000, "Pendulum": 510_000, "Breakout": 9_810_000}


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest) -> tuple[str, Any]:
    learner, hparams = ppo.make_learner(ppo.Config(**CASES[request.param])), ppo.HParams()
    state = jax.eval_shape(learner.init, jax.random.key(0), hparams)
    return request.param, jax.jit(learner.update).lower(state, hparams).compile()


def test_operations_of_an_update(compiled: tuple[str, Any]):
    """Instructions that XLA schedules separately, those in loops counted once. Instructions that
    move no data, and those inside fusions, do not count."""
    name, program = compiled
    text = re.sub(r"(?m)^%(?:fused|wrapped)[^\n]*\{\n(?:.*\n)*?\}\n", "", program.as_text())
    free = "parameter|get-tuple-element|tuple|constant|bitcast"
    operations = re.findall(rf"(?m)^\s+(?:ROOT )?%\S+ = .*? (?!(?:{free})\()[a-z-]+\(", text)
    assert OPERATIONS[name] / 2 < len(operations) <= OPERATIONS[name]


def test_live_bytes_of_an_update(compiled: tuple[str, Any]):
    """Peak memory besides the state: the rollout, a shuffled copy of it, a minibatch."""
    name, program = compiled
    live = program.memory_analysis().temp_size_in_bytes
    assert LIVE_BYTES[name] / 2 < live <= LIVE_BYTES[name]
