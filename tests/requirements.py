"""Print what pyproject.toml says that building, running and testing cbwcore needs, one requirement a line.

For builds of variants (sanitizers, coverage, mutants) in environments of their own, which install the package without
its dependencies and without build isolation."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> list[str]:
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)
    package = project["project"]
    return project["build-system"]["requires"] + package["dependencies"] + package["optional-dependencies"]["test"]


if __name__ == "__main__":
    print("\n".join(requirements()))
