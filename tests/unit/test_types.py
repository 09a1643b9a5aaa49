"""Room for pages, where the kernel copies fastest."""

import pytest

from memshr.types import PAGE_SIZE, page_buffer


@pytest.mark.parametrize("pages", [0, 1, 31, 33, 5000])
def test_page_buffers_begin_where_pages_do(pages: int) -> None:
    buffer = page_buffer(pages)
    assert buffer.shape == (pages, PAGE_SIZE)
    assert buffer.ctypes.data % PAGE_SIZE == 0
    assert not buffer.any()
    buffer[:] = 1
    assert buffer.all()
