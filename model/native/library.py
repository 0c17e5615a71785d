"""The shared library of the kernels beside this file: compiled once per machine, then loaded; or the reason why not.

g++ takes three seconds for it, since no header of torch's is read, where torch.compile took 18 s for a slower head. The
file is named after its sources and flags, so that an old one is never loaded, and ends with its own digest, so that one
cut short by a crash is built anew: loading it would end the process. It lies in the user's cache folder, and where that
cannot be written or run from, in a folder that ends with the process. An image without a compiler brings
the files in a folder of its own: `python -m model.native.library --out DIR` writes those of every processor it knows.

The processor's instruction set is chosen by name (x86-64-v4, x86-64-v3), not by `native`, so that a file can move.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / f"{name}.cpp" for name in ("attend", "best", "fill", "index", "mlp", "pool", "record", "sdim", "turns")
)  # fmt: skip
HEADERS = tuple(HERE / f"{name}.hpp" for name in ("attend", "best", "match", "pool", "vectors"))
BUILT = HERE / "built"  # what an image brings
COMPILERS = ("g++", "c++")  # GCC's vector types; clang has them too
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-mprefer-vector-width=512")
COMPILE_TIMEOUT_S = 60.0
AT_ONCE = 1024  # look-ups: 10 µs, and to give the interpreter away and get it back under load takes longer
# What /proc/cpuinfo calls the instructions that a level needs and that the level below does not have.
LEVELS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "fma", "bmi2", "f16c"}),
)
L = TypeVar("L", bound=ctypes.CDLL)
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class NoLibrary(Exception):
    """The kernels cannot be had here, and the message says why: torch's own operations do the work."""


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where there is none, with one line in the log that says why."""
    try:
        return declared(_find_or_build())
    except (NoLibrary, OSError) as error:
        logger.warning("no native kernels, torch's operations score instead (1.6 times the head's time): %s", error)
        return None


def loaded() -> ctypes.CDLL:
    """The library, where `load` has said that there is one."""
    library = load()
    assert library is not None
    return library


@cache
def at_once() -> ctypes.PyDLL:
    """The same library, called without giving the interpreter away: for what takes microseconds."""
    library = loaded()
    return declared(ctypes.PyDLL(library._name, handle=library._handle))


def library_for(lookups: int) -> ctypes.CDLL:
    """The library, called in the way that suits so many look-ups."""
    return at_once() if lookups <= AT_ONCE else loaded()


def level() -> str:
    """The name of the best instruction set that this processor has and we build for. Raises NoLibrary."""
    if _on_arm():
        return "armv8-a"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError as error:
        raise NoLibrary(f"the processor's instructions are not known ({error})") from error
    for name, needed in LEVELS:
        if needed <= flags:
            return name
    raise NoLibrary(f"the processor is older than {LEVELS[-1][0]}")


def _on_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


def build(folder: Path, target: str) -> Path:
    """Compile the kernels for `target` into `folder`, whole or not at all. Raises NoLibrary."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoLibrary(f"there is no compiler here ({' or '.join(COMPILERS)}): install g++, or bring built files")
    path = folder / _name(target)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_flags(target), "-o", str(made), *map(str, SOURCES)]
        try:
            # errors: a compiler speaks the locale's encoding, which need not be ours.
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoLibrary(f"{compiler} did not end well: {error}") from error
        if done.returncode:
            raise NoLibrary(f"{compiler} refuses the kernels: {done.stderr.strip()[-300:]}")
        _seal(made)
        made.replace(path)
    return path


def _seal(path: Path) -> None:
    """Append the file's digest, and have all of it on the disk."""
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _intact(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(data[:-size]).digest() == data[-size:]


def _find_or_build() -> ctypes.CDLL:
    """Of the image, of the user's folder, built there, or built for this process alone. Raises NoLibrary, OSError."""
    target, own = level(), _own_folder()
    folders = [folder for folder in (BUILT, own) if folder is not None]
    for path in (folder / _name(target) for folder in folders):
        if _intact(path):
            with suppress(OSError):  # a folder that nothing may be run from
                return ctypes.CDLL(str(path))
    if own is not None:
        with suppress(OSError):
            return ctypes.CDLL(str(build(own, target)))
    with tempfile.TemporaryDirectory(prefix="lrea-native-") as passing:  # once mapped, the file need not stay
        return ctypes.CDLL(str(build(Path(passing), target)))


@cache
def _own_folder() -> Path | None:
    """A folder that is this user's alone, for what is loaded from it runs with his rights; None where there is none."""
    try:
        folder = Path.home() / ".cache" / "lrea"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    mine = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if mine and os.access(folder, os.W_OK) else None


def _flags(target: str) -> list[str]:
    return [f"-march={target}", *(flag for flag in FLAGS if target.startswith("x86") or "512" not in flag)]


@cache
def _name(target: str) -> str:
    """The file's name: what it was made from and for."""
    digest = hashlib.sha256(" ".join(_flags(target)).encode())
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return f"lrea-{target}-{digest.hexdigest()[:16]}.so"


def declared(library: L) -> L:
    """The same library with the types of its functions' arguments, as the sources have them."""
    library.lrea_scratch.argtypes, library.lrea_scratch.restype = [_INT, _INT], _INT
    library.lrea_attend.argtypes = [
        *(_POINTER, _INT, _INT),  # x
        *(_POINTER, _POINTER, _INT),  # keys and values
        *(_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT),  # the scorer
        *(_POINTER, _INT, _POINTER),  # out, scratch
    ]
    library.lrea_attend.restype = None
    library.lrea_fill_scratch.argtypes, library.lrea_fill_scratch.restype = [_INT, _INT, _INT, _INT], _INT
    library.lrea_fill.argtypes = [
        *(_POINTER, _INT, _INT, _INT, _INT),  # requests, which of their candidates, the width
        *(_POINTER, _INT, _INT, _POINTER),  # out, the largest window, scratch
    ]
    library.lrea_fill.restype = _INT
    library.lrea_codes_are.argtypes = [*(_POINTER, _INT), *(_POINTER, _INT, _INT), _POINTER]
    library.lrea_codes_are.restype = _INT
    library.lrea_best_scratch.argtypes, library.lrea_best_scratch.restype = [_INT], _INT
    library.lrea_best.argtypes = [
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT),  # scores, penalties, candidates, rows, count
        *(_POINTER, _POINTER, _POINTER),  # index, found, scratch
    ]
    library.lrea_best.restype = None
    library.lrea_turns_scratch.argtypes, library.lrea_turns_scratch.restype = [_INT, _INT], _INT
    library.lrea_turns.argtypes = [
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _INT),  # the same, of several heads
        *(_POINTER, _POINTER, _POINTER),
    ]
    library.lrea_turns.restype = None
    library.lrea_pool_scratch.argtypes, library.lrea_pool_scratch.restype = [_INT, _INT, _INT], _INT
    library.lrea_pool_least_width.argtypes, library.lrea_pool_least_width.restype = [], _INT
    library.lrea_pool.argtypes = [
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # queries, rows, index, found
        *(_INT, _INT, _INT, _INT, _INT, _INT, _INT),  # candidates, rows, width, chosen, heads
        *(_POINTER, _POINTER),  # out, scratch
    ]
    library.lrea_pool.restype = _INT
    library.lrea_mlp_panel.argtypes, library.lrea_mlp_panel.restype = [], _INT
    library.lrea_mlp_scratch.argtypes, library.lrea_mlp_scratch.restype = [_INT], _INT
    library.lrea_mlp.argtypes = [
        *(_POINTER, _INT, _INT, _INT),  # inputs
        *(_POINTER, _POINTER, _POINTER, _INT),  # the users' biases and ends, layers
        *(_POINTER, _FLOAT, _FLOAT),  # the last layer, the slope
        *(_POINTER, _POINTER),  # out, scratch
    ]
    library.lrea_mlp.restype = None
    library.lrea_index_build.argtypes, library.lrea_index_build.restype = [_POINTER, _INT, _INT, _POINTER, _INT], None
    library.lrea_index_find.argtypes = [
        *(_POINTER, _INT, _POINTER, _INT, _INT),  # keys, slots, what is unknown
        _POINTER,
    ]
    library.lrea_index_find.restype = _INT
    library.lrea_index_encode.argtypes = [
        *(_POINTER, _INT, _POINTER, _INT, _INT),
        *(_POINTER, _INT, _POINTER, _INT),  # two tables
        *(_POINTER, _POINTER, _POINTER),
    ]
    library.lrea_index_encode.restype = _INT
    library.lrea_record_read.argtypes = [_POINTER, _INT, _POINTER, _POINTER]
    library.lrea_record_read.restype = _INT
    library.lrea_sdim_scratch.argtypes, library.lrea_sdim_scratch.restype = [_INT], _INT
    library.lrea_sdim_sums.argtypes = [
        *(_POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT),  # products, vectors, present, users, rows, width
        *(_POINTER, _POINTER),  # sums, scratch
    ]
    library.lrea_sdim_sums.restype = None
    library.lrea_sdim_means.argtypes = [*(_POINTER, _POINTER), *(_INT, _INT, _INT, _INT), _POINTER]
    library.lrea_sdim_means.restype = None
    return library


def main(arguments: list[str]) -> int:
    """`--out DIR`: the files of every level of this kind of processor, for an image that has no compiler."""
    if len(arguments) != 2 or arguments[0] != "--out":
        print("usage: python -m model.native.library --out DIR", file=sys.stderr)
        return 2
    folder = Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    for target in [level()] if _on_arm() else [name for name, _ in LEVELS]:
        print(build(folder, target))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
