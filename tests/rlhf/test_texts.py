"""Learning from texts: packing, losses, reward models, runs from the command line and errors."""

import csv
import dataclasses
import itertools
import json
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import random_params
from kept import keep_programs

import purejaxppo as ppo
from purejaxppo.checks import RunWarning
from purejaxppo.cli import main
from purejaxppo.host.configfile import load_settings
from purejaxppo.rlhf import (
    Architecture,
    Characters,
    DPOConfig,
    Preference,
    RewardConfig,
    RewardModel,
    RLHFConfig,
    RLHFHParams,
    Sample,
    SFTConfig,
    TextHParams,
    letters,
    load_generator,
    load_reward,
    make_decoder,
    make_rlhf_task,
    make_text_task,
    records,
    write_records,
)
from purejaxppo.rlhf.actor import TokenActor
from purejaxppo.rlhf.generation import Responses, generate, observe
from purejaxppo.rlhf.packing import Rows, Tokens, alone, pack, padding_share
from purejaxppo.rlhf.prepare import scores_of
from purejaxppo.rlhf.problem import pad_left
from purejaxppo.rlhf.starts import start_of
from purejaxppo.rlhf.text_learner import gradient_of_batch
from purejaxppo.rlhf.text_losses import Texts, completion_log_probs, make_text_loss, scores
from purejaxppo.rlhf.texts import calibration_error, reliability
from purejaxppo.rlhf.tokenizer import Vocabulary

DECODER: dict[str, Any] = {"num_layers": 1, "width": 16, "num_heads": 2}
SIZE, LENGTH = 8, 24
MADE = Architecture(SIZE, LENGTH, **DECODER, critic="shared")
NETWORK = make_decoder(MADE)


@pytest.fixture(autouse=True)
def cache_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)


def sequence(rng: np.random.Generator, prompt: int, completion: int) -> Tokens:
    return Tokens(
        tuple(rng.integers(SIZE, size=prompt).tolist()),
        tuple(rng.integers(SIZE, size=completion).tolist()),
    )


def items_of(count: int, each: int, seed: int = 0) -> list[list[Tokens]]:
    """Items with prompts of 2 tokens and completions of 1, 3 or 6, so that few lengths differ."""
    rng = np.random.default_rng(seed)
    return [[sequence(rng, 2, rng.choice([1, 3, 6])) for _ in range(each)] for _ in range(count)]


def read_back(rows: Rows) -> dict[int, list[Tokens]]:
    """The items of rows, by a plain loop over tokens."""
    found: dict[int, list[Tokens]] = {}
    each = rows.last.shape[2]
    for r, m in zip(*np.nonzero(rows.real), strict=True):
        sequences = []
        for k in range(each):
            place = [t for t, s in enumerate(rows.sequence[r]) if s == m * each + k]
            assert place == list(range(place[0], place[-1] + 1))
            assert rows.last[r, m, k] == place[-1]
            assert rows.start[r, place].tolist() == [True] + [False] * (len(place) - 1)
            parts: tuple[list[int], list[int]] = [], []
            for t in place:
                parts[bool(rows.completion[r, t])].append(int(rows.tokens[r, t]))
            assert [*parts[0], *parts[1]] == rows.tokens[r, place].tolist()  # the prompt is first
            sequences.append(Tokens(tuple(parts[0]), tuple(parts[1])))
        assert rows.item[r, m] not in found
        found[int(rows.item[r, m])] = sequences
    return found


# Packing


@pytest.mark.parametrize("each", [1, 2])
def test_every_token_is_packed_once(each: int):
    rng = np.random.default_rng(each)
    items = [[sequence(rng, *rng.integers(1, 6, size=2)) for _ in range(each)] for _ in range(500)]
    for rows in (pack(items, 32), alone(items)):
        assert read_back(rows) == dict(enumerate(items))
        count = sum(len(x.all) for item in items for x in item)
        assert (rows.sequence >= 0).sum() == count
        padding = rows.sequence < 0
        assert rows.start[padding].all()
        assert not rows.completion[padding].any()
        assert padding_share(rows) == pytest.approx(1 - count / rows.tokens.size)
    rows = pack(items, 32)
    assert rows.tokens.shape[1] == 32
    assert padding_share(rows) < 0.1


def test_an_item_that_fits_no_row_is_an_error():
    items = items_of(4, 2)
    items[2] = [Tokens((1,) * 5, (2,) * 6), Tokens((1,) * 5, (2,) * 7)]
    assert pack(items, 23).tokens.shape[1] == 23
    with pytest.raises(ppo.ConfigError, match=r"row_length = 22: .* use at least 23"):
        pack(items, 22)


# Losses, against plain loops over sequences


@jax.jit
def applied(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    start = jnp.arange(len(tokens))[:, None] == 0
    _, logits, value = NETWORK.apply(params, (), observe(tokens[:, None], 1.0), start)
    return logits[:, 0], value[:, 0]


def outputs(params: Any, given: Tokens) -> tuple[np.ndarray, float]:
    """The log-probabilities of the tokens after the first one, and the value at the last one."""
    logits, value = (np.asarray(x, np.float64) for x in applied(params, jnp.array(given.all)))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return np.array([log_probs[t, x] for t, x in enumerate(given.all[1:])]), float(value[-1])


def log_prob_of(params: Any, given: Tokens) -> float:
    return outputs(params, given)[0][len(given.prompt) - 1 :].sum()


def texts_of(
    items: list[list[Tokens]], margins: Any = None, reference: Any = None, length: int = LENGTH
) -> Texts:
    rows = pack(items, length)
    margin = np.zeros(len(items)) if margins is None else np.asarray(margins)
    known = np.zeros((len(items), len(items[0]))) if reference is None else np.asarray(reference)
    real = rows.real[..., None] > 0
    texts = Texts(rows, margin[rows.item], np.where(real, known[rows.item], 0.0))  # pyright: ignore
    return jax.tree.map(lambda x: jnp.asarray(x, None if x.dtype != float else jnp.float32), texts)


def loss_of(config: Any, params: Any, texts: Texts, **hparams: Any) -> dict[str, float]:
    found = jax.jit(make_text_loss(config, NETWORK))(params, texts, TextHParams(**hparams))
    means = {name: float(x / found.weight) for name, x in found.metrics.items()}
    return {"loss": float(found.loss / found.weight), "weight": float(found.weight), **means}


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


PARAMS = random_params(MADE, 0)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_next_token_loss(loss_on: Any):
    items = items_of(12, 1)
    found = loss_of(SFTConfig(**DECODER, loss_on=loss_on), PARAMS, texts_of(items))
    each = []
    for (given,) in items:
        log_probs, _ = outputs(PARAMS, given)
        each += log_probs[len(given.prompt) - 1 if loss_on == "completion" else 0 :].tolist()
    assert found["weight"] == len(each)
    assert found["loss"] == pytest.approx(-np.mean(each), abs=1e-5)


def test_bradley_terry_with_margin_and_centring():
    items = items_of(12, 2)
    margins = np.random.default_rng(1).normal(size=12)
    found = loss_of(RewardConfig(**DECODER), PARAMS, texts_of(items, margins), centring=0.3)
    score = np.array([[outputs(PARAMS, x)[1] for x in item] for item in items])
    gap = score[:, 0] - score[:, 1]
    expected = softplus(margins - gap) + 0.3 * score.sum(1) ** 2
    assert np.ptp(gap) > 0.1
    assert found["weight"] == 12
    assert found["loss"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found["margin"] == pytest.approx(gap.mean(), abs=1e-5)
    assert found["accuracy"] == pytest.approx((gap > 0).mean())


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_direct_preference(kind: Any):
    items, other = items_of(12, 2), random_params(MADE, 1)
    reference = np.array([[log_prob_of(other, x) for x in item] for item in items])
    ratio = np.array([[log_prob_of(PARAMS, x) for x in item] for item in items]) - reference
    gap = ratio[:, 0] - ratio[:, 1]
    config = DPOConfig(**DECODER, loss=kind)
    found = loss_of(config, PARAMS, texts_of(items, None, reference), kl_coef=0.4)
    expected = softplus(-0.4 * gap) if kind == "sigmoid" else (gap - 1 / 0.8) ** 2
    assert np.ptp(gap) > 0.1
    assert found["loss"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found["margin"] == pytest.approx(gap.mean(), abs=1e-5)
    swapped = [item[::-1] for item in items]
    back = loss_of(config, PARAMS, texts_of(swapped, None, reference[:, ::-1]), kl_coef=0.4)
    assert back["margin"] == pytest.approx(-found["margin"], abs=1e-5)
    assert back["accuracy"] == pytest.approx(1 - found["accuracy"])


def test_the_gradient_of_a_pair():
    """-(1 - sigmoid(margin)) times the difference of the scores' gradients."""
    texts = texts_of(items_of(1, 2, seed=3))

    @jax.jit
    def both(params: Any) -> Any:
        def of(index: int) -> Any:
            return jax.value_and_grad(lambda x: scores(NETWORK, x, texts.rows)[0, 0, index])(params)

        loss = make_text_loss(RewardConfig(**DECODER), NETWORK)
        return jax.grad(lambda x: loss(x, texts, TextHParams()).loss)(params), of(0), of(1)

    gradient, (chosen, high), (rejected, low) = both(PARAMS)
    weight = -1 / (1 + np.exp(float(chosen - rejected)))
    expected = jax.tree.map(lambda x, y: weight * (x - y), high, low)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 0.01
    for x, y in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_give_the_same_gradient():
    """Rows have different numbers of pairs, so a mean of the parts' means would differ."""
    rng = np.random.default_rng(2)
    items = [[sequence(rng, 2, n), sequence(rng, 2, n)] for n in [10] * 4 + [1] * 16]
    texts = texts_of(items, np.linspace(-1, 1, 20))
    assert len(texts.rows.tokens) == 8
    assert len({float(x) for x in texts.rows.real.reshape(4, -1).sum(1)}) > 1
    loss = make_text_loss(RewardConfig(**DECODER), NETWORK)

    @jax.jit
    def found(params: Any) -> Any:
        hparams = TextHParams(centring=0.1)
        return [gradient_of_batch(loss, params, texts, hparams, parts=n, axis=None) for n in (1, 4)]

    for x, y in zip(*map(jax.tree.leaves, found(PARAMS)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


# Reward models


def test_a_score_depends_on_its_own_text_only():
    members = [random_params(MADE, seed) for seed in (4, 5)]
    params = {
        "model": jax.tree.map(lambda *x: jnp.stack(x), *members),
        "mean": jnp.array([0.3, -0.2]),
        "std": jnp.array([0.5, 2.0]),
    }
    vocabulary = Vocabulary(Characters("abcdefg."), SIZE, SIZE - 1)
    model = RewardModel(MADE, vocabulary, params, "mean", "run")
    given = [item[0] for item in items_of(6, 1, seed=6)]
    assert len({len(x.all) for x in given}) == 3
    expected = [
        np.mean([(outputs(members[0], x)[1] - 0.3) / 0.5, (outputs(members[1], x)[1] + 0.2) / 2.0])
        for x in given
    ]
    assert np.ptp(expected) > 0.1

    def called(rows: list[Tokens], width: int, filler: int) -> np.ndarray:
        tokens = np.full((len(rows), width), filler)
        for row, x in zip(tokens, rows, strict=True):
            row[: len(x.all)] = x.all
        lengths = jnp.array([len(x.all) for x in rows])
        return np.asarray(jax.jit(model.__call__)(params, jnp.asarray(tokens), lengths))

    for x, y in zip(given[:3], expected, strict=False):
        assert called([x], len(x.all), 0) == pytest.approx([y], abs=1e-5)
    for width, filler in ((8, 0), (20, 5)):
        np.testing.assert_allclose(called(given, width, filler), expected, atol=1e-5)

    prompts = pad_left([x.prompt for x in given], 5)
    responses = np.full((len(given), 7), 3)
    for row, x in zip(responses, given, strict=True):
        row[: len(x.completion)] = x.completion
    count = len(given)
    sample = Sample(
        prompts,
        Responses(
            jnp.asarray(responses), jnp.array([len(x.completion) for x in given]),
            jnp.ones(count, bool), jnp.zeros((count, 7)),
        ),
        (),
    )  # fmt: skip
    np.testing.assert_allclose(
        jax.jit(scores_of, static_argnums=0)(Static(model), params, sample), expected, atol=1e-5
    )


class Static:
    """A reward model that can be a static argument."""

    def __init__(self, model: RewardModel):
        self.members, self.combined = model.members, model.combined


def test_calibration_by_hand():
    """Margins with the confidences 0.62, 0.64 (one wrong) and 0.91; the second bin is from 0.6 to
    0.65, the ninth from 0.9 to 0.95."""
    sure = np.array([0.62, 0.64, 0.91, 0.91])
    margins = np.log(sure / (1 - sure)) * [1, -1, 1, 1]
    predicted, observed, share = reliability(margins)
    np.testing.assert_allclose(predicted, [0.63, 0.91])
    np.testing.assert_allclose(observed, [0.5, 1.0])
    np.testing.assert_allclose(share, [0.5, 0.5])
    assert calibration_error(margins) == pytest.approx(0.5 * 0.13 + 0.5 * 0.09)
    assert calibration_error(np.full(3, 50.0)) == pytest.approx(0.0, abs=1e-9)


# Runs from the command line

SMALL = (
    "--num-layers 1 --width 16 --num-heads 2 --row-length 32 --batch-rows 4 --eval-episodes 8 "
    "--learning-rate 0.01"
).split()
UPDATE = 4 * 32
"""Tokens per update."""


def trained(kind: str, folder: Path, updates: int, *given: str, name: str = "run") -> Path:
    run_dir = folder / name
    budget = ["--total-timesteps", str(updates * UPDATE), "--run-dir", str(run_dir)]
    assert main(["rlhf", kind, *SMALL, *budget, *given]) == 0
    return run_dir


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def metrics_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of all runs."""
    found = tmp_path_factory.mktemp("texts")
    write_records(found / "demonstrations.jsonl", letters.demonstrations(60))
    write_records(found / "preferences.jsonl", letters.preferences(60))
    return found


@pytest.fixture(scope="module")
def sft(folder: Path) -> Path:
    return trained("sft", folder, 4, "--data", str(folder / "demonstrations.jsonl"), name="sft")


@pytest.fixture(scope="module")
def reward(folder: Path, sft: Path) -> Path:
    given = ["--data", str(folder / "preferences.jsonl"), "--init", str(sft), "--num-seeds", "2"]
    return trained("reward", folder, 6, *given, name="reward")


@pytest.fixture(scope="module")
def of_bytes(folder: Path) -> Path:
    given = ["--data", str(folder / "preferences.jsonl"), "--tokenizer", "bytes"]
    return trained("reward", folder, 1, *given, name="bytes")


def held_out_of(folder: Path, name: str) -> tuple[list[Any], list[Any]]:
    read = {"demonstrations": records.read_demonstrations, "preferences": records.read_preferences}
    return records.split(read[name](folder / f"{name}.jsonl"), 0.1)


ENCODE = Characters(letters.ALPHABET).encode


@lru_cache
def forward_of(run_dir: Path) -> Any:
    """`tokens [12] -> logits [12, V]` of the run's decoder."""
    start = start_of(str(run_dir))
    network, first = make_decoder(start.architecture), jnp.arange(12)[:, None] == 0

    def forward(tokens: jax.Array) -> jax.Array:
        return network.apply(start.params, (), observe(tokens[:, None], 1.0), first)[1][:, 0]

    return jax.jit(forward)


def log_probs_under(run_dir: Path, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the tokens of a completion, and whether each is the most likely one, by
    a forward pass of the run's decoder."""
    tokens = ENCODE(f"{prompt}{completion}.")
    logits = forward_of(run_dir)(jnp.array(tokens + [0] * (12 - len(tokens))))
    every = np.asarray(logits, np.float64)[len(prompt) - 1 : len(tokens) - 1]
    every = every - np.log(np.exp(every).sum(1, keepdims=True))
    said = np.array(tokens[len(prompt) :])
    return every[np.arange(len(said)), said], every.argmax(1) == said


def test_fine_tuning_from_the_command_line(sft: Path, folder: Path):
    summary, (train, held_out) = summary_of(sft), held_out_of(folder, "demonstrations")
    assert summary["held_out"] == len(held_out)
    found = [log_probs_under(sft, x.prompt, x.completion) for x in held_out]
    loss = -np.mean([log_prob.mean() for log_prob, _ in found])
    assert summary["held_out_loss"] == pytest.approx(loss, abs=1e-4)
    assert summary["exact"] == pytest.approx(np.mean([likely.all() for _, likely in found]))
    tokens = sum(len(ENCODE(f"{x.prompt}{x.completion}.")) for x in train)
    rows = round(tokens / 32 / (1 - summary["padding"]))
    assert summary["padding"] == pytest.approx(1 - tokens / 32 / rows)
    assert 0 <= summary["padding"] < 0.15
    losses = [float(row["loss"]) for row in metrics_of(sft)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_a_reward_model_from_the_command_line(reward: Path, folder: Path):
    summary, (_, held_out) = summary_of(reward), held_out_of(folder, "preferences")
    prompts, chosen, rejected = (
        [getattr(x, name) for x in held_out] for name in ("prompt", "chosen", "rejected")
    )
    margins = []
    for member, std in zip(members_of(reward), summary["score_std"], strict=True):
        gap = member.score(prompts, chosen) - member.score(prompts, rejected)
        margins.append(gap * std)
    assert summary["held_out"] == len(held_out)
    assert summary["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert summary["margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert summary["held_out_loss"] == pytest.approx(
        np.mean(softplus(-np.array(margins))), abs=1e-4
    )
    error = np.mean([calibration_error(x) for x in margins])
    assert summary["calibration_error"] == pytest.approx(error, abs=1e-4)
    chances = [x.columns["probability"] for x in held_out]
    assert summary["bayes_accuracy"] == pytest.approx(np.mean([max(x, 1 - x) for x in chances]))
    assert len(summary["score_mean"]) == len(summary["score_std"]) == 2
    assert summary["score_mean"][0] != summary["score_mean"][1]


def members_of(run_dir: Path) -> list[RewardModel]:
    """Each member of an ensemble alone."""
    model = load_reward(run_dir)
    count = len(model.params["mean"])
    params = [jax.tree.map(lambda x, i=i: x[i : i + 1], model.params) for i in range(count)]
    return [model._replace(params=x) for x in params]


def test_a_run_is_loaded_without_its_data(reward: Path, sft: Path, tmp_path: Path):
    """A reward model and a fine-tuned policy work after their data files are gone."""
    moved = {}
    for run_dir in (reward, sft):
        copy = moved[run_dir] = tmp_path / run_dir.name
        shutil.copytree(run_dir, copy)
        text = (copy / "config.toml").read_text()
        (copy / "config.toml").write_text(re.sub(r'data = ".*"', 'data = "gone.jsonl"', text))
    np.testing.assert_array_equal(
        load_reward(moved[reward]).score(["ab:"], ["cd"]),
        load_reward(reward).score(["ab:"], ["cd"]),
    )
    assert load_generator(moved[sft])(["ab:"])[0][0].text == load_generator(sft)(["ab:"])[0][0].text


def test_scores_are_normalised_and_combined(reward: Path, folder: Path):
    train, _ = held_out_of(folder, "preferences")
    prompts = [x.prompt for x in train] * 2
    texts = [x.chosen for x in train] + [x.rejected for x in train]
    each = np.array([member.score(prompts, texts) for member in members_of(reward)])
    np.testing.assert_allclose(each.mean(1), 0.0, atol=1e-3)
    np.testing.assert_allclose(each.std(1), 1.0, atol=1e-3)
    mean, low, careful = (
        load_reward(reward, combine).score(prompts[:9], texts[:9])
        for combine in ("mean", "min", "mean_minus_variance")
    )
    each = each[:, :9]
    assert np.ptp(each, axis=0).max() > 0.01
    np.testing.assert_allclose(mean, each.mean(0), atol=1e-5)
    np.testing.assert_allclose(low, each.min(0), atol=1e-5)
    np.testing.assert_allclose(careful, each.mean(0) - each.var(0), atol=1e-5)
    assert (low <= mean).all()


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig, DPOConfig])
def test_a_run_starts_from_the_decoder_of_another(config: Any, sft: Path, folder: Path):
    name = "demonstrations" if config is SFTConfig else "preferences"
    task = make_text_task(config(data=str(folder / f"{name}.jsonl"), init=str(sft), row_length=32))
    state = jax.jit(ppo.make_learner(task).init)(jax.random.key(3), TextHParams(), task.data)
    params, start = state.learner.params, start_of(str(sft)).params
    assert params["actor"].keys() == start["actor"].keys()
    for x, y in zip(*(jax.tree.leaves(p["actor"]) for p in (params, start)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_direct_preference_optimisation_from_the_command_line(sft: Path, folder: Path):
    data = str(folder / "preferences.jsonl")
    run_dir = trained("dpo", folder, 12, "--data", data, "--init", str(sft), name="dpo")
    summary, (_, held_out) = summary_of(run_dir), held_out_of(folder, "preferences")
    gaps = []
    for x in held_out:
        new, old = (
            log_probs_under(d, x.prompt, x.chosen)[0].sum()
            - log_probs_under(d, x.prompt, x.rejected)[0].sum()
            for d in (run_dir, sft)
        )
        gaps.append(new - old)
    assert np.ptp(gaps) > 1e-3
    assert summary["margin"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert summary["accuracy"] == pytest.approx(np.mean(np.array(gaps) > 0))
    first, *_ = rows = metrics_of(run_dir)
    assert float(first["loss"]) == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference
    assert float(first["margin"]) == pytest.approx(0.0, abs=1e-5)
    assert np.mean([float(row["loss"]) for row in rows[-4:]]) < np.log(2)


@pytest.mark.slow
def test_a_reward_run_that_was_stopped_resumes_bit_for_bit(
    sft: Path, folder: Path, tmp_path: Path, fused: Any
):
    config = RewardConfig(
        data=str(folder / "preferences.jsonl"), init=str(sft), row_length=32, batch_rows=4,
        total_timesteps=6 * UPDATE, accumulation=2,
    )  # fmt: skip
    options: dict[str, Any] = {"eval_episodes": 8, "progress": False, "devices": 1, "num_seeds": 2}
    hparams = TextHParams(learning_rate=1e-2, centring=0.01)
    task = make_text_task(config)
    whole = ppo.run(task, hparams, run_dir=tmp_path / "a", **options)
    stopped = ppo.run(task, hparams, run_dir=tmp_path / "b", callback=lambda *_: True, **options)
    assert stopped.summary["env_steps"] < whole.summary["env_steps"]
    resumed = ppo.resume(tmp_path / "b", task, progress=False)
    for x, y in zip(*(jax.tree.leaves(r.states.learner) for r in (whole, resumed)), strict=True):
        assert bool(jnp.all(x == y))
    np.testing.assert_array_equal(whole.returns, resumed.returns)
    for name in ("score_mean", "score_std", "accuracy", "calibration_error"):
        assert whole.summary[name] == resumed.summary[name]
    assert load_reward(tmp_path / "b").score(["ab:"], ["cd"]) == pytest.approx(
        load_reward(tmp_path / "a").score(["ab:"], ["cd"]), abs=0
    )


# Policies that learn from a reward model

POLICY = (
    "letters --objective rloo --response-length 7 --num-prompts 4 --group-size 4 "
    "--num-minibatches 1 --eval-episodes 8 --num-layers 1 --width 16 --num-heads 2 "
    "--learning-rate 0.01"
).split()


@pytest.mark.slow
def test_a_policy_learns_from_a_reward_model(sft: Path, reward: Path, tmp_path: Path):
    run_dir = tmp_path / "policy"
    given = [
        *POLICY, "--reward", f"2.0*{reward}", "--reward-combine", "min", "--init", str(sft),
        "--total-timesteps", str(2 * 4 * 4 * 7), "--run-dir", str(run_dir),
    ]  # fmt: skip
    assert main(["rlhf", *given]) == 0
    first, second = metrics_of(run_dir)
    assert float(first["reference_kl"]) == pytest.approx(0.0, abs=1e-5)
    assert abs(float(second["reference_kl"])) > 1e-5

    config: Any = ppo.load(run_dir).config
    task: Any = make_rlhf_task(config)
    for x, y in zip(
        *(jax.tree.leaves(p["actor"]) for p in (task.data["reference"], start_of(str(sft)).params)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    parts = task.samples.parts if hasattr(task.samples, "parts") else task.evaluate.args[0]
    hparams, model = RLHFHParams(), load_reward(reward, "min")
    state = jax.jit(ppo.make_learner(task).init)(jax.random.key(5), hparams, task.data)
    actor = TokenActor(*parts)
    sampled = jax.jit(actor.sample)(state.learner.params, state.actors, hparams, task.data)
    _, sample, score = sampled
    rollout = jax.jit(actor.rollout)(
        state.learner.params, task.data["reference"], sample._replace(shared=()), score, hparams
    )
    prompts = [letters.ALPHABET[int(a)] + letters.ALPHABET[int(b)] + ":"
               for a, b, _ in np.asarray(sample.prompts.tokens)]  # fmt: skip
    ends = np.asarray(sample.responses.lengths)
    tokens = np.zeros((16, 12), np.int32)
    for row, end in enumerate(ends):
        tokens[row, :3] = ENCODE(prompts[row])
        tokens[row, 3 : 3 + end] = np.asarray(sample.responses.tokens)[row, :end]
    expected = 2 * jax.jit(model.__call__)(model.params, jnp.asarray(tokens), jnp.array(3 + ends))
    np.testing.assert_allclose(score, expected, atol=1e-4)
    for row in range(16):
        response = np.asarray(sample.responses.tokens)[row, : ends[row]].tolist()
        text = "".join(letters.ALPHABET[x] for x in response)
        log_probs, _ = log_probs_under(sft, prompts[row], text)
        np.testing.assert_allclose(
            rollout.extras.reference[2 : 2 + len(response), row], log_probs[:-1], atol=1e-4
        )
    assert np.ptp(np.asarray(score)) > 0.1


@pytest.mark.slow
def test_evaluations_of_a_policy_are_gold_scores(sft: Path, reward: Path):
    task: Any = make_rlhf_task(
        RLHFConfig("rloo", "letters", response_length=7, init=str(sft), reward=(str(reward),))
    )
    _, problem, network = task.evaluate.args[0]
    state = jax.jit(ppo.make_learner(task).init)(jax.random.key(5), RLHFHParams(), task.data)
    key = jax.random.key(7)
    found = task.evaluate(state, key, 6, data=task.data)
    prompts = task.data["held_out"].take(jnp.arange(6))
    responses = generate(
        network, state.learner.params, jax.random.split(key, 6), prompts, max_tokens=7,
        stop_token=problem.stop_token,
    )  # fmt: skip
    for row in range(6):
        prompt, response = (
            problem.text.decode(np.asarray(x.tokens)[row]) for x in (prompts, responses)
        )
        assert float(found[row]) == pytest.approx(letters.gold(prompt, response), abs=1e-4)


# Errors


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("sft none.jsonl", r"none.jsonl: No such file or directory; check the path"),
        ("sft letters --tokenizer latters", r"no such tokenizer; did you mean letters\?"),
        ("sft letters --tokenizer none.json", r"none.json"),
        ("sft {demonstrations} --row-length 8", r"has 10 tokens, but .* context is 8; use a"),
        ("reward {preferences} --row-length 12", r"row_length = 12: .* use at least [12]\d"),
        ("sft {preferences}", r"line 1: has no completion"),
        ("sft {demonstrations} --tokenizer sort", r"is not in the alphabet"),
        ("sft {demonstrations} --init {folder}/none", r"none"),
        ("sft {demonstrations} --init {folder}", r"."),
        ("sft {demonstrations} --init {of_bytes}", r"was trained with another tokenizer"),
        ("sft letters --batch-rows 5 --accumulation 2", r"not divisible by accumulation = 2"),
        ("dpo letters --centring 0.1", r"centring"),
        ("reward letters --kl-coef 0.3", r"kl.coef"),
        ("sft letters --gamma 0.5", r"gamma"),
        ("letters --reward {sft}", r"is not a reward model; train one with"),
        ("letters --reward {folder}/none", r"reward = \S*none: there is no such directory"),
        ("letters --init {folder}/none", r"none"),
        ("letters --init {sft} --mlp-width 3", r"mlp_width = 3: has no effect, since the decoder"),
        ("sft {demonstrations} --init {sft} --mlp-width 3", r"mlp_width = 3: has no effect"),
        ("letters --reward {of_bytes}", r"was trained with another tokenizer than 'letters'"),
        ("letters --response-length 30 --reward {reward}", r"row_length = 33 or more"),
        ("letters --response-length 30 --init {sft}", r"up to 33; use shorter responses"),
        ("letters --reward x*{reward}", r"must be RUN_DIR, package\.module:function, or one"),
        ("letters --reward inf*{reward}", r"must be RUN_DIR, package\.module:function, or one"),
        ("letters --reward-combine min", r"has no effect without reward"),
        ("letters --critic-init reward", r"needs reward, the directory of a reward model"),
        ("letters --objective rloo --critic-init reference", r"without a separate critic"),
        ("letters --critic-init reward --width 24 --reward {reward}", r"has another shape"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_message(
    given: str, words: str, folder: Path, sft: Path, reward: Path, of_bytes: Path,
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    files = {x: folder / f"{x}.jsonl" for x in ("demonstrations", "preferences")}
    made = given.format(folder=folder, sft=sft, reward=reward, of_bytes=of_bytes, **files)
    capsys.readouterr()
    assert main(["rlhf", *made.split(), "--total-timesteps", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    assert not any(tmp_path.rglob("config.toml"))


PAIR = '{"prompt": "ab:", "chosen": "cd", "rejected": "e"}'
BAD_PAIRS = {
    "an empty text": (
        [PAIR, PAIR.replace("cd", "")], "line 2: chosen is empty: needs at least one character",
    ),
    "equal texts": ([PAIR, "", PAIR.replace("cd", "e")], "line 3: chosen and rejected are equal"),
    "a missing key": ([PAIR, '{"prompt": "ab:", "chosen": "cd"}'], "line 2: has no rejected; add"),
    "a list": ([f"[{PAIR}]"], "line 1: is a list: must be a JSON object; write one JSON object"),
    "Latin-1": ([PAIR, PAIR.replace("cd", "\xe9")], "line 2: is not UTF-8 text (byte 30 of the"),
    "another alphabet": (
        [PAIR, "", PAIR.replace("cd", "cx")],
        "line 3: chosen 'cx': character 'x' (number 2) is not in the alphabet",
    ),
    "a wrong probability": (
        [PAIR.replace("}", ', "probability": 1.7}')], "line 1: probability = 1.7: must be a number",
    ),
    "one prompt": ([PAIR, PAIR], ": has 1 distinct prompt, but needs at least 2"),
    "nothing": (["", " "], ": has no pair; write one JSON object per line"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["reward", "dpo"])
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_preferences_give_one_message(kind: str, case: str, tmp_path: Path, capsys: Any):
    lines, words = BAD_PAIRS[case]
    (tmp_path / "pairs.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    run_dir = tmp_path / "run"
    assert main(["rlhf", kind, str(tmp_path / "pairs.jsonl"), "--run-dir", str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert "pairs.jsonl" in error
    assert words in error
    assert len(error.splitlines()) == 1, error
    assert not run_dir.exists()


def test_lines_that_cannot_be_encoded_are_bad_lines(tmp_path: Path):
    """They are skipped on request, and the others are encoded."""
    good = [PAIR, PAIR.replace("ab", "cd"), PAIR.replace("ab", "ef")]
    bad = [PAIR.replace("ab", "xy"), PAIR.replace('"e"', '"e!"')]
    (tmp_path / "pairs.jsonl").write_text("\n".join([good[0], bad[0], good[1], bad[1], good[2]]))
    config = RewardConfig(data=str(tmp_path / "pairs.jsonl"), bad_lines="skip")
    words = "skipped 2 of 5 lines; first, line 2: prompt 'xy:': character 'x'"
    with pytest.warns(RunWarning, match=re.escape(words)):
        data = make_text_task(config).data
    assert sum(float(data[name].rows.real.sum()) for name in ("train", "held_out")) == 3
    with pytest.raises(ppo.ConfigError, match=r"pairs.jsonl line 2: prompt 'xy:'"):
        make_text_task(RewardConfig(data=config.data))


def test_hyperparameters_without_effect_are_refused():
    for config, wrong in (
        (SFTConfig(), {"gamma": 0.5}),
        (SFTConfig(), {"kl_coef": 0.3}),
        (RewardConfig(), {"kl_coef": 0.3}),
        (DPOConfig(), {"centring": 0.1}),
    ):
        (name,) = wrong
        with pytest.raises(ppo.ConfigError, match=f"{name} = .*: has no effect on"):
            config.check_hparams(TextHParams(**wrong))
    RewardConfig().check_hparams(TextHParams(centring=0.1))
    DPOConfig().check_hparams(TextHParams(kl_coef=0.3))
    with pytest.raises(ppo.ConfigError, match=r"must be a rlhf.TextHParams"):
        SFTConfig().check_hparams(RLHFHParams())


def test_a_run_from_python_refuses_hyperparameters_without_effect(folder: Path):
    config = SFTConfig(data=str(folder / "demonstrations.jsonl"), **DECODER)
    with pytest.raises(ppo.ConfigError, match=r"gamma = 0.5: has no effect on supervised"):
        ppo.run(config, TextHParams(gamma=0.5), progress=False)


# Optima


def of_labels(scores: dict[str, float], count: int, prompts: list[str]) -> list[Preference]:
    """Every ordered pair, as often as labellers with these scores prefer the first."""
    found = []
    for prompt in prompts:
        for one, other in itertools.permutations(scores, 2):
            chance = 1 / (1 + np.exp(scores[other] - scores[one]))
            found += [Preference(prompt, one, other)] * round(count * chance)
    return found


@pytest.mark.slow
def test_direct_preference_optimisation_reaches_its_optimum(tmp_path: Path):
    """The log ratio of two completions is the difference of their scores divided by beta (Rafailov
    et al. 2023, eq. 5)."""
    scores, beta = {"abc": 0.0, "ddd": 1.0, "ha": 2.0}, 0.5
    write_records(tmp_path / "pairs.jsonl", of_labels(scores, 100, ["ab:", "ef:"]))
    config = DPOConfig(
        data=str(tmp_path / "pairs.jsonl"), held_out=0.5, num_layers=1, width=32,
        row_length=128, total_timesteps=300 * 16 * 128,
    )  # fmt: skip
    ppo.run(
        config, TextHParams(kl_coef=beta, weight_decay=0.0), run_dir=tmp_path / "run",
        progress=False, devices=1,
    )  # fmt: skip
    (prompt,) = {x.prompt for x in records.split(records.read_preferences(config.data), 0.5)[0]}
    start = start_of(str(tmp_path / "run"))
    network = make_decoder(start.architecture)
    items = [[Tokens(tuple(ENCODE(prompt)), (*ENCODE(x), 9))] for x in scores]
    rows = alone(items)
    log_ratio = np.subtract(*(
        np.asarray(completion_log_probs(network, params, rows))[:, 0, 0]
        for params in (start.params, network.init(jax.random.key(0)))
    ))  # fmt: skip
    np.testing.assert_allclose(np.diff(log_ratio), np.diff(list(scores.values())) / beta, rtol=0.1)


def check_recovers(learned: np.ndarray, hidden: np.ndarray) -> None:
    """Scores of held-out pairs `[H, 2]` tell the chosen text as often as the hidden ones, with the
    right probabilities, and are correlated with them."""
    gap, true = (x[:, 0] - x[:, 1] for x in (learned, hidden))
    accuracy, bayes = np.mean(gap > 0), np.mean(1 / (1 + np.exp(-np.abs(true))))
    correlation = np.corrcoef(learned.reshape(-1), hidden.reshape(-1))[0, 1]
    print(accuracy, bayes, "correlation", correlation, "calibration", calibration_error(gap))
    assert accuracy == pytest.approx(bayes, abs=0.02)
    assert calibration_error(gap) < 0.03
    assert correlation > 0.95


def test_a_reward_model_recovers_a_score_of_letters(tmp_path: Path):
    """The hidden score is a sum over letters; half of the prompts are held out."""
    rng = np.random.default_rng(1)
    values = dict(zip(letters.LETTERS, rng.normal(size=len(letters.LETTERS)), strict=True))

    def score(text: str) -> float:
        return sum(values[x] for x in text)

    pairs = []
    for x in letters.preferences(8000):
        one, other = sorted((x.chosen, x.rejected))
        right = rng.random() < 1 / (1 + np.exp(score(other) - score(one)))
        pairs.append(Preference(x.prompt, *((one, other) if right else (other, one))))
    write_records(tmp_path / "pairs.jsonl", pairs)
    config = RewardConfig(
        data=str(tmp_path / "pairs.jsonl"), **DECODER, held_out=0.5, row_length=20, batch_rows=64,
        total_timesteps=400 * 64 * 20,
    )  # fmt: skip
    task: Any = make_text_task(config)
    learner, hparams = ppo.make_learner(task), TextHParams(learning_rate=1e-2, centring=0.003)

    @jax.jit
    def scored(key: jax.Array, data: Any) -> jax.Array:
        state = learner.init(key, hparams, data)
        state, _ = ppo.train_chunk(learner, state, hparams, config.num_updates, data)
        return scores(task.results.parts.network, state.learner.params, data["held_out"].rows)

    held_out = records.split(pairs, config.held_out)[1]
    hidden = np.array([[score(x.chosen), score(x.rejected)] for x in held_out])
    check_recovers(np.asarray(scored(jax.random.key(0), task.data))[:, 0], hidden)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["true", "shuffled"])
def test_the_shipped_reward_model_recovers_the_gold_score(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With shuffled labels, it is no better than chance."""
    options: Any = {"xla_backend_optimization_level": 3}
    compiled = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled(lowered, options))
    pairs, rng = letters.preferences(), np.random.default_rng(0)
    if labels == "shuffled":
        swap = rng.random(len(pairs)) < 0.5
        pairs = [
            Preference(x.prompt, x.rejected, x.chosen) if flip else x
            for x, flip in zip(pairs, swap, strict=True)
        ]
    write_records(tmp_path / "pairs.jsonl", pairs)
    shipped: Any = load_settings("configs/rlhf/reward.toml")
    config = dataclasses.replace(shipped.config, data=str(tmp_path / "pairs.jsonl"))
    run_dir = tmp_path / "run"
    result = ppo.run(config, shipped.hparams, run_dir=run_dir, progress=False, devices=1)
    print(result.summary)
    if labels == "shuffled":
        assert result.summary["accuracy"] == pytest.approx(0.5, abs=0.03)
        return
    held_out = records.split(pairs, config.held_out)[1]
    prompts = [x.prompt for x in held_out]
    texts = [x.chosen for x in held_out], [x.rejected for x in held_out]
    learned = np.stack([load_reward(run_dir).score(prompts, x) for x in texts], axis=1)
    hidden = [list(map(letters.gold, prompts, x)) for x in texts]
    check_recovers(learned * result.summary["score_std"], np.transpose(hidden))
    assert result.summary["bayes_accuracy"] == pytest.approx(0.8, abs=0.01)
