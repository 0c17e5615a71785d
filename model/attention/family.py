"""Which long attentions there are, and the one that a configuration asks for."""

from model.attention.din import DinAttention
from model.attention.interface import LongAttention
from model.attention.lrea import LreaAttention
from model.config import RankerConfig


def build_long_attention(config: RankerConfig) -> LongAttention | None:
    """The configured attention with fresh weights; None where the model has none."""
    match config.long_attention:
        case "none":
            return None
        case "lrea":
            return LreaAttention(config.width, config.head_width, config.long_length, config.rank, config.form)
        case "din":
            return DinAttention(config.width, config.head_width, config.long_length, softmax=config.din_softmax)
