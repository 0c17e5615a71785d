"""The images copy what exists, are pinned, do not run as root and set only settings that exist (read, not built)."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docker.parsing import DOCKER, DOCKERFILES, ROOT, YAML_FILES, instructions, settings_of

BASE_IMAGE = "python:3.11-slim-bookworm"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_copied_paths_exist_and_are_not_ignored(dockerfile: Path) -> None:
    copied = [
        source
        for word, rest in instructions(dockerfile)
        if word == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    ]
    assert copied
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied:
        assert (ROOT / source).exists(), f"{dockerfile.name} copies {source}, which is not in the repository"
        assert source.rstrip("/") in allowed, f"{dockerfile.name} copies {source}, which .dockerignore leaves out"


def test_dockerignore_lets_nothing_through_that_no_image_copies() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    copied = {
        source.rstrip("/")
        for file in DOCKERFILES
        for word, rest in instructions(file)
        if word == "COPY"
        for source in rest.split()
    }
    assert {line[1:] for line in lines if line[0] == "!"} <= copied


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_pinned_and_runs_without_root(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert {rest.split()[0] for word, rest in steps if word == "FROM"} == {BASE_IMAGE}
    last_stage = steps[max(index for index, (word, _) in enumerate(steps) if word == "FROM") :]
    (user,) = [rest for word, rest in last_stage if word == "USER"]
    assert user == "10001:10001"
    (entry,) = [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT"]  # a shell would swallow SIGTERM
    program = dockerfile.name.removesuffix(".Dockerfile")
    assert entry == ["python", "-m", {"service": "service", "builder": "cache_builder"}[program]]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_installs_only_what_a_lock_verifies(dockerfile: Path) -> None:
    installs = [
        install
        for word, rest in instructions(dockerfile)
        if word == "RUN"
        for install in re.findall(r"\bpip install (.*?)(?: ;;|&&|$)", rest)
    ]
    assert len(installs) == 3
    for install in installs:
        assert install.startswith("--no-deps --require-hashes "), install
        assert set(re.findall(r"-r (\S+)", install)) <= {"torch.lock", "requirements.lock", "requirements-cuda.lock"}


def test_torch_is_cut_out_of_the_lock_with_its_hashes() -> None:
    (cut,) = {
        command
        for file in DOCKERFILES
        for command in re.findall(r"sed -n '[^']+' requirements\.lock", file.read_text())
    }
    done = subprocess.run(shlex.split(cut), cwd=ROOT, capture_output=True, text=True, check=True)
    first, *hashes = done.stdout.splitlines()
    assert re.fullmatch(r"torch==[\d.]+ \\", first)
    assert len(hashes) > 20
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image_sets_only_settings_that_exist(dockerfile: Path) -> None:
    program = dockerfile.name.removesuffix(".Dockerfile")
    for word, rest in instructions(dockerfile):
        if word == "ENV":
            assert set(re.findall(r"\b(LREA_[A-Z_]+)=", rest)) <= settings_of(program)


def test_dockerfiles_install_in_the_same_way() -> None:
    """The two first stages are one truth in two files; this keeps them equal."""
    service, builder = (instructions(DOCKER / f"{name}.Dockerfile") for name in ("service", "builder"))
    end = [word for word, _ in service].index("FROM", 1)
    assert service[:end] == builder[:end]


def test_service_is_healthy_while_it_lives() -> None:
    (health,) = [rest for word, rest in instructions(DOCKER / "service.Dockerfile") if word == "HEALTHCHECK"]
    command = json.loads(health[health.index("[") :])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])
    assert "/livez" in command[2]


def test_every_yaml_file_parses() -> None:
    assert len(YAML_FILES) >= 10
    for file in YAML_FILES:
        assert all(document for document in yaml.safe_load_all(file.read_text())), file


@pytest.mark.parametrize("file", [*DOCKERFILES, *YAML_FILES], ids=lambda path: str(path.relative_to(DOCKER)))
def test_files_are_tidy(file: Path) -> None:
    text = file.read_text()
    assert text.endswith("\n")
    assert "\t" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert not [line for line in text.splitlines() if line != line.rstrip()]
