"""Over-optimisation of a learned reward, on a problem whose responses can all be enumerated.

Gao et al. 2022 (arXiv:2210.10760) in miniature: a proxy is fitted to preferences between responses
of a reference, and a policy is optimised against the proxy. Divergence from the reference, proxy
and gold score of a policy are exact sums over the N = V^R responses. Axis letters: V vocabulary, R
length of a response, F features of the proxy, P pairs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logsumexp, xlogy

import purejaxppo as ppo
from purejaxppo.rlhf import (
    Architecture,
    DPOConfig,
    Problem,
    Prompts,
    RLHFConfig,
    RLHFHParams,
    Sample,
    TextHParams,
    make_decoder,
    make_rlhf_task,
)
from purejaxppo.rlhf.generation import observe
from purejaxppo.rlhf.packing import Tokens, alone
from purejaxppo.rlhf.text_learner import make_text_learner
from purejaxppo.rlhf.text_losses import Texts, make_text_loss

VOCABULARY, LENGTH = 8, 6
PAIRS = (100, 400, 1600, 6400)
BETAS = np.geomspace(30, 0.02, 40)
BEST_OF = 2 ** np.arange(11)
RIDGE = 0.1
"""Weight of half the squared norm of the proxy's coefficients in the sum over pairs."""


class Setting(NamedTuple):
    """A reference and what is to be maximised: log-probabilities and gold scores `[N]`."""

    log_ref: np.ndarray
    gold: np.ndarray


class Proxy(NamedTuple):
    """A learned reward: the sum of a table over the tokens, and of one over adjacent tokens."""

    unigram: np.ndarray
    """`[V]`; contains the constant that makes the mean under the reference 0."""
    bigram: np.ndarray
    """`[V, V]`"""

    def scores(self) -> np.ndarray:
        """Of all responses `[N]`."""
        return sums(self.unigram) + sums(self.bigram)


class Points(NamedTuple):
    """Exact values of one policy or of several: KL(pi, ref), E[proxy] and E[gold]."""

    divergence: Any
    proxy: Any
    gold: Any


class Law(NamedTuple):
    """The fit gold = d (alpha - beta log d) with d = sqrt(KL), and its share of explained variance
    R^2."""

    alpha: float
    beta: float
    explained: float


def sums(table: np.ndarray) -> np.ndarray:
    """Sum of a table `[V] * k` over the k adjacent tokens at every place, for all responses
    `[N]`."""
    total, k = np.zeros((VOCABULARY,) * LENGTH), table.ndim
    for i in range(LENGTH - k + 1):
        total += table.reshape((1,) * i + table.shape + (1,) * (LENGTH - k - i))
    return total.reshape(-1)


def moments(values: np.ndarray, log_ref: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of values `[N]` under the reference."""
    p = np.exp(log_ref)
    mean = p @ values
    return float(mean), float(np.sqrt(p @ (values - mean) ** 2))


def bigram_model(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the first token `[V]`, and of the next one `[V, V]`."""
    rng = np.random.default_rng(seed)
    shape = VOCABULARY, VOCABULARY
    return log_softmax(rng.normal(size=shape[0])), log_softmax(rng.normal(size=shape), axis=-1)


def log_probs_of_bigrams(first: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of all responses `[N]`."""
    return sums(following) + np.repeat(first, VOCABULARY ** (LENGTH - 1))


def make_setting(log_ref: np.ndarray, seed: int) -> Setting:
    """The gold score has random terms of one, two and (halved) three adjacent tokens, and mean 0
    and variance 1 under the reference."""
    rng = np.random.default_rng([seed, 1])
    weights = {1: 1.0, 2: 1.0, 3: 0.5}
    terms = [w * sums(rng.normal(size=(VOCABULARY,) * k)) for k, w in weights.items()]
    gold = np.sum(terms, axis=0)
    mean, scale = moments(gold, log_ref)
    return Setting(log_ref, (gold - mean) / scale)


def setting_of(seed: int) -> Setting:
    """A setting whose reference is a random bigram model."""
    return make_setting(log_probs_of_bigrams(*bigram_model(seed)), seed)


# The proxy


def tokens_of(index: np.ndarray) -> np.ndarray:
    """Tokens `[..., R]` of the responses with these numbers."""
    return np.stack(np.unravel_index(index, (VOCABULARY,) * LENGTH), axis=-1)


def features(index: np.ndarray) -> np.ndarray:
    """Counts of tokens and of adjacent tokens `[P, F]` of the responses with these numbers."""
    tokens = tokens_of(index)
    pairs = VOCABULARY + VOCABULARY * tokens[:, :-1] + tokens[:, 1:]
    found = np.zeros((len(index), VOCABULARY + VOCABULARY**2))
    rows = np.arange(len(index))[:, None]
    np.add.at(found, (rows, tokens), 1.0)
    np.add.at(found, (rows, pairs), 1.0)
    return found


def fit_logistic(x: np.ndarray, label: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Coefficients `[F]` that maximise the penalised likelihood of labels `[P]`, by Newton's method
    with step halving."""
    w = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float(np.sum(np.logaddexp(0.0, z) - label * z) + ridge / 2 * w @ w)

    for _ in range(100):
        p = expit(x @ w)
        gradient = x.T @ (p - label) + ridge * w
        if np.abs(gradient).max() < 1e-8:
            break
        hessian = (x.T * (p * (1 - p))) @ x + ridge * np.eye(len(w))
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
    return w


def labels_of(setting: Setting, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of pairs of the reference's responses `[2, P]`, and whether the first is preferred
    `[P]`, which has the probability sigmoid(gold of the first - gold of the second)."""
    rng = np.random.default_rng([seed, 2])
    p = np.exp(setting.log_ref)
    index = rng.choice(len(p), size=(2, PAIRS[-1]), p=p / p.sum())[:, :pairs]
    difference = setting.gold[index[0]] - setting.gold[index[1]]
    return index, rng.uniform(size=PAIRS[-1])[:pairs] < expit(difference)


def fit_proxy(setting: Setting, pairs: int, seed: int) -> Proxy:
    """Fit a reward to labelled pairs."""
    index, label = labels_of(setting, pairs, seed)
    w = fit_logistic(features(index[0]) - features(index[1]), label.astype(float))
    raw = Proxy(w[:VOCABULARY], w[VOCABULARY:].reshape(VOCABULARY, VOCABULARY))
    mean, scale = moments(raw.scores(), setting.log_ref)
    return Proxy((raw.unigram - mean / LENGTH) / scale, raw.bigram / scale)


# Exact policies


def tilted(setting: Setting, proxy: np.ndarray, beta: float) -> np.ndarray:
    """Log-probabilities `[N]` of the optimum ref exp(proxy / beta) / Z."""
    unnormalised = setting.log_ref + proxy / beta
    return unnormalised - logsumexp(unnormalised)


def best_of(setting: Setting, proxy: np.ndarray, n: int) -> np.ndarray:
    """Log-probabilities `[N]` of the best by the proxy of n responses of the reference.

    The best score is at most v with probability F(v)^n. Among responses with equal scores, each is
    the best in proportion to its probability under the reference. Proxies of responses with the
    same counts differ by rounding, hence the 9 decimals.
    """
    _, rank = np.unique(proxy.round(9), return_inverse=True)
    share = np.bincount(rank, weights=np.exp(setting.log_ref))
    upto = np.minimum(np.cumsum(share), 1.0)
    upto[-1] = 1.0
    below = np.concatenate([[0.0], upto[:-1]])
    with np.errstate(divide="ignore"):
        log_best = n * np.log(upto) + np.log(-np.expm1(n * np.log(below / upto)))
    return setting.log_ref + (log_best - np.log(upto - below))[rank]


def point_of(setting: Setting, proxy: np.ndarray, log_pi: np.ndarray) -> Points:
    """Exact values of a policy given by its log-probabilities `[N]`."""
    pi = np.exp(log_pi)
    kl = np.sum(xlogy(pi, pi) - pi * setting.log_ref)
    return Points(float(kl), float(pi @ proxy), float(pi @ setting.gold))


def curve_of(setting: Setting, proxy: np.ndarray, betas: Sequence[float] = tuple(BETAS)) -> Points:
    """Optima for several betas."""
    return _stack([point_of(setting, proxy, tilted(setting, proxy, beta)) for beta in betas])


def best_of_curve(setting: Setting, proxy: np.ndarray) -> Points:
    """The best of n responses, for n in `BEST_OF`."""
    return _stack([point_of(setting, proxy, best_of(setting, proxy, int(n))) for n in BEST_OF])


def _stack(points: Sequence[Points]) -> Points:
    return Points(*np.array(points).T)


def at_divergence(setting: Setting, proxy: np.ndarray, divergence: float) -> Points:
    """The optimum whose divergence from the reference is the given one."""

    def excess(log_beta: float) -> float:
        found = point_of(setting, proxy, tilted(setting, proxy, np.exp(log_beta)))
        return found.divergence - divergence

    log_beta: Any = brentq(excess, np.log(1e-3), np.log(1e3), xtol=1e-4)
    return point_of(setting, proxy, tilted(setting, proxy, np.exp(log_beta)))


def fit_law(points: Points, smallest: float = 0.1) -> Law:
    """Fit gold = d (alpha - beta log d) by least squares over the points with d > `smallest`
    (Gao et al. 2022, section 3.1)."""
    d = np.sqrt(points.divergence)
    d, gold = d[d > smallest], points.gold[d > smallest]
    x = np.stack([d, -d * np.log(d)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(x, gold, rcond=None)
    error = gold - x @ np.array([alpha, beta])
    explained = 1 - error @ error / np.sum((gold - gold.mean()) ** 2)
    return Law(float(alpha), float(beta), float(explained))


# Decoders


def architecture_of(config: RLHFConfig) -> Architecture:
    """The prompt is one token."""
    return config.architecture(VOCABULARY, 1 + LENGTH)


def config_of(objective: Any, updates: int = 150, **changes: Any) -> RLHFConfig:
    """A decoder of one layer of width 32; 256 responses per update by default."""
    given: dict[str, Any] = {
        "response_length": LENGTH, "num_layers": 1, "width": 32, "num_heads": 2,
    } | changes  # fmt: skip
    size = given.get("num_prompts", 16) * given.get("group_size", 16)
    return RLHFConfig(objective, total_timesteps=updates * size * LENGTH, **given)


@partial(jax.jit, static_argnums=0)
def logits_of(made: Architecture, params: Any, read: jax.Array, start: jax.Array) -> jax.Array:
    """Logits `[R, B, V]` of the tokens after those read `[R, B]`."""
    return make_decoder(made).apply(params, (), observe(read, 1.0), start)[1]


def inputs_of(tokens: Any) -> tuple[jax.Array, jax.Array]:
    """What the decoder reads before the tokens of responses `[B, R]`: the prompt and all but the
    last token, and where sequences start; both `[R, B]`."""
    read = jnp.concatenate([jnp.zeros((len(tokens), 1), int), tokens[:, :-1]], axis=1).T
    return read, jnp.zeros(read.shape, bool).at[0].set(True)


def fit_decoder(seed: int, steps: int = 300, rows: int = 128) -> Any:
    """Parameters of a decoder without critic, fitted to a bigram model by gradient descent on the
    cross entropy of each next token, given responses sampled from the model."""
    made = architecture_of(config_of("rloo"))
    first, following = (jnp.asarray(x, jnp.float32) for x in bigram_model(seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def sample(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, LENGTH)
        token = jax.random.categorical(keys[0], first, shape=(rows,))
        tokens = [token]
        for k in keys[1:]:
            tokens.append(jax.random.categorical(k, following[tokens[-1]]))
        return jnp.stack(tokens, axis=1)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        initial = jnp.broadcast_to(first, (1, rows, VOCABULARY))
        target = jnp.concatenate([initial, following[tokens[:, :-1].T]])
        log_pi = jax.nn.log_softmax(logits_of(made, params, *inputs_of(tokens)))
        return -jnp.mean(jnp.sum(jnp.exp(target) * log_pi, axis=-1))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.grad(loss)(params, sample(key))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def fit(key: jax.Array) -> Any:
        params = make_decoder(made).init(key)
        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return fit(jax.random.key(seed))


def log_probs_of(made: Architecture, params: Any, rows: int = 8192) -> np.ndarray:
    """Of all responses `[N]`, from the logits at all prefixes; sums to 1 in float64."""
    prefixes = np.indices((VOCABULARY,) * (LENGTH - 1)).reshape(LENGTH - 1, -1).T
    tokens = np.pad(prefixes, ((0, 0), (0, 1)))
    parts = [
        np.asarray(logits_of(made, params, *inputs_of(batch)), np.float64)
        for batch in np.split(tokens, len(tokens) // rows)
    ]
    log_pi = log_softmax(np.concatenate(parts, axis=1), axis=-1)
    total = np.zeros(1)
    for i in range(LENGTH):
        each = log_pi[i, :: VOCABULARY ** (LENGTH - 1 - i)]
        total = (total[:, None] + each).reshape(-1)
    return total


def decoder_setting(fitted: Any, seed: int) -> Setting:
    """A setting whose reference is the decoder with the parameters `fitted`."""
    return make_setting(log_probs_of(architecture_of(config_of("rloo")), fitted), seed)


def problem_of(fitted: Any, proxy: Proxy) -> Problem:
    """Maximise the proxy, starting from the decoder `fitted`. The extras are the proxy's tables."""

    def score(sample: Sample) -> jax.Array:
        (unigram, bigram), tokens = sample.extras, sample.responses.tokens
        rows = jnp.arange(len(tokens))[:, None]
        alone = jnp.sum(unigram[rows, tokens], axis=1)
        return alone + jnp.sum(bigram[rows, tokens[:, :-1], tokens[:, 1:]], axis=1)

    def reference(made: Architecture) -> Any:
        return make_decoder(made).init(jax.random.key(0)) | fitted

    prompts = Prompts(jnp.zeros((1, 1), int), jnp.ones(1, int))
    return Problem("proxy", prompts, score, VOCABULARY, -1, reference, extras_of(proxy))


def extras_of(proxy: Proxy) -> tuple[jax.Array, ...]:
    """Tables for one prompt: `[1, V]` and `[1, V, V]`."""
    return tuple(jnp.asarray(table[None], jnp.float32) for table in proxy)


def trainer(config: RLHFConfig, fitted: Any) -> Callable[[int, float, Proxy], np.ndarray]:
    """A function of seed, kl_coef and proxy that trains a policy, compiled once, and returns its
    log-probabilities `[N]`."""
    nothing = Proxy(np.zeros(VOCABULARY), np.zeros((VOCABULARY, VOCABULARY)))
    task = make_rlhf_task(config, problem_of(fitted, nothing))
    learner = ppo.make_learner(task)

    @jax.jit
    def train(key: jax.Array, beta: jax.Array, extras: Any) -> Any:
        hparams = RLHFHParams(kl_coef=beta, clip_eps=0.2)
        data = task.data | {"extras": extras}
        state = learner.init(key, hparams, data)
        state, metrics = ppo.train_chunk(learner, state, hparams, config.num_updates, data)
        return state.learner.params, metrics

    def log_probs(seed: int, beta: float, proxy: Proxy) -> np.ndarray:
        params, _ = train(jax.random.key(seed), jnp.asarray(beta), extras_of(proxy))
        return log_probs_of(architecture_of(config), params)

    return log_probs


# Direct preference optimisation


def dpo_config_of(loss: Any, updates: int, **changes: Any) -> DPOConfig:
    """The decoder of `config_of`; a row is one pair, each with its prompt."""
    given: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "batch_rows": 64}
    given |= {"row_length": 2 * (1 + LENGTH), "loss": loss} | changes
    size = given["batch_rows"] * given["row_length"]
    return DPOConfig(total_timesteps=updates * size, **given)


def texts_of(setting: Setting, index: np.ndarray, label: np.ndarray) -> Texts:
    """Labelled pairs as the library's losses read them; see `labels_of`."""
    numbers = np.where(label, index, index[::-1]).T
    items = [[Tokens((0,), tuple(tokens)) for tokens in pair] for pair in tokens_of(numbers)]
    rows = jax.tree.map(jnp.asarray, alone(items))
    reference = jnp.asarray(setting.log_ref[numbers][:, None], jnp.float32)
    return Texts(rows, jnp.zeros(rows.real.shape), reference)


def preference_trainer(config: DPOConfig) -> Callable[[int, float, Any, Texts], np.ndarray]:
    """A function of seed, beta, the reference's parameters and pairs that trains a policy by direct
    preference optimisation, compiled once for each number of pairs, and returns its
    log-probabilities `[N]`."""
    made = architecture_of(config_of("rloo"))
    loss = make_text_loss(config, make_decoder(made))
    learner = make_text_learner(config, loss, lambda key, data: data["init"], None)

    @jax.jit
    def train(key: jax.Array, beta: jax.Array, data: Any) -> Any:
        hparams = TextHParams(kl_coef=beta, weight_decay=0.0)
        state = learner.init(key, hparams, data)
        state, _ = ppo.train_chunk(learner, state, hparams, config.num_updates, data)
        return state.learner.params

    def log_probs(seed: int, beta: float, fitted: Any, texts: Texts) -> np.ndarray:
        data = {"train": texts, "init": fitted}
        return log_probs_of(made, train(jax.random.key(seed), jnp.asarray(beta), data))

    return log_probs
