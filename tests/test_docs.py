"""The code in the README and on the site's pages runs, and the reference is complete."""

import inspect
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import purejaxppo as ppo
from purejaxppo import rlhf
from purejaxppo.cli import main
from purejaxppo.cli.main import _parse

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "reference" not in path.parts),
]
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
STEPS = 1024
"""Environment steps of the runs on the pages, in place of those that they name."""

SLOW = (
    "get-started", "sweeps", "docs/index", "rlhf/index", "rlhf/preferences",
    "your-own-parts", "runs", "rendering",
    "environments",
)  # fmt: skip
"""Pages whose code compiles much that the other pages compile too."""

_slow = pytest.mark.slow


def _is_slow(page: Path) -> bool:
    return str(page.with_suffix("")).endswith(SLOW)


_pages = [
    pytest.param(page, every, marks=[_slow] if every or _is_slow(page) else [], id=name)
    for page in WITH_CODE
    for every, name in ((False, page.stem), (True, f"{page.stem}-all"))
]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of a page take few steps, in an empty directory that also has `configs/`."""
    mpl.use("agg")

    def capped(kind: Any, *args: Any, **given: Any) -> Any:
        wanted = given.pop("total_timesteps", STEPS)
        return kind(*args, total_timesteps=min(wanted, STEPS), **given)

    monkeypatch.setattr(ppo, "Config", partial(capped, ppo.Config))
    monkeypatch.setattr(rlhf, "RLHFConfig", partial(capped, rlhf.RLHFConfig))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions):\n    return [-0.1 * len(text) for text in completions]\n"
    )


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("page", "every"), _pages)
def test_the_code_of_a_page_runs(page: Path, every: bool):
    """Commands without a run directory are only parsed, unless `every`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        else:
            for arguments in commands(block):
                if arguments[:2] == ["rlhf", "refresh"]:  # several runs of full length
                    assert _parse(arguments), arguments
                    continue
                assert status(shortened(arguments, every)) == 0, arguments
    check = RESULTS.get(page.stem)
    if check is not None:
        check(names)


def status(arguments: list[str]) -> Any:
    try:
        return main(arguments)
    except SystemExit as stopped:  # --help
        return stopped.code


def commands(block: str) -> list[list[str]]:
    """Arguments of the commands of a block, which are all of `purejaxppo`."""
    lines = block.replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert all(words[0] == "purejaxppo" for words in found), block
    return [words[1:] for words in found]


def shortened(arguments: list[str], every: bool) -> list[str]:
    if arguments[0] == "resume":
        return [str(2 * STEPS) if word == "600_000" else word for word in arguments]
    trains = arguments[0] in ("train", "sweep", "rlhf")
    trains &= arguments[:2] not in (["rlhf", "score"], ["rlhf", "evaluate"])
    if not trains or "--help" in arguments:
        return arguments
    short = [*arguments, "--total-timesteps", str(STEPS), "--eval-episodes", "4"]
    if every or "--run-dir" in arguments or "--print-config" in arguments:
        return short
    return [*short, "--dry-run" if arguments[0] == "sweep" else "--print-config"]


def is_fitted(names: dict[str, Any]) -> None:
    params = names["result"].states.learner.params
    np.testing.assert_allclose(params, [[2, -1], [2, -1]], atol=0.01)


def has_its_shape(names: dict[str, Any]) -> None:
    assert names["metrics"]["episode_return"].shape[:2] == (64, 4)


def has_actions(names: dict[str, Any]) -> None:
    assert names["value"].shape == names["action"].shape == names["actions"].shape == (8,)


RESULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "policies": has_actions,
    "your-own-parts": is_fitted,
    "README": has_its_shape,
}


def test_every_public_name_is_in_the_reference_and_has_a_docstring():
    pages = (ROOT / "docs/reference").glob("*.md")
    found = [
        name
        for page in pages
        for name in re.findall(r"^::: purejaxppo\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(found) == sorted(ppo.__all__)
    tokens = (ROOT / "docs/reference/language-models.md").read_text(encoding="utf-8")
    assert all(f"::: purejaxppo.rlhf.{name}\n" in tokens for name in rlhf.__all__)
    for name in set(found) - {"OBJECTIVES"}:
        text = inspect.getdoc(getattr(ppo, name)) or ""
        assert len(text) > 20, name
        assert not text.startswith(f"{name}("), name  # what NamedTuple and dataclass make


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_algorithms_page_lists_what_the_table_holds():
    page = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    for objective in ppo.OBJECTIVES.values():
        own = ", ".join(f"`{x}`" for x in sorted(objective.reads - {"bootstrap_time_limits"}))
        chosen = ", ".join(f"{name} = {value}" for name, value in objective.defaults.items())
        words = objective.maximises.replace("|", r"\|")
        assert f"| `{objective.name}` | {words} | {own} | {chosen} |" in page


STIFF = (
    r"\btrainings\b", r"\bgo(es|ne|ing)? on (with|from|by)\b", r"\banew\b", r"\bonce more\b",
    r"\bfor ever\b", r"\bwithout a word\b", r"\bsuch a one\b", r"\bwhat (comes|came) (of|to)\b",
    r"\bdealt out\b", r"\bat hand\b", r"\b(steered|weighed)\b", r"\bof another (run|training)\b",
    r"\bwhere it is given\b", r"nobody's", r"\bby others\b", r"\bis there already\b",
)  # fmt: skip
"""Phrases for which there is a plainer one: runs, continues, again, forever, distributed, ..."""


def test_the_text_has_none_of_the_phrases_that_it_once_had():
    folders = ("purejaxppo", "docs", "configs", "benchmarks", "notebooks", "tests")
    paths = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".toml", ".ipynb") and path.name != Path(__file__).name
    ]
    stiff = re.compile("|".join(STIFF), re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in [*paths, *ROOT.glob("*.md"), ROOT / "Makefile"]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if stiff.search(line)
    ]
    assert not found, "\n".join(found)
