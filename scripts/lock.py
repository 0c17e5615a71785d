"""Write the locks: exact versions, each with the sha256 of every file of its release. `make lock` runs this.

    python scripts/lock.py --extras test,dev [--upgrade NAMES|all] [--pip-flags=FLAGS] torch==2.13.0

    requirements.lock         what the service and the cache builder need
    requirements-extras.lock  what the extras add to it
    requirements-cuda.lock    what torch's CUDA build adds to it

pip resolves, for the Python and the platform that run this, and keeps each version that a lock has unless it is named
in --upgrade. The index says the hashes of the files for all others. Index, credentials, certificates and proxy are
those that pip is set up with; pip has no public interface to them, so this reads its internals as pip-tools does.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pip._internal.cli.req_command import RequirementCommand
from pip._internal.commands import create_command
from pip._internal.network.session import PipSession
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from pip._vendor.packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
MAIN, EXTRAS, CUDA = (ROOT / f"requirements{suffix}.lock" for suffix in ("", "-extras", "-cuda"))
# Each environment brings its own pip: one that installs cannot verify itself.
LEFT_OUT = {"pip"}
ENTRY = r"^([\w.-]+)==([\w.!]+)(?: ; ([^\\\n]+?))?((?: \\\n +--hash=sha256:[0-9a-f]{64})*)$"
SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"

HEADS = {
    MAIN: """\
# Written by `make lock`: what the service and the cache builder need, with the sha256 of every file of each release.
# Resolved with Python 3.11 on Linux; what only another Python needs is not here.
# "DO NOT MATCH THE HASHES" for torch? Its index has builds (+cpu) that the one which wrote this lock doesn't list. Let
#     make lock PIP_FLAGS="--extra-index-url URL"
# ask that index too: it adds the hashes of this release and leaves the versions alone. For anything else, be alarmed.
""",
    EXTRAS: "# Written by `make lock`: what demo, tests, benchmarks and checks need beside requirements.lock.\n",
    CUDA: "# Written by `make lock`: what torch's CUDA build needs on Linux beside requirements.lock.\n",
}


@dataclass(frozen=True)
class Pin:
    """One release: its name as its authors write it, its version without a local tag, sha256 of its files in hex.

    marker: where it is needed, in the words of pyproject.toml; empty for everywhere.
    """

    name: str
    version: str
    hashes: frozenset[str]
    marker: str = ""

    @property
    def key(self) -> str:
        return canonicalize_name(self.name)


def parse(text: str) -> dict[str, Pin]:
    """The pins of a lock by their normalised names."""
    pins = (
        Pin(name, version, frozenset(re.findall(r"[0-9a-f]{64}", hashes)), marker)
        for name, version, marker, hashes in re.findall(ENTRY, text, flags=re.MULTILINE)
    )
    return {pin.key: pin for pin in pins}


def render(head: str, pins: Iterable[Pin]) -> str:
    """The text of a lock, packages and hashes sorted."""
    return head + "".join(f"{entry(pin)}\n" for pin in sorted(pins, key=lambda pin: pin.key))


def entry(pin: Pin) -> str:
    """A requirement as pip reads it, its hashes on lines of their own."""
    requirement = f"{pin.name}=={pin.version}" + (f" ; {pin.marker}" if pin.marker else "")
    return " \\\n    ".join([requirement, *(f"--hash=sha256:{each}" for each in sorted(pin.hashes))])


def resolve(requirements: list[str], constraints: Iterable[Pin], flags: list[str]) -> list[dict[str, Any]]:
    """What pip would install of these in an empty environment, as its report says it."""
    with tempfile.TemporaryDirectory() as folder:
        pins, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        pins.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", report, "-c", pins, *flags, *requirements], cwd=ROOT, check=True)
        installed: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return installed


def taken(report: list[dict[str, Any]]) -> dict[str, Pin]:
    """The releases of a report by their normalised names, each with the hash of the one file that pip took."""
    pins = (
        Pin(
            name=item["metadata"]["name"],
            version=Version(item["metadata"]["version"]).public,
            hashes=frozenset([item["download_info"]["archive_info"]["hashes"]["sha256"]]),
        )
        for item in report
        if "archive_info" in item["download_info"]  # not our own folder
    )
    return {pin.key: pin for pin in pins if pin.key not in LEFT_OUT}


def needs_in(report: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What each package of a report asks for, by its normalised name."""
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"].get("requires_dist", []) for item in report}


def closure(requirements: Iterable[str], needs_of: Callable[[str], Iterable[str]]) -> set[str]:
    """Normalised names of all packages that these need. needs_of: what one asks for, by its normalised name."""
    waiting, seen = [Requirement(line) for line in requirements], set()
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if (wanted := (canonicalize_name(requirement.name), frozenset(extras))) in seen:
            continue
        seen.add(wanted)
        for needed in map(Requirement, needs_of(wanted[0])):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name for name, _ in seen}


def markers() -> dict[str, str]:
    """Where pyproject.toml asks for a package only on some machines: its normalised name -> its marker."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    return {canonicalize_name(each.name): str(each.marker) for each in map(Requirement, asked) if each.marker}


def listed_files(response_type: str, body: str) -> Iterator[tuple[str, str]]:
    """(file name, sha256) of an index's page on a package, in either form of the simple repository API."""
    if response_type.startswith(SIMPLE_JSON):
        files = ((file["filename"], file["hashes"].get("sha256")) for file in json.loads(body)["files"])
        yield from ((name, sha256) for name, sha256 in files if sha256)
    else:
        yield from ((unquote(name), sha256) for name, sha256 in re.findall(r"([^/\"]+)#sha256=([0-9a-f]{64})", body))


def version_of(filename: str) -> str | None:
    """A file's version without its local tag; None for what pip would not install."""
    try:
        if filename.endswith(".whl"):
            return parse_wheel_filename(filename)[1].public
        return parse_sdist_filename(filename)[1].public
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None


class Indexes:
    """The package indexes that pip would ask with these flags."""

    def __init__(self, flags: list[str]) -> None:
        command = create_command("install")
        assert isinstance(command, RequirementCommand)
        options, _ = command.parse_args(flags)
        with command.main_context():
            self._session: PipSession = command.get_default_session(options)
        urls = [options.index_url, *options.extra_index_urls]
        self._urls = [url.rstrip("/") for url in urls if url.startswith("http")]  # a folder is no more than a mirror

    def hashes(self, pin: Pin) -> frozenset[str]:
        """sha256 of every file of a release. Raises requests' HTTPError for an index that fails."""
        return frozenset(
            sha256
            for url in self._urls
            for name, sha256 in self._files(url, pin.key)
            if version_of(name) == pin.version
        )

    def _files(self, url: str, name: str) -> Iterator[tuple[str, str]]:
        accept = f"{SIMPLE_JSON}, text/html;q=0.1"
        response = self._session.get(f"{url}/{name}/", headers={"Accept": accept}, timeout=60)
        if response.status_code in (403, 404):  # what an index says of a package that it hasn't
            return
        response.raise_for_status()
        yield from listed_files(response.headers["Content-Type"], response.text)


def with_hashes(pin: Pin, indexes: Indexes, before: Mapping[str, Pin]) -> Pin:
    """The pin with all hashes: its own, the indexes', and those that the lock has of the same release.

    The last, since not every machine reaches the index with the CPU builds of torch.
    """
    old = before.get(pin.key)
    kept = old.hashes if old and old.version == pin.version else frozenset[str]()
    return replace(pin, hashes=pin.hashes | kept | indexes.hashes(pin))


def kept_pins(before: Mapping[str, Pin], upgrade: str) -> list[Pin]:
    """What the locks have and may not change. upgrade: names, with spaces or commas between them, or `all`."""
    names = {canonicalize_name(name) for name in re.split(r"[\s,]+", upgrade) if name}
    if unknown := names - before.keys() - {"all"}:
        raise SystemExit(f"--upgrade names {', '.join(sorted(unknown))}, which no lock has")
    return [pin for key, pin in before.items() if key not in names and "all" not in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", required=True)
    parser.add_argument("--upgrade", default="", metavar="NAMES")
    parser.add_argument("--pip-flags", default="", metavar="FLAGS")
    parser.add_argument("requirements", nargs="+", metavar="REQUIREMENT", help="pinned beside pyproject.toml's")
    arguments = parser.parse_args()
    flags = shlex.split(arguments.pip_flags)

    before = {path: parse(path.read_text()) if path.exists() else {} for path in HEADS}
    locked = {key: pin for pins in before.values() for key, pin in pins.items()}
    keep = kept_pins(locked, arguments.upgrade)
    report = resolve([*arguments.requirements, "-e", f".[{arguments.extras}]"], keep, flags)
    where = markers()
    everything = {key: replace(pin, marker=where.get(key, "")) for key, pin in taken(report).items()}
    runtime = closure(["lrea"], needs_in(report).__getitem__)
    # Three equal signs: 2.13.0 and not 2.13.0+cpu, which 2.13.0 with two would match.
    cuda = taken(resolve([f"torch==={everything['torch'].version}"], [*keep, *everything.values()], flags))

    indexes = Indexes(flags)
    parts = {
        MAIN: [pin for key, pin in everything.items() if key in runtime],
        EXTRAS: [pin for key, pin in everything.items() if key not in runtime],
        CUDA: [pin for key, pin in cuda.items() if key not in runtime],
    }
    texts = {
        path: render(HEADS[path], [with_hashes(pin, indexes, locked) for pin in pins]) for path, pins in parts.items()
    }
    for path, text in texts.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
