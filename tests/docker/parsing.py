"""How the tests of docker/ read its files, and what our programs read from their environment."""

import re
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
YAML_FILES = sorted([*DOCKER.rglob("*.yaml"), *DOCKER.rglob("*.yml")])


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, comments dropped and continued lines joined."""
    lines = (line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


def settings_of(program: str) -> set[str]:
    """The LREA_ variables that a program reads."""
    if program == "service":
        return {f"LREA_{name.upper()}" for name in Settings.model_fields}
    files = (ROOT / "cache_builder" / name for name in ("__main__.py", "store_options.py"))
    return {name for file in files for name in re.findall(r"\bLREA_[A-Z_]+\b", file.read_text())}
