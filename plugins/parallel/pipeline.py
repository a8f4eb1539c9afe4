"""Pipeline parallelism: consecutive layers a stage, one tensor from each stage to the next (Narayanan et al.
2021, section 2.2, without its backward passes). The engine keeps `pp` plans in flight, so while a stage
computes one, its neighbours compute others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headway import ParallelConfig, StepPlan

from ..executors.torch.batch import Batcher, StepInput
from ..executors.torch.runner import Sampled
from .tensor import ShardRunner

if TYPE_CHECKING:
    from ..kernels.ops import BatchMetadata
    from ..models.layers import CausalLM, DecoderLayer, KVCache
    from .mesh import Mesh


def layers_of(parallel: ParallelConfig, stage: int, num_layers: int) -> range:
    """The stage's layers: as listed in `parallel.layers`, else evenly, with the odd ones in the middle stages
    (the first and the last have the vocabulary to carry)."""
    counts = parallel.layers
    if counts is None:
        base, odd = divmod(num_layers, parallel.pp)
        middle = sorted(
            range(parallel.pp), key=lambda s: (s in (0, parallel.pp - 1), s == parallel.pp - 1, s)
        )
        counts = [base + (s in middle[:odd]) for s in range(parallel.pp)]
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


class LayerRange(nn.ModuleList):
    """Some layers of a model under their numbers in the whole of it, which is how the checkpoint names
    them."""

    def __init__(self, layers: Sequence[DecoderLayer], numbers: range) -> None:
        super().__init__()
        for number in numbers:
            self.add_module(str(number), layers[number])


def cut(model: CausalLM, mesh: Mesh) -> None:
    """Leaves this stage's layers, and of the vocabulary what the stage needs. In place, before weights are
    loaded."""
    parallel, decoder = mesh.parallel, model.model
    if parallel.pp == 1:
        return
    decoder.layers = LayerRange(decoder.decoder_layers, layers_of(parallel, mesh.stage, len(decoder.layers)))
    tied = model.spec.shape.tie_word_embeddings
    if not mesh.is_first and not (tied and mesh.is_last):
        decoder.embed_tokens = nn.Identity()  # type: ignore[assignment]  # this stage never calls it
    if not mesh.is_last:
        decoder.norm = model.lm_head = nn.Identity()  # type: ignore[assignment]  # nor these


class Stage:
    """A model of which ranks hold parts, loaded, with the face of a whole one: what it returns is for the
    last stage to use."""

    def __init__(self, model: CausalLM, mesh: Mesh, timed: bool = False) -> None:
        self.spec, self.model, self.lm_head, self._mesh = model.spec, model.model, model.lm_head, mesh
        self.compute_logits = model.compute_logits
        self._timed = timed
        self._marks: list[list[torch.cuda.Event]] = []  # of each step: its input is there; its output is

    def __call__(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[KVCache], batch: BatchMetadata
    ) -> Tensor:
        """tokens, positions int64 [T] -> [T, N]: on the last stage hidden states after the final norm, else
        of no meaning. Between stages travels [T, N], or of a long step each rank's part of the rows
        (`Mesh.begin`)."""
        decoder, mesh = self.model, self._mesh
        rows = mesh.begin(len(tokens))
        if mesh.is_first:
            hidden = decoder.embed_tokens(tokens)
        else:
            hidden = mesh.receive(caches[0][0].new_empty(rows, self.spec.shape.hidden_size))
        if self._timed and not torch.cuda.is_current_stream_capturing():
            self._marks.append([])
            self.mark()
        hidden, residual = decoder.run_layers(hidden, None, positions, caches, batch)
        assert residual is not None  # every stage has a layer
        if mesh.is_last:
            return mesh.gathered(decoder.finish(hidden, residual))
        if hidden.dim() == 3:  # in parts, [parts, T, N], as the next norm would take it
            hidden = hidden.sum(0).to(residual.dtype)
        hidden = mesh.whole(hidden) + residual
        self.mark()
        mesh.send(hidden)
        return hidden if rows == len(tokens) else hidden.new_empty(len(tokens), hidden.shape[1])

    def mark(self) -> None:
        """A point in time on the device, of the step that is running."""
        if self._marks and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[-1].append(event)

    def times(self) -> tuple[float, float]:
        """(busy, elapsed) seconds of the steps marked since the last call."""
        steps, self._marks = self._marks, []
        if not steps:
            return 0.0, 0.0
        torch.cuda.synchronize()
        return sum(marks[0].elapsed_time(marks[-1]) for marks in steps) / 1e3, steps[0][0].elapsed_time(
            steps[-1][-1]
        ) / 1e3


class StageRunner(ShardRunner):
    """Runs its layers on what the stage before sent. Only the last stage samples, and nobody sends tokens
    back over the device: the driver puts the tokens of a decode step, which it knows by then, behind its
    rows."""

    def _tell(self, step: StepInput, data: Tensor) -> None:
        self.mesh.flush()  # what this step's graph sends must not overtake what was sent last
        super()._tell(step, data)

    def _set_batch(self, step: StepInput, data: Tensor) -> None:
        n = step.num_seqs
        super()._set_batch(step, data[:-n])
        self.last_tokens[self.batch_rows[:n]] = data[-n:]

    def _sample(
        self, hidden: Tensor, rows: Tensor, positions: Tensor, sampling: int, logprobs: int
    ) -> Sampled:
        if self.mesh.is_last:
            sampled = super()._sample(hidden, rows, positions, sampling, logprobs)
            stage: Any = self.model
            stage.mark()
            return sampled
        return Sampled(self.last_tokens[rows], None)


class StageBatcher(Batcher):
    """Appends to every decode step the tokens that it computes, int32 [num_seqs]: the first stage did not
    sample them."""

    def _decode(self, plan: StepPlan, last: Any, updates: Any, *, same_rows: bool) -> StepInput:
        step = super()._decode(plan, last, updates, same_rows=same_rows)
        tokens = np.array([r.token_ids[-1] for r in plan.requests], dtype=np.int32)
        return replace(step, data=np.concatenate((step.data, tokens)))
