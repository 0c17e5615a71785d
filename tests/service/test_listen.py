"""A process's limit of open files, raised to what its connections need: in a process of its own, for it stays so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import logging, resource, sys
logging.basicConfig(format="%(message)s")
from service.process.listen import allow_connections
soft, hard, most = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_connections(most, 10), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "most", "found", "warned"),
    [
        (100, 1000, 300, "300 566 1000", False),
        (800, 1000, 300, "300 800 1000", False),
        (100, 500, 300, "234 500 500", True),
        (100, 200, 300, "1 200 200", True),
    ],
    ids=["raised", "enough", "not allowed", "hardly any"],
)
def test_files_are_allowed_for(soft: int, hard: int, most: int, found: str, warned: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, *map(str, (soft, hard, most))]
    ended = subprocess.run(command, cwd=ROOT, check=True, timeout=30, capture_output=True, text=True)
    assert ended.stdout.strip() == found
    warning = "LREA_MAX_CONNECTIONS needs 566 open files, and the system allows "
    assert (warning in ended.stderr) == warned
