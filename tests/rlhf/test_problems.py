"""The shipped tasks against plain Python."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.rlhf import PROBLEMS, Characters, Prompts, Responses, Sample, TokenIds, letters
from purejaxppo.rlhf.config import TASKS
from purejaxppo.rlhf.problem import Problem, pad_left

SMALL: dict[str, dict[str, Any]] = {
    "sort": {"longest": 3, "digits": 4},
    "reverse": {"longest": 3, "digits": 4},
    "sum": {"longest": 3, "digits": 4},
    "arithmetic": {"digits": 4},
    "countdown": {"largest": 3},
    "letters": {},
}


def sample_of(problem: Problem, texts: list[tuple[str, str]], width: int) -> Sample:
    """Responses, each with whatever stop token its text has."""
    encoded = [problem.text.encode(response)[:width] for _, response in texts]
    lengths = np.array([len(x) for x in encoded])
    tokens = np.array([[*x, *[0] * (width - len(x))] for x in encoded])
    stopped = np.array([response.endswith(".") for _, response in texts])
    prompts = [prompt for prompt, _ in texts]
    return Sample(
        pad_left([problem.text.encode(x) for x in prompts]),
        Responses(*(jnp.asarray(x) for x in (tokens, lengths, stopped, tokens * 0.0))),
        problem.extras_of(prompts) if problem.extras_of else (),
    )


def text(problem: Problem, prompts: Prompts) -> list[str]:
    rows = zip(np.asarray(prompts.tokens), np.asarray(prompts.lengths), strict=True)
    return [problem.text.decode(tokens[-length:]) for tokens, length in rows]


def answer_of(name: str, prompt: str) -> str:
    given = prompt[:-1]
    if name == "arithmetic":
        first, second = int(given[:2]), int(given[3:])
        return f"{first + second if given[2] == '+' else first - second:02d}"
    return {
        "sort": lambda: "".join(sorted(given)),
        "reverse": lambda: given[::-1],
        "sum": lambda: f"{sum(int(x) for x in given):02d}",
    }[name]()


@pytest.mark.parametrize("name", ["sort", "reverse", "sum", "arithmetic"])
def test_scores_equal_a_loop(name: str):
    problem = PROBLEMS[name](**SMALL[name])
    prompts, rng = text(problem, problem.prompts), np.random.default_rng(0)
    alphabet = problem.tokenizer.alphabet  # pyright: ignore
    pairs = []
    for row, prompt in enumerate(prompts):
        right = answer_of(name, prompt) + "."
        wrong = "".join(rng.choice(list(alphabet), rng.integers(1, 6)))
        pairs.append(
            (prompt, [right, wrong, right[: rng.integers(1, 3)], right[:-1] + "0"][row % 4])
        )
    found = problem.score(sample_of(problem, pairs, 6))
    for (prompt, response), score in zip(pairs, found, strict=True):
        right = answer_of(name, prompt) + "."
        same = sum(a == b for a, b in zip(response, right, strict=False))
        assert score == pytest.approx(same / len(right)), (prompt, response)
        assert (score == 1) == response.startswith(right)


def test_countdown_scores_equal_an_evaluation_by_python():
    problem = PROBLEMS["countdown"](**SMALL["countdown"])
    prompts, rng = text(problem, problem.prompts), np.random.default_rng(0)
    pairs = []
    for prompt in prompts[:40]:
        digits, target = prompt[:-1].split(":")
        for order in itertools.permutations(digits):
            for operators in itertools.product("+-*", repeat=2):
                expression = f"{order[0]}{operators[0]}{order[1]}{operators[1]}{order[2]}"
                if int(target) == eval(expression) or rng.random() < 0.1:
                    pairs.append((prompt, expression + "."))
        pairs += [(prompt, x) for x in ("1+1+1.", "1+2.", "123", "+1+2+.", "1+2*33", f"{digits}.")]
    found = problem.score(sample_of(problem, pairs, 6))
    exact = 0
    for (prompt, response), score in zip(pairs, found, strict=True):
        digits, target = prompt[:-1].split(":")
        body = response.rstrip(".")
        formed = len(response) == 6 and response[-1] == "." and body[1::2].strip("+-*") == ""
        formed = formed and body[::2].isdigit()
        right = formed and sorted(body[::2]) == sorted(digits) and eval(body) == int(target)
        assert (score == 1.0) == right, (prompt, response)
        assert right or 0 <= score <= 0.5
        exact += right
    assert exact > 40


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_prompt_of_a_task_is_in_one_split_and_has_an_exact_answer(name: str):
    problem = PROBLEMS[name](**SMALL[name])
    assert problem.held_out is not None
    train, held_out = text(problem, problem.prompts), text(problem, problem.held_out)
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert len(train) == pytest.approx(4 * len(held_out), abs=4)
    if name in ("countdown", "letters"):
        return
    pairs = [(x, answer_of(name, x) + ".") for x in train + held_out]
    assert max(len(response) for _, response in pairs) == problem.longest_answer
    sample = sample_of(problem, pairs, problem.longest_answer)
    assert (np.asarray(problem.score(sample)) == problem.exact_score).all()
    own = Sample(problem.prompts, *sample[1:])._replace(
        responses=Responses(*(x[: len(train)] for x in sample.responses)), extras=problem.extras
    )
    assert (np.asarray(problem.score(own)) == 1).all()


def test_letters_score_equals_a_loop_over_letters():
    problem, given = PROBLEMS["letters"](), letters.weights()
    rng = np.random.default_rng(0)
    pairs = []
    for prompt in text(problem, problem.prompts):
        response = "".join(rng.choice(list(letters.ALPHABET[:9]), rng.integers(0, 7)))
        pairs.append((prompt, f"{response}." if len(response) < 6 else response))
    found = problem.score(sample_of(problem, pairs, 6))
    for (prompt, response), score in zip(pairs, found, strict=True):
        told, expected = [letters.ALPHABET.index(x) for x in prompt[:2]], -given.mean
        for token in (letters.ALPHABET.index(x) for x in response.rstrip(".")):
            expected += given.single[token] + given.pair[told[-1], token]
            expected += given.triple[told[-2], told[-1], token]
            told.append(token)
        assert score == pytest.approx(expected * given.scale, abs=1e-4)
        assert letters.gold(prompt, response) == pytest.approx(float(score), abs=1e-4)


def test_labels_of_letters_have_the_stated_probabilities():
    pairs = letters.preferences(3000, seed=1)
    better = np.array([
        letters.gold(x.prompt, x.chosen) > letters.gold(x.prompt, x.rejected) for x in pairs
    ])  # fmt: skip
    chance = np.array([x.columns["probability"] for x in pairs])
    likely = np.maximum(chance, 1 - chance)
    assert ((chance > 0.5) == better).all()
    assert better.mean() == pytest.approx(likely.mean(), abs=3 * 0.5 / 3000**0.5)


def prompts_of(name: str, **given: Any) -> set[str]:
    problem = PROBLEMS[name](**given)
    assert problem.held_out is not None
    return {*text(problem, problem.prompts), *text(problem, problem.held_out)}


def test_arithmetic_has_carries_on_request():
    every = {f"{a:02d}{x}{b:02d}=" for a, x, b in itertools.product(range(100), "+-", range(100))}

    def result(prompt: str) -> int:
        return int(prompt[:2]) + int(prompt[2:5])

    def has_carry(prompt: str) -> bool:
        ones = int(prompt[1]) + int(prompt[2] + prompt[4])
        return not 0 <= ones <= 9

    possible = {x for x in every if 0 <= result(x) <= 99}
    assert prompts_of("arithmetic", digits=10, carries=True) == possible
    assert prompts_of("arithmetic", digits=10) == {x for x in possible if not has_carry(x)}
    assert all(set(x) <= set("012+-=") for x in prompts_of("arithmetic", digits=3))


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("reorder", [True, False])
def test_countdown_has_the_targets_that_its_arguments_allow(products: bool, reorder: bool):
    expected = set()
    for digits in itertools.product("123", repeat=3):
        for order in itertools.permutations(digits) if reorder else [digits]:
            for first, second in itertools.product("+-*" if products else "+-", repeat=2):
                target = eval(f"{order[0]}{first}{order[1]}{second}{order[2]}")
                if 0 <= target < 100:
                    expected.add(f"{''.join(digits)}:{target}=")
    found = prompts_of("countdown", numbers=3, largest=3, products=products, reorder=reorder)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("sort", {"shortest": 0}, "lengths must be at least 1"),
        ("sort", {"digits": 11}, "digits from 2 to 10"),
        ("countdown", {"numbers": 4}, "numbers must be 2 or 3"),
        ("sort", {"shortest": 1, "longest": 1, "digits": 1}, "digits from 2 to 10"),
        ("arithmetic", {"digits": 11}, "digits from 2 to 10"),
    ],
)
def test_impossible_arguments_of_a_task(name: str, given: dict[str, Any], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        PROBLEMS[name](**given)


def test_the_command_line_knows_the_names_of_the_tasks():
    assert set(TASKS) == set(PROBLEMS)


def test_tokenizers():
    characters = Characters("01=.")
    assert characters.encode("10=") == [1, 0, 2]
    assert characters.decode([3, 0]) == ".0"
    with pytest.raises(ppo.ConfigError, match=r"character 'x' \(number 2\) is not in the alphabet"):
        characters.encode("1x")
    with pytest.raises(ppo.ConfigError, match="has '1' twice"):
        Characters("121")
    numbers = TokenIds(12)
    assert numbers.encode("3 11") == [3, 11]
    assert numbers.decode([3, 11]) == "3 11"
    for text_ in ("3 12", "a", "-1"):
        with pytest.raises(ppo.ConfigError, match="is not a token"):
            numbers.encode(text_)
