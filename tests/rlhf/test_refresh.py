"""Rounds of reward models and policies, with new pairs between them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept import keep_programs

from purejaxppo.cli import main
from purejaxppo.host.configfile import load_settings
from purejaxppo.host.rundir import sealed
from purejaxppo.rlhf import letters, read_preferences, write_records

DECODER = "num_layers = 1\nwidth = 16\nnum_heads = 2\n"
POLICY = f"""kind = "rlhf"
task = "letters"
objective = "rloo"
response_length = 4
num_prompts = 2
group_size = 4
total_timesteps = 96
kl_control = "proportional"
{DECODER}
[hparams]
kl_target = 0.5
kl_horizon = 50.0
[run]
eval_episodes = 8
"""
REWARD = f"""kind = "reward"
data = "pairs.jsonl"
tokenizer = "letters"
batch_rows = 2
row_length = 32
total_timesteps = 192
{DECODER}
[run]
eval_episodes = 8
"""
WORDS = "rlhf refresh policy.toml reward.toml --rounds 2 --pairs 12 --run-dir".split()
LABELS = """
def earlier(prompts, first, second):
    return [a < b for a, b in zip(first, second)]

def too_few(prompts, first, second):
    return [True]

def words(prompts, first, second):
    return ["yes"] * len(prompts)
"""


@pytest.fixture(autouse=True)
def cache_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)


def write_settings(folder: Path) -> None:
    (folder / "policy.toml").write_text(POLICY)
    (folder / "reward.toml").write_text(REWARD)
    (folder / "my_labels.py").write_text(LABELS)
    write_records(folder / "pairs.jsonl", letters.preferences(40))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with settings, pairs and a finished refresh."""
    folder = tmp_path_factory.mktemp("refresh")
    write_settings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        keep_programs(patch.setattr)
        assert main([*WORDS, "done", "--label", "gold"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the current directory."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def files(run: Path) -> dict[str, Any]:
    """What identifies the results: metrics without times, pairs, and entries of the summaries."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("metrics.csv")):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        place = rows[0].index("seconds")
        found[str(path.relative_to(run))] = [row[:place] + row[place + 1 :] for row in rows]
    for path in sorted(run.rglob("pairs.jsonl")):
        found[str(path.relative_to(run))] = path.read_text()
    for path in sorted(run.rglob("summary.json")):
        table = json.loads(path.read_text())
        found[str(path.relative_to(run))] = table["eval_return_per_seed"]
    return found


@pytest.mark.slow
def test_a_round_uses_all_pairs_and_continues_the_policy(folder: Path):
    first, later = (folder / f"done/round-{n}" for n in (1, 2))
    old, every = read_preferences("pairs.jsonl"), read_preferences(later / "pairs.jsonl")
    texts = [(x.prompt, x.chosen, x.rejected) for x in every]
    assert texts[:40] == [(x.prompt, x.chosen, x.rejected) for x in old]
    assert len(texts) == 52
    one, two = (load_settings(x / "policy/config.toml") for x in (first, later))
    assert one.config.start == ""
    assert two.config.start == "done/round-1/policy"
    assert one.config.reward == ("done/round-1/reward",)
    assert two.config.reward == ("done/round-2/reward",)
    assert load_settings(later / "reward/config.toml").config.data == str(
        Path("done/round-2/pairs.jsonl")
    )
    header, *rows = (x.split(",") for x in (first / "policy/metrics.csv").read_text().splitlines())
    last = float(rows[-1][header.index("kl_coef")])
    assert two.hparams.kl_coef == pytest.approx(last)  # pyright: ignore
    assert last != one.hparams.kl_coef  # pyright: ignore
    kl = float((later / "policy/metrics.csv").read_text().splitlines()[1].split(",")[
        header.index("reference_kl")
    ])  # fmt: skip
    assert kl > 0.0  # the first update of the second round starts away from the reference


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("round-2", marks=pytest.mark.slow),
        pytest.param("round-2/policy", marks=pytest.mark.slow),
        pytest.param("round-2/reward", marks=pytest.mark.slow),
        pytest.param("round-1/policy/summary.json", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_refresh_is_completed(lost: str, folder: Path):
    """Removing what came later leaves the state of an interruption."""
    whole = files(folder / "done")
    path = folder / "done" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost == "round-2/reward":
        shutil.rmtree(folder / "done/round-2/policy")
    assert main(["resume", "done"]) == 0
    assert files(folder / "done") == whole


@pytest.mark.faults
def test_a_refresh_that_is_killed_ends_with_the_same_results(folder: Path):
    """Killed five times at random moments, in any of its parts."""
    start = [sys.executable, "-m", "purejaxppo", *WORDS]
    subprocess.run([*start, "whole", "--label", "gold"], check=True, capture_output=True)
    random, kills = np.random.default_rng(3), 0
    while kills < 5:
        begun = Path("killed/refresh.json").exists()
        words = [*start[:3], "resume", "killed"] if begun else [*start, "killed", "--label", "gold"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(float(random.uniform(4, 25)))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if process.wait() == 0:
            break
    assert kills
    subprocess.run([*start[:3], "resume", "killed"], check=True, capture_output=True)
    assert files(folder / "killed") == files(folder / "whole")


@pytest.mark.slow
def test_labels_are_drawn_with_the_gold_score(folder: Path):
    """Most new pairs are labelled by the sign of the difference of gold scores."""
    new = read_preferences("done/round-2/pairs.jsonl")[40:]
    right = [letters.gold(x.prompt, x.chosen) > letters.gold(x.prompt, x.rejected) for x in new]
    sure = [abs(letters.gold(x.prompt, x.chosen) - letters.gold(x.prompt, x.rejected)) > 2
            for x in new]  # fmt: skip
    assert np.mean(np.array(right)[np.array(sure)]) > 0.7


@pytest.mark.slow
def test_labels_from_a_function(folder: Path):
    assert main([*WORDS, "named", "--label", "my_labels:earlier"]) == 0
    new = read_preferences("named/round-2/pairs.jsonl")[40:]
    assert len(new) == 12
    assert all(x.chosen < x.rejected for x in new)


@pytest.mark.slow
def test_labels_by_hand(folder: Path, capsys: Any):
    """The pairs are written, and read when they are labelled."""
    assert main([*WORDS, "manual"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert "12 pairs are to be labelled" in shown
    assert shown.endswith("purejaxppo resume manual")
    rows = [json.loads(x) for x in Path("manual/round-2/unlabelled.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert all(row["first"] != row["second"] for row in rows)
    assert main(["resume", "manual"]) == 0
    assert "12 pairs are to be labelled" in capsys.readouterr().out
    labelled = [
        {"prompt": x["prompt"], "chosen": x["second"], "rejected": x["first"]} for x in rows
    ]
    text = "".join(json.dumps(x) + "\n" for x in labelled)
    Path("manual/round-2/labelled.jsonl").write_text(text)
    assert main(["resume", "manual"]) == 0
    new = read_preferences("manual/round-2/pairs.jsonl")[40:]
    assert [(x.chosen, x.rejected) for x in new] == [(x["second"], x["first"]) for x in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rlhf refresh reward.toml reward.toml --run-dir x".split(), "has kind = reward"),
        ("rlhf refresh policy.toml --run-dir x".split(), "rlhf refresh needs REWARD"),
        ([*WORDS, "x", "--rounds", "0"], "rounds"),
        ([*WORDS, ".", "--label", "gold"], "is not empty"),
        ([*WORDS, "x", "--label", "my_labels:missing"], "has no missing"),
    ],
)
def test_bad_settings(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    write_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert {x.name for x in tmp_path.iterdir()} >= {"policy.toml", "reward.toml", "pairs.jsonl"}
    assert not list(tmp_path.rglob("config.toml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS, "done", "--label", "gold", "--seed", "1"], "belongs to a refresh with other"),
        ([*WORDS, "done"], "belongs to a refresh with other settings"),
        (["resume", "done", "--total-timesteps", "500"], "have no effect on a refresh"),
    ],
)
def test_bad_settings_of_a_finished_refresh(
    words: list[str], message: str, folder: Path, capsys: Any
):
    before = files(folder)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "message"),
    [("too_few", "returned shape [1] for 12 pairs"), ("words", "other values than true and false")],
)
def test_bad_labels(label: str, message: str, folder: Path, capsys: Any):
    """One message; nothing is written."""
    shutil.copytree("done", "again")
    shutil.rmtree("again/round-2")
    table = json.loads(Path("again/refresh.json").read_text())
    Path("again/refresh.json").write_text(sealed(table | {"label": f"my_labels:{label}"}))
    assert main(["resume", "again"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("again/round-2/pairs.jsonl").exists()
