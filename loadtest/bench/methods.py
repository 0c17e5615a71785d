"""Every method of the paper over histories of several lengths (its Table 1, measured): the attention alone.

What a method computes from the history alone (LREA's slots, SDIM's buckets, SIM's index by category) is done before,
as its service would keep it; SDIM and SIM are shown from the history too. Candidates are taken so many at a time that a
method's largest tensor stays in cache where that helps it, and what it reads of the history alone is prepared once for
all of them. The whole scorer adds the same rest to each.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loadtest.bench.products import Product, record, replay
from loadtest.bench.timing import Run, medians
from loadtest.bench.world import CATEGORIES, Shape, World, pair_products
from model.attention.din import DinAttention
from model.attention.eta import EtaAttention
from model.attention.family import ETA_ROWS, SIM_ROWS, TWIN_ROWS
from model.attention.interface import Embedded
from model.attention.lrea import LreaAttention
from model.attention.retrieval import Choice, RetrievingAttention
from model.attention.sdim import BITS, BUCKETS, SIGNATURES, SdimAttention
from model.attention.sim import SimHard, SimSoft
from model.attention.twin import TwinAttention
from model.config import RankerConfig

_CHUNK_FLOATS = 1 << 20  # of relevances at a time, in whole blocks of rows: the products of 104 take 1.1 times as long
_BLOCK = 128
Row = dict[str, Any]


class Contestant:
    """One method's attention over one history."""

    def __init__(self, name: str, run: Run, products: list[Product]) -> None:
        self.name = name
        self.run = run
        self.products = products


@torch.no_grad()
def at_length(shape: Shape, seconds: float) -> list[Row]:
    """Every method at L = `shape.length`: milliseconds, the rest of the scorer included, and times its own products."""
    world = World(shape)
    serving = world.serving()
    without = world.with_slots(torch.zeros(0, world.config.width), torch.zeros(0, world.config.width))
    contestants = _contestants(world)
    runs = {each.name: each.run for each in contestants} | {"rest": lambda: serving.score(without)}
    products = {f"{each.name} products": replay(each.products) for each in contestants}
    found = medians(runs | products, seconds)
    return [
        {
            "method": each.name,
            "length": shape.length,
            "attention_ms": round(found[each.name] * 1e3, 3),
            "scorer_ms": round((found[each.name] + found["rest"]) * 1e3, 3),
            "over_matmul": round(found[each.name] / found[f"{each.name} products"], 2),
        }
        for each in contestants
    ]


def _contestants(world: World) -> list[Contestant]:
    config, length = world.config, world.shape.length
    items, history = world.request.candidates, world.items(length)
    candidates = world.ranker.embed_all(items.unsqueeze())
    rows = world.ranker.embed_all(history.unsqueeze())
    width, heads = config.width, config.heads
    sdim = SdimAttention(width)
    buckets = sdim.buckets(rows)
    read = partial(sdim.read, candidates, buckets)
    reading, summing = _sdim_products(world.shape.candidates, length, width)
    found = [
        Contestant("sdim", read, reading),
        Contestant("sdim, from the history", lambda: sdim.read(candidates, sdim.buckets(rows)), summing + reading),
    ]
    # Each with how many relevances it has per candidate and row: SIM's search by category has none.
    retrieving: dict[str, tuple[RetrievingAttention, int]] = {
        "sim, indexed": (_Indexed(width, length, SIM_ROWS, heads, rows), 0),
        "sim": (SimHard(width, length, SIM_ROWS, heads), 0),
        "sim_soft": (SimSoft(width, length, SIM_ROWS, heads), 1),
        "eta": (EtaAttention(width, ETA_ROWS, heads), 1),
        "twin": (TwinAttention(width, length, TWIN_ROWS, heads), heads),
    }
    for name, (attention, relevances) in retrieving.items():
        at_a_time = _at_a_time(length, relevances) if relevances else candidates.vectors.shape[1]
        run = partial(_in_chunks, attention, candidates, rows, at_a_time)
        found.append(Contestant(name, run, _retrieving_products(attention, candidates, rows)))
    return [*_pairs(world, config, candidates, rows), *found]


def _pairs(world: World, config: RankerConfig, candidates: Embedded, rows: Embedded) -> list[Contestant]:
    """DIN over the whole history, and LREA at the shipped rank and at 128."""
    count, length = world.shape.candidates, world.shape.length
    din = DinAttention(config.width, config.head_width, length)
    found = [
        Contestant("din_long", lambda: din(candidates, rows), pair_products(count, length, din.scorer)),
    ]
    for rank in (RankerConfig().rank, 128):
        lrea = LreaAttention(config.width, config.head_width, length, rank)
        head = partial(lrea.absorbed, candidates.vectors, lrea.compress(rows))
        found.append(Contestant(f"lrea, r = {rank}", head, pair_products(count, rank, lrea.scorer)))
    return found


def _sdim_products(count: int, length: int, width: int) -> tuple[list[Product], list[Product]]:
    """Those of reading and of summing by the method's formula: with R, and with one-hot matrices.

    The native kernel needs only those with R: it adds what the others multiply by 1 and 0.
    """
    bits, buckets = SIGNATURES * BITS, SIGNATURES * BUCKETS
    reading = [Product(count, width, bits), Product(count, buckets, width)]
    return reading, [Product(length, width, bits), Product(buckets, length, width)]


def _retrieving_products(attention: RetrievingAttention, candidates: Embedded, rows: Embedded) -> list[Product]:
    """All that the method needs, of all candidates at once: those with a candidate's own rows too, [heads, w] times
    [w, rows] and back, in one batch. The native kernel does these where they are not seen, and never where a gradient
    may be wanted.
    """
    with torch.enable_grad():
        return record(lambda: attention(candidates, rows))


def _at_a_time(length: int, relevances: int) -> int:
    blocks = max(1, _CHUNK_FLOATS // (length * _BLOCK))
    return max(1, blocks * _BLOCK // relevances)


def _in_chunks(attention: RetrievingAttention, candidates: Embedded, rows: Embedded, at_a_time: int) -> Tensor:
    prepared = attention.prepare(rows)
    parts = zip(*(torch.split(tensor, at_a_time, dim=1) for tensor in candidates), strict=True)
    return torch.cat([attention.attend(Embedded(*part), rows, prepared) for part in parts], dim=1)


class _Indexed(SimHard):
    """SIM's hard search as a service would keep it: each category's newest rows, found once per user."""

    def __init__(self, width: int, length: int, retrieved: int, heads: int, history: Embedded) -> None:
        super().__init__(width, length, retrieved, heads)
        every = torch.arange(CATEGORIES)
        asked = Embedded(torch.zeros(1, CATEGORIES, width), every.unsqueeze(0), every.unsqueeze(0) > 0)
        self._kept = super().search(asked, history)

    def search(self, candidates: Embedded, history: Embedded) -> Choice:
        """What is kept of each candidate's category."""
        categories_K = candidates.categories[0]
        return Choice(self._kept.index_UKk[:, categories_K], self._kept.found_UKk[:, categories_K])
