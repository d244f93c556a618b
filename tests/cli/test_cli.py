"""The command line as users type it."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import gymnax
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo.cli import main, options
from purejaxppo.host.configfile import Settings, load_settings, settings_from
from purejaxppo.sweeps.settings import SweepSettings

SMALL = ["--total-timesteps=640", "--num-steps=8", "--hidden-sizes=8", "--num-minibatches=2"]


def failed_with_2(argv: list[str], capsys: Any) -> str:
    """Run a command that must fail with status 2; return its output with wrapped lines joined."""
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
        ("train --hparams.lerning-rate 1", "did you mean --learning-rate?"),
        ("train --lr 1", "did you mean --learning-rate?"),
        ("sweep --seeds 4", "--seeds: sweep has no such option; did you mean --num-seeds?"),
        ("train --run.keeep 1", "did you mean --keep?"),
        ("train --normalize-obs=no", "must be true or false; to turn it off, write --no-normalize"),
        ("train --no-normalize-obs=true", "--no-normalize-obs takes no value"),
        ("eval . --json=0", "--json=0: must be true or false; to turn it off, leave it out"),
        ("train --env-params.max-steps-in-episode nan", "= nan: must be finite"),
        ("train --env-params.max-steps-in-episode inf", "= inf: must be finite"),
        ("train --env-params.max-steps-in-episode 1e20", "must be a whole number below 2^31"),
        ("train --env-params.max-steps-in-episode 0", "must be at least 1"),
        ("train --num-envs x", "--num-envs x: must be a whole number"),
        ("train --num-envs", "--num-envs: needs a value"),
        ("train --hidden-sizes 8 a", "'a': no such environment"),
        ("train --hidden-sizes a", "--hidden-sizes a: must be a whole number"),
        ("train --gamma much", "--gamma much: must be a number"),
        ("train --gamma=1.2", "gamma = 1.2: must be at least 0 and at most 1"),
        ("train cartpol", "no such file, shipped config or environment; did you mean cartpole?"),
        ("train a.toml b.toml", "'b.toml': train takes one config or environment"),
        ("train --env-params.max_step 3", "did you mean max_steps_in_episode?"),
        ("train --env-params.gravity true", "env_params.gravity = True: must be a number"),
        ("train --env-params.gravity=strong", "must be a number, true or false"),
        ("train --eval-every 1.5", "must be a whole number, since eval_unit = updates"),
        ("eval", "eval needs RUN_DIR, as in `purejaxppo eval RUN_DIR`"),
        ("export x", "export needs FILE"),
        ("plot a b", "'b': one argument too many"),
        ("eval . --trial best", "is not a sweep; leave out --trial"),
        ("resume . --seed 1", "seed = 1: needs --trial"),
        ("train --num-envs 0", "num_envs = 0: must be at least 1"),
        ("train --hparams.gamma 1.2", "purejaxppo: gamma = 1.2: must be at least 0 and at most 1"),
        ("train --hparams.clip-eps -1", "clip_eps = -1.0: must be greater than 0"),
        ("train --num-minibatches 3", "is not divisible by num_minibatches = 3"),
        ("train --activation rellu", "must be one of tanh, relu, gelu, silu (did you mean relu?)"),
        ("train none.toml", "config file 'none.toml': No such file or directory"),
        ("train --run-dir /proc/none/here", "cannot be written"),
        ("train --encoder cnn", "use auto or mlp"),
        ("train --action-distribution tanh_normal", "use auto"),
        ("train --num-seeds 0", "num_seeds = 0"),
        ("train --num-envs 1000000000", "must be below 2^31"),
        ("train --wandb", "pip install 'purejaxppo[wandb]'"),
        ("train --eval-episodes 0", "eval_episodes = 0"),
        ("eval /proc/none", "run directory '/proc/none': does not exist"),
        ("eval . --checkpoint last", "must be newest, best, or a number"),
        ("eval .", "no complete checkpoint found in '.' (existing: none)"),
        ("resume /proc/none", "no config.toml found, so there is no run to resume"),
        ("export . x.bin", "no complete checkpoint found"),
        ("eval . --checkpoint " + "1" * 5000, "must be newest, best, or a number"),
        (f"resume {'x' * 300}", "File name too long"),
        (f"eval {'x' * 300}", "File name too long"),
        (f"export . {'x' * 300}", "complete checkpoint"),
        ("train --keep 0", "keep = 0"),
        ("train --checkpoint-every 0", "checkpoint_every = 0.0: must be greater than 0"),
        ("train --checkpoint-every 0.5 --checkpoint-unit updates", "must be a whole number"),
        ("trane", "did you mean train?"),
        ("", "no command given; the commands are train, sweep"),
    ],
)
def test_bad_input_gives_one_clear_message(
    arguments: str, words: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert words in failed_with_2(arguments.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_bad_config_file_is_refused(tmp_path: Path, capsys: Any):
    path = tmp_path / "my.toml"
    path.write_text("num_env = 3")
    assert "did you mean num_envs?" in failed_with_2(["train", str(path)], capsys)


def printed_config(capsys: Any, *arguments: str) -> Settings:
    assert main([*arguments, "--print-config"]) == 0
    table = tomllib.loads(capsys.readouterr().out)
    table.pop("sweep", None)
    return settings_from(table)


@pytest.mark.parametrize("source", ["configs/cartpole.toml", "cartpole"])
def test_config_may_come_anywhere_and_options_override_it(source: str, capsys: Any):
    shipped = load_settings("configs/cartpole.toml")
    assert printed_config(capsys, "train", source) == shipped
    found = printed_config(
        capsys, "train", "--num-seeds", "3", source, "--hidden-sizes", "8", "--normalize-obs"
    )
    assert found.config.num_envs == shipped.config.num_envs
    assert (found.run.num_seeds, found.config.hidden_sizes) == (3, (8,))
    assert found.config.normalize_obs
    found = printed_config(
        capsys, "train", "--hparams.gamma", "0.5", "--hidden-sizes", "8", "16",
        "--learning_rate=1e-5", source,
    )  # fmt: skip
    assert found.config.hidden_sizes == (8, 16)
    assert (found.hparams.gamma, found.hparams.learning_rate) == (0.5, 1e-5)
    assert found.hparams.gae_lambda == shipped.hparams.gae_lambda


def test_flags_take_true_and_false(capsys: Any):
    for arguments, wanted in (
        (["--normalize-obs=false"], False),
        (["--normalize-obs", "true"], True),
        (["--normalize-obs", "false"], False),
        (["--normalize-obs=True"], True),
    ):
        found = printed_config(capsys, "train", *arguments)
        assert found.config.normalize_obs is wanted
    assert (
        main(["train", "--print-config=false", "--num-envs=0"]) == 2
    )  # not printed, but still checked


@pytest.mark.parametrize("none", ["none", "None"])
def test_none_may_be_capitalised(none: str, capsys: Any):
    assert printed_config(capsys, "train", "--target-kl", none).hparams.target_kl is None
    space = SweepSettings(grid=(f"clip_higher={none},0.3", "normalize_obs=True,false")).space
    assert space.grid == (("clip_higher", (None, 0.3)), ("normalize_obs", (True, False)))


def test_search_options_override_the_config_file(tmp_path: Path, capsys: Any):
    path = tmp_path / "s.toml"
    path.write_text(
        '[sweep]\ngrid = ["gamma=0.9,0.99", "num_envs=4,8"]\nsample = ["ent_coef=uniform:0,1"]\n'
    )
    options = ["--grid", "gamma=0.5", "--grid", "ent-coef=0,1", "--print-config"]
    assert main(["sweep", str(path), *options]) == 0
    found = tomllib.loads(capsys.readouterr().out)["sweep"]
    assert found["grid"] == ["num_envs=4,8", "gamma=0.5", "ent-coef=0,1"]
    assert not found.get("sample")


def test_sweep_refuses_settings_of_runs(tmp_path: Path, capsys: Any):
    path = tmp_path / "s.toml"
    for line in ('checkpoint_unit = "updates"', "eval_every = 10.0", "tensorboard = true"):
        path.write_text(f'[run]\nkeep = 5\n{line}\n[sweep]\ngrid = ["gamma=0.9,0.99"]\n')
        said = failed_with_2(["sweep", str(path), "--print-config"], capsys)
        assert f"run.{line}: a sweep writes results.csv" in said


@pytest.mark.parametrize("end", [">&-", "> /dev/full", "2>&-"])
def test_closed_or_full_output_gives_no_traceback(end: str, tmp_path: Path):
    def status(command: str) -> int:
        done = subprocess.run(
            f"{sys.executable} -m purejaxppo {command} {end}",
            shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode

    assert status("--version") == (end == "> /dev/full")
    assert status(f"train --run-dir r {' '.join(SMALL)}") == 0
    assert (tmp_path / "r/summary.json").exists()


def test_environment_may_replace_the_config(capsys: Any):
    found = printed_config(capsys, "train", "Acrobot-v1", "--num-envs", "2")
    assert found == Settings(ppo.Config(env_id="Acrobot-v1", num_envs=2))
    assert printed_config(capsys, "sweep", "Acrobot-v1").config.env_id == "Acrobot-v1"


def test_environment_parameters_are_used_recorded_and_restored(tmp_path: Path, capsys: Any):
    run = str(tmp_path / "r")
    limit = ["--env-params.max-steps-in-episode", "7"]
    assert main(["train", "CartPole-v1", *limit, "--run-dir", run, *SMALL]) == 0
    text = (tmp_path / "r/config.toml").read_text()
    assert "[env_params]\nmax_steps_in_episode = 7\n" in text
    with (tmp_path / "r/metrics.csv").open() as file:
        lengths = [float(row["episode_length"]) for row in csv.DictReader(file)]
    assert np.nanmax(lengths) <= 7
    capsys.readouterr()
    assert main(["eval", run, "--json", "--episodes", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["return_mean"] <= 7
    assert main(["train", str(tmp_path / "r/config.toml"), "--print-config"]) == 0
    assert "max_steps_in_episode = 7" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_shows_each_setting_with_its_docstring_in_groups(command: str, capsys: Any):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--gamma FLOAT Discount factor per step. (default: 0.99)" in text
    assert "[CONFIG]" in text
    groups = [f"{name} options" for name in ("common", "algorithm", "network", "hyperparameter")]
    at = [text.index(name) for name in groups]
    assert at == sorted(at)
    for table in (ppo.Config, ppo.HParams):
        for name in (f.name for f in dataclasses.fields(table) if f.name != "env_params"):
            option = f" --{name.replace('_', '-')}"
            shown = text.count(f"{option} ") + text.count(f"{option}, --no-")
            assert shown >= 1, option


def test_every_option_has_a_description():
    """Including the options in groups generated from settings."""
    options.join_help_lines()
    for command in (options.Train, options.Sweep):
        for group in dataclasses.fields(command):
            for option in () if group.name == "config" else dataclasses.fields(group.type):
                assert option.metadata.get("help"), option.name


def test_help_and_argument_errors_do_not_import_jax():
    code = """
import sys
from purejaxppo.cli import main, options
from purejaxppo.host.configfile import Settings, load_settings, settings_from
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert main(["train", "--num-env", "4"]) == 2
assert main(["train", "cartpole", "--print-config"]) == 0
assert main(["--version"]) == 0
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_closed_pipe_ends_silently():
    """As in `purejaxppo envs | head`, where the reader exits before all output is written."""
    code = """
import sys
from purejaxppo.cli import commands, entry
commands._envs = lambda _: [print("x" * 99) for _ in range(9999)] and 0
sys.argv = ["purejaxppo", "envs"]
entry()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_shell_completion_includes_options(capsys: Any):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    assert not stop.value.code
    assert "--learning-rate" in capsys.readouterr().out


def test_train_and_eval_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Config file, options that override it, run directory and evaluation, as subprocesses."""
    (tmp_path / "my.toml").write_text(
        'env_id = "CartPole-v1"\nnum_envs = 2\n[hparams]\ngamma = 0.9\n[run]\nnum_seeds = 3\n'
    )

    def command(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "purejaxppo", *argv],
            cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip

    trained = command("train", "my.toml", "--num-envs", "4", "--run-dir", "m[/x]", *SMALL)
    assert "\x1b" not in trained.stdout  # plain lines if the output is not a terminal
    assert trained.stdout.startswith("purejaxppo 0.1.0: loading JAX\n")
    assert "= 640 environment steps per seed" in trained.stdout
    assert " CPU core" in trained.stdout
    assert " steps/s over 3 seeds" in trained.stdout
    assert "evaluation return, sampled actions: " in trained.stdout
    assert "evaluation return, deterministic actions: " in trained.stdout
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


def test_diverged_run_exits_with_status_1(tmp_path: Path, capsys: Any):
    argv = ["train", "--run-dir", str(tmp_path / "r"), "--learning-rate", "1e38", *SMALL]
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "the loss is not finite at update" in said
    assert "every seed failed, so there is no return to report" in said

    assert main(["export", str(tmp_path / "r"), str(tmp_path / "x.bin")]) == 0
    assert "seed 0 failed: exporting its last good state" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "r")]) == 1
    said = capsys.readouterr().out
    assert "every seed failed" in said
    assert "to train longer" not in said
    longer = ["resume", str(tmp_path / "r"), "--total-timesteps=9999"]
    assert "so no seed can be trained longer" in failed_with_2(longer, capsys)


def test_run_with_a_passed_environment_is_refused(tmp_path: Path, capsys: Any):
    config = ppo.Config(total_timesteps=64, num_steps=8, hidden_sizes=(8,))
    limit = gymnax.make("CartPole-v1")[1].replace(max_steps_in_episode=7)
    ppo.run(config, env_params=limit, run_dir=tmp_path / "r", eval_episodes=2, progress=False)
    for argv in (["eval", str(tmp_path / "r")], ["train", str(tmp_path / "r/config.toml")]):
        assert "passed from Python" in failed_with_2(argv, capsys)


def test_eval_reports_failed_seeds_and_excludes_them(tmp_path: Path, capsys: Any):
    argv = ["train", "--run-dir", str(tmp_path / "r"), "--learning-rate", "1e38", *SMALL]
    main([*argv, "--no-compilation-cache"])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "r"), "--json", "--no-compilation-cache"]) == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert evaluation["failed_seeds"] == [0]
    assert evaluation["return_mean"] is None
    assert main(["eval", str(tmp_path / "r")]) == 0
    assert "this seed failed" in capsys.readouterr().out


def test_envs_lists_environments(capsys: Any):
    assert main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["CartPole-v1", "Box[4]", "Discrete(2)", "500"] in [line.split() for line in lines]
    assert not any("MNIST" in line for line in lines)
    assert any("purejaxppo envs jumanji/" in line for line in lines)
    assert not any("Snake" in line for line in lines)


def test_envs_says_all_about_one(capsys: Any):
    assert main(["envs", "CartPole-v1"]) == 0
    shown = capsys.readouterr().out
    for words in ("Box[4]", "Discrete(2)", "500", "masspole = 0.1", "purejaxppo train CartPole-v1"):
        assert words in shown


def test_envs_with_a_pattern(capsys: Any):
    assert main(["envs", "navix/*Empty*-8x8*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["environment", "navix/Navix-Empty-8x8-v0", "navix/Navix-Empty-Random-8x8-v0"]
    assert main(["envs", "navix/nothing"]) == 2
    assert "env_id = 'navix/nothing': no such environment" in capsys.readouterr().err
    assert main(["envs", "nothing"]) == 2
    assert "no environment matches 'nothing'" in capsys.readouterr().err
