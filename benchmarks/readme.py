"""Tables of the README, each between two marks and made from a committed result file."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def write_table(name: str, text: str) -> None:
    """Put `text` between the marks that name the script `benchmarks/NAME.py`."""
    begin, end = f"<!-- {name}: benchmarks/{name}.py -->", f"<!-- end of {name} -->"
    head, rest = README.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    README.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
