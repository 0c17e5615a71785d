"""What every arrangement of a long history into slots has in common, and the names of the arrangements and forms."""

from typing import Literal, NamedTuple

from torch import Tensor

Form = Literal["absorbed", "paper", "hard"]
# Where slots begin: "fixed" and "log" start learned matrices over positions, "actual" and "content" are blocks of the
# rows that are present and learn nothing.
Blocks = Literal["fixed", "log", "actual", "content"]
ROW_BLOCKS: tuple[Blocks, ...] = ("actual", "content")


class UserSlots(NamedTuple):
    """What users' long histories become: keys and values, each float32 [U, r, d], slot-major."""

    keys_URd: Tensor
    values_URd: Tensor
