"""The command line, as a person types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnax
import pytest

import purejaxppo as ppo
from purejaxppo.cli import main

SMALL = ["--total-timesteps=640", "--num-steps=8", "--hidden-sizes=8", "--num-minibatches=2"]


def failed_with_2(argv: list[str], capsys: Any) -> str:
    """Run a command that must fail; what it said, in one line where lines are wrapped."""
    try:
        status: Any = main(argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    text = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --env-id CartPol-v1", "did you mean CartPole-v1?"),
        ("train --num-env 4", "--num-envs"),
        ("train --hparams.lerning-rate 1", "--hparams.learning-rate"),
        ("train --num-envs x", "invalid literal for int"),
        ("train --num-envs 0", "num_envs = 0: must be at least 1"),
        ("train --hparams.gamma 1.2", "purejaxppo: gamma = 1.2: must be at least 0 and at most 1"),
        ("train --hparams.clip-eps -1", "clip_eps = -1.0: must be greater than 0"),
        ("train --num-minibatches 3", "does not divide into num_minibatches = 3"),
        ("train --activation rellu", "invalid choice"),
        ("train none.toml", "config file 'none.toml': No such file or directory"),
        ("train --run-dir /proc/none/here", "cannot be written"),
        ("train --encoder cnn", "use auto or mlp"),
        ("train --action-distribution tanh_normal", "use auto"),
        ("train --num-seeds 0", "num_seeds = 0"),
        ("train --num-envs 1000000000", "must be below 2^31"),
        ("train --wandb", "pip install 'purejaxppo[wandb]'"),
        ("train --eval-episodes 0", "eval_episodes = 0"),
        ("eval /proc/none", "run directory '/proc/none': is not there"),
        ("eval . --checkpoint last", "must be newest, best, or a number"),
        ("eval .", "has no whole checkpoint (there: none)"),
        ("resume /proc/none", "no run to go on with"),
        ("export . x.bin", "has no whole checkpoint"),
        ("eval . --checkpoint " + "1" * 5000, "must be newest, best, or a number"),
        (f"resume {'x' * 300}", "File name too long"),
        (f"eval {'x' * 300}", "File name too long"),
        (f"export . {'x' * 300}", "whole checkpoint"),
        ("train --keep 0", "keep = 0"),
        ("train --checkpoint-every 0", "checkpoint_every = 0.0: must be greater than 0"),
        ("train --checkpoint-every 0.5 --checkpoint-unit updates", "must be a whole number"),
        ("trane", "train"),
        ("", "train"),
    ],
)
def test_bad_input_ends_with_one_clear_message(
    arguments: str, words: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert words in failed_with_2(arguments.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_a_bad_file_and_a_file_in_the_wrong_place(tmp_path: Path, capsys: Any):
    path = tmp_path / "my.toml"
    path.write_text("num_env = 3")
    assert "did you mean num_envs?" in failed_with_2(["train", str(path)], capsys)
    path.write_text("num_envs = 3")
    assert "right after `train`" in failed_with_2(
        ["train", "--num-minibatches", "1", str(path)], capsys
    )


def test_help_shows_each_setting_with_its_docstring_and_default(capsys: Any):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--num-envs INT N, environments stepped side by side. (default: 4)" in text
    assert "--hparams.gamma FLOAT Discount per step. (default: 0.99)" in text
    assert "--seed INT" in text
    assert "[CONFIG.toml]" in text


def test_train_and_eval_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a process of its own: config file, command line over it, run directory, evaluation."""
    (tmp_path / "my.toml").write_text(
        'env_id = "CartPole-v1"\nnum_envs = 2\n[hparams]\ngamma = 0.9\n[run]\nnum_seeds = 3\n'
    )

    def command(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "purejaxppo.cli", *argv],
            cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip

    trained = command("train", "my.toml", "--num-envs", "4", "--run-dir", "m[/x]", *SMALL)
    assert "\x1b" not in trained.stdout  # plain lines when the output is no terminal
    assert "640 environment steps each" in trained.stdout
    assert "learning curve: m[/x]/learning_curve.png" in trained.stdout
    text = (tmp_path / "m[/x]/config.toml").read_text()
    assert "num_envs = 4" in text
    assert "gamma = 0.9" in text
    assert "num_seeds = 3" in text
    assert list((tmp_path / "cache/purejaxppo").iterdir())
    evaluation = json.loads(command("eval", "m[/x]", "--episodes", "9", "--json").stdout)
    assert len(evaluation["return_per_seed"]) == 3
    assert evaluation["episodes"] == 9
    assert main(["eval", str(tmp_path / "m[/x]"), "--deterministic", "--episodes", "5"]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("seed 0: return ")
    assert "mean: " in plain


def test_a_run_that_diverges_exits_1(tmp_path: Path, capsys: Any):
    argv = ["train", "--run-dir", str(tmp_path / "r"), "--hparams.learning-rate", "1e38", *SMALL]
    assert main(argv) == 1
    assert "the loss is not finite at update" in capsys.readouterr().out


def test_a_run_on_an_environment_object_is_not_taken_for_another(tmp_path: Path, capsys: Any):
    config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(8,))
    limit = gymnax.make("CartPole-v1")[1].replace(max_steps_in_episode=7)
    ppo.run(config, env_params=limit, run_dir=tmp_path / "r", eval_episodes=2, progress=False)
    for argv in (["eval", str(tmp_path / "r")], ["train", str(tmp_path / "r/config.toml")]):
        assert "were passed from Python" in failed_with_2(argv, capsys)


def test_eval_names_seeds_that_failed_and_leaves_them_out(tmp_path: Path, capsys: Any):
    argv = ["train", "--run-dir", str(tmp_path / "r"), "--hparams.learning-rate", "1e38", *SMALL]
    main([*argv, "--no-compilation-cache"])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "r"), "--json", "--no-compilation-cache"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["failed_seeds"] == [0]
    assert evaluation["return_mean"] is None
    assert main(["eval", str(tmp_path / "r")]) == 0
    assert "its training failed" in capsys.readouterr().out


def test_envs_lists_what_can_be_trained(capsys: Any):
    assert main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["CartPole-v1", "Box[4]", "Discrete(2)"] for line in lines)
    assert not any("MNIST" in line for line in lines)
