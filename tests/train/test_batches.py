"""Every row once an epoch, and every learned token once a batch, whatever the cutting."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from loramix.train.batches import IGNORED, collate, epoch_order, micro_batches
from loramix.train.data import Row

ROW = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 200)).map(
    lambda n: Row(tuple(range(n[2], n[2] + n[0] + n[1])), ((n[0], n[0] + n[1]),))
)
ROWS = st.lists(ROW, min_size=1, max_size=40)


@given(ROWS, st.integers(1, 8), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_is_the_same_when_asked_again(rows, size, seed, epoch):
    lengths = [len(row.ids) for row in rows]
    order = epoch_order(lengths, size, seed, epoch)
    assert sorted(i for batch in order for i in batch) == list(range(len(rows)))
    assert all(len(batch) <= size for batch in order)
    assert order == epoch_order(lengths, size, seed, epoch)


def test_epochs_differ():
    orders = [epoch_order([3] * 50, 4, 0, epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]


@given(
    st.lists(ROWS, min_size=1, max_size=3),
    st.integers(1, 100),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_micro_batches_hold_every_learned_token_of_every_expert_once(steps, tokens, rows, packing):
    found: list[Counter[tuple[int, int]]] = [Counter() for _ in steps]
    for batch in micro_batches(steps, tokens=tokens, rows=rows, packing=packing):
        fits = batch.ids.numel() <= tokens or len(batch.ids) == 1
        assert fits
        assert sum(batch.counts) == len(batch.ids)
        owners = [k for k, count in enumerate(batch.counts) for _ in range(count)]
        if rows:
            assert len(batch.ids) <= rows
        for owner, line, labels in zip(
            owners, batch.ids.tolist(), batch.labels.tolist(), strict=True
        ):
            for read, label in zip(line, labels, strict=True):
                if label != IGNORED:
                    found[owner][read, label] += 1
    expected = [
        Counter(
            (row.ids[t - 1], row.ids[t])
            for row in step
            for a, b in row.learned
            for t in range(a, b)
        )
        for step in steps
    ]
    assert found == expected


def test_rows_are_padded_on_the_right_and_answers_labelled_where_they_are_predicted():
    batch = collate([Row((5, 6, 7, 8), ((2, 4),)), Row((9, 10), ((1, 2),))])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 7, 8, IGNORED], [10, IGNORED, IGNORED, IGNORED]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2


def test_packed_rows_begin_at_position_zero():
    rows = [Row((1, 2, 3, 4), ((1, 4),)), Row((5, 6), ((1, 2),)), Row((7, 8), ((1, 2),))]
    (batch,) = micro_batches([rows], tokens=64, packing=True)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert torch.equal(batch.positions, torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]]))
