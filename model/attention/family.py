"""Which long attentions there are, and the one that a configuration asks for."""

from model.attention.din import DinAttention
from model.attention.eta import EtaAttention
from model.attention.interface import LongAttention
from model.attention.lrea import LreaAttention
from model.attention.sdim import SdimAttention
from model.attention.sim import SimHard, SimSoft
from model.attention.twin import TwinAttention
from model.config import RankerConfig

# Rows that are attended to, as published.
SIM_ROWS = ETA_ROWS = 50
TWIN_ROWS = 100


def build_long_attention(config: RankerConfig, categories: int | None) -> LongAttention | None:
    """The configured attention with fresh weights; None where the model has none.

    categories: codes of the item feature that is the category; None where items have no feature.
    """
    width, length, rows, heads = config.width, config.long_length, config.retrieved, config.heads
    match config.long_attention:
        case "none":
            return None
        case "lrea":
            return LreaAttention(width, config.head_width, length, config.rank, config.form, config.blocks, categories)
        case "din":
            return DinAttention(width, config.head_width, length, softmax=config.din_softmax)
        case "sim-hard":
            return SimHard(width, length, rows or SIM_ROWS, heads)
        case "sim-soft":
            return SimSoft(width, length, rows or SIM_ROWS, heads)
        case "eta":
            return EtaAttention(width, rows or ETA_ROWS, heads)
        case "sdim":
            return SdimAttention(width)
        case "twin":
            return TwinAttention(width, length, rows or TWIN_ROWS, heads)
