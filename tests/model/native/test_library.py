"""Where the kernels come from, and what happens where they cannot be had: the same scores, and a line that says why."""

import ctypes
import logging
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.attention.scorer import PairScorer
from model.native import library

SCORE_ONCE = """
import logging, sys, torch
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
from model.attention.scorer import PairScorer
from model.native import kernels
torch.manual_seed(0)
torch.set_num_threads(1)
scorer, rows = PairScorer(8, 8), torch.randn(1, 50, 8)
with torch.no_grad():
    print(kernels.available(), scorer.attend(rows, rows[:, :5], rows[:, :5]).double().sum().item())
"""


def score_in_a_process(home: Path, path: str) -> list[str]:
    environment = {**os.environ, "HOME": str(home), "PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ONCE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_without_a_compiler_torch_scores_the_same_and_the_log_says_why(tmp_path: Path) -> None:
    warning, alone = score_in_a_process(tmp_path, path="/nowhere")
    [with_kernels] = score_in_a_process(tmp_path, path=os.environ["PATH"])
    assert "there is no compiler here (g++ or c++): install g++, or bring built files" in warning
    assert (alone.split()[0], with_kernels.split()[0]) == ("False", "True")
    assert float(alone.split()[1]) == pytest.approx(float(with_kernels.split()[1]), rel=1e-5)


def test_a_built_file_is_private_and_met_again(tmp_path: Path) -> None:
    score_in_a_process(tmp_path, path=os.environ["PATH"])
    [built] = (tmp_path / ".cache" / "lrea").iterdir()
    assert built.name.startswith(f"lrea-{library.level()}-")
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    made_at = built.stat().st_mtime_ns
    [line] = score_in_a_process(tmp_path, path="/nowhere")  # no compiler is needed any more
    assert line.startswith("True")
    assert built.stat().st_mtime_ns == made_at


def test_a_folder_that_others_may_write_to_is_not_loaded_from(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "lrea"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    [line] = score_in_a_process(tmp_path, path=os.environ["PATH"])
    assert line.startswith("True")  # built for this process alone
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_a_file_cut_short_by_a_crash_is_built_anew(tmp_path: Path, kept: float | None) -> None:
    """Loading it would end the process without a word. None: as long as it was, and other bytes in it."""
    score_in_a_process(tmp_path, path=os.environ["PATH"])
    [built] = (tmp_path / ".cache" / "lrea").iterdir()
    whole = built.read_bytes()
    damaged = bytearray(whole[: int(len(whole) * (kept if kept is not None else 1))])
    if kept is None:
        damaged[len(whole) // 2] ^= 1
    built.write_bytes(damaged)
    [line] = score_in_a_process(tmp_path, path=os.environ["PATH"])
    assert line.startswith("True")
    assert built.read_bytes() == whole


def test_sources_that_do_not_compile_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++;")
    monkeypatch.setattr(library, "SOURCES", (broken,))
    library._name.cache_clear()
    try:
        with pytest.raises(library.NoLibrary, match="refuses the kernels"):
            library.build(tmp_path, library.level())
    finally:
        library._name.cache_clear()
    assert [path.name for path in tmp_path.iterdir()] == ["broken.cpp"]


def test_a_compiler_that_fails_in_another_encoding_is_no_reason_to_stop(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nprintf 'unbekannter Prozessor f\\374r -march' >&2\nexit 1\n")
    compiler.chmod(0o755)
    warning, alone = score_in_a_process(tmp_path, path=str(tmp_path))
    assert "refuses the kernels: unbekannter Prozessor f" in warning
    assert alone.startswith("False")


def test_files_for_an_image_are_built_for_every_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert library.main(["--out", str(tmp_path / "built")]) == 0
    names = sorted(path.name for path in (tmp_path / "built").iterdir())
    levels = ["x86-64-v3", "x86-64-v4"] if platform.machine() == "x86_64" else [library.level()]
    assert [name.rpartition("-")[0] for name in names] == [f"lrea-{level}" for level in levels]
    assert library.main([]) == 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one level")
def test_the_older_level_scores_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    scorer, candidates = PairScorer(24, 20), torch.randn(130, 24)
    keys = torch.randn(19, 24)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        wanted = scorer.attend(candidates.unsqueeze(0), keys.unsqueeze(0), keys.unsqueeze(0))[0]
        older = library.declared(ctypes.CDLL(str(library.build(tmp_path, "x86-64-v3"))))
        out = torch.empty_like(candidates)
        scratch = torch.empty(older.lrea_scratch(24, 24))
        weights = scorer.native()
        older.lrea_attend(
            *(candidates.data_ptr(), 24, 130, keys.data_ptr(), keys.data_ptr(), 19),
            *(tensor.data_ptr() for tensor in weights.tensors),
            *(24, weights.units, weights.struct.slope, out.data_ptr(), 24, scratch.data_ptr()),
        )
    assert (out - wanted).abs().max().item() < 1e-5
