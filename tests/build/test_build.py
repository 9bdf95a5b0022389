"""The build itself: an edit of a part rebuilds the core, and off Linux it fails with a clear word."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent  # cmake, ninja and cython of the test extra


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads."""
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def cmake(tree, *arguments):
    return subprocess.run([SCRIPTS / "cmake", *arguments], cwd=tree, capture_output=True, text=True, check=False)


def configure(tree, *definitions):
    paths = [f"-DCMAKE_MAKE_PROGRAM={SCRIPTS / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    return cmake(tree, "-S", ".", "-B", "build", "-G", "Ninja", *paths, *definitions)


def test_an_edit_of_any_part_transpiles_the_core_again(tree):
    assert configure(tree).returncode == 0
    assert "Transpiling" in cmake(tree, "--build", "build", "--target", "_cbwcore.c").stdout
    assert "no work to do" in cmake(tree, "--build", "build", "--target", "_cbwcore.c").stdout
    for part in sorted((tree / "src" / "cbwcore").glob("*.px[di]")):
        part.write_text(part.read_text() + "\n")
        again = cmake(tree, "--build", "build", "--target", "_cbwcore.c")
        assert "Transpiling" in again.stdout, (part.name, again.stdout)


def test_off_linux_the_build_says_what_it_needs(tree):
    refused = configure(tree, "-DCMAKE_SYSTEM_NAME=Darwin")
    assert refused.returncode != 0
    assert re.search(r"cbwcore needs Linux.*Darwin", refused.stderr.replace("\n", " "))
