"""Language models as runs: command line, resuming, sweeps, samples, generation and errors."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import LENGTH, config_of, random_params, table_problem
from kept import keep_programs

import purejaxppo as ppo
from purejaxppo.checks import EnvParams
from purejaxppo.cli import main
from purejaxppo.host.checkpoint import data_digests
from purejaxppo.host.configfile import load_settings
from purejaxppo.rlhf import (
    PROBLEMS,
    Problem,
    Prompts,
    RLHFConfig,
    RLHFHParams,
    Sample,
    load_generator,
    make_rlhf_task,
)

SMALL = (
    "--num-layers 1 --width 16 --num-heads 2 --num-prompts 4 --group-size 4 --num-minibatches 2 "
    "--eval-episodes 8 --task-params.shortest 2 --task-params.longest 2 --task-params.digits 3 "
    "--response-length 8 --total-timesteps 640"
).split()
UPDATES = 640 // (16 * 8)


@pytest.fixture(autouse=True)
def cache_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line."""
    directory = tmp_path_factory.mktemp("rlhf") / "run"
    assert main(["rlhf", "sort", *SMALL, "--run-dir", str(directory)]) == 0
    return directory


def test_a_run_from_the_command_line(trained: Path, capsys: Any):
    summary = json.loads((trained / "summary.json").read_text())
    assert 0 <= summary["exact"] <= 1
    assert {"exact_sampled", "score", "reference_kl", "eval_return_mean"} <= summary.keys()
    assert summary["env_steps"] == 640
    header = (trained / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"score", "reference_kl", "kl_coef", "entropy", "response_length", "stopped"} <= {
        *header
    }
    settings = load_settings(trained / "config.toml")
    text = (trained / "config.toml").read_text()
    assert text.startswith('kind = "rlhf"\n')
    assert 'objective = "grpo"\n' in text
    assert isinstance(settings.config, RLHFConfig)
    assert dict(settings.config.task_params) == {"shortest": 2, "longest": 2, "digits": 3}
    assert main(["eval", str(trained), "--episodes", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["env_id"] == "sort"
    assert main(["resume", str(trained)]) == 0
    shown = capsys.readouterr().out
    assert "already finished: 640 of 640 tokens per seed" in shown
    assert "exact: " in shown


def test_samples_are_logged_and_shown(trained: Path):
    rows = [json.loads(x) for x in (trained / "samples.jsonl").read_text().splitlines()]
    assert sorted({row["update"] for row in rows}) == [0, UPDATES // 2, UPDATES]
    problem = make_rlhf_task(load_settings(trained / "config.toml").config).data["held_out"]
    assert len(rows) == 3 * min(8, len(problem.lengths))
    for row in rows:
        assert row["prompt"].endswith("=")
        right = "".join(sorted(row["prompt"][:-1]))
        assert (row["score"] == 1) == (row["stopped"] and row["response"] == right)
    page = (trained / "report.html").read_text()
    assert "After 0 updates" in page
    assert f"<td>{rows[0]['prompt']}</td>" in page
    assert 'id="training"' in page


@pytest.mark.slow
def test_resume_from_the_command_line_equals_one_run(trained: Path, tmp_path: Path, fused: Any):
    """With samples and evaluations; the first part ends after three updates."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["rlhf", "sort", *SMALL, "--lr-schedule", "constant", "--num-seeds", "2"]
    assert main([*given, "--run-dir", str(whole)]) == 0
    assert main([*given, "--total-timesteps", "384", "--run-dir", str(parts)]) == 0
    assert main(["resume", str(parts), "--total-timesteps", "640"]) == 0
    one, other = (json.loads((x / "summary.json").read_text()) for x in (whole, parts))
    for name in ("exact", "eval_return_per_seed", "score", "reference_kl"):
        assert one[name] == other[name]
    lines = (parts / "samples.jsonl").read_text().splitlines()
    assert sorted({json.loads(x)["update"] for x in lines}) == [0, 1, 3, UPDATES]
    assert lines[-1:] == (whole / "samples.jsonl").read_text().splitlines()[-1:]


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles during the test."""
    found: list[str] = []

    def listen(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_more_chunks_compile_no_more_programs(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()  # programs are compiled as usual
    task, counts = small_task(), []
    for name, every in (("first", 6), ("whole", 6), ("chunks", 1)):
        compilations.clear()
        options: dict[str, Any] = {
            "run_dir": tmp_path / name, "checkpoint_every": every, "checkpoint_unit": "updates",
            "eval_episodes": 8, "progress": False, "devices": 1,
        }  # fmt: skip
        ppo.run(task, RLHFHParams(clip_eps=0.2), **options)
        counts.append(len(compilations))
    assert counts[1] == counts[2] > 0, counts


@pytest.mark.slow
def test_samples_of_later_updates_are_dropped(tmp_path: Path):
    task = small_task()
    options: dict[str, Any] = {"eval_episodes": 4, "progress": False, "devices": 1}
    ppo.run(task, RLHFHParams(), run_dir=tmp_path / "r", callback=lambda *_: True, **options)
    path = tmp_path / "r/samples.jsonl"
    path.write_text(path.read_text() + '{"update": 99, "prompt": "later"}\n')
    ppo.resume(tmp_path / "r", task, progress=False)
    rows = [json.loads(x) for x in path.read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1, 3, 6]
    for text in ("{}\n", '{"update": 1e999}\n', "[" * 100_000, '{"update": 1}\n{"up'):
        path.write_text(text)
        with pytest.raises(ppo.ConfigError, match=r"samples.jsonl': was changed"):
            ppo.resume(tmp_path / "r", task, total_timesteps=12 * 16 * LENGTH, progress=False)


@pytest.mark.slow
def test_a_tokenizer_that_fails_later_does_not_end_a_run(tmp_path: Path):
    class Fails:
        calls = 0

        def encode(self, text: str) -> list[int]:
            return []

        def decode(self, tokens: Any) -> str:
            Fails.calls += 1
            if Fails.calls > 4:
                raise IndexError("no such token")
            return ""

    problem = dataclasses.replace(table_problem(0)[0], tokenizer=Fails())
    task = make_rlhf_task(small_task().config, problem)
    with pytest.warns(RuntimeWarning, match="no samples are logged: no such token"):
        ppo.run(task, RLHFHParams(), run_dir=tmp_path / "r", eval_episodes=4, progress=False)
    assert (tmp_path / "r/summary.json").exists()


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path: Path, capsys: Any):
    space = ["--sample", "learning_rate=loguniform:1e-4,1e-2", "--grid", "kl_coef=0.0,0.1"]
    given = ["sweep", "sort", *SMALL, "--trials", "2", *space, "--run-dir", str(tmp_path / "s")]
    assert main([*given, "--grid", "objective=grpo,ppo_clip"]) == 0
    shown = capsys.readouterr().out
    assert f"purejaxppo rlhf {tmp_path / 's/winner.toml'}" in shown
    assert "best trials by selection score (8 responses per seed)" in shown
    results = (tmp_path / "s/results.csv").read_text().splitlines()
    assert len(results) == 9
    assert main(["rlhf", str(tmp_path / "s/winner.toml"), "--print-config"]) == 0
    assert main(["eval", str(tmp_path / "s"), "--episodes", "4"]) == 0
    assert main(["resume", str(tmp_path / "s"), "--trial", "best"]) == 0


@pytest.mark.slow
def test_a_population(tmp_path: Path):
    found = ppo.sweep(
        small_task(), {"learning_rate": ppo.loguniform(1e-4, 1e-2)}, hparams=RLHFHParams(),
        strategy="pbt", trials=5, interval=2, eval_episodes=4, progress=False,
    )  # fmt: skip
    assert found.best is not None
    assert np.asarray(found.returns).shape == (5, 1)


# Python


def small_task(**changes: Any) -> ppo.Task:
    given: dict[str, Any] = {
        "total_timesteps": 6 * 16 * LENGTH, "num_prompts": 4, "group_size": 4
    }  # fmt: skip
    return make_rlhf_task(config_of("grpo", **(given | changes)), table_problem(0)[0])


@pytest.mark.slow
def test_a_run_that_was_stopped_resumes_bit_for_bit(tmp_path: Any, fused: Any):
    task, options = small_task(), {"eval_episodes": 8, "progress": False}
    hparams = RLHFHParams(clip_eps=0.2)
    whole = ppo.run(task, hparams, run_dir=tmp_path / "a", devices=1, **options)
    assert (whole.metrics["response_length"] == LENGTH).all()
    stopped = ppo.run(
        task, hparams, run_dir=tmp_path / "b", devices=1, callback=lambda *_: True, **options
    )
    assert stopped.summary["env_steps"] < whole.summary["env_steps"]
    resumed = ppo.resume(tmp_path / "b", task, progress=False)
    for x, y in zip(
        *(jax.tree.leaves(r.states.learner.params) for r in (whole, resumed)), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(whole.returns, resumed.returns)


@pytest.mark.parametrize(
    "objective",
    ["grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in ("ppo_clip", "gspo"))],
)
def test_devices_learn_what_one_learns(objective: str):
    """With one minibatch, so that the order of shuffling does not matter."""
    config = config_of(
        objective, total_timesteps=3 * 32 * LENGTH, num_prompts=8, group_size=4, num_minibatches=1
    )
    task = make_rlhf_task(config, table_problem(0)[0])
    hparams = RLHFHParams(clip_eps=0.2, learning_rate=1e-4)
    options: dict[str, Any] = {"eval_episodes": 4, "progress": False}
    one, *others = (ppo.run(task, hparams, devices=n, **options) for n in (1, 2, 4))
    for several in others:
        for name in ("score", "reference_kl", "policy_loss", "entropy", "grad_norm"):
            np.testing.assert_allclose(
                one.metrics[name], several.metrics[name], rtol=1e-3, atol=1e-5
            )


def test_a_config_is_enough(tmp_path: Path):
    config = RLHFConfig(
        "rloo", "reverse", {"longest": 2, "digits": 3}, num_prompts=2, group_size=2,
        num_layers=1, width=16, num_heads=2, num_minibatches=1, total_timesteps=64,
    )  # fmt: skip
    result = ppo.run(config, RLHFHParams(), run_dir=tmp_path / "r", eval_episodes=4, progress=False)
    assert result.summary["num_seeds"] == 1
    assert ppo.load(tmp_path / "r").config == config
    with pytest.raises(ppo.ConfigError, match="env: has no effect with an RLHFConfig"):
        ppo.make_train(config, env=object())


@pytest.mark.slow
def test_the_original_data_are_needed_to_resume(tmp_path: Path):
    options: dict[str, Any] = {"eval_episodes": 4, "progress": False}
    ppo.run(small_task(), RLHFHParams(), run_dir=tmp_path / "r", **options)
    config = small_task().config
    other = make_rlhf_task(
        config,
        dataclasses.replace(table_problem(0)[0], reference=partial(random_params, seed=9)),
    )
    with pytest.raises(ppo.ConfigError, match=r"trained with other data: reference changed since"):
        ppo.resume(tmp_path / "r", other, total_timesteps=12 * 16 * LENGTH, progress=False)
    task = small_task()
    ppo.resume(tmp_path / "r", task, total_timesteps=7 * 16 * LENGTH, progress=False)
    digests = data_digests(task.data)
    assert sorted(digests) == ["extras", "held_out", "held_out_extras", "prompts", "reference"]
    assert data_digests(other.data)["extras"] == digests["extras"]


# Generation


def test_generate_prints_responses(trained: Path, tmp_path: Path, capsys: Any):
    assert main(["generate", str(trained), "--prompt", "21=", "--num-responses", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("21= ") and "score" in line for line in lines)
    (tmp_path / "p.txt").write_text("21=\n\n0=\n")
    given = ["generate", str(trained), "--prompts", str(tmp_path / "p.txt"), "--json"]
    assert main([*given, "--greedy"]) == 0
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["21=", "0="]
    assert main([*given, "--best-of", "16", "--top-k", "3", "--top-p", "0.9"]) == 0
    best = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(best) == 2
    generator = load_generator(trained)
    every = generator(["21="], num_responses=16)[0]
    (kept,) = generator(["21="], best_of=16)[0]
    assert kept.score == max(x.score or 0 for x in every)
    assert np.isfinite([x.log_prob for x in every]).all()


def test_log_probs_of_given_completions_are_those_of_generation(trained: Path):
    generator = load_generator(trained)
    found = {x.text: x for x in generator(["21="], num_responses=32, temperature=0.8)[0]}
    texts = [text for text, x in found.items() if x.stopped]
    assert len(texts) > 1
    given = generator.log_probs(["21="] * len(texts), texts, temperature=0.8)
    np.testing.assert_allclose(given, [found[x].log_prob for x in texts], rtol=1e-4)
    alphabet = PROBLEMS["sort"](digits=3).text.alphabet
    first = generator.log_probs(["21="] * len(alphabet), list(alphabet), stop=False)
    np.testing.assert_allclose(np.exp(first).sum(), 1.0, rtol=1e-5)
    ended = generator.log_probs(["21="], [""])
    np.testing.assert_allclose(ended, first[alphabet.index(".")], rtol=1e-5)


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        (["1", "2"], "1 prompts and 2 completions: give one prompt for each"),
        (["x"], "character 'x'"),
        ([""], "a completion is empty"),
        (["1" * 20], "needs a context of 23, but this decoder has"),
    ],
)
def test_log_probs_of_bad_completions(trained: Path, completions: list[str], words: str):
    with pytest.raises(ppo.ConfigError, match=words):
        load_generator(trained).log_probs(["21="], completions, stop=False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--prompt", "2x="], r"character 'x' \(number 2\) is not in the alphabet"),
        (["--prompt", ""], "prompt '': is empty"),
        (["--prompt", "21212="], "needs a context of 14, but this decoder has 11"),
        (["--prompt", "2=", "--max-tokens", "10"], "needs a context of 12"),
        ([], "generate needs prompts: give either --prompt TEXT or --prompts FILE"),
        (["--prompts", "none.txt"], "prompts 'none.txt': No such file"),
        (["--prompt", "2=", "--temperature", "0"], "temperature = 0.0: must be above 0"),
        (["--prompt", "2=", "--top-p", "0"], "top_p = 0.0: must be above 0"),
        (["--prompt", "2=", "--greedy", "--top-k", "3"], "top_k and top_p have no effect"),
        (["--prompt", "2=", "--greedy", "--num-responses", "3"], "are the same"),
        (["--prompt", "2=", "--max-tokens", "3", "--best-of", "2"], "of at most 8 tokens"),
        (["--prompt", "2=", "--generation-seed", str(2**40)], "must be below"),
        (["--prompt", "2=", "--seed", "1"], "seed = 1: the run has seeds 0 to 0"),
        (["--prompt", "2=", "--checkpoint", "nope"], "must be newest, best"),
    ],
)
def test_impossible_generation(trained: Path, given: list[str], words: str, capsys: Any):
    assert main(["generate", str(trained), *given]) == 2
    error = capsys.readouterr().err
    import re

    assert re.search(words, error), error
    assert len(error.splitlines()) == 1


# Errors


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["rlhf", "sort", "--top-k", "5"], "--top-k: rlhf has no such option"),
        (["rlhf", "sorted"], "no such file, shipped config or environment; did you mean sort?"),
        (["rlhf", "Sort", "--run-dir", "x"], "task = 'Sort': no such task; did you mean sort?"),
        (["rlhf", "nomodule:f"], "module nomodule cannot be imported"),
        (["rlhf", "json:loads"], "task = json:loads: TypeError"),
        (["rlhf", "json:__version__"], "task = json:__version__|json has no __version__"),
        (["rlhf", "sort", "--response-length", "3"], "longest answer of sort has 5 tokens"),
        (["rlhf", "sort", "--context", "9"], "together 10; use at least 10"),
        (["rlhf", "sort", "--num-minibatches", "3"], "not divisible by num_minibatches = 3"),
        (["rlhf", "sort", "--group-size", "1"], "the baseline is computed from the other"),
        (["rlhf", "sort", "--kl-in", "loss", "--kl-estimator", "k1"], "expected gradient"),
        (["rlhf", "sort", "--kl-estimator", "k2_sequence"], "works only in the loss"),
        (["rlhf", "sort", "--kl-control", "halving"], "a weight of 0 stays 0"),
        (["rlhf", "sort", "--task-params.length", "3"], "unexpected keyword argument 'length'"),
        (["rlhf", "sort", "--overlong-buffer", "8"], "must be below response_length = 5"),
        (["rlhf", "sort", "--objective", "ppo_clip", "--oversampling", "2"], "has no effect"),
        (["train", "sort"], "'sort': is not for train; use `purejaxppo rlhf sort`"),
        (["rlhf", "cartpole"], "'cartpole': is not for rlhf; use `purejaxppo train cartpole`"),
        (["sweep", "--trials", "2", "sort"], "give it directly after sweep"),
        (["sweep", "sort", "--sample", "kl_target=uniform:1,2"], "no effect with kl_control"),
        (["rlhf", "sort", "--kl-beta", "3"], "rlhf has no such option; did you mean --kl-coef"),
        (
            ["rlhf", "sort", "--response-length", "8", "--overlong-buffer", "5"],
            "use at most 3",
        ),
        (["rlhf", "sort", "--task-params.longest", "five"], "must be a number, true or false"),
        (["sweep", "sort", "--grid", "task=sort,reverse"], "task: returns of different"),
        (["sweep", "sort", "--sample", "vf_coef=uniform:1,2"], "no effect with objective = grpo"),
    ],
)
def test_bad_input_gives_one_message(
    given: list[str], words: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1
    assert not any(tmp_path.rglob("config.toml"))


def test_top_k_in_a_config_file_is_explained(tmp_path: Path):
    (tmp_path / "c.toml").write_text('kind = "rlhf"\n[hparams]\ntop_k = 5\n')
    with pytest.raises(ppo.ConfigError, match=r"hparams.top_k: no such setting; learning from a"):
        load_settings(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('kind = "rlfh"\n')
    with pytest.raises(ppo.ConfigError, match="kind = 'rlfh': must be rlhf"):
        load_settings(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('kind = "rlhf"\ngroup_sise = 3\n')
    with pytest.raises(ppo.ConfigError, match=r"did you mean group_size\?"):
        load_settings(tmp_path / "c.toml")


def test_a_score_that_is_not_finite_is_named_and_keeps_the_state(tmp_path: Path, capsys: Any):
    def score(sample: Sample) -> jax.Array:
        bad = jnp.all(sample.responses.tokens[:, :2] == 1, axis=1)
        return jnp.where(bad, jnp.inf, jnp.sum(sample.responses.tokens == 1, axis=1) * 1.0)

    prompts = Prompts(jnp.zeros((1, 1), int), jnp.ones(1, int))
    own = Problem("often", prompts, score, 4, -1, partial(random_params, seed=0))
    config = config_of(
        "rloo", num_prompts=1, group_size=4, num_minibatches=1, total_timesteps=30 * 4 * LENGTH
    )
    task = make_rlhf_task(config, own)
    result = ppo.run(
        task, RLHFHParams(learning_rate=1e-2), run_dir=tmp_path / "r", eval_episodes=4,
        num_seeds=2, devices=1,
    )  # fmt: skip
    assert result.failed
    shown = capsys.readouterr().out
    assert "the score of task often is not finite for" in shown
    assert "first for the prompt '0' and the response '1 1 " in shown
    learner = result.states.learner
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learner.params))
    for seed, update in result.failed.items():
        assert int(learner.updates[seed]) == update - 1


def test_faults_of_a_users_problem_are_one_message():
    problem, _ = table_problem(0)

    def fails(sample: Sample) -> Any:
        return 1 if sample.responses.lengths[0] > 0 else 0

    two = Prompts(jnp.zeros((2, 1), int), jnp.ones(2, int))
    for changes, words in (
        ({"score": fails}, "score of table: TracerBoolConversionError"),
        ({"score": lambda sample: None}, "score of table: returned shape None"),
        ({"reference": lambda made: 1 / 0}, "reference of table: ZeroDivisionError"),
        ({"held_out": two}, "score of table: "),
        ({"held_out": two, "held_out_extras": problem.extras}, "held_out: the extras must be"),
        ({"prompts": Prompts(jnp.zeros((0, 1), int), jnp.zeros(0, int))}, "P at least 1"),
        ({"prompts": Prompts(jnp.zeros((1, 1)), jnp.ones(1, int))}, "must be integers"),
        ({"prompts": Prompts(jnp.zeros((2, 1), int), jnp.ones(1, int))}, r"lengths int32\[1\]"),
        ({"extras": [0.1]}, "the extras must be arrays with one row per prompt"),
    ):
        with pytest.raises(ppo.ConfigError, match=words):
            make_rlhf_task(config_of("rloo"), dataclasses.replace(problem, **changes))


def test_settings_of_the_wrong_type_are_one_message(tmp_path: Path):
    for text, words in (
        ('kind = ["rlhf"]', "kind = .*must be rlhf"),
        ('kind = "rlhf"\nobjective = ["grpo"]', "objective = .*must be one of"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(ppo.ConfigError, match=words):
            load_settings(tmp_path / "c.toml")


def test_hyperparameters_of_other_learners_are_refused():
    with pytest.raises(ppo.ConfigError, match=r"kl_beta = 3.0: has no effect on a language model"):
        ppo.run(small_task(), RLHFHParams(kl_beta=3.0), progress=False)


def test_the_default_buffer_of_dapo_leaves_room_for_right_answers():
    config = RLHFConfig("dapo", "sort", response_length=5, total_timesteps=1024)
    assert config.overlong_buffer == 1
    assert make_rlhf_task(config).config.overlong_buffer == 0
    assert RLHFHParams(clip_eps=0.1).with_clip_of(config.token_objective).clip_higher == (
        pytest.approx(0.14)
    )
    assert RLHFHParams().with_clip_of(config.token_objective).clip_higher == 0.28


def test_evaluate_takes_no_step_limit():
    task = small_task()
    state = jax.jit(partial(task.learner(None).init, data=task.data))(
        jax.random.key(0), RLHFHParams()
    )
    with pytest.raises(ppo.ConfigError, match="max_steps = 3: responses end after response_length"):
        ppo.evaluate(task, state, jax.random.key(0), 2, max_steps=3)


# Learning


def learned(objective: Any, digits: int, tokens: int, num_seeds: int) -> Any:
    config = RLHFConfig(
        objective, "reverse", EnvParams({"shortest": 3, "longest": 3, "digits": digits}),
        response_length=6, num_prompts=32, num_minibatches=8, total_timesteps=tokens,
    )  # fmt: skip
    hparams = RLHFHParams(learning_rate=1.4e-3, ent_coef=0.025, clip_eps=0.1, kl_coef=0.0)
    return ppo.run(config, hparams, num_seeds=num_seeds, eval_episodes=128, progress=False)


@pytest.mark.slow
def test_reversing_digits_is_being_learned():
    result = learned("grpo", digits=3, tokens=20 * 512 * 6, num_seeds=1)
    assert result.metrics["score"][0, 0] < 0.3
    assert result.metrics["score"][0, -1] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo_clip", "reinforce_pp", "rloo", "grpo", "gspo"])
def test_reversing_digits_is_learned(objective: str):
    """To at least 90% exact answers to held-out prompts."""
    result = learned(objective, digits=8, tokens=300_000, num_seeds=2)
    assert (result.metrics["score"][:, 0] < 0.2).all()
    assert (np.mean(result.returns_deterministic == 1, axis=1) >= 0.9).all()
