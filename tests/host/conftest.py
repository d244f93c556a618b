import pytest
from kept import keep_programs


@pytest.fixture(autouse=True)
def programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_programs(monkeypatch.setattr)
