"""Write generated tables into the README and the documentation, each between two markers."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"


def write_table(name: str, text: str, script: str = "") -> None:
    """Replace the text between two markers, on the page that contains them.

    The markers are `<!-- NAME: benchmarks/SCRIPT.py -->` and `<!-- end of NAME -->`; `script`
    defaults to the name.
    """
    begin, end = f"<!-- {name}: benchmarks/{script or name}.py -->", f"<!-- end of {name} -->"
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    page = next(page for page in pages if begin in page.read_text(encoding="utf-8"))
    head, rest = page.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
