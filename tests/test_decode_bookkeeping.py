"""What a decode step reads of its rows and leaves in them."""

from __future__ import annotations

import torch

from plugins.kernels.torch import ops


def test_inputs_are_the_rows_next_token_position_and_slot():
    lengths, last = torch.tensor([5, 0, 9, 0]), torch.tensor([50, 0, 90, 7])
    tables = torch.tensor([[3, 1, 8], [8, 8, 8], [0, 2, 5], [8, 8, 8]], dtype=torch.int32)
    rows = torch.tensor([2, 0, 3, 3])  # the last row is padding
    tokens, positions, ends, slots, contexts, gathered = ops.decode_inputs(rows, lengths, last, tables, 4)
    assert tokens.tolist() == [90, 50, 7, 7]
    assert positions.tolist() == [9, 5, 0, 0] and ends.tolist() == contexts.tolist() == [10, 6, 1, 1]
    assert slots.tolist() == [5 * 4 + 1, 1 * 4 + 1, 8 * 4, 8 * 4]
    assert gathered.tolist() == tables[rows].tolist()


def test_advance_adds_one_token_to_every_row_but_padding():
    lengths, last = torch.tensor([5, 0, 9, 0]), torch.tensor([50, 0, 90, 7])
    ops.advance(torch.tensor([2, 0, 3, 3]), torch.tensor([11, 12, 13, 14]), lengths, last)
    assert lengths.tolist() == [6, 0, 10, 0]
    assert last.tolist()[:3] == [12, 0, 11]
