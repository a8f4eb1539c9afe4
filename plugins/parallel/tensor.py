"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, section 3), applied from outside to a model that
knows nothing of it.

PLAN says by module name how each matrix is split over the ranks of a stage; names that are not in it are held
in full by every rank. Each attention block and each MLP is one column-parallel product followed by one
row-parallel product, so a layer has two all-reduces, after `o_proj` and `down_proj`; the vocabulary costs one
more after the embedding and an all-gather of logits.

In a long step (`Mesh.begin`) an all-reduce is taken apart into its halves: ranks sum after a row-parallel
product, each for its part of the tokens, add and normalise those, and gather before the next column-parallel
product.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..executors.torch.batch import FILTERED, GREEDY, NO_LOGPROBS
from ..executors.torch.runner import ModelRunner, Sampled

if TYPE_CHECKING:
    from ..models.layers import Attention, CausalLM, PackedLinear
    from .mesh import Mesh

COLUMN, ROW, VOCABULARY, WHOLE = "column", "row", "vocabulary", "whole"
PLAN = {
    "q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW,
    "gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW,
    "embed_tokens": VOCABULARY, "lm_head": VOCABULARY,
}  # fmt: skip


class RowParallelLinear(nn.Linear):
    """Holds some input columns; the partial products are summed over the ranks, then the bias is added
    once."""

    mesh: Mesh

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self.mesh.partial_linear(x, self.weight)  # the norm that comes next sums it
        return self.mesh.reduced_linear(x, self.weight) + self.bias


class VocabularyParallelEmbedding(nn.Embedding):
    """Holds rows [first, first + num_embeddings) of the table; other tokens come from other ranks."""

    mesh: Mesh
    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        ours = (local >= 0) & (local < self.num_embeddings)
        rows = F.embedding(torch.where(ours, local, 0), self.weight)
        return self.mesh.reduced(torch.where(ours.unsqueeze(-1), rows, 0))


class VocabularyParallelHead(nn.Linear):
    """Every rank ends up with all logits, so each samples the same token and nobody has to be told."""

    mesh: Mesh
    vocab_size: int

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mesh.all_gather(F.linear(hidden, self.weight))[:, : self.vocab_size]

    @property
    def first(self) -> int:
        """The first token of this rank's part."""
        return self.mesh.place * self.out_features

    @property
    def everywhere(self) -> bool:
        """Whether every rank's part has a token: a small vocabulary may end before the last rank's."""
        return (self.mesh.parallel.tp - 1) * self.out_features < self.vocab_size

    def part(self, hidden: Tensor) -> Tensor:
        """hidden [S, N] -> logits of this rank's tokens."""
        return F.linear(hidden, self.weight)[:, : self.vocab_size - self.first]


class ShardRunner(ModelRunner):
    """Samples without all logits where it can: the best token of each rank's part, of which the best is the
    best of all."""

    mesh: Mesh

    def _sample(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, sampling: int, logprobs: int
    ) -> Sampled:
        head, sample = self.model.lm_head, self.kernels.sample_part
        if (
            sample is None
            or not isinstance(head, VocabularyParallelHead)
            or not head.everywhere
            or sampling == FILTERED
            or logprobs != NO_LOGPROBS
        ):
            return super()._sample(hidden, rows, positions, sampling, logprobs)
        temperature = None if sampling == GREEDY else self.numbers[0, rows]
        best = sample(head.part(hidden), temperature, self.seeds[rows], positions, first=head.first)
        return Sampled(self.mesh.best(*best), None)


class Sharding:
    """A rank's part of every tensor: `Share` of plugins/models/loading.py."""

    def __init__(self, model: CausalLM, mesh: Mesh) -> None:
        shape = model.spec.shape
        self._tp, self._place = mesh.parallel.tp, mesh.place
        self._vocab = shape.vocab_size
        self._kv_rows = shape.num_key_value_heads * shape.head_dim
        # With fewer KV heads than ranks, neighbours hold the same one.
        self._copies = max(1, self._tp // shape.num_key_value_heads)
        modules = dict(model.named_modules())
        self._layers = {name for name in modules if name.startswith("model.layers.") and name.count(".") == 2}
        # in other stages
        self._elsewhere = {name for name, module in modules.items() if isinstance(module, nn.Identity)}

    def full_shape(self, name: str, local: tuple[int, ...]) -> tuple[int, ...]:
        kind, axis = self._rule(name)
        if kind == WHOLE:
            return local
        whole = (
            self._vocab if kind == VOCABULARY else self._kv_rows if _is_kv(name) else local[axis] * self._tp
        )
        return (*local[:axis], whole, *local[axis + 1 :])

    def take(self, name: str, tensor: Any) -> Tensor:
        kind, axis = self._rule(name)
        part: Tensor
        if kind == WHOLE:
            part = tensor[:]
            return part
        size = tensor.get_shape()[axis]
        if kind == VOCABULARY:
            rows = -(-size // self._tp)
            first = min(self._place * rows, size)
            part = tensor[first : first + rows]
            # the last rank's rows past the vocabulary: no token is there
            return F.pad(part, (0, 0, 0, rows - len(part)))
        place, parts = self._place, self._tp
        if _is_kv(name):
            place, parts = place // self._copies, parts // self._copies
        rows = size // parts
        part = (
            tensor[:, place * rows : (place + 1) * rows]
            if axis
            else tensor[place * rows : (place + 1) * rows]
        )
        return part

    def owns(self, name: str) -> bool:
        if name.startswith("model.layers."):
            return ".".join(name.split(".")[:3]) in self._layers
        return name.rpartition(".")[0] not in self._elsewhere

    def _rule(self, name: str) -> tuple[str, int]:
        """How a checkpoint's tensor is split, and along which axis."""
        module, _, parameter = name.rpartition(".")
        kind = PLAN.get(module.rpartition(".")[2], WHOLE)
        if kind == ROW:
            return (ROW, 1) if parameter == "weight" else (WHOLE, 0)
        return kind, 0


def _is_kv(name: str) -> bool:
    return name.rpartition(".")[0].endswith(("k_proj", "v_proj"))


def shard(model: CausalLM, mesh: Mesh) -> Sharding:
    """Makes a model on the meta device smaller, in place. Answers how its tensors are to be read."""
    tp = mesh.parallel.tp
    share = Sharding(model, mesh)
    if tp == 1:
        return share
    for layer in model.model.decoder_layers:
        _shard_attention(layer.self_attn, mesh)
        _column_parallel(
            layer.mlp.gate_up_proj,
            {name: rows // tp for name, rows in layer.mlp.gate_up_proj.parts.items()},
            mesh,
        )
        layer.mlp.down_proj = _row_parallel(layer.mlp.down_proj, mesh)
        layer._add_norm = partial(mesh.add_norm, layer._add_norm)
    model.model._add_norm = partial(mesh.add_norm, model.model._add_norm)
    _shard_vocabulary(model, mesh)
    return share


def _shard_attention(attention: Attention, mesh: Mesh) -> None:
    attention.num_heads //= mesh.parallel.tp
    attention.num_kv_heads = max(1, attention.num_kv_heads // mesh.parallel.tp)
    rows, kv_rows = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    _column_parallel(attention.qkv_proj, {"q_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows}, mesh)
    attention.o_proj = _row_parallel(attention.o_proj, mesh)


def _column_parallel(linear: PackedLinear, parts: dict[str, int], mesh: Mesh) -> None:
    linear._product = partial(mesh.gathered_linear, linear._product)
    linear.parts, linear.out_features = parts, sum(parts.values())
    linear.weight = _parameter(linear.weight, linear.out_features, linear.in_features)
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.out_features)


def _row_parallel(linear: nn.Linear, mesh: Mesh) -> RowParallelLinear:
    made = RowParallelLinear(
        linear.in_features // mesh.parallel.tp,
        linear.out_features,
        bias=False,
        device="meta",
        dtype=linear.weight.dtype,
    )
    made.weight.requires_grad_(False)
    made.bias, made.mesh = linear.bias, mesh
    return made


def _shard_vocabulary(model: CausalLM, mesh: Mesh) -> None:
    vocab, hidden = model.spec.shape.vocab_size, model.spec.shape.hidden_size
    rows = -(-vocab // mesh.parallel.tp)
    if isinstance(table := model.model.embed_tokens, nn.Embedding):
        embedding = VocabularyParallelEmbedding(rows, hidden, device="meta", dtype=table.weight.dtype)
        embedding.weight.requires_grad_(False)
        embedding.mesh, embedding.first = mesh, mesh.place * rows
        model.model.embed_tokens = embedding
    if isinstance(old := model.lm_head, nn.Linear):
        head = VocabularyParallelHead(hidden, rows, bias=False, device="meta", dtype=old.weight.dtype)
        head.weight.requires_grad_(False)
        head.mesh, head.vocab_size = mesh, vocab
        if model.spec.shape.tie_word_embeddings:
            head.weight = model.model.embed_tokens.weight
        model.lm_head = head


def _parameter(like: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=False)
