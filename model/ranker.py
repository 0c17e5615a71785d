"""The ranker: embeddings, short-window DIN, the long attention, match features, MLP.

One set of functions is trained (`forward`), run offline over each user's history (`compress`, `sketch`) and served
(`score`, `score_many`); they share every step, so the served score is the trained one. What the ranker does not know:
ids (`model.catalogue` encodes them), where records come from, HTTP.

Letters: U users, K candidates of a user in training, B candidates of a request, L long history, S short window, r
slots, d width, M sketch bytes, F feature columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention.din import DinAttention
from model.attention.family import build_long_attention
from model.attention.interface import Embedded
from model.attention.lrea import LreaAttention
from model.attention.slots import UserSlots
from model.catalogue import Items
from model.config import RankerConfig
from model.match_sketch import FEATURES_PER_COLUMN, build_sketch, match_short, read_sketch
from model.mlp import fold_batch_norm, serving_mlp, training_mlp

EMBEDDING_STD = 0.1


@dataclass(frozen=True)
class VocabularySizes:
    """Rows of every embedding table: items, then each item, user and context feature."""

    items: int
    item_features: tuple[int, ...]
    user_features: tuple[int, ...]
    context_features: tuple[int, ...]


class TrainingBatch(NamedTuple):
    """Samples of U requests, padded to K candidates."""

    long: Items  # [U, L], newest first
    short: Items  # [U, S], newest first
    user_codes: Tensor  # int64 [U, Fu]
    context_codes: Tensor  # int64 [U, Fc]
    candidates: Items  # [U, K]
    mask_UK: Tensor  # bool, true where there is a candidate
    labels_UK: Tensor  # float32


class UserState(NamedTuple):
    """What a cache holds of one user's long history, float32 [r, d] twice and uint8 [M]."""

    keys_Rd: Tensor
    values_Rd: Tensor
    sketch_M: Tensor

    def to(self, device: torch.device | str) -> "UserState":
        """The same state on another device."""
        return UserState(*(tensor.to(device, non_blocking=True) for tensor in self))


class ScoringInput(NamedTuple):
    """One request, encoded: everything that its scores depend on."""

    state: UserState
    short: Items  # [n <= S], newest first
    user_codes: Tensor  # int64 [Fu]
    context_codes: Tensor  # int64 [Fc]
    candidates: Items  # [B]

    def to(self, device: torch.device | str) -> "ScoringInput":
        """The same request on another device."""
        return ScoringInput(
            self.state.to(device),
            self.short.to(device),
            self.user_codes.to(device),
            self.context_codes.to(device),
            self.candidates.to(device),
        )


class Output(NamedTuple):
    """What a training step reads."""

    logits: Tensor  # float32 [n], of the n candidates that the mask keeps
    auxiliary_loss: Tensor  # scalar: the long attention's own loss, 0 for most


class Ranker(nn.Module):
    """Click probability of candidates, given a user's whole history."""

    def __init__(self, config: RankerConfig, sizes: VocabularySizes, *, serving: bool = False) -> None:
        """serving: BatchNorm is folded into the MLP (see `folded`)."""
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        self.item_embedding = _embedding(sizes.items, width)
        self.feature_embeddings = nn.ModuleList(_embedding(size, width) for size in sizes.item_features)
        side_sizes = (*sizes.user_features, *sizes.context_features)
        self.side_embeddings = nn.ModuleList(_embedding(size, config.feature_width) for size in side_sizes)
        self.short = DinAttention(width, config.head_width, config.short_length) if config.short_attention else None
        index = config.category_index
        self.long = build_long_attention(config, None if index is None else sizes.item_features[index])
        build = serving_mlp if serving else training_mlp
        self.mlp = build(self._mlp_inputs(), config.mlp)

    def _mlp_inputs(self) -> int:
        matches = 2 * FEATURES_PER_COLUMN * len(self.config.sketch_cells)
        return self.interest_columns + self.side_columns + matches

    @property
    def interest_columns(self) -> int:
        """Columns of the MLP's input that come first: the target, each interest and its product with the target."""
        return (1 + 2 * (self.short is not None) + 2 * (self.long is not None)) * self.config.width

    @property
    def side_columns(self) -> int:
        """Columns behind them: the features of the user and of the request."""
        return len(self.side_embeddings) * self.config.feature_width

    def folded(self) -> "Ranker":
        """A copy for serving: the same function, without BatchNorm and without gradients."""
        ranker = Ranker(self.config, self.sizes, serving=True)
        kept = {name: value for name, value in self.state_dict().items() if not name.startswith("mlp.")}
        ranker.load_state_dict(kept, strict=False)
        fold_batch_norm(self.mlp, ranker.mlp)
        return ranker.eval().requires_grad_(False)

    # ---- the long history, once per user

    def embed(self, items: Items) -> Tensor:
        """Embeddings [..., d]: the item's plus its features'; zero where padded."""
        embedded: Tensor = self.item_embedding(items.rows)
        for index, table in enumerate(self.feature_embeddings):
            embedded = embedded + table(items.codes[..., index])
        return embedded

    def embed_all(self, items: Items) -> Embedded:
        """Items as an attention reads them."""
        index = self.config.category_index
        categories = torch.zeros_like(items.rows) if index is None else items.codes[..., index]
        return Embedded(self.embed(items), categories, items.rows > 0)

    def _embed_together(self, parts: dict[str, Items]) -> dict[str, Embedded]:
        """`embed_all` of each, by one look-up per table: the gradient of every look-up is as large as the table."""
        sizes = [part.rows.shape[1] for part in parts.values()]
        joined = self.embed_all(Items(*(torch.cat(tensors, dim=1) for tensors in zip(*parts.values(), strict=True))))
        pieces = zip(*(torch.split(tensor, sizes, dim=1) for tensor in joined), strict=True)
        return {name: Embedded(*piece) for name, piece in zip(parts, pieces, strict=True)}

    def compress(self, long: Items) -> UserSlots:
        """Slots of each user's long history [U, L], newest first; no slots where the model has no long attention.

        Raises ValueError for a model whose long attention cannot be compressed.
        """
        return self._compress(self.embed_all(long), long.rows.device)

    def compress_rows(self, table: Embedded, rows_UN: Tensor) -> UserSlots:
        """`compress` for many histories of the same items, embedded once: rows of `table` [1 + I], 0 is padding."""
        vectors = nn.functional.embedding(rows_UN, table.vectors)
        return self._compress(Embedded(vectors, table.categories[rows_UN], rows_UN > 0), rows_UN.device)

    def _compress(self, long: Embedded, device: torch.device) -> UserSlots:
        if isinstance(self.long, LreaAttention):
            return self.long.compress(long)
        if self.long is not None:
            raise ValueError(
                f"the long attention {self.config.long_attention} reads the whole history for every candidate: "
                'only a model with long_attention = "lrea" (or "none") can be cached and served'
            )
        empty = torch.zeros(len(long.vectors), 0, self.config.width, device=device)
        return UserSlots(empty, empty)

    def sketch(self, long: Items) -> Tensor:
        """Match sketch of each user's long history, uint8 [U, M]; M is 0 where the model has none."""
        if not self.config.match:
            return torch.zeros(len(long.rows), 0, dtype=torch.uint8, device=long.rows.device)
        return build_sketch(long.hashes, self.config.sketch_cells)

    def sketch_rows(self, hashes: Tensor, rows_UN: Tensor) -> Tensor:
        """`sketch` for many histories of the same items: rows of `hashes` int64 [1 + I, C], 0 is padding."""
        if not self.config.match:
            return torch.zeros(len(rows_UN), 0, dtype=torch.uint8, device=rows_UN.device)
        return build_sketch(hashes[rows_UN], self.config.sketch_cells)

    # ---- candidates

    def forward(self, batch: TrainingBatch) -> Output:
        """Logits of the batch's candidates in the form that is trained, and the long attention's own loss."""
        long = _without_common_padding(batch.long)
        read = {"candidates": batch.candidates}
        read |= {} if self.long is None else {"long": long}
        read |= {} if self.short is None else {"short": batch.short}
        embedded = self._embed_together(read)
        candidates = embedded["candidates"]
        long_UKd, loss = None, batch.labels_UK.new_zeros(())
        if self.long is not None:
            history = embedded["long"]
            long_UKd = self.long(candidates, history)
            if self.training:
                loss = self.long.auxiliary_loss(candidates, history, batch.labels_UK)
        side_UF = torch.cat([batch.user_codes, batch.context_codes], dim=-1)
        inputs_UKf = self._mlp_input(
            candidates, batch.candidates.hashes, long_UKd, self.sketch(long), embedded.get("short"),
            batch.short.hashes, side_UF,
        )  # fmt: skip
        logits: Tensor = self.mlp(inputs_UKf[batch.mask_UK])
        return Output(logits.squeeze(-1), loss)

    def logits(self, batch: TrainingBatch) -> Tensor:
        """Logits float32 [n] of the n candidates that the mask keeps, in the form that is trained."""
        output: Output = self(batch)
        return output.logits

    @torch.no_grad()
    def score(self, request: ScoringInput) -> Tensor:
        """Logits float32 [B] of one request's candidates, from the user's cached state."""
        return self.score_many([request])[0]

    @torch.no_grad()
    def score_many(self, requests: Sequence[ScoringInput]) -> list[Tensor]:
        """Logits float32 [B] of each request: one absorbed GEMM per user, one pass of the MLP for all of them."""
        sizes = [len(request.candidates.rows) for request in requests]
        inputs = torch.cat([self._serving_input(request) for request in requests])
        return list(self.mlp(inputs).squeeze(-1).split(sizes))

    def _serving_input(self, request: ScoringInput) -> Tensor:
        items = request.candidates.unsqueeze()
        candidates = self.embed_all(items)
        slots = UserSlots(request.state.keys_Rd.unsqueeze(0), request.state.values_Rd.unsqueeze(0))
        long_UKd = self.long.absorbed(candidates.vectors, slots) if isinstance(self.long, LreaAttention) else None
        side_UF = torch.cat([request.user_codes, request.context_codes]).unsqueeze(0)
        window, sketch_UM = request.short.unsqueeze(), request.state.sketch_M.unsqueeze(0)
        short = None if self.short is None else self.embed_all(window)
        return self._mlp_input(candidates, items.hashes, long_UKd, sketch_UM, short, window.hashes, side_UF).squeeze(0)

    def _mlp_input(
        self,
        candidates: Embedded,
        hashes_UKC: Tensor,
        long_UKd: Tensor | None,
        sketch_UM: Tensor,
        short: Embedded | None,
        short_hashes_USC: Tensor,
        side_codes_UF: Tensor,
    ) -> Tensor:
        """Everything the MLP reads of each candidate, float32 [U, K, f]."""
        target_UKd = candidates.vectors
        parts = [target_UKd]
        if self.short is not None and short is not None:
            parts += _with_product(target_UKd, self.short(candidates, short))
        if long_UKd is not None:
            parts += _with_product(target_UKd, long_UKd)
        for index, table in enumerate(self.side_embeddings):
            parts.append(table(side_codes_UF[:, index]).unsqueeze(1).expand(-1, target_UKd.shape[1], -1))
        if self.config.match:
            parts.append(match_short(short_hashes_USC, hashes_UKC))
            parts.append(read_sketch(sketch_UM, hashes_UKC, self.config.sketch_cells))
        return torch.cat(parts, dim=-1)


def _without_common_padding(long: Items) -> Items:
    """The columns that any user of the batch has a row in: young users of a long L cost what their rows cost."""
    return Items(*(tensor[:, : int((long.rows > 0).any(dim=0).sum())] for tensor in long))


def _with_product(target_UKd: Tensor, interest_UKd: Tensor) -> list[Tensor]:
    """An interest and its product with the target: an MLP is slow to learn one (short window only: AUC .61 to .65)."""
    return [interest_UKd, target_UKd * interest_UKd]


def _embedding(rows: int, width: int) -> nn.Embedding:
    """A table drawn from N(0, .1²), with the missing and the unknown value at zero: neither says anything."""
    table = nn.Embedding(rows, width, padding_idx=0)
    nn.init.normal_(table.weight, std=EMBEDDING_STD)
    with torch.no_grad():
        table.weight[:2] = 0
    return table
