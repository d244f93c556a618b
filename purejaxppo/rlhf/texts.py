"""The tasks of learning from texts: fine-tuning, reward models, direct preference optimisation."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from purejaxppo.checks import ConfigError
from purejaxppo.rlhf import letters, records
from purejaxppo.rlhf.architecture import Architecture
from purejaxppo.rlhf.decoder import make_decoder
from purejaxppo.rlhf.generation import generate
from purejaxppo.rlhf.packing import Rows, Tokens, alone, pack, padding_share
from purejaxppo.rlhf.plots import reliability_plot
from purejaxppo.rlhf.problem import pad_left
from purejaxppo.rlhf.samples import SHOWN, finite
from purejaxppo.rlhf.starts import Start, check_unused, start_of
from purejaxppo.rlhf.text_config import DPOConfig, RewardConfig, SFTConfig, TextConfig, TextHParams
from purejaxppo.rlhf.text_learner import make_text_learner
from purejaxppo.rlhf.text_losses import (
    CHOSEN,
    REJECTED,
    Texts,
    completion_log_probs,
    implicit_margin,
    log_probs_of_tokens,
    make_text_loss,
    preferred,
    scores,
)
from purejaxppo.rlhf.tokenizer import Vocabulary, vocabulary_of
from purejaxppo.task import FinishedRun, Plot, Task
from purejaxppo.types import Network, PyTree, TrainState

_PART = 64
"""Rows that are processed at once where all rows are."""


class TextParts(NamedTuple):
    """The parts of a run on texts."""

    config: TextConfig
    vocabulary: Vocabulary
    architecture: Architecture
    network: Network
    start: Start | None
    """The decoder of the run that `config.init` names."""


class Item(NamedTuple):
    """A record and its sequences."""

    record: Any
    tokens: list[Tokens]

    @property
    def prompt(self) -> str:
        return self.record.prompt


class Items(NamedTuple):
    """Records and their tokens."""

    records: list[Any]
    tokens: list[list[Tokens]]


def make_text_task(config: TextConfig) -> Task:
    """Make the task that a config describes.

    Raises:
        ConfigError: if the data, the tokenizer or the run to start from cannot be used.
    """
    vocabulary = vocabulary_of(config.tokenizer)
    train, held_out = (
        Items([item.record for item in part], [item.tokens for item in part])
        for part in records.split(read_items(config, vocabulary), config.held_out)
    )
    parts = _parts(config, vocabulary)
    for items in (train, held_out):
        _check_items(config, parts.architecture, items)
    rows = pack(train.tokens, config.row_length)
    reference = _reference(parts)
    data = {
        "train": _texts(parts, rows, train, reference),
        "held_out": _texts(parts, alone(held_out.tokens), held_out, reference),
        "init": () if parts.start is None else parts.start.params,
    }
    loss = make_text_loss(config, parts.network)
    results = _Results(parts, held_out, data, padding_share(rows), _judge(parts))
    curve = "accuracy" if isinstance(config, DPOConfig) else "log_likelihood"
    others = ("token_accuracy",) if isinstance(config, SFTConfig) else ("accuracy", "margin")
    return Task(
        config=config,
        learner=partial(make_text_learner, config, loss, partial(_first_params, parts)),
        evaluate=partial(_evaluate, parts),
        with_config=make_text_task,
        hparams=TextHParams(),
        passed=(),
        curve=curve,
        progress=tuple(name for name in others if name != curve),
        rank=curve,
        data=data,
        why_not_divided=partial(_why_not_divided, config),
        results=results,
        samples=partial(_samples, parts, held_out, data),
        plots=results.plots,
    )


def read_items(config: TextConfig, vocabulary: Vocabulary) -> list[Item]:
    """The records of `config.data`, of at least two prompts."""
    encode = partial(_encode, vocabulary)
    kind = records.Demonstration if isinstance(config, SFTConfig) else records.Preference
    if config.data == "letters":
        sft = kind is records.Demonstration
        every = letters.demonstrations() if sft else letters.preferences()
        return [Item(record, encode(record)) for record in every]
    items = [Item(*x) for x in records.read_encoded(config.data, kind, encode, config.bad_lines)]
    if len({item.prompt for item in items}) < 2:
        raise ConfigError(
            f"{config.data}: has 1 distinct prompt, but needs at least 2, one of them held out"
        )
    return items


def _encode(vocabulary: Vocabulary, record: Any) -> list[Tokens]:
    """The sequences of a record: prompt, completion and stop token."""
    pair = isinstance(record, records.Preference)
    prompt = tuple(_tokens(vocabulary, record, "prompt"))
    return [
        Tokens(prompt, (*_tokens(vocabulary, record, name), vocabulary.stop_token))
        for name in (("chosen", "rejected") if pair else ("completion",))
    ]


def _tokens(vocabulary: Vocabulary, record: Any, name: str) -> list[int]:
    """The tokens of one text of a record."""
    try:
        found = vocabulary.tokenizer.encode(getattr(record, name))
    except ConfigError as error:  # tokenizers call every text a prompt
        raise ConfigError(f"{name} {str(error).removeprefix('prompt ')}") from error
    if not found:
        raise ConfigError(f"{name} {getattr(record, name)[:80]!r}: has no tokens; remove the line")
    return found


def _parts(config: TextConfig, vocabulary: Vocabulary) -> TextParts:
    critic: Any = "shared" if isinstance(config, RewardConfig) else "none"
    start = start_of(config.init) if config.init else None
    if start is None:
        architecture = config.decoder(vocabulary.size, config.row_length, critic)
    else:
        start.check_vocabulary(vocabulary, config.tokenizer)
        check_unused(config, start.architecture, config.init)
        architecture = dataclasses.replace(start.architecture, critic=critic)
    return TextParts(config, vocabulary, architecture, make_decoder(architecture), start)


def _check_items(config: TextConfig, architecture: Architecture, items: Items) -> None:
    longest = max(len(x.all) for item in items.tokens for x in item)
    if longest > architecture.context:
        raise ConfigError(
            f"data = {config.data}: the longest sequence has {longest} tokens, but the decoder's "
            f"context is {architecture.context}; "
            + ("leave init out or shorten them" if config.init else "use a larger row_length")
        )
    margins = [x.margin for x in items.records if isinstance(x, records.Preference)]
    if isinstance(config, DPOConfig) and config.loss == "ipo" and any(margins):
        raise ConfigError(
            f"data = {config.data}: has margins, which loss = ipo ignores; leave them out, or use "
            "loss = sigmoid"
        )


def _reference(parts: TextParts) -> PyTree | None:
    """The parameters of the reference of direct preference optimisation."""
    if not isinstance(parts.config, DPOConfig):
        return None
    start = parts.start and parts.start.params
    return jax.jit(partial(init_params, parts))(jax.random.key(0), start)


def _texts(parts: TextParts, rows: Rows, items: Items, reference: PyTree | None) -> Texts:
    """Rows as arrays on the device, with margins and the reference's log-probabilities."""
    rows = jax.tree.map(jnp.asarray, rows)
    margin = jnp.array([getattr(record, "margin", 0.0) for record in items.records])
    log_prob = jnp.zeros(rows.last.shape)
    if reference is not None:
        log_prob = over_parts(partial(completion_log_probs, parts.network, reference), rows)
    return Texts(rows, margin[rows.item], log_prob)


def over_parts(function: Any, rows: PyTree) -> Any:
    """Map a function over rows `[R, ...]`, a part at a time."""
    return jax.jit(lambda rows: jax.lax.map(
        lambda row: jax.tree.map(lambda x: x[0], function(jax.tree.map(lambda x: x[None], row))),
        rows, batch_size=_PART,
    ))(rows)  # fmt: skip


def init_params(parts: TextParts, key: Key[Array, ""], start: PyTree) -> PyTree:
    """Initial parameters: random, or those of the run that `config.init` names. Direct preference
    optimisation starts all seeds from the reference. The output layer of a reward model is drawn
    from N(0, 1 / (W + 1)) (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1)."""
    config = parts.config
    reference = isinstance(config, DPOConfig)
    params = parts.network.init(jax.random.key(0) if reference else key)
    params |= {name: x for name, x in (start or {}).items() if name.startswith("actor")}
    if isinstance(config, RewardConfig):
        width = parts.architecture.width
        kernel = jax.random.normal(jax.random.fold_in(key, 1), (width, 1)) / np.sqrt(width + 1)
        params["critic_head"] = params["critic_head"] | {"kernel": kernel}
    return params


def _first_params(parts: TextParts, key: Key[Array, ""], data: PyTree) -> PyTree:
    return init_params(parts, key, data["init"])


def _why_not_divided(config: TextConfig, devices: int) -> str | None:
    rows = config.batch_rows
    if rows % devices or rows // devices % config.accumulation:
        return (
            f"batch_rows = {rows} is not divisible by devices = {devices} times accumulation = "
            f"{config.accumulation}; use a multiple"
        )
    return None


def _evaluate(
    parts: TextParts,
    state: TrainState,
    key: Key[Array, ""],
    num_episodes: int,
    *,
    deterministic: Any = False,
    max_steps: int | None = None,
    data: PyTree,
) -> Float[Array, " num_episodes"]:
    """A number for each held-out item, used in turn. Fine-tuning: the log-likelihood per token, or
    with `deterministic` whether greedy decoding gives exactly the completion. Reward models: the
    log-likelihood of the label, or the margin. Direct preference optimisation: whether the log
    ratio of the chosen completion is higher, or by how much."""
    held_out: Texts = data["held_out"]
    chosen = jnp.arange(num_episodes) % held_out.rows.tokens.shape[0]
    texts = jax.tree.map(lambda x: x[chosen], held_out)
    sampled, greedy = judged(parts, state.learner.params, texts)
    return jnp.where(deterministic, greedy, sampled)


def judged(
    parts: TextParts, params: PyTree, texts: Texts
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The numbers of `_evaluate`, sampled and deterministic, for rows with one item each."""
    config, network = parts.config, parts.network
    if isinstance(config, SFTConfig):
        log_prob, likely = log_probs_of_tokens(network, params, texts.rows)
        counted = texts.rows.completion & ~texts.rows.start
        total = jnp.sum(jnp.where(counted, log_prob, 0.0), axis=1)
        return total / jnp.sum(counted, axis=1), jnp.all(likely | ~counted, axis=1) * 1.0
    if isinstance(config, RewardConfig):
        score = scores(network, params, texts.rows)[:, 0]
        margin = score[:, CHOSEN] - score[:, REJECTED]
        return jax.nn.log_sigmoid(margin - texts.margin[:, 0]), margin
    gap = implicit_margin(network, params, texts)[:, 0]
    return preferred(gap), gap


def _judge(parts: TextParts) -> Callable[[PyTree, Texts], tuple[Array, Array]]:
    """`judged` over any number of rows, compiled once for all seeds."""
    return jax.jit(lambda params, texts: over_parts(partial(judged, parts, params), texts))


class _Results(NamedTuple):
    """`(metrics, evaluated, states) -> further entries of summary.json`, over all held-out items;
    means over seeds."""

    parts: TextParts
    held_out: Items
    data: PyTree
    padding: float
    judge: Callable[[PyTree, Texts], tuple[Array, Array]]

    def __call__(
        self, metrics: Mapping[str, Any], evaluated: Mapping[str, Any], states: TrainState
    ) -> dict[str, Any]:
        parts, config = self.parts, self.parts.config
        each = _each_seed(states)
        likelihood, greedy = self._judged(each)
        found: dict[str, Any] = {
            "held_out": len(self.held_out.records),
            "padding": self.padding,
        }
        if not isinstance(config, DPOConfig):
            found["held_out_loss"] = float(-likelihood.mean())
        if isinstance(config, SFTConfig):
            return found | {"exact": float(greedy.mean())}
        found |= {"accuracy": accuracy(greedy), "margin": float(greedy.mean())}
        chances = [record.columns.get("probability") for record in self.held_out.records]
        if all(isinstance(x, float | int) for x in chances):
            found["bayes_accuracy"] = float(np.mean([max(x, 1 - x) for x in chances]))
        if isinstance(config, RewardConfig):
            found["calibration_error"] = float(np.mean([calibration_error(x) for x in greedy]))
            found |= _score_moments(parts, each, self.data["train"].rows)
        return found

    def _judged(self, each: list[PyTree]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihoods, and exact answers or margins, `[S, H]`."""
        found = [self.judge(params, self.data["held_out"]) for params in each]
        likelihood, greedy = zip(*found, strict=True)
        return np.stack(likelihood), np.stack(greedy)

    def plots(self, run: FinishedRun) -> list[Plot]:
        """A reliability diagram, if margins are logits of a preference, of all seeds together."""
        config = self.parts.config
        if isinstance(config, SFTConfig) or (
            isinstance(config, DPOConfig) and config.loss == "ipo"
        ):
            return []
        _, margins = self._judged(_each_seed(run.states))
        prediction = "sigmoid(|score difference|)"
        if isinstance(config, DPOConfig):
            margins = run.hparams.kl_coef * margins
            prediction = "sigmoid(kl_coef |margin|)"
        errors = np.array([calibration_error(x) for x in margins])
        bins = reliability(margins.ravel())
        return [reliability_plot(bins, errors, margins.shape[1], prediction)]


def _each_seed(states: TrainState) -> list[PyTree]:
    """The parameters of each seed."""
    seeds = range(states.learner.updates.shape[0])
    return [jax.tree.map(lambda x, s=s: x[s], states.learner.params) for s in seeds]


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins; zeros count half."""
    return float(np.mean(margins > 0) + np.mean(margins == 0) / 2)


def reliability(margins: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted and observed frequency of the preferred label per bin, and the share of pairs.

    The prediction for a pair is sigmoid(|margin|), from 0.5 to 1: the probability that the text
    with the higher score is preferred. Bins are of equal width; empty ones are left out.
    """
    sure = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + (margins == 0) / 2
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    used = [place == b for b in range(bins) if (place == b).any()]
    predicted, observed = (np.array([x[rows].mean() for rows in used]) for x in (sure, right))
    return predicted, observed, np.array([rows.mean() for rows in used])


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015) over ten bins: the mean distance of predicted
    and observed frequency, weighted by the share of pairs."""
    predicted, observed, share = reliability(margins)
    return float(np.sum(share * np.abs(predicted - observed)))


def _score_moments(parts: TextParts, each: list[PyTree], rows: Rows) -> dict[str, Any]:
    """Mean and standard deviation of each seed's scores of the completions it was trained on."""
    real = np.asarray(rows.real) > 0
    means, stds = [], []
    for params in each:
        found = np.asarray(over_parts(partial(scores, parts.network, params), rows))[real]
        means.append(float(found.mean()))
        stds.append(float(found.std()))
    return {"score_mean": means, "score_std": stds}


def _samples(
    parts: TextParts, held_out: Items, data: PyTree, state: TrainState
) -> list[dict[str, Any]]:
    """Held-out pairs with their margins, or responses to held-out prompts."""
    params = state.learner.params
    shown = held_out.records[:SHOWN]
    texts = jax.tree.map(lambda x: x[: len(shown)], data["held_out"])
    if not isinstance(parts.config, SFTConfig):
        _, margins = judged(parts, params, texts)
        return [
            {"prompt": x.prompt, "chosen": x.chosen, "rejected": x.rejected, "margin": finite(m)}
            for x, m in zip(shown, np.asarray(margins), strict=True)
        ]
    said = respond(parts, params, [x.prompt for x in shown], held_out)
    return [
        {"prompt": x.prompt, "completion": x.completion, "response": r}
        for x, r in zip(shown, said, strict=True)
    ]


def respond(parts: TextParts, params: PyTree, prompts: Sequence[str], items: Items) -> list[str]:
    """Greedy responses, at most as long as the longest completion of the items."""
    tokenizer, _, stop = parts.vocabulary
    rows = pad_left([tokenizer.encode(text) for text in prompts])
    room = parts.architecture.context - rows.tokens.shape[1]
    longest = min(room, max(len(x.completion) for item in items.tokens for x in item))
    found = jax.jit(partial(
        generate, parts.network, max_tokens=longest, stop_token=stop, deterministic=True,
        prompts=rows,
    ))(params, jax.random.split(jax.random.key(0), len(prompts)))  # fmt: skip
    ends = np.asarray(found.lengths) - np.asarray(found.stopped)
    return [
        tokenizer.decode(tokens[:end])
        for tokens, end in zip(np.asarray(found.tokens), ends, strict=True)
    ]
