import subprocess
from pathlib import Path

import engine_support
import pytest
from interop_support import need

rig = engine_support.rig


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that counts calls and makes one fail, for LD_PRELOAD: sweep/shim.c."""
    need("gcc")
    library = tmp_path_factory.mktemp("sweep") / "shim.so"
    source = Path(__file__).with_name("sweep") / "shim.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library
