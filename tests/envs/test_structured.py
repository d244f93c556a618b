"""Observations of several parts: their names, and an encoder for each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import spaces
from toy_envs import Countdown

import purejaxppo as ppo
from purejaxppo.distributions import make_policy
from purejaxppo.envs.base import named_parts
from purejaxppo.networks import make_network
from purejaxppo.types import Network


@struct.dataclass
class Sensors:
    choice: Any
    view: Any


class Named(NamedTuple):
    choice: Any
    view: Any


VIEW = spaces.Box(0, 1, (3, 4, 2))


class Structured(Countdown):
    """Observations of a kind that its constructor is given, made from a view and a choice."""

    def __init__(self, kind: Any, space: Any):
        self.kind, self.space = kind, space

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> Any:
        view = jnp.full((3, 4, 2), state.time / 5)
        return self.kind(state.time % 3, view)

    def observation_space(self, params: Any = None) -> Any:
        return self.space


def named_space() -> Any:
    return spaces.Dict({"choice": spaces.Discrete(3), "view": VIEW})


def trained(config: ppo.Config, kind: Any, space: Any) -> tuple[Any, Any]:
    task = ppo.make_task(config, env=Structured(kind, space))
    return task, jax.jit(ppo.make_train(task))(jax.random.key(0), ppo.HParams())[0]


@pytest.mark.parametrize("encoder", ["auto", "view=cnn,choice=mlp"])
def test_dataclasses_train_as_dictionaries_do(tiny: ppo.Config, encoder: str):
    config = ppo.Config(**{**vars(tiny), "encoder": encoder, "total_timesteps": 32})
    _, expected = trained(config, lambda choice, view: {"choice": choice, "view": view},
                          named_space())  # fmt: skip
    for kind in (Sensors, Named):
        task, state = trained(config, kind, named_space())
        jax.tree.map(np.testing.assert_array_equal, state.learner.params, expected.learner.params)
        agent = ppo.make_agent(task, state)
        obs = kind(jnp.ones(2, int), jnp.zeros((2, 3, 4, 2)))
        action, _ = agent.act(jax.random.key(1), obs, ())
        assert action.shape == (2,)


def test_the_entries_of_a_tuple_have_numbers_for_names(tiny: ppo.Config):
    config = ppo.Config(**{**vars(tiny), "encoder": "1=cnn", "total_timesteps": 32})
    tuple_space = spaces.Tuple([spaces.Discrete(3), VIEW])
    _, state = trained(config, lambda *parts: parts, tuple_space)
    encoder = state.learner.params["actor"]["encoder"]
    assert set(encoder) == {"encoder_1", "joined"}
    assert encoder["encoder_1"]["Conv_0"]["kernel"].shape == (3, 3, 2, 16)
    # 8 features of the image, and 3 of the choice, which has no encoder of its own.
    assert encoder["joined"]["Dense_0"]["kernel"].shape == (8 + 3, 8)


def test_names_of_nested_parts():
    given = {"b": (1, Named(2, [3])), "a": Sensors(4, ())}
    assert named_parts(given) == {
        "b": {"0": 1, "1": {"choice": 2, "view": [3]}}, "a": {"choice": 4, "view": {}},
    }  # fmt: skip


def network_of(encoder: str) -> Network:
    config = ppo.Config(hidden_sizes=(6, 5), encoder=encoder)
    return make_network(config, named_space(), make_policy(config, spaces.Discrete(4)))


def test_encoders_of_entries_against_numpy(key: jax.Array):
    network = network_of("choice=mlp,view=cnn")
    params = network.init(key)
    view, choice = jax.random.normal(key, (1, 7, 3, 4, 2)), jnp.arange(7)[None] % 3
    obs = {"choice": choice, "view": view}
    _, outputs, _ = network.apply(params, (), obs, jnp.zeros((1, 7), bool))

    trunk = jax.tree.map(lambda x: np.asarray(x, np.float64), params["actor"]["encoder"])

    def layer(x: np.ndarray, of: Any) -> np.ndarray:
        return np.tanh(x @ of["kernel"] + of["bias"])

    kernel = trunk["encoder_view"]["Conv_0"]["kernel"]
    image = np.asarray(view[0], np.float64)
    conv = np.stack(
        [np.einsum("nijc,ijcf->nf", image[:, :, j : j + 3], kernel) for j in range(2)], axis=1
    )
    seen = np.tanh(conv + trunk["encoder_view"]["Conv_0"]["bias"]).reshape(7, -1)
    seen = layer(seen, trunk["encoder_view"]["Dense_0"])
    chosen = layer(np.eye(3)[np.asarray(choice[0])], trunk["encoder_choice"]["Dense_0"])
    x = np.concatenate([chosen, seen], axis=1)
    for name in ("Dense_0", "Dense_1"):
        x = layer(x, trunk["joined"][name])
    head = jax.tree.map(np.asarray, params["actor_head"])
    np.testing.assert_allclose(outputs[0], x @ head["kernel"] + head["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("cn", "must be auto, mlp or cnn"),
        ("view=cnnn", "must be auto, mlp or cnn"),
        ("view=cnn,view=mlp", "name each entry once"),
        ("image=cnn", "no entry 'image' to encode; .* has the entries choice, view"),
        ("choice=cnn", r"the entry choice has the shape \[3\]; use choice=mlp"),
    ],
)
def test_bad_encoders_are_refused(encoder: str, words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        network_of(encoder)


def test_a_named_encoder_needs_named_entries():
    config = ppo.Config(encoder="view=cnn")
    with pytest.raises(ppo.ConfigError, match="is a single array"):
        make_network(config, VIEW, make_policy(config, spaces.Discrete(4)))


def test_a_row_without_legal_actions_does_no_harm(key: jax.Array):
    """Its gradient is zero, and the other rows' gradients are as without it."""
    config = ppo.Config(hidden_sizes=(4,))
    space = spaces.Dict({"x": spaces.Box(0, 1, (3,)), "action_mask": spaces.Box(0, 1, (4,), bool)})
    policy = make_policy(config, spaces.Discrete(4))
    network = make_network(config, space, policy)
    params = network.init(key)
    x = jax.random.normal(key, (1, 2, 3))
    mask = jnp.array([[[True, False, True, True], [False] * 4]])

    def loss(params: Any, rows: int) -> Any:
        obs = {"x": x[:, :rows], "action_mask": mask[:, :rows]}
        _, outputs, _ = network.apply(params, (), obs, jnp.zeros((1, rows), bool))
        distribution = policy.distribution(outputs)
        action = jnp.full((1, rows), 2)
        return jnp.sum(distribution.log_prob(action) + distribution.entropy())

    with_it, without = (jax.grad(loss)(params, rows) for rows in (2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_it, without)
    assert any(np.abs(x).max() > 0.01 for x in jax.tree.leaves(without))
