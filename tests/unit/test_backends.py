"""What the command line opens by name, and what it knows of the host beforehand."""

import pytest

from memshr import backends
from memshr.qemu import pagemap
from memshr.qemu.attachment import MAP_RESERVE


@pytest.mark.parametrize(("limit", "budget"), [(65_530, 65_530 - MAP_RESERVE), (MAP_RESERVE, 0), (10, 0)])
def test_sharing_may_not_use_every_mapping(monkeypatch: pytest.MonkeyPatch, limit: int, budget: int) -> None:
    """QEMU needs some for itself: an estimate promises nothing that the mechanism would not do."""
    assert MAP_RESERVE > 0
    monkeypatch.setattr(pagemap, "map_count_limit", lambda: limit)
    assert backends.mapping_budget() == budget


def test_mappings_of_a_host_that_does_not_tell_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file() -> int:
        raise FileNotFoundError

    monkeypatch.setattr(pagemap, "map_count_limit", no_such_file)
    assert backends.mapping_budget() == backends.DEFAULT_MAP_COUNT - MAP_RESERVE
