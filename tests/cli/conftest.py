import pytest
from kept import keep_programs


@pytest.fixture(autouse=True)
def cache_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)
