"""The repository keeps its promises: what CI runs, what is pinned, what the README names."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.lock import Pin, closure, parse

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
CUDA = ("nvidia-", "cuda-")  # what torch asks for where its build needs it


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock(*names: str) -> dict[str, Pin]:
    """The pins of requirements.lock, or of those with these endings, by normalised name."""
    files = [ROOT / f"requirements{name}.lock" for name in names or ("",)]
    return {key: pin for file in files for key, pin in parse(file.read_text()).items()}


def needs_of_installed(package: str) -> list[str]:
    return importlib.metadata.requires(package) or []


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


@pytest.mark.parametrize("name", ["", "-extras", "-cuda"])
def test_every_line_of_a_lock_is_a_pin_or_its_hash(name: str) -> None:
    """The form itself, not by the script that writes it: nothing else may reach pip, no option and no address."""
    lines = (ROOT / f"requirements{name}.lock").read_text().splitlines()
    for before, line in pairwise(line for line in lines if not line.startswith("#")):
        if before.endswith("\\"):
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
        else:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; [\w\"= ]+)? \\", line), line
    assert lines[-1].startswith("    --hash=")


def test_every_direct_dependency_is_locked_in_a_version_that_it_may_have() -> None:
    locked = lock("", "-extras")
    extras = project()["project"]["optional-dependencies"].values()
    for line in (*project()["project"]["dependencies"], *(line for lines in extras for line in lines)):
        requirement = Requirement(line)
        pin = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version), f"{line}, locked is {pin.version}: run `make lock`"
        assert pin.hashes, line


def test_what_builds_the_package_is_locked() -> None:
    (backend,) = project()["build-system"]["requires"]
    assert backend in project()["project"]["optional-dependencies"]["dev"]
    pin = lock("-extras")["hatchling"]
    assert backend == f"hatchling=={pin.version}"


def test_the_locks_and_torch_agree_about_triton() -> None:
    """torch's CUDA builds pin one Triton; the extras' must be that."""
    assert lock()["torch"].version == "2.13.0"
    assert {lock(name)["triton"].version for name in ("-extras", "-cuda")} == {"3.7.1"}
    pinned = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    assert {str(each.specifier) for each in pinned if each.name == "triton"} <= {"==3.7.1"}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the lock is written with 3.11; others need other packages")
def test_locks_hold_what_is_needed_and_nothing_else() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert extras.keys() == {*EXTRAS, "embedded"}
    runtime = project()["project"]["dependencies"]
    needed, all_needed = (
        {name for name in closure(direct, needs_of_installed) if not name.startswith(CUDA)} - {"pip"}
        for direct in (runtime, runtime + [line for extra in EXTRAS for line in extras[extra]])
    )
    assert lock().keys() == needed - {"triton"}, "run `make lock`"
    assert lock("-extras").keys() == all_needed - lock().keys(), "run `make lock`"
    assert all(name.startswith(CUDA) or name == "triton" for name in lock("-cuda"))


def test_what_a_peer_shares_is_cut_out_of_the_lock_as_pip_reads_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (shared,) = re.findall(r"^PEERS_SHARED := (\S+)$", makefile, flags=re.MULTILINE)
    (command,) = re.findall(r"\$\$\((grep -oE '\^\(.*\)==.*' requirements\.lock)\)", makefile)
    cut = shlex.split(command.replace("$(PEERS_SHARED)", shared))
    done = subprocess.run(cut, cwd=ROOT, capture_output=True, text=True, check=True)
    pins = [Requirement(line) for line in done.stdout.splitlines()]
    assert {pin.name for pin in pins} == set(shared.split("|"))
    assert {str(pin.specifier) for pin in pins} == {f"=={lock()[pin.name].version}" for pin in pins}


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
