"""The code of the documentation's pages runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGES = sorted(Path("docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_blocks_of_a_page_run(page: Path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    if page.stem == "your-own-parts":
        params = names["result"].states.learner.params
        np.testing.assert_allclose(params, [[2, -1], [2, -1]], atol=0.01)
