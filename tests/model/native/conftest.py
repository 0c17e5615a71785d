"""The kernels are tested wherever they can be built."""

import shutil

import pytest

from model.native import kernels, library


@pytest.fixture(autouse=True)
def _kernels_are_here() -> None:
    if not any(map(shutil.which, library.COMPILERS)):
        pytest.skip(f"no compiler here ({' or '.join(library.COMPILERS)}): torch's operations do the kernels' work")
    assert kernels.available(), "there is a compiler and there are no kernels: the log says why"
