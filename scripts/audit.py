"""Ask for the vulnerabilities that are known of the locked releases. `make check` runs this.

    python scripts/audit.py requirements.lock requirements-extras.lock [-- FLAGS OF pip-audit]

pip-audit asks the package registry, one request a package; `-- --vulnerability-service osv` asks elsewhere.
Exits with 0 if nothing is known, 1 if something is or pip-audit itself fails, and 75 if nobody answers: a machine
without Internet can check the rest. Three packages are asked for first, so that this costs little there.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import Any

FOUND, NO_ANSWER = 1, 75
PROBE_LIMIT_S = 20
# Some 150 requests one after the other: 15 s from far away, and a registry can be slow.
AUDIT_LIMIT_S = 300
REQUEST_LIMIT_S = 10
# Advisory -> the last day on which it is let through, and why no upgrade answers it. Then it fails again.
ACCEPTED: dict[str, tuple[date, str]] = {}


class NoAnswer(Exception):
    """The service could not be asked, or knows none of the packages; says which in one line."""


def pip_audit(files: list[Path], flags: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Raises TimeoutExpired."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    command += ["--format", "json", "--timeout", str(REQUEST_LIMIT_S)]
    command += [word for file in files for word in ("--requirement", str(file))]
    return subprocess.run([*command, *flags], check=False, capture_output=True, text=True, timeout=limit_s)


def ask(files: list[Path], flags: list[str], limit_s: float) -> list[dict[str, Any]]:
    """What is known of each requirement, as pip-audit's JSON says it. Raises NoAnswer."""
    try:
        done = pip_audit(files, flags, limit_s)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {limit_s} s") from None
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise NoAnswer((done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode}"])[-1]) from None
    if all("skip_reason" in package for package in packages):
        raise NoAnswer(packages[0]["skip_reason"])
    return packages


def probe(lock: Path, flags: list[str]) -> None:
    """Ask for the first packages of a lock. Raises NoAnswer."""
    pinned = re.findall(r"^[\w.-]+==[\w.!]+", lock.read_text(), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder, "few.txt")
        few.write_text("\n".join(pinned[:3]))
        ask([few], flags, PROBE_LIMIT_S)


def findings(packages: list[dict[str, Any]], today: date) -> Iterator[str]:
    """One line for each advisory that nobody accepted, or accepted for a time that is over."""
    for package in packages:
        for advisory in package.get("vulns", []):
            names = sorted({advisory["id"], *advisory["aliases"]})
            if any(name in ACCEPTED and today <= ACCEPTED[name][0] for name in names):
                continue
            fixed = f"fixed in {', '.join(advisory['fix_versions'])}" if advisory["fix_versions"] else "not fixed yet"
            yield f"{package['name']} {package['version']}: {' = '.join(names)}, {fixed}"


def audit(locks: list[Path], flags: list[str]) -> int:
    """The exit status, after everything has been said."""
    works = pip_audit(locks, ["--dry-run"], AUDIT_LIMIT_S)
    if works.returncode != 0:
        print(works.stderr, file=sys.stderr)
        return FOUND
    try:
        probe(locks[0], flags)
        packages = ask(locks, flags, AUDIT_LIMIT_S)
    except NoAnswer as reason:
        print(f"not audited, nobody answers for known vulnerabilities: {shorten(str(reason), 120)}")
        return NO_ANSWER
    found = list(findings(packages, date.today()))
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    print(f"audited {len(packages) - len(unknown)} packages, {len(found)} known vulnerabilities")
    if unknown:
        print(f"not audited, for the registry doesn't know them: {', '.join(unknown)}")
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print("upgrade them (`make lock UPGRADE=NAME`), or say in scripts/audit.py until when why not", file=sys.stderr)
    return FOUND if found else 0


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    sys.exit(audit([Path(word) for word in words[:end]], words[end + 1 :]))


if __name__ == "__main__":
    main()
