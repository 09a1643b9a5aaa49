"""How many mappings an estimate counts on."""

import pytest

from memshr.qemu import mapping_budget
from memshr.qemu.mapping_budget import DEFAULT_MAP_COUNT, MAP_RESERVE


@pytest.mark.parametrize(("limit", "budget"), [(65_530, 65_530 - MAP_RESERVE), (MAP_RESERVE, 0), (10, 0)])
def test_sharing_may_not_use_every_mapping(monkeypatch: pytest.MonkeyPatch, limit: int, budget: int) -> None:
    """QEMU needs some for itself: an estimate promises nothing that the mechanism would not do."""
    assert MAP_RESERVE > 0
    monkeypatch.setattr(mapping_budget, "map_count_limit", lambda: limit)
    assert mapping_budget.mapping_budget() == budget


def test_mappings_of_a_host_that_does_not_tell_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file() -> int:
        raise FileNotFoundError

    monkeypatch.setattr(mapping_budget, "map_count_limit", no_such_file)
    assert mapping_budget.mapping_budget() == DEFAULT_MAP_COUNT - MAP_RESERVE
