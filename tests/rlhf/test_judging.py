"""Evaluations of policies, compared with enumerations of subsets and of all responses."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host import checkpoint
from purejaxppo.host.configfile import RunSettings, Settings, dump_settings
from purejaxppo.rlhf import (
    DPOConfig,
    PolicyEvaluation,
    Prompt,
    RewardConfig,
    RLHFConfig,
    RLHFHParams,
    SFTConfig,
    TextHParams,
    best_of_n,
    evaluate_policy,
    letters,
    load_reward,
    make_decoder,
    pass_at_k,
    write_records,
)
from purejaxppo.rlhf.estimates import kl_bound, mean_over_prompts, of_means, wins
from purejaxppo.rlhf.generation import observe
from purejaxppo.rlhf.judging import _contest, at_equal_kl
from purejaxppo.rlhf.prepare import prepared
from purejaxppo.rlhf.problem import Problem, Sample, texts_of
from purejaxppo.rlhf.problems import random_reference
from purejaxppo.rlhf.records import split
from purejaxppo.rlhf.sampler import Sampler, make_judge, prompts_of
from purejaxppo.rlhf.starts import start_of, task_to_load
from purejaxppo.rlhf.text import load_policy

# Estimators, against enumerations


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_an_exact_response(n: int):
    for k in range(1, n + 1):
        counts = np.arange(n + 1)
        expected = []
        for c in counts:
            exact = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(exact, k))
            expected.append(sum(any(x) for x in subsets) / len(subsets))
        np.testing.assert_allclose(pass_at_k(n, counts, k), expected, atol=1e-12)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 0, 5000) == 0.0
    assert pass_at_k(10_000, 5001, 5000) == 1.0


def test_impossible_pass_at_k():
    with pytest.raises(ppo.ConfigError, match="k = 5: must be at most n = 4"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ppo.ConfigError, match="c = 5: must be from 0 to n = 4"):
        pass_at_k(4, 5, 1)


def best_of_subsets(scores: np.ndarray, judged: np.ndarray, n: int) -> float:
    """The mean over all subsets of the score of the best; ties are broken at random."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        rows = np.array(subset)
        best = rows[scores[rows] == scores[rows].max()]
        found.append(judged[best].mean())
    return float(np.mean(found))


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_subsets(ties: bool):
    rng = np.random.default_rng(0)
    shape = (2, 3, 7)
    scores = rng.integers(3, size=shape).astype(float) if ties else rng.normal(size=shape)
    judged = rng.normal(size=shape)
    for n in range(1, 8):
        for values, given in ((scores, None), (judged, judged)):
            expected = [
                best_of_subsets(a, b, n)
                for a, b in zip(scores.reshape(-1, 7), values.reshape(-1, 7), strict=True)
            ]
            found = best_of_n(scores, n, given)
            assert found.shape == (2, 3)
            np.testing.assert_allclose(found.ravel(), expected, atol=1e-12)
    with pytest.raises(ppo.ConfigError, match="n = 8: must be at most 7"):
        best_of_n(scores, 8)


def test_best_of_n_is_unbiased():
    """The mean over all samples of 4 responses is the expected best of 3 responses."""
    values, chances = np.array([0.0, 1.0, 5.0]), np.array([0.5, 0.3, 0.2])
    rows = np.array(list(itertools.product(range(3), repeat=4)))
    mean = np.sum(np.prod(chances[rows], axis=1) * best_of_n(values[rows], 3))
    below = np.cumsum(chances) ** 3
    assert mean == pytest.approx(values @ np.diff(below, prepend=0.0), abs=1e-12)


def test_the_bound_on_the_divergence_of_best_of_n():
    """It is the divergence if all scores differ, and above it with few responses."""
    place = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 10):
        density = n * place ** (n - 1)
        assert kl_bound(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-3)
        chances = np.array([0.6, 0.3, 0.1])
        best = np.diff(np.cumsum(chances) ** n, prepend=0.0)
        assert np.sum(best * np.log(best / chances)) <= kl_bound(n) + 1e-12


def test_win_rates_equal_a_loop_over_pairs():
    rng = np.random.default_rng(1)
    first, second = rng.integers(4, size=(3, 5)) / 4, rng.integers(4, size=(3, 6)) / 4
    first = first + 1e-8  # rounding does not break ties
    expected = [
        np.mean([1.0 if a - b > 0.1 else 0.5 * (abs(a - b) < 0.1) for a in x for b in y])
        for x, y in zip(first, second, strict=True)
    ]
    found, back = wins(first, second), wins(second, first)
    np.testing.assert_allclose(found.win_rate, expected)
    np.testing.assert_allclose(found.win_rate + back.win_rate, 1.0)
    tied = [np.mean(np.abs(x[:, None] - y) < 0.1) for x, y in zip(first, second, strict=True)]
    np.testing.assert_allclose(found.ties, tied)
    large = wins(np.array([[1e6]]), np.array([[1e6 + 0.5]]))
    assert large.win_rate == 0.5
    assert wins(np.array([[0.0]]), np.array([[1e-4]])).win_rate == 0.0


# Intervals


def test_the_interval_covers_the_mean_over_prompts():
    """With 8 prompts that differ in difficulty and 16 responses to each. An interval that counts
    responses as independent is too narrow."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(1000, 8, 1)) + rng.normal(size=(1000, 8, 16))
    covered = [x.low < 0 < x.high for x in map(mean_over_prompts, data.mean(axis=2))]
    flat = data.reshape(1000, -1)
    half = 1.96 * flat.std(axis=1) / np.sqrt(flat.shape[1])
    assert 0.93 < np.mean(covered) < 0.97
    assert np.mean(np.abs(flat.mean(axis=1)) < half) < 0.7


def test_intervals_by_hand():
    values = np.array([1.0, 2.0, 6.0])
    half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    for found in (mean_over_prompts(values), of_means(lambda x: float(x[0]), values[:, None])):
        np.testing.assert_allclose(found, [3.0, 3.0 - half, 3.0 + half])
    clipped = mean_over_prompts([0.0, 1.0], share=True)
    np.testing.assert_allclose(clipped, [0.5, 0.0, 1.0])
    assert np.isnan([*mean_over_prompts([1.0])[1:], *of_means(sum, values[None])[1:]]).all()


def test_the_interval_of_a_ratio_is_that_of_a_linear_expansion():
    rng = np.random.default_rng(0)
    values = rng.normal([2.0, 4.0], 0.2, size=(200, 2))
    found = of_means(lambda x: x[0] / x[1], values)
    a, b = values.mean(axis=0)
    linear = (values[:, 0] - a / b * values[:, 1]) / b
    half = stats.t.ppf(0.975, 199) * linear.std(ddof=1) / np.sqrt(200)
    assert found.mean == pytest.approx(a / b)
    assert found.high - found.mean == pytest.approx(half, rel=0.02)


def test_best_of_n_at_equal_divergence():
    curve = np.array([[0.0, 1.0, 3.0], [0.0, 3.0, 5.0]])  # means 0, 2, 4
    middle = (kl_bound(2) + kl_bound(3)) / 2
    at, lead = at_equal_kl(np.array([5.0, 6.0]), np.array([middle - 0.1, middle + 0.1]), curve)
    assert at is not None
    assert lead is not None
    assert at.mean == pytest.approx(3.0)
    assert lead.mean == pytest.approx(2.5)
    assert at.low < 3.0 < at.high
    assert at_equal_kl(np.ones(2), np.full(2, kl_bound(3) + 0.01), curve) == (None, None)
    below, _ = at_equal_kl(np.ones(2), np.array([-0.02, 0.01]), curve)
    assert below is not None
    assert below.mean == 0.0


# Runs with random weights, saved without training

DECODER: dict[str, Any] = {"num_layers": 1, "width": 16, "num_heads": 2}


def saved(run_dir: Path, config: Any, num_seeds: int = 1) -> Path:
    """Write a run whose policies are the reference plus noise."""
    hparams = RLHFHParams() if isinstance(config, RLHFConfig) else TextHParams()
    settings = Settings(config, hparams, RunSettings(num_seeds=num_seeds))
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(dump_settings(settings))
    task = task_to_load(str(run_dir), settings)
    number = sum(run_dir.name.encode())
    keys = jax.random.split(jax.random.key(number), num_seeds)
    init = jax.vmap(task.learner(None).init, (0, None, None))
    states = jax.jit(init)(keys, hparams, task.data)
    rng = np.random.default_rng(number)
    learner = states.learner._replace(
        params=jax.tree.map(
            lambda x: x + rng.normal(scale=0.2, size=x.shape).astype(np.float32),
            jax.device_get(states.learner.params),
        )
    )
    checkpoint.save(run_dir, checkpoint.Position(1), settings, states._replace(learner=learner))
    return run_dir


def policy_config(task: str, **given: Any) -> RLHFConfig:
    return RLHFConfig("rloo", task, num_prompts=2, group_size=2, **DECODER, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judging")


@pytest.fixture(scope="module")
def sft(folder: Path) -> Path:
    return saved(folder / "sft", SFTConfig(row_length=32, **DECODER))


@pytest.fixture(scope="module")
def dpo(folder: Path, sft: Path) -> Path:
    return saved(folder / "dpo", DPOConfig(init=str(sft)))


@pytest.fixture(scope="module")
def reward(folder: Path) -> Path:
    run_dir = saved(folder / "reward", RewardConfig(row_length=32, **DECODER), 2)
    moments = {"score_mean": [0.1, -0.1], "score_std": [0.2, 0.3], "failed_seeds": []}
    (run_dir / "summary.json").write_text(json.dumps(moments))
    return run_dir


@pytest.fixture(scope="module")
def aligned(folder: Path, sft: Path, reward: Path) -> Path:
    config = policy_config(
        "letters", response_length=7, init=str(sft), reward=(f"2.0*{reward}",),
        reward_combine="min",
    )  # fmt: skip
    return saved(folder / "aligned", config)


# Runs on a task whose responses can be enumerated

MODULE = """
from purejaxppo.rlhf import checkable

PROMPTS = [f"{x:0{n}b}=" for n in range(1, 5) for x in range(2**n)]
problem = checkable("first", PROMPTS, lambda text: text[0], "01=")
"""
LENGTH, COUNT = 3, 2000


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module with a task: the answer is the first digit of the prompt."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "first_digit.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import first_digit  # pyright: ignore[reportMissingImports]

    yield first_digit
    sys.path.remove(str(folder))
    del sys.modules["first_digit"]


@pytest.fixture(scope="module")
def run(folder: Path, module: Any) -> Path:
    """A run with two seeds."""
    return saved(folder / "run", policy_config("first_digit:problem", response_length=LENGTH), 2)


RESPONSES = [
    (*begun, last)
    for length in range(LENGTH)
    for begun in itertools.product(range(3), repeat=length)
    for last in (range(4) if length == LENGTH - 1 else [3])
]
"""All responses in tokens: 0, 1, = and the stop token."""


@lru_cache
def decoder_of(run_dir: Path, seed: int | None) -> Any:
    """The network and the parameters of a seed, or of the reference, and the context."""
    start = start_of(str(run_dir), seed or 0)
    params = random_reference(start.architecture) if seed is None else start.params
    return jax.jit(make_decoder(start.architecture).apply), params, start.architecture.context


def chances_of(run_dir: Path, seed: int | None, prompt: str, temperature: float) -> np.ndarray:
    """Probabilities of all responses under the policy of a seed, or under the reference."""
    apply, params, context = decoder_of(run_dir, seed)
    rows = np.zeros((len(RESPONSES), context), int)
    for row, response in zip(rows, RESPONSES, strict=True):
        given = [*map("01=.".index, prompt), *response]
        row[: len(given)] = given
    first = jnp.arange(context)[:, None] == jnp.zeros(len(rows), int)
    logits = apply(params, (), observe(jnp.array(rows.T), 1.0), first)[1]
    logits = np.asarray(logits, np.float64) / temperature
    each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp([
        sum(each[len(prompt) - 1 + t, row, token] for t, token in enumerate(response))
        for row, response in enumerate(RESPONSES)
    ])  # fmt: skip


def scores_of(prompt: str) -> np.ndarray:
    """The share of right tokens; the answer is the first digit and the stop token."""
    answer = (int(prompt[0]), 3)
    return np.array([
        sum(a == b for a, b in zip(answer, x, strict=False)) / 2 for x in RESPONSES
    ])  # fmt: skip


def best_of(chances: np.ndarray, scores: np.ndarray, n: int) -> float:
    """The expected highest score of n responses."""
    values = np.unique(scores)
    below = np.array([chances[scores <= x].sum() for x in values]) ** n
    return float(values @ np.diff(below, prepend=0.0))


def held_out_of(problem: Problem) -> list[str]:
    assert problem.held_out is not None
    tokens, lengths = (np.asarray(x) for x in problem.held_out)
    return [problem.text.decode(t[-n:]) for t, n in zip(tokens, lengths, strict=True)]


def exact_values(
    policy: np.ndarray, reference: np.ndarray, opponent: np.ndarray, scores: np.ndarray
) -> dict[str, tuple[float, float]]:
    """The numbers of one prompt, and upper bounds on the variances of their estimates times the
    number of responses. Estimates from subsets of k have at most k^2 times the variance."""
    log_ratio = np.log(policy / reference)
    above = np.sign(scores[:, None] - scores) / 2 + 0.5
    exact = policy[scores == 1].sum()

    def mean(chances: np.ndarray, values: np.ndarray) -> tuple[float, float]:
        center = float(chances @ values)
        return center, float(chances @ (values - center) ** 2)

    win_rate, of_policy = mean(policy, above @ opponent)
    _, of_opponent = mean(opponent, policy @ above)
    return {
        "score": mean(policy, scores),
        "opponent": mean(opponent, scores),
        "kl": mean(policy, log_ratio),
        "win_rate": (win_rate, of_policy + of_opponent),
        **{f"pass {k}": (1 - (1 - exact) ** k, k**2 * exact * (1 - exact)) for k in (1, 2, 4)},
        **{f"best {n}": (best_of(reference, scores, n), n**2 / 4) for n in (1, 2, 16)},
    }


def estimates_of(found: PolicyEvaluation) -> dict[str, Any]:
    assert found.opponent is not None
    assert found.policy.exact == pytest.approx(found.policy.pass_at_k[1])
    return {
        "score": found.policy.score, "opponent": found.opponent.score, "kl": found.kl,
        "win_rate": found.win_rate,
        **{f"pass {k}": x for k, x in found.policy.pass_at_k.items()},
        **{f"best {x.n}": x.score for x in found.best_of},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("against", "temperature"), [("reference", 1.0), ("reference", 2.0), ("other", 1.0)]
)
def test_an_evaluation_agrees_with_enumeration(
    against: str, temperature: float, run: Path, module: Any
):
    """Estimates lie within 4 standard errors."""
    found = evaluate_policy(
        run, run if against == "other" else None, seed=1, num_responses=COUNT, k=[1, 2, 4],
        best_of=[1, 2, 16], temperature=temperature,
    )  # fmt: skip
    prompts = held_out_of(module.problem)
    assert (found.num_prompts, found.num_responses) == (len(prompts), COUNT)
    assert found.score_name == found.selected_by == "task first"
    expected, curve, ties = [], [], []
    for prompt in prompts:
        scores = scores_of(prompt)
        policy, reference, seed_0 = (chances_of(run, x, prompt, temperature) for x in (1, None, 0))
        assert policy.sum() == pytest.approx(1.0, abs=1e-5)
        opponent = seed_0 if against == "other" else reference
        expected.append(exact_values(policy, reference, opponent, scores))
        curve.append([best_of(reference, scores, n) for n in range(1, 17)])
        ties.append(policy @ (scores[:, None] == scores) @ opponent)
    for name, estimate in estimates_of(found).items():
        values, variances = zip(*(x[name] for x in expected), strict=True)
        error = np.sqrt(np.mean(variances) / COUNT)  # of one prompt
        own = error / np.sqrt(len(prompts))
        assert estimate.mean == pytest.approx(np.mean(values), abs=4 * own), name
        between = float(np.std(values, ddof=1))
        spread = (estimate.high - estimate.mean) / stats.t.ppf(0.975, len(prompts) - 1)
        if estimate.low > 0 and estimate.high < 1:  # not clipped
            assert spread * np.sqrt(len(prompts)) == pytest.approx(between, abs=3 * error), name
    assert found.ties == pytest.approx(np.mean(ties), abs=4 * 0.5 / np.sqrt(len(prompts) * COUNT))
    kl, score = (float(np.mean([x[name][0] for x in expected])) for name in ("kl", "score"))
    assert 0.1 < kl < kl_bound(16)
    assert found.best_of_at_kl is not None
    assert found.lead_at_kl is not None
    at_kl = float(np.interp(kl, kl_bound(np.arange(1, 17)), np.mean(curve, axis=0)))
    assert found.best_of_at_kl.mean == pytest.approx(at_kl, abs=0.02)
    assert found.lead_at_kl.mean == pytest.approx(score - at_kl, abs=0.03)


@pytest.mark.slow
def test_batches_change_nothing(run: Path, monkeypatch: pytest.MonkeyPatch):
    whole = evaluate_policy(run, num_responses=4, best_of=[1, 10])
    monkeypatch.setattr("purejaxppo.rlhf.sampler._MAX_ROWS", 7)
    parts = evaluate_policy(run, num_responses=4, best_of=[1, 10])
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert x == y if isinstance(x, str) else x == pytest.approx(y, abs=1e-5, nan_ok=True)


def test_evaluations_from_the_command_line(run: Path, tmp_path: Path, capsys: Any):
    given = ["rlhf", "evaluate", str(run), "--num-responses", "4", "--best-of", "1,4"]
    capsys.readouterr()
    assert main([*given, "--k", "2", "4"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines()[1:]), shown
    assert re.search(r"pass@4 +\d+\.\d% \[\d", shown)
    assert re.search(r"50% is (in|out)side the interval", shown)
    prompts = ["01=", "1=", "0110=", "1000=", "11=", "001="]
    write_records(tmp_path / "p.jsonl", [Prompt(text) for text in prompts])
    assert main([*given, "--prompts", str(tmp_path / "p.jsonl"), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = evaluate_policy(run, num_responses=4, best_of=[1, 4], prompts=tmp_path / "p.jsonl")
    assert json.loads(line) == found.as_json()
    assert set(found.policy.pass_at_k) == {1, 4}


def test_the_prompts_of_an_evaluation(run: Path, module: Any, tmp_path: Path):
    policy = load_policy(run)
    texts = ["01=", "1=", "0="]
    write_records(tmp_path / "p.jsonl", [Prompt(text) for text in texts])
    for file, count, expected in (
        (None, None, held_out_of(module.problem)),
        (None, 2, held_out_of(module.problem)[:2]),
        (tmp_path / "p.jsonl", None, texts),
        (tmp_path / "p.jsonl", 2, texts[:2]),
    ):
        asked = prompts_of(policy, file, count, None)
        assert held_out_of(dataclasses.replace(module.problem, held_out=asked.prompts)) == expected
        assert asked.prompts.tokens.shape[1] == max(map(len, expected))
        answers = [[int(text[0]), 3] for text in expected]
        np.testing.assert_array_equal(asked.extras.tokens, answers)


# Errors


def not_finite(sample: Sample) -> jax.Array:
    return jnp.full(sample.prompts.lengths.shape, jnp.nan)


def failing(texts: Any) -> Any:
    raise ValueError(f"cannot read {texts[0]}")


@pytest.mark.parametrize(
    ("given", "changes", "words"),
    [
        ("none", {}, "run directory 'none': does not exist; check the path"),
        ("{run} --against absent", {}, "run directory 'absent': does not exist"),
        ("{run} --num-responses 2 --k 4", {}, "k = 4: must be at most num_responses = 2; use"),
        ("{run} --k 1", {"exact_score": None}, "k = 1: pass@k needs exact answers"),
        ("{run} --k 1,x", {}, "must be a whole number"),
        ("{run} --best-of 0", {}, "best_of = 0: must be at least 1"),
        ("{run} --prompts {file}", {"extras_of": None}, "no extras_of to make them"),
        ("{run} --prompts {file}", {"extras_of": failing}, "cannot read 01=; write prompts like"),
        ("{run} --prompts {file}", {"extras_of": lambda _: np.ones(3)}, "one row per prompt"),
        ("{run} --prompts {wrong}", {}, "character 'x' .* is not in the alphabet"),
        ("{run} --prompts {long}", {}, "needs a context of 10, but this decoder has 8"),
        (
            "{run} --num-responses 4 --best-of 1",
            {"score": not_finite},
            "is not finite for the prompt '.*' and the response '",
        ),
        ("{run} --combine min", {}, "combine = min: has no effect without reward"),
        ("{run} --max-tokens 3", {}, "of at most response_length = 3 tokens; leave it out"),
        ("{run} --temperature 0", {}, "temperature = 0.0: must be above 0"),
        ("{run} --seed 2", {}, "seed = 2: the run has seeds 0 to 1"),
        ("{run} --checkpoint last", {}, "must be newest, best, or a number of updates"),
        ("{run} --against {sft}", {}, "was trained with another tokenizer than 'first'"),
        ("{run} --against {reward}", {}, "is a reward model, not a policy for text; give"),
        ("{run} --reward {reward}", {}, "reward = .* another tokenizer than 'first'"),
        ("{run} --reward {sft}", {}, "is not a reward model"),
        ("{reward}", {}, "is a reward model, not a policy for text; give the directory"),
        ("{sft} --against reference", {}, "started from random weights, so it has no reference"),
        ("{sft} --k 1", {}, "k = 1: pass@k needs exact answers, but the score of 'letters'"),
    ],
)
def test_bad_input_gives_one_message(
    given: str, changes: Any, words: str, run: Path, sft: Path, reward: Path, module: Any,
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    files = {"file": "01=", "wrong": "x=", "long": "010101="}
    for name, prompt in files.items():
        write_records(tmp_path / f"{name}.jsonl", [Prompt(prompt)])
    monkeypatch.setattr(module, "problem", dataclasses.replace(module.problem, **changes))
    paths = {name: tmp_path / f"{name}.jsonl" for name in files}
    made = given.format(run=run, sft=sft, reward=reward, **paths)
    capsys.readouterr()
    assert main(["rlhf", "evaluate", *made.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1, error
    assert error.startswith("purejaxppo: ")


# Scores of the task and of a reward model

SMALL: dict[str, Any] = {"num_responses": 2, "best_of": [2], "num_prompts": 6}
"""All evaluations below have the same shapes, so that little is compiled."""


class Recorded(NamedTuple):
    """What a sampler found, and the prompts and responses as text."""

    found: Any
    prompts: list[str]
    responses: list[str]


def sampled(run_dir: Path, reward: Path | None = None) -> Recorded:
    policy = load_policy(run_dir)
    asked = prompts_of(policy, None, 6, None)
    problem = prepared(policy.config, asked.problem)
    judge = make_judge(policy, asked, problem, reward, "min" if reward else "mean")
    samples: list[Sample] = []

    def score(sample: Sample) -> np.ndarray:
        samples.append(sample)
        return judge.score(sample)

    contest = _contest(policy, problem, asked, str(run_dir), "reference")
    sampler = Sampler(judge._replace(score=score), asked, 2, 1.0)
    found = sampler(contest.policy, jax.random.key(0), 2, contest.reference)
    return Recorded(found, *texts_of(problem, samples[0]))


def tokens_of(recorded: Recorded) -> tuple[list[list[int]], jax.Array, jax.Array]:
    """Prompt, response and stop token, at most 10 tokens, as lists and as `[N, 10]`; lengths."""
    texts = zip(recorded.prompts, recorded.responses, strict=True)
    rows = [[letters.ALPHABET.index(x) for x in f"{a}{b}."[:10]] for a, b in texts]
    padded = jnp.array([row + [0] * (10 - len(row)) for row in rows])
    return rows, padded, jnp.array([len(row) for row in rows])


def log_probs_of(run_dir: Path, recorded: Recorded) -> np.ndarray:
    """By a forward pass over whole texts; a prompt has 3 tokens."""
    rows, padded, lengths = tokens_of(recorded)
    first = jnp.arange(10)[:, None] == jnp.zeros_like(lengths)
    params = start_of(str(run_dir)).params
    logits = FORWARD(params, (), observe(padded.T, 1.0), first)[1]
    each = np.asarray(jax.nn.log_softmax(logits))
    return np.array([
        sum(each[t - 1, i, row[t]] for t in range(3, len(row))) for i, row in enumerate(rows)
    ])  # fmt: skip


FORWARD = jax.jit(make_decoder(SFTConfig(**DECODER).decoder(10, 32)).apply)


@pytest.mark.slow
def test_scores_and_divergences_of_single_responses(aligned: Path, sft: Path, reward: Path):
    """Reported: the gold score; selected by the reward model; the reference is `init`."""
    recorded = sampled(aligned)
    found, (_, padded, lengths) = recorded.found, tokens_of(recorded)
    texts = zip(recorded.prompts, recorded.responses, strict=True)
    np.testing.assert_allclose(found.score.ravel(), [letters.gold(*x) for x in texts], atol=1e-4)
    model = load_reward(reward, "min")
    learned = jax.jit(model.__call__)(model.params, padded, lengths)
    np.testing.assert_allclose(found.select.ravel(), 2.0 * learned, atol=1e-3)
    log_ratio = np.subtract(*(log_probs_of(x, recorded) for x in (aligned, sft)))
    np.testing.assert_allclose(found.log_ratio.ravel(), log_ratio, atol=1e-3)
    assert found.exact is None
    assert all(np.ptp(x) > 0.5 for x in found[:2])
    assert np.ptp(log_ratio) > 0.5

    judged = sampled(aligned, reward)
    assert judged.responses == recorded.responses
    np.testing.assert_allclose(judged.found.score.ravel(), learned, atol=1e-3)
    np.testing.assert_allclose(judged.found.select, found.select, atol=1e-4)


@pytest.mark.slow
def test_the_score_by_which_best_of_n_selects(aligned: Path, dpo: Path, reward: Path):
    """A run that was not trained on a score has none of its own."""
    for run_dir, selected_by in ((aligned, f"2.0*{reward}"), (dpo, str(reward))):
        given: dict[str, Any] = SMALL | ({"max_tokens": 7} if run_dir == dpo else {})
        made = evaluate_policy(run_dir, reward=reward, **given)
        assert (made.score_name, made.selected_by) == (str(reward), selected_by)


@pytest.mark.slow
def test_runs_on_texts(dpo: Path, sft: Path, aligned: Path):
    """Their prompts are those that their data hold out. The reference of direct preference
    optimisation is `init`; fine-tuning from random weights has none."""
    given = SMALL | {"max_tokens": 7, "num_prompts": None}
    alone = evaluate_policy(sft, **given)
    assert (alone.against, alone.opponent, alone.win_rate, alone.kl) == (None,) * 4
    assert alone.best_of == ()
    held_out = split(letters.demonstrations(), 0.1)[1]
    assert alone.num_prompts == len({x.prompt for x in held_out})
    assert "started from random weights" in alone.table()
    both, same = evaluate_policy(dpo, aligned, **given), evaluate_policy(dpo, "reference", **given)
    assert (both.against, same.against) == (str(aligned), "reference")
    assert both.win_rate != same.win_rate
    assert both.kl is not None
    assert both.kl.mean > 0.1
    assert (both.kl, both.policy, both.best_of) == (same.kl, same.policy, same.best_of)
