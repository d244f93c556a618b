"""Small problems of which all responses can be enumerated."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import purejaxppo as ppo
from purejaxppo.rlhf import (
    Architecture,
    Problem,
    Prompts,
    RLHFConfig,
    RLHFHParams,
    Sample,
    make_decoder,
    make_rlhf_task,
)
from purejaxppo.rlhf.generation import observe

VOCABULARY, LENGTH = 4, 3


def responses_of(vocabulary: int = VOCABULARY, length: int = LENGTH) -> np.ndarray:
    """All responses of the maximum length, in the order of their numbers."""
    return np.array(list(itertools.product(range(vocabulary), repeat=length)))


def config_of(objective: Any, **changes: Any) -> RLHFConfig:
    given: dict[str, Any] = {
        "num_layers": 1, "width": 32, "num_heads": 2, "response_length": LENGTH,
    }  # fmt: skip
    return RLHFConfig(objective, **(given | changes))


def architecture(
    objective: str, context: int = LENGTH + 1, vocabulary: int = VOCABULARY
) -> Architecture:
    return config_of(objective).architecture(vocabulary, context)


def random_params(made: Architecture, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(make_decoder(made).init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(100 + seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def table_problem(
    seed: int, vocabulary: int = VOCABULARY, length: int = LENGTH
) -> tuple[Problem, np.ndarray]:
    """Every response has a random score; the prompt is one token."""
    table = jax.random.normal(jax.random.key(200 + seed), (1, vocabulary**length))
    places = vocabulary ** jnp.arange(length - 1, -1, -1)

    def score(sample: Sample) -> jax.Array:
        index = jnp.sum(sample.responses.tokens * places, axis=1)
        return jnp.take_along_axis(sample.extras, index[:, None], axis=1)[:, 0]

    prompts = Prompts(jnp.zeros((1, 1), int), jnp.ones(1, int))
    problem = Problem(
        "table", prompts, score, vocabulary, -1, partial(random_params, seed=seed), table
    )
    return problem, np.asarray(table[0], np.float64)


def token_log_probs(
    made: Architecture, params: Any, responses: np.ndarray, temperature: float = 1.0
) -> jax.Array:
    """Of the tokens `[N, R]` of responses to the prompt 0."""
    tokens = jnp.concatenate([jnp.zeros((len(responses), 1), int), responses], axis=1).T
    start = jnp.zeros((len(tokens) - 1, len(responses)), bool).at[0].set(True)
    _, logits, _ = make_decoder(made).apply(params, (), observe(tokens[:-1], temperature), start)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:][..., None], -1)[..., 0].T


def log_probs(made: Architecture, params: Any, temperature: float = 1.0) -> np.ndarray:
    """Of all responses, by enumeration."""
    every = responses_of(made.vocab_size, made.context - 1)
    return np.asarray(token_log_probs(made, params, every, temperature).sum(1), np.float64)


def objective_of(log_prob: Any, reference: Any, table: Any, beta: float) -> float:
    """E[r] - beta KL(pi, pi_ref)."""
    return float(np.sum(np.exp(log_prob) * (table - beta * (log_prob - reference))))


def trained(
    objective: str,
    betas: list[float],
    num_seeds: int,
    updates: int,
    size: tuple[int, int] = (VOCABULARY, LENGTH),
    **settings: Any,
) -> tuple[Any, Any]:
    """States and metrics `[seeds, betas]` of runs on table problems."""
    config = config_of(
        objective, response_length=size[1], total_timesteps=updates * 256 * size[1], **settings
    )
    tasks = [make_rlhf_task(config, table_problem(seed, *size)[0]) for seed in range(num_seeds)]
    learner = ppo.make_learner(tasks[0])

    def train(key: jax.Array, data: Any, beta: jax.Array) -> Any:
        hparams = RLHFHParams(kl_coef=beta, clip_eps=0.2)
        state = learner.init(key, hparams, data)
        return ppo.train_chunk(learner, state, hparams, updates, data)

    data = jax.tree.map(lambda *x: jnp.stack(x), *(task.data for task in tasks))
    over_betas = jax.vmap(train, (None, None, 0))
    return jax.jit(jax.vmap(over_betas, (0, 0, None)))(
        jax.random.split(jax.random.key(0), num_seeds), data, jnp.array(betas)
    )
