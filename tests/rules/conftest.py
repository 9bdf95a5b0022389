import os

import engine_support
import pytest

import cbwcore

rig = engine_support.rig


@pytest.fixture
def set_budget():
    """``set_budget(mib)``: the budget of copy buffers, for this test; in bytes."""
    before = cbwcore.limits.copy_buffers

    def set_budget(mib):
        cbwcore.limits.copy_buffers = mib << 20
        return mib << 20

    yield set_budget
    cbwcore.limits.copy_buffers = before


@pytest.fixture
def open_direct(rig):
    """``open_direct(folder, content)``: a disk opened with O_DIRECT."""

    def open_direct(folder, content):
        path = folder / f"direct{len(os.listdir(folder))}"
        path.write_bytes(content)
        try:
            return rig.open(path, content, direct=True)
        except cbwcore.ConfigError as e:
            pytest.skip(str(e))

    return open_direct
