"""Reward functions in Python, and prompts from a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kept import keep_programs

import purejaxppo as ppo
from purejaxppo.cli import main
from purejaxppo.host.configfile import load_settings
from purejaxppo.rlhf import (
    PROBLEMS,
    Prompt,
    RLHFConfig,
    RLHFHParams,
    Sample,
    load_generator,
    load_reward,
    make_rlhf_task,
    write_records,
)
from purejaxppo.rlhf.functions import Weighted, text_rewards
from purejaxppo.rlhf.problem import texts_of

CONFIG = RLHFConfig(
    "rloo", "letters", num_prompts=2, group_size=4, response_length=4, num_layers=1, width=16,
    num_heads=2, total_timesteps=4 * 32,
)  # fmt: skip
OPTIONS = (
    "--objective rloo --num-prompts 2 --group-size 4 --response-length 4 --num-layers 1 --width 16 "
    "--num-heads 2 --total-timesteps 128 --eval-episodes 8"
).split()
MODULE = """
import pathlib

def length(prompts, completions):
    return [len(x) / 4 for x in completions]

def half(prompts, completions):
    return [0.5] * len(prompts)

def fails_later(prompts, completions):
    calls = pathlib.Path("calls")
    done = len(calls.read_text()) if calls.exists() else 0
    if done == 4 and not pathlib.Path("mended").exists():
        raise OSError("the judge is down")
    calls.write_text("x" * (done + 1))
    return length(prompts, completions)

def too_few(prompts, completions):
    return [1.0]

def texts(prompts, completions):
    return completions

def not_finite(prompts, completions):
    return [float("inf") if x.startswith("a") else 0.0 for x in completions]

def no_arguments():
    return []

number = 3
"""


@pytest.fixture(autouse=True)
def cache_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module of reward functions and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    rows = [Prompt(f"{a}{b}:", {"bonus": i / 4}) for i, (a, b) in enumerate(["ab", "cd", "ef"] * 1)]
    write_records(tmp_path / "prompts.jsonl", rows)
    return tmp_path


def run_of(task: ppo.Task, **settings: Any) -> ppo.Result:
    return ppo.run(
        task, RLHFHParams(), eval_episodes=8, num_seeds=2, progress=False, **settings
    )  # fmt: skip


def test_a_python_function_trains_like_the_same_compiled_score():
    """Scores are small fractions of 8, so both are exact."""
    problem = PROBLEMS["letters"]()

    def count(sample: Sample) -> jax.Array:
        used = jnp.arange(4) < (sample.responses.lengths - sample.responses.stopped)[:, None]
        return jnp.sum(used & (sample.responses.tokens < 2), axis=1) / 8

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        assert len(prompts) == len(completions)
        return [sum(x in "ab" for x in text) / 8 for text in completions]

    compiled = run_of(make_rlhf_task(CONFIG, problem.__class__(**{
        **vars(problem), "score": count, "gold": None, "exact_score": None
    })))  # fmt: skip
    called = run_of(make_rlhf_task(CONFIG, reward=reward))
    for name, values in compiled.metrics.items():
        if name != "seconds":
            np.testing.assert_array_equal(values, called.metrics[name], name)
    params = (x.states.learner.params for x in (compiled, called))
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert np.ptp(compiled.metrics["score"]) > 0


def test_the_evaluation_is_the_tasks_own_score():
    task = make_rlhf_task(CONFIG, reward=lambda prompts, completions: [100.0] * len(prompts))
    result = run_of(task)
    assert (result.metrics["score"] == 100).all()
    assert (np.abs(result.returns) < 50).all()


def test_weights_and_columns(folder: Path):
    """Rewards are weighted and added, and each prompt has the columns of its line."""
    seen: list[tuple[list[str], list[float]]] = []

    def own(prompts: list[str], completions: list[str], bonus: list[float]) -> list[float]:
        seen.append((prompts, bonus))
        return bonus

    config = RLHFConfig(
        "rloo", "prompts.jsonl", tokenizer="letters", reward=("-2*my_rewards:half",), num_prompts=2,
        group_size=2, response_length=3, num_layers=1, width=16, num_heads=2, total_timesteps=36,
    )  # fmt: skip
    task = make_rlhf_task(config, reward=own)
    result = run_of(task)
    bonus_of = {"ab:": 0.0, "cd:": 0.25, "ef:": 0.5}
    assert seen
    for prompts, bonus in seen:
        assert bonus == [bonus_of[x] for x in prompts]
    means = {(bonus_of[a] + bonus_of[b]) / 2 - 1 for a in bonus_of for b in bonus_of}
    assert {*np.unique(result.metrics["score"])} <= means
    assert {*np.unique(result.returns)} <= {x - 1 for x in bonus_of.values()}


def test_prompts_are_split_between_training_and_evaluation(folder: Path):
    config = RLHFConfig(
        "rloo", "prompts.jsonl", tokenizer="letters", reward=("my_rewards:half",),
        response_length=3, num_layers=1, width=16, num_heads=2,
    )  # fmt: skip
    data = make_rlhf_task(config).data
    decode = PROBLEMS["letters"]().text.decode
    train, held_out = ([decode(x) for x in data[k].tokens] for k in ("prompts", "held_out"))
    assert sorted([*train, *held_out]) == ["ab:", "cd:", "ef:"]
    assert train
    assert held_out
    assert config.label == "prompts"


def test_a_function_that_fails_loses_nothing(folder: Path, capsys: Any):
    words = ["rlhf", "prompts.jsonl", "--tokenizer", "letters", *OPTIONS]
    assert main([*words, "--reward", "my_rewards:length", "--run-dir", "whole"]) == 0
    assert main([*words, "--reward", "my_rewards:fails_later", "--run-dir", "broken"]) == 1
    error = capsys.readouterr().err.strip()
    assert "reward = my_rewards:fails_later: raised OSError: the judge is down" in error
    assert error.endswith("to resume: purejaxppo resume broken")
    Path("mended").touch()
    assert main(["resume", "broken"]) == 0
    rows = [
        [line.split(",") for line in Path(x, "metrics.csv").read_text().splitlines()]
        for x in ("whole", "broken")
    ]
    place = rows[0][0].index("seconds")
    whole, broken = ([row[:place] + row[place + 1 :] for row in x] for x in rows)
    assert len(whole) == 5
    assert whole == broken
    assert main(["eval", "broken", "--episodes", "4", "--json"]) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(text)["return_mean"] in {x / 16 for x in range(17)}
    best = load_generator("broken")(["ab:", "cd:"], num_responses=1, best_of=8)
    assert all(x.score == len(x.text) / 4 for group in best for x in group)


@pytest.mark.parametrize(
    ("reward", "status", "message"),
    [
        ("my_rewards:too_few", 1, "returned shape [1] for 8 completions; must return one number"),
        ("my_rewards:texts", 1, "returned a list that is not a list of numbers"),
        ("my_rewards:no_arguments", 2, "cannot be called with prompts and completions"),
        ("my_rewards:number", 2, "is of type int; must be a function"),
        ("my_rewards:missing", 2, "has no missing; write package.module:name"),
        ("x*my_rewards:half", 2, "must be RUN_DIR, package.module:function, or one of these"),
    ],
)
def test_bad_functions(reward: str, status: int, message: str, folder: Path, capsys: Any):
    assert main(["rlhf", "letters", *OPTIONS, "--reward", reward, "--run-dir", "run"]) == status
    assert message in capsys.readouterr().err
    assert Path("run").exists() == (status == 1)


@pytest.mark.slow
def test_a_score_that_is_not_finite_names_the_texts(folder: Path, capsys: Any):
    words = ["rlhf", "letters", *OPTIONS, "--reward", "my_rewards:not_finite", "--run-dir", "run"]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "is not finite for" in shown.out + shown.err
    assert "and the response 'a" in shown.out + shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts.jsonl"], "has no score; give reward"),
        (["absent.jsonl", "--reward", "my_rewards:half"], "absent.jsonl: No such file"),
        (["sort", "--tokenizer", "bytes"], "tokenizer = bytes: has no effect with task = sort"),
        (["sort", "--retokenize"], "retokenize = true: has no effect without reward"),
        (
            ["prompts.jsonl", "--reward", "my_rewards:half", "--task-params.shortest", "2"],
            "task_params.shortest: a file of prompts takes only held_out, skip_bad_lines",
        ),
        (
            ["prompts.jsonl", "--reward", "my_rewards:half", "--devices", "2"],
            "calls a Python function in each update",
        ),
    ],
)
def test_bad_settings(words: list[str], message: str, folder: Path, capsys: Any):
    assert main(["rlhf", *words, "--objective", "rloo", "--run-dir", "run"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_one_compiled_function_is_refused():
    task = make_rlhf_task(CONFIG, reward=lambda prompts, completions: [0.0] * len(prompts))
    with pytest.raises(ppo.ConfigError, match=r"cannot be part of one compiled function"):
        jax.eval_shape(ppo.make_train(task), jax.random.key(0), RLHFHParams())


def test_texts_in_a_reward_are_those_of_the_tokens():
    problem = PROBLEMS["letters"]()
    from purejaxppo.rlhf import Prompts, Responses

    tokens = np.array([[0, 1, 9, 9], [2, 3, 4, 5]])
    responses = Responses(
        jnp.array(tokens), jnp.array([3, 4]), jnp.array([True, False]), jnp.zeros((2, 4))
    )
    sample = Sample(Prompts(jnp.array([[7, 0, 8], [1, 1, 8]]), jnp.array([2, 3])), responses, ())
    assert texts_of(problem, sample) == (["a:", "bb:"], ["ab", "cdef"])
    found: list[Any] = []

    def keep(prompts: list[str], completions: list[str]) -> list[int]:
        found.extend(zip(prompts, completions, strict=True))
        return [1, 2]

    scores = text_rewards(problem, [Weighted(0.5, "keep", keep)])(sample)
    np.testing.assert_array_equal(scores, [0.5, 1.0])
    assert found == [("a:", "ab"), ("bb:", "cdef")]


@pytest.mark.slow
def test_a_reward_model_with_another_tokenizer(folder: Path, capsys: Any):
    """It is refused, or scores the decoded texts."""
    words = (
        "rlhf reward letters --tokenizer bytes --num-layers 1 --width 16 --num-heads 2 "
        "--batch-rows 2 --row-length 32 --total-timesteps 128 --eval-episodes 4 --run-dir bytes"
    )
    assert main([*words.split()]) == 0
    policy = ["rlhf", "letters", *OPTIONS, "--reward", "bytes"]
    assert main([*policy, "--run-dir", "refused"]) == 2
    assert "use the same tokenizer, or retokenize = true" in capsys.readouterr().err
    assert main([*policy, "--retokenize", "--run-dir", "run"]) == 0
    found = load_generator("run")(["ab:", "cd:"], num_responses=4)
    for prompt, group in zip(["ab:", "cd:"], found, strict=True):
        scores = load_reward("bytes").score([prompt] * 4, [x.text for x in group], empty=True)
        np.testing.assert_allclose([x.score or 0.0 for x in group], scores, atol=1e-5)
    assert load_settings(Path("run/config.toml")).config.retokenize
