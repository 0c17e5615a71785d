"""What a method must keep of a user's long history, in bytes, and what its head costs a candidate.

Counted is the part of the long history only: the short window, which every method needs, and a record's own header are
left out.

    LREA                    the pair in float16, as the cache stores it by default, and the match sketch
    SDIM                    16 signatures of 8 buckets, each a row of d, in float16, and the match sketch
    none                    the match sketch
    any other               the L raw item ids, 8 bytes each; a match sketch is made from them and not kept beside them
"""

from model.cache_format.pair import body_size
from model.cache_format.shape import RecordShape
from model.config import RankerConfig

ITEM_ID_BYTES = 8
SDIM_BUCKETS = 16 * 8
FLOAT16_BYTES = 2


def bytes_per_user(config: RankerConfig, shape: RecordShape) -> int:
    """Bytes of one user's long history, as counted above; `shape` is the bundle's."""
    match config.long_attention:
        case "lrea" | "none":
            return body_size(shape, "float16") + shape.sketch_size
        case "sdim":
            return SDIM_BUCKETS * config.width * FLOAT16_BYTES + shape.sketch_size
        case _:
            return config.long_length * ITEM_ID_BYTES


def head_flops(rank: int, width: int, head_width: int) -> int:
    """Flops per candidate of the absorbed head: E_t·M + C, times W_o, then the scores times r values."""
    return 2 * rank * (width * head_width + head_width + width)
