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


def test_what_a_step_says_about_rows_is_written_to_theirs_alone():
    tables = torch.full((4, 3), 8, dtype=torch.int32)
    numbers, top_k, seeds = (
        torch.zeros(3, 4),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
    )
    bits = torch.tensor([0.7, 0.9, 0.1]).view(torch.int32).tolist()
    low, high = torch.tensor([-5], dtype=torch.int64).view(torch.int32).tolist()
    said = [2 * 3 + 1, 0 * 3, 5, 6, *[2, *bits, 40, low, high], *[0, 0, 0, 0, 0, 7, 1], 99]
    ops.update_rows(torch.tensor(said), 2, 2, block_tables=tables, numbers=numbers, top_k=top_k, seeds=seeds)
    assert tables.tolist() == [[6, 8, 8], [8, 8, 8], [8, 5, 8], [8, 8, 8]]
    torch.testing.assert_close(numbers[:, 2], torch.tensor([0.7, 0.9, 0.1]), rtol=0, atol=0)
    assert top_k.tolist() == [0, 0, 40, 0] and seeds.tolist() == [2**32 + 7, 0, -5, 0]
