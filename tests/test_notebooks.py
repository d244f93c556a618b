"""Notebooks run from top to bottom without errors."""

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


SHORTER = {
    "01_quickstart": {"total_timesteps=100_000": "total_timesteps=8_192"},
    "02_sweeps": {"total_timesteps=4_096": "total_timesteps=1_024", "64": "4"},
    "03_from_reinforce_to_ppo": {
        "total_timesteps=40_000": "total_timesteps=8_192",
        'optimization_level": 1': 'optimization_level": 0',
    },
    "04_rlhf": {
        "total_timesteps=400_000": "total_timesteps=20_000",
        "tokens: int = 1_000_000": "tokens: int = 20_000",
        "800_000": "20_000",
        "total_timesteps=250_000": "total_timesteps=5_000",
        "total_timesteps=150_000": "total_timesteps=5_000",
        "pairs=3000": "pairs=40",
        "[:8000]": "[:400]",
    },
}
"""Replacements in the code that shorten training."""


def run_notebook(name: str, folder: Path, shorter: dict[str, str]) -> list[Any]:
    """Run a notebook and return the outputs of all cells."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for number, written in shorter.items():
        cells = [c for c in notebook.cells if c.cell_type == "code" and number in c.source]
        assert cells
        for cell in cells:
            cell.source = cell.source.replace(number, written)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def pictures(found: list[Any]) -> int:
    return sum("image/png" in out.get("data", {}) for out in found)


def test_every_notebook_has_a_shorter_form():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SHORTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_notebook_runs_for_a_shorter_time(name: str, tmp_path: Path):
    found = run_notebook(name, tmp_path, SHORTER[name])
    assert not [out for out in found if out.output_type == "error"]
    assert pictures(found) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTER)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With full compiler optimisation, since training takes longer than compiling."""
    monkeypatch.delenv("XLA_FLAGS")
    found = run_notebook(name, tmp_path, {})
    assert not [out for out in found if out.output_type == "error"]
    assert pictures(found) >= 2
