"""No file of ours runs code that it reads: no pickle, no eval, no shell. Parsed, not searched: text may name them."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.save",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
# A keyword that is anything but a plain False.
KEYWORDS = {"allow_pickle", "shell"}
# File -> what it may do, and why.
ALLOWED = {
    # An index goes to worker processes, which pickle it; the test does as they do, with its own bytes.
    "tests/model/native/test_index.py": {"pickle"},
    # Runs the example of our own manual as a reader would.
    "tests/service/test_inference_protocol.py": {"exec"},
}


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; empty for what is neither a name nor an attribute of one."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := full_name(node.value, imported)):
        return f"{owner}.{node.attr}"
    return ""


def names_imported(tree: ast.AST) -> dict[str, str]:
    """Name in this file -> what it was imported as."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def modules_imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that runs code which it reads."""
    tree = ast.parse(source)
    imported = names_imported(tree)
    for node in ast.walk(tree):
        for module in modules_imported(node):
            if module.partition(".")[0] in MODULES:
                yield node.lineno, module  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            name = full_name(node.func, imported).removeprefix("builtins.")
            if name in BUILTINS | CALLS or name.endswith(".to_pickle"):
                yield node.lineno, name
            for keyword in node.keywords:
                harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in KEYWORDS and not harmless:
                    yield node.lineno, keyword.arg


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def test_no_file_runs_code_that_it_reads() -> None:
    files = tracked_files()
    assert len(files) > 300
    found = [
        f"{file}:{line}: {name}"
        for file in files
        for line, name in unsafe((ROOT / file).read_text())
        if name not in ALLOWED.get(file, set())
    ]
    assert found == []


def test_every_exception_is_still_needed() -> None:
    used = {file: {name for _, name in unsafe((ROOT / file).read_text())} for file in ALLOWED}
    assert used == ALLOWED


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("import os, marshal as m", "marshal"),
        ("from joblib import load", "joblib"),
        ("from cloudpickle.cloudpickle import dumps", "cloudpickle.cloudpickle"),
        ("def f():\n    import shelve", "shelve"),
        ("eval('1')", "eval"),
        ("exec(code)", "exec"),
        ("import builtins\nbuiltins.eval('1')", "eval"),
        ("from builtins import exec as run\nrun('1')", "exec"),
        ("compile('1', '', 'eval')", "compile"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load\nload(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=True)", "torch.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
        ("import numpy as np\nnp.load(path, allow_pickle=flag)", "allow_pickle"),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("import yaml\nyaml.unsafe_load(text)", "yaml.unsafe_load"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("import os\nos.system('ls')", "os.system"),
        ("frame.to_pickle(path)", "frame.to_pickle"),
    ],
)
def test_each_kind_is_found(source: str, name: str) -> None:
    assert [found for _, found in unsafe(source)] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "model.eval()",
        "import torch\ntorch.compile(model)",
        "import json\njson.load(file)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_what_only_looks_like_it_is_not(source: str) -> None:
    assert list(unsafe(source)) == []
