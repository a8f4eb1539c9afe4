"""The device side of a step: persistent rows, the model, sampling. Every rank of a parallel run has one and
is sent the same StepInputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.ops import BatchMetadata
from .batch import FILTERED, GREEDY, NO_LOGPROBS, StepInput

if TYPE_CHECKING:
    from ...kernels.compose import Kernels
    from ...models.layers import CausalLM, KVCache
    from .graphs import MixedGraphs


class Sampled(NamedTuple):
    """What a step leaves on the device. S: chunks that sample."""

    tokens: Tensor  # int64 [S]
    # of the sampled token [S], its rank [S]; of the best n [S, n], their ids [S, n]
    logprobs: tuple[Tensor, ...] | None


class Staging:
    """Page-locked host buffers for StepInput.data, one for each step in flight and one more: a buffer is
    written again when the step that was sent from it has come back, so nobody waits for its copy. int64,
    because that is what indexes are on a device."""

    def __init__(self, device: torch.device, slots: int, size: int) -> None:
        self._device, self._slots, self._next = device, slots, 0
        self._grow(size)

    def _grow(self, size: int) -> None:
        pinned = self._device.type == "cuda"
        self.host = [torch.empty(size, dtype=torch.int64, pin_memory=pinned) for _ in range(self._slots)]
        self.views = [buffer.numpy() for buffer in self.host]
        self.on_device = torch.empty(size, dtype=torch.int64, device=self._device)

    def send(self, data: np.ndarray) -> Tensor:
        """int64 [len(data)] on the device; valid until the next send, in stream order."""
        size = len(data)
        if size > len(self.on_device):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._grow(2 * size)
        slot = self._next = (self._next + 1) % self._slots
        self.views[slot][:size] = data
        return self.on_device[:size].copy_(self.host[slot][:size], non_blocking=True)


class ModelRunner:
    """Rows: one for each request that may run, and a last one that padding points to, whose blocks are the
    reserved block."""

    def __init__(
        self,
        model: CausalLM,
        kernels: Kernels,
        device: torch.device,
        caches: list[KVCache],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_plans: int,
        host_caches: list[KVCache] | None = None,
    ) -> None:
        """host_caches: the tier behind `caches`, in host memory (page-locked beside a GPU)."""
        self.model, self.kernels, self.device, self.caches = model, kernels, device, caches
        self.tiers = [caches, host_caches or []]
        self.block_size, self.max_num_seqs, self.max_model_len = block_size, max_num_seqs, max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        rows = max_num_seqs + 1
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = torch.full((rows, max_blocks), num_blocks, dtype=torch.int32, device=device)
        # tokens whose KV is written or being written
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        # Sampling parameters; a parameter's rows lie together, as kernels read them.
        self.numbers = torch.zeros((3, rows), dtype=torch.float32, device=device)  # temperature, top_p, min_p
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        # of the running decode batch, padded
        self.batch_rows = torch.zeros(rows, dtype=torch.int64, device=device)
        # int64 0, 1, 2 ...
        self.ordinals = torch.arange(max(rows, max_num_batched_tokens) + 1, device=device)
        # cu_seqlens_q of a decode batch
        self.bounds = torch.arange(rows + 1, dtype=torch.int32, device=device)
        # or a replay of it as a CUDA graph
        self.decode_step: Callable[[int, int, int, int], Sampled] = self.decode
        self.mixed_graphs: MixedGraphs | None = None  # of steps that are no decodes
        self.staging = Staging(device, max_plans + 1, 16 * rows + 3 * max_num_batched_tokens)

    def execute(self, step: StepInput) -> Sampled:
        """Enqueues the step; waits for nothing."""
        if step.num_copies:
            step, copies = step.without_copies()
            self.copy_blocks(copies)
        if not step.decode:
            return self._mixed(step)
        if len(step.data):  # else it is the last decode step again
            data = self.staging.send(step.data)
            self._tell(step, data)
            self._set_batch(step, data[step.num_told :])
        return self.decode_step(step.num_seqs, step.max_context, step.sampling, step.logprobs)

    @torch.inference_mode()
    def copy_blocks(self, copies: list[list[int]]) -> None:
        """Each a source tier and block and a target tier and block (core.plan.KVCopy): one after the other,
        in all layers."""
        for source_tier, source, target_tier, target in copies:
            for here, there in zip(self.tiers[source_tier], self.tiers[target_tier], strict=True):
                for part in (0, 1):  # keys, values
                    there[part][target].copy_(here[part][source], non_blocking=True)

    def _tell(self, step: StepInput, data: Tensor) -> None:
        """Applies what the step says about rows, at the front of `data`."""
        self._update_rows(data, step.num_updates, step.num_admitted)

    def _update_rows(self, data: Tensor, num_updates: int, num_admitted: int) -> None:
        self.kernels.update_rows(
            data,
            num_updates,
            num_admitted,
            block_tables=self.block_tables,
            numbers=self.numbers,
            top_k=self.top_k,
            seeds=self.seeds,
        )

    def _set_batch(self, step: StepInput, data: Tensor) -> None:
        """The rows of a decode step; `data` is what follows the block-table updates."""
        if not step.same_rows:
            self.batch_rows.copy_(data)

    def tell_nothing_new(self) -> None:
        """Says of the row that belongs to nobody what holds already: for the warm-up, as every step launches
        this."""
        last = self.max_num_seqs
        block = int(self.block_tables[last, 0])
        said = [last * self.block_tables.shape[1], block, last, 0, 0, 0, 0, 0, 0]
        self._update_rows(self.staging.send(np.array(said, dtype=np.int32)), 1, 1)

    @torch.inference_mode()
    def decode(self, num_seqs: int, max_context: int, sampling: int, logprobs: int = NO_LOGPROBS) -> Sampled:
        """One token for each of the first `num_seqs` of `batch_rows`. Reads and writes device state only, at
        fixed addresses."""
        rows = self.batch_rows[:num_seqs]
        tokens, positions, ends, slots, contexts, tables = self.kernels.decode_inputs(
            rows, self.lengths, self.last_tokens, self.block_tables, self.block_size
        )
        batch = BatchMetadata(
            slot_mapping=slots,
            block_tables=tables,
            cu_seqlens_q=self.bounds[: num_seqs + 1],
            context_lens=contexts,
            max_seqlen_q=1,
            max_seqlen_k=max_context,
            block_size=self.block_size,
        )
        hidden = self.model(tokens, positions, self.caches, batch)
        sampled = self._sample(hidden, rows, ends, sampling, logprobs)
        self.kernels.advance(rows, sampled.tokens, self.lengths, self.last_tokens)
        return sampled

    @torch.inference_mode()
    def _mixed(self, step: StepInput) -> Sampled:
        """Chunks of any length, as CUDA graphs where some are large enough."""
        graphs = self.mixed_graphs
        size = graphs.size_of(step) if graphs is not None else None
        data = self.staging.send(step.data if size is None else step.padded(*size, self.max_num_seqs))
        self._tell(step, data)
        told, samples = step.num_told, step.num_samples
        if graphs is not None and size is not None:
            return graphs.replay(size, data[told:], step)
        chosen, batch = data[told : told + samples], data[told + samples :]
        hidden, rows, ends, last = self.mixed_hidden(
            step.num_seqs, step.num_tokens, batch, step.max_query, step.max_context
        )
        return self.draw(hidden[last[chosen]], rows[chosen], ends[chosen], step.sampling, step.logprobs)

    def draw(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, sampling: int, logprobs: int = NO_LOGPROBS
    ) -> Sampled:
        """The next tokens of these rows, from the hidden states [S, N] of their last ones; positions: where
        they will stand."""
        if not len(rows):
            return Sampled(hidden.new_empty(0, dtype=torch.int64), None)
        sampled = self._sample(hidden, rows, positions, sampling, logprobs)
        self.last_tokens[rows] = sampled.tokens
        return sampled

    @torch.inference_mode()
    def mixed_hidden(
        self, seqs: int, tokens: int, inputs: Tensor, max_query: int, max_context: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """inputs: the sections rows to owners of a StepInput, int64 on the device. Answers hidden states
        [tokens, N] after the final norm; of each sequence its row, the position after its last token, and its
        last token's place in the batch, int64 [seqs]."""
        rows, starts, bounds, ids, owners = inputs.split((seqs, seqs, seqs + 1, tokens, tokens))
        size, first, past = self.block_size, bounds[:-1], bounds[1:]
        place = self.ordinals[:tokens]
        real = place < bounds[-1]
        positions = torch.where(real, (starts - first)[owners] + place, 0)  # int64 [T]
        tables = self.block_tables[rows]
        slots = tables[owners, positions // size].long() * size + positions % size
        ends = starts + past - first
        batch = BatchMetadata(
            slot_mapping=torch.where(real, slots, -1),
            block_tables=tables,
            cu_seqlens_q=bounds.int(),
            context_lens=ends.int(),
            max_seqlen_q=max_query,
            max_seqlen_k=max_context,
            block_size=size,
        )
        known = torch.where(ids < 0, self.last_tokens[rows][owners], ids)
        hidden = self.model(known, positions, self.caches, batch)
        self.lengths[rows] = ends
        return hidden, rows, ends, past - 1

    def _sample(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, sampling: int, logprobs: int
    ) -> Sampled:
        """hidden [S, N] of the last known tokens; positions int64 [S]: where the sampled tokens will
        stand."""
        logits = self.model.compute_logits(hidden)
        if sampling == GREEDY:
            tokens = self.kernels.sample(logits, None, None, None, None, rows, positions)
        else:
            temperature, top_p, min_p = self.numbers[:, rows]
            filters = (self.top_k[rows], top_p, min_p) if sampling == FILTERED else (None, None, None)
            tokens = self.kernels.sample(logits, temperature, *filters, self.seeds[rows], positions)
        return Sampled(tokens, None if logprobs == NO_LOGPROBS else _logprobs(logits, tokens, logprobs))


def _logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, ...]:
    """Of the model's distribution as it is, before temperature and filters."""
    everything = logits.float().log_softmax(-1)
    own = everything.gather(1, tokens.unsqueeze(1))
    best = everything.topk(count, dim=-1)
    return own.squeeze(1), (everything > own).sum(-1) + 1, best.values, best.indices
