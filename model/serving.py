"""The ranker as it is served: the function of `Ranker.score_many`, in fewer and cheaper steps, without gradients.

Of the first layer of the MLP, what depends on the user alone (his features, the bias) is computed once per request. An
item and its features are one vector, summed once per model. On a CPU one native kernel makes all that the first product
reads of a candidate in one pass, and another takes it through all layers; where they are not to be had, and on a GPU,
both are done step by step, as are the layers in bfloat16.

What was measured and left out: the items' own share of the first layer as a table (512 numbers per item) in place of a
seventh of that product: docs/fast-path.md.

Letters: N candidates of all requests, B of one, d width, C hashed columns, S window rows, F features of the user and of
the request, f columns of the first product.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from model.attention.din import DinAttention
from model.attention.fused_head import fused_absorbed, takes_fused_head
from model.attention.lrea import LreaAttention
from model.attention.scorer import NEGATIVE_SLOPE, PairScorer
from model.catalogue import Items
from model.match_sketch import match_request, match_rows, native_matches
from model.native import fill, kernels, mlp
from model.ranker import Ranker, ScoringInput
from model.serving_buckets import PaddedBatch

_CHUNK_ROWS = 256  # of the MLP at a time: 0.5 MB of its widest layer stays in cache


class ServingRanker:
    """Scores requests from users' cached state. Made from a folded, cacheable ranker, of its weights then."""

    def __init__(self, ranker: Ranker, codes_of_row: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """codes_of_row: int64 [items, F], the catalogue's feature codes by vocabulary row.

        dtype: of the MLP's products, float32 or bfloat16; sums and logits are float32. Raises ValueError for a ranker
        that cannot be cached.
        """
        if not ranker.config.cacheable:
            raise ValueError(f"the long attention {ranker.config.long_attention} cannot be served from a cache")
        self.ranker = ranker
        self.config = ranker.config
        self.dtype = dtype
        device = ranker.item_embedding.weight.device
        self._codes_IF = codes_of_row.to(device).contiguous()
        everything = Items(torch.arange(len(codes_of_row), device=device), self._codes_IF, self._codes_IF)
        with torch.no_grad():
            self._vectors_Id = ranker.embed(everything)
        self._mlp = _ServingMlp(ranker, dtype)
        self._native_scorers: dict[nn.Module, kernels.Scorer] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._vectors_Id.device

    @property
    def columns(self) -> int:
        """Columns of the MLP's first product, f."""
        return self._mlp.columns

    @torch.no_grad()
    def score_many(self, requests: Sequence[ScoringInput]) -> list[Tensor]:
        """Logits float32 [B] of each request; one pass of the MLP for all of them."""
        sizes = [request.candidates.rows.shape[0] for request in requests]
        inputs_Nf = torch.empty(sum(sizes), self.columns, device=self._vectors_Id.device)
        self._fill(requests, sizes, inputs_Nf)
        sides = ([request.user_codes for request in requests], [request.context_codes for request in requests])
        sides_UF = torch.cat([torch.stack(codes) for codes in sides], dim=1)
        return list(self._mlp(inputs_Nf, sides_UF, sizes).split_with_sizes(sizes))

    def score(self, request: ScoringInput) -> Tensor:
        """Logits float32 [B] of one request's candidates."""
        return self.score_many([request])[0]

    @torch.no_grad()
    def score_padded(self, batch: PaddedBatch) -> Tensor:
        """Logits float32 [N] of a batch in a bucket, those of the padding too.

        What a GPU's graphs are captured from: every shape is the bucket's, and nothing is read back.
        """
        ranker, users, rows = self.ranker, batch.users, batch.rows
        # Embedded anew, since a look at whether the features are the catalogue's would have to be read back.
        targets_Nd, user_N = ranker.embed(rows.candidates), rows.user_of_candidate()
        columns = [targets_Nd]
        if isinstance(ranker.short, DinAttention):
            window_USd = ranker.embed(users.short)
            values_USd = window_USd * ranker.short.scale
            interest_Nd = _interest(ranker.short.scorer, targets_Nd, rows.offsets_U1, user_N, window_USd, values_USd)
            columns += [interest_Nd, targets_Nd * interest_Nd]
        if isinstance(ranker.long, LreaAttention):
            slots = users.keys_URd, users.values_URd
            interest_Nd = _interest(ranker.long.scorer, targets_Nd, rows.offsets_U1, user_N, *slots)
            columns += [interest_Nd, targets_Nd * interest_Nd]
        if self.config.match:
            cells, sketch_UM = self.config.sketch_cells, users.sketch_UM
            columns.append(match_rows(rows.hashes_NC, user_N, users.short.hashes, sketch_UM, cells))
        sides_UF = torch.cat([users.codes_UF, rows.context_codes_UF], dim=-1)
        return self._mlp.of_users(torch.cat(columns, dim=-1), sides_UF, user_N)

    def _fill(self, requests: Sequence[ScoringInput], sizes: Sequence[int], inputs_Nf: Tensor) -> None:
        """The columns of the first product: those of `Ranker._mlp_input` without the side features."""
        if inputs_Nf.is_cpu and kernels.available():
            fill.fill([self._candidates(request) for request in requests], inputs_Nf)
        else:
            self._fill_in_steps(requests, sizes, inputs_Nf)

    def _candidates(self, request: ScoringInput) -> fill.Candidates:
        """The request as the kernel reads it: for the catalogue's items torch computes and copies nothing."""
        ranker, items = self.ranker, request.candidates
        attentions: list[kernels.Attention | fill.Window] = []
        if isinstance(ranker.short, DinAttention):
            attentions.append(fill.Window(self._native(ranker.short), *self._table_and_rows(request.short)))
        if isinstance(ranker.long, LreaAttention):
            slots = request.state
            attentions.append(kernels.Attention(self._native(ranker.long), slots.keys_Rd, slots.values_Rd))
        matches = None
        if self.config.match:
            matches = native_matches(request.short.hashes, request.state.sketch_M, self.config.sketch_cells)
        return fill.Candidates(*self._table_and_rows(items), items.hashes, attentions, matches)

    def _native(self, attention: DinAttention | LreaAttention) -> kernels.Scorer:
        """Its scorer as the kernels read it, made once; of DIN, with the scale of its sum."""
        if attention not in self._native_scorers:
            scale = attention.scale if isinstance(attention, DinAttention) else 1.0
            self._native_scorers[attention] = attention.scorer.native(scale)
        return self._native_scorers[attention]

    def _fill_in_steps(self, requests: Sequence[ScoringInput], sizes: Sequence[int], inputs_Nf: Tensor) -> None:
        """The same by torch's operations, or on a GPU."""
        width, ranker = self.config.width, self.ranker
        targets_Nd = torch.cat([self._vectors(request.candidates) for request in requests])
        inputs_Nf[:, :width] = targets_Nd
        free_Nf = inputs_Nf[:, width:]
        if isinstance(ranker.short, DinAttention):
            windows = [self._vectors(request.short) for request in requests]
            values = [window_Sd * ranker.short.scale for window_Sd in windows]
            _attend(ranker.short.scorer, targets_Nd, sizes, windows, values, free_Nf)
            free_Nf = free_Nf[:, 2 * width :]
        if isinstance(ranker.long, LreaAttention):
            keys, values = ([request.state[part] for request in requests] for part in (0, 1))
            _attend(ranker.long.scorer, targets_Nd, sizes, keys, values, free_Nf)
            free_Nf = free_Nf[:, 2 * width :]
        if self.config.match:
            cells = self.config.sketch_cells
            for request, rows_Bf in zip(requests, free_Nf.split_with_sizes(list(sizes)), strict=True):
                rows_Bf.copy_(
                    match_request(request.candidates.hashes, request.short.hashes, request.state.sketch_M, cells)
                )

    def _vectors(self, items: Items) -> Tensor:
        """Embeddings [n, d]."""
        table_Id, rows_n = self._table_and_rows(items)
        return functional.embedding(rows_n, table_Id)

    def _table_and_rows(self, items: Items) -> tuple[Tensor, Tensor]:
        """Where the items' embeddings are: in the catalogue's table, unless they bring other features than its."""
        if self._are_catalogues(items):
            return self._vectors_Id, items.rows
        return self.ranker.embed(items), torch.arange(len(items.rows), device=items.rows.device)

    def _are_catalogues(self, items: Items) -> bool:
        """Whether the items have the features that they have in the catalogue."""
        if items.rows.is_cpu and kernels.available():  # in a tenth of the time of torch's two operations
            return fill.codes_are(self._codes_IF, items.rows, items.codes)
        return torch.equal(items.codes, functional.embedding(items.rows, self._codes_IF))


def _attend(
    scorer: PairScorer,
    targets_Nd: Tensor,
    sizes: Sequence[int],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    free_Nf: Tensor,
) -> None:
    """Every request's interest and its product with the target, into the first 2d columns of `free_Nf`.

    keys, values: float32 [n, d] of each request, as many as it has; on a GPU one launch takes all of them.
    """
    width = targets_Nd.shape[1]
    interest_Nd = free_Nf[:, :width]
    if takes_fused_head(targets_Nd, scorer):
        ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=targets_Nd.device)
        # A slot of zeros adds nothing, whatever its score is.
        keys_URd, values_URd = (pad_sequence(list(rows), batch_first=True) for rows in (keys, values))
        interest_Nd.copy_(fused_absorbed(targets_Nd, ends, keys_URd, values_URd, scorer, longest=max(sizes)))
    else:
        parts = (tensor.split_with_sizes(list(sizes)) for tensor in (targets_Nd, interest_Nd))
        for keys_Sd, values_Sd, targets_Bd, interest_Bd in zip(keys, values, *parts, strict=True):
            scorer.attend_one(targets_Bd, keys_Sd, values_Sd, interest_Bd)
    torch.mul(targets_Nd, interest_Nd, out=free_Nf[:, width : 2 * width])


def _interest(
    scorer: PairScorer, targets_Nd: Tensor, offsets_U1: Tensor, user_N: Tensor, keys_URd: Tensor, values_URd: Tensor
) -> Tensor:
    """Every candidate's interest [N, d] in the slots of its user, of whom each may have all candidates."""
    if takes_fused_head(targets_Nd, scorer):
        return fused_absorbed(targets_Nd, offsets_U1, keys_URd, values_URd, scorer, longest=len(targets_Nd))
    keys_NRd, values_NRd = (slots.index_select(0, user_N) for slots in (keys_URd, values_URd))
    return scorer.attend(targets_Nd.unsqueeze(1), keys_NRd, values_NRd).squeeze(1)


class _ServingMlp:
    """The folded MLP, its first product split: side features once per request, everything else per candidate."""

    def __init__(self, ranker: Ranker, dtype: torch.dtype) -> None:
        first, *rest = [layer for layer in ranker.mlp if isinstance(layer, nn.Linear)]
        begin, side = ranker.interest_columns, ranker.side_columns
        self._side_embeddings = ranker.side_embeddings
        self._side_weight = first.weight[:, begin : begin + side]
        self._side_bias = first.bias
        per_candidate = torch.cat([first.weight[:, :begin], first.weight[:, begin + side :]], dim=1)
        self.columns = per_candidate.shape[1]
        self._dtype = dtype
        weights = [per_candidate, *(layer.weight for layer in rest)]
        self._weights = [_columns_of(weight, dtype) for weight in weights]
        self._biases = [layer.bias.to(dtype) for layer in rest]
        self._native: mlp.Mlp | None = None
        if dtype == torch.float32 and kernels.serve(*weights):
            self._native = mlp.Mlp(weights, [layer.bias for layer in rest], NEGATIVE_SLOPE)

    def __call__(self, inputs_Nf: Tensor, sides_UF: Tensor, sizes: Sequence[int]) -> Tensor:
        """Logits float32 [N] of all requests' candidates, `sizes[u]` of them with the side codes `sides_UF[u]`."""
        bias_Uh = self._bias(sides_UF).to(self._dtype)
        if self._native is not None:
            return self._native(inputs_Nf, bias_Uh, sizes)
        of_row = torch.repeat_interleave(torch.tensor(sizes)) if len(sizes) > 1 else None
        logits = []
        for begin in range(0, max(1, len(inputs_Nf)), _CHUNK_ROWS):
            rows = slice(begin, begin + _CHUNK_ROWS)
            user_N = None if of_row is None else of_row[rows].to(bias_Uh.device)
            logits.append(self._layers(inputs_Nf[rows], bias_Uh, user_N))
        return torch.cat(logits)

    def of_users(self, inputs_Nf: Tensor, side_UF: Tensor, user_N: Tensor) -> Tensor:
        """The same at once, of candidates that each say whose they are; their number alone decides every shape."""
        return self._layers(inputs_Nf, self._bias(side_UF).to(self._dtype), user_N)

    def _bias(self, side_UF: Tensor) -> Tensor:
        """What the first layer adds for a request's user and context, float32 [U, h]."""
        if not len(self._side_embeddings):
            return self._side_bias.expand(len(side_UF), -1)
        embedded = [table(side_UF[:, index]) for index, table in enumerate(self._side_embeddings)]
        return functional.linear(torch.cat(embedded, dim=-1), self._side_weight, self._side_bias)

    def _layers(self, rows_Nf: Tensor, bias_Uh: Tensor, user_N: Tensor | None) -> Tensor:
        """user_N: which of the biases is a row's; None where there is one."""
        rows_Nf, weight = rows_Nf.to(self._dtype), self._weights[0]
        if user_N is None:
            hidden = torch.addmm(bias_Uh, rows_Nf, weight)
        else:  # onto the rows' biases themselves: that addmm copies them first was a tenth of the MLP
            hidden = bias_Uh.index_select(0, user_N).addmm_(rows_Nf, weight)
        hidden = functional.leaky_relu_(hidden, NEGATIVE_SLOPE)
        for weight, bias_h in zip(self._weights[1:-1], self._biases[:-1], strict=True):
            hidden = functional.leaky_relu_(torch.addmm(bias_h, hidden, weight), NEGATIVE_SLOPE)
        return torch.addmm(self._biases[-1], hidden, self._weights[-1]).squeeze(-1).float()


def _columns_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [out, in] as the right side of a product, [in, out]."""
    return weight.to(dtype).t()
