"""What Volatility 3 finds in the tests' own images, where it is installed: a reader by people who have seen real ones.

It is no dependency: its licence (VSL 1.0) is not one that this project takes parts under. ``pip install volatility3``
into .venv, and Debian's libsnappy for AVML, run this.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest

from image_writers import XlCore, avml, lime, vmware
from memshr.images import open_image
from odd_cores import PAGE, pattern, write

GUEST = [(1, pattern(1, 70)), (1 << 20, bytes(PAGE) + pattern(1, 30) + pattern(500, 10))]
WRITTEN = {"lime": lime(GUEST), "avml": avml(GUEST), "xen": XlCore(GUEST).packed(), "vmware": vmware(GUEST)[0]}
LAYERS = {"lime": "LimeLayer", "avml": "AVMLLayer", "xen": "XenCoreDumpLayer", "vmware": "VmwareLayer"}
"""Volatility's module -> its class. It does not read dumps of PV guests, whose table it takes for one of numbers."""


@pytest.mark.parametrize("module", LAYERS)
def test_same_pages_as_volatility(tmp_path: Path, module: str) -> None:
    pytest.importorskip("volatility3", reason="Volatility 3 is not installed")
    physical: Any = importlib.import_module("volatility3.framework.layers.physical")
    layer_class: Any = getattr(importlib.import_module(f"volatility3.framework.layers.{module}"), LAYERS[module])
    context: Any = importlib.import_module("volatility3.framework.contexts").Context()
    files = {"base_layer": write(tmp_path / "guest.vmem", WRITTEN[module])}
    if module == "vmware":
        files["meta_layer"] = write(tmp_path / "guest.vmss", vmware(GUEST)[1])
    for role, path in files.items():
        context.config[f"{role}.location"] = path.as_uri()
        context.add_layer(physical.FileLayer(context, role, role))
        context.config[f"top.{role}"] = role
    layer = layer_class(context, "top", "top")
    with open_image(files["base_layer"]) as image:
        assert image.total_pages == 111
        for extent in image.extents:
            assert layer.read(extent.first_gfn * PAGE, len(extent.pages) * PAGE) == extent.pages.tobytes()
