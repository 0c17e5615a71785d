"""The repository keeps its promises: what CI runs, what is pinned, what the README names."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TOP_LEVEL = (
    "pyproject.toml",
    "service",
    "model",
    "cache_builder",
    "docker",
    "loadtest",
    "tests",
    "README.md",
    "Makefile",
)
PACKAGES = ("cache_builder", "loadtest", "model", "service")
EXTRAS = ("demo", "plots", "ray", "test", "dev")  # what the lock covers
CUDA = ("nvidia-", "cuda-")  # torch pins these itself, where its build needs them


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock() -> dict[str, str]:
    """Package (normalised name) -> line of the lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if line and not line.startswith("#")}


def closure(requirements: list[str]) -> set[str]:
    """Names of all packages that these need, as the installed ones say."""
    waiting, seen = [Requirement(line) for line in requirements], set()
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if (wanted := (canonicalize_name(requirement.name), frozenset(extras))) in seen:
            continue
        seen.add(wanted)
        for needed in map(Requirement, importlib.metadata.requires(requirement.name) or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name for name, _ in seen}


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_is_as_designed(name: str) -> None:
    assert (ROOT / name).exists()


def test_no_api_key_is_committed() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    key = re.compile(rb"lrea_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
    assert [name for name in files if (ROOT / name).is_file() and key.search((ROOT / name).read_bytes())] == []


def test_ci_runs_make_check_test() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make check test"]


def test_every_dependency_is_pinned_exactly() -> None:
    for line in lock().values():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), (
            f"{line!r}: wanted name==version without a local tag"
        )
    assert lock()["torch"] == "torch==2.13.0"


def test_the_lock_and_torch_agree_about_triton() -> None:
    """torch's CUDA builds pin one Triton; a constraint on another would leave such a machine without an answer."""
    assert (lock()["torch"], lock()["triton"]) == ("torch==2.13.0", "triton==3.7.1")
    pinned = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    assert {str(each.specifier) for each in pinned if each.name == "triton"} <= {"==3.7.1"}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lock is written with 3.11; others need other packages")
def test_lock_holds_what_the_extras_need_and_nothing_else() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert extras.keys() == {*EXTRAS, "embedded"}
    direct = project()["project"]["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]
    needed = {name for name in closure(direct) if not name.startswith(CUDA)}
    assert lock().keys() == needed, "run `make lock`"


def test_wheel_and_import_contracts_name_every_package() -> None:
    tools = project()["tool"]
    assert sorted(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == list(PACKAGES)
    assert sorted(tools["importlinter"]["root_packages"]) == list(PACKAGES)


def test_make_targets_are_listed_by_help_and_phony() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "serve", "test", "check", "lock", "setup", "loadtest", "clean"} <= targets
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(phony.split()) == targets
    assert targets == set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"`make ([a-z-]+)[^`]*`|^ *make ([a-z-]+)", document.read_text(), flags=re.MULTILINE))
        assert {name for pair in named for name in pair if name} <= targets, document.name


def test_files_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
    paths = set(re.findall(rf"`((?:{'|'.join((*PACKAGES, 'docker', 'docs', 'scripts', 'tests'))})/[\w./-]*)`", readme))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_file_tree_of_the_readme_exists() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    trees = [paths for paths in map(tree_paths, blocks) if "model" in paths and "service" in paths]
    assert len(trees) == 1, "wanted one file tree in a fenced block, with model/ and service/ at its top"
    assert [path for path in trees[0] if not (ROOT / path).exists()] == []


def tree_paths(block: str) -> list[str]:
    """Paths of a tree drawn by indentation, with or without lines: the first word of each row, if it is a file's."""
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for row in block.splitlines():
        indent = len(row) - len(row.lstrip(" │├└─"))
        name = row[indent:].partition(" ")[0]
        if not re.fullmatch(r"[\w-]+/|\.?[\w-]+\.[\w.]+|Makefile|LICENSE", name):
            continue  # a description that runs on
        parents = [(column, folder) for column, folder in parents if column < indent]
        path = "/".join([*(folder for _, folder in parents), name.rstrip("/")])
        paths.append(path)
        if name.endswith("/"):
            parents.append((indent, name.rstrip("/")))
    return paths


def test_importing_a_package_does_not_start_anything() -> None:
    script = f"import threading, {', '.join(PACKAGES)}; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=30)
