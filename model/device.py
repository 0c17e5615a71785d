"""Where to compute: the one meaning of `auto`, `cpu` and `cuda` for every program."""

import torch

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is cuda where torch finds a GPU, else cpu.

    Raises ValueError for another name, and for cuda where there is no GPU.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown: wanted {', '.join(DEVICES)}")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device is cuda, but torch finds no GPU here: use auto or cpu, or install torch with CUDA")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
