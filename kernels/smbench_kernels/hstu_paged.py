"""HSTU attention over a paged cache: what a batch is, which key a query sees, truth in PyTorch. Owns no kernel.

An inference step of document 003: each user brings new history and candidates; keys and values of the history before
that lie in pages. New history is appended to the pages before it is attended to, candidates are never cached. Semantics
as in NVIDIA/recsys-examples (`paged_hstu_with_kvcache_benchmark.py`), whose first version did not attend to what is
cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's sequences: rows of q, k, v are new history, then candidates, sequence after sequence.

    A padded batch for a CUDA graph has sequences of no rows at its end: every entry of theirs is that of the last one.
    """

    offsets: torch.Tensor
    """int32 [batch + 1]: sequence b has the rows offsets[b] … offsets[b + 1] - 1."""
    num_targets: torch.Tensor
    """int32 [batch]: how many of a sequence's last rows are candidates."""
    totals: torch.Tensor
    """int32 [batch]: tokens of its history, cached and new."""
    page_offsets: torch.Tensor
    """int32 [batch + 1]: where its entries of `page_ids` begin."""
    page_ids: torch.Tensor
    """int32 [at least page_offsets[-1]]: token t of a history is row t % page_size of page page_ids[page_offsets[b] +
    t // page_size]."""
    page_size: int
    max_rows: int
    """Most rows that a sequence may have: the bound of a kernel's grid."""
    max_seqlen: int
    """The N of `silu(alpha q k^T) / N`: a constant of the model, since a cache would not fit another one."""

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.totals.numel()

    def sequences(self) -> list[PagedSequence]:
        """The sequences as plain integers. Waits for the device: for references and bookkeeping only."""
        offsets, pages = self.offsets.tolist(), self.page_offsets.tolist()
        counts = zip(self.num_targets.tolist(), self.totals.tolist(), strict=True)
        return [
            PagedSequence(offsets[b], offsets[b + 1] - offsets[b] - targets, targets, total, pages[b])
            for b, (targets, total) in enumerate(counts)
        ]


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """One sequence of a batch."""

    start: int
    """Its first row."""
    new: int
    """Rows of new history."""
    targets: int
    """Rows of candidates, after those."""
    total: int
    """Tokens of history, cached and new."""
    first_page: int
    """Its first entry of `page_ids`."""

    @property
    def cached(self) -> int:
        """Tokens of history that were there before the step."""
        return self.total - self.new


def visible_paged(sequence: PagedSequence, device: torch.device | str) -> torch.Tensor:
    """Which key each query of one sequence sees: bool [new + targets, total + targets].

    Columns are the history, cached and new, then the candidates. New history sees the history up to and with itself; a
    candidate sees all history and itself, never another candidate.
    """
    row = torch.arange(sequence.new + sequence.targets, device=device)[:, None]
    column = torch.arange(sequence.total + sequence.targets, device=device)[None, :]
    position = row + sequence.cached
    of_history = (column <= position) & (column < sequence.total)
    # row and column of a candidate count alike from the end of the history on
    return of_history | (column == position)


def append_reference(cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch) -> None:
    """Write the keys and values of new history into their pages, in place.

    cache: [pages, 2, page_size, heads, head_dim], keys first. k, v: [rows, heads, head_dim].
    """
    for sequence in batch.sequences():
        pages, slots = _places(batch, sequence, range(sequence.cached, sequence.total))
        rows = slice(sequence.start, sequence.start + sequence.new)
        cache[pages, 0, slots] = k[rows].to(cache.dtype)
        cache[pages, 1, slots] = v[rows].to(cache.dtype)


def paged_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, batch: PagedBatch, alpha: float
) -> torch.Tensor:
    """`silu(alpha * q k^T) / max_seqlen` where visible, `@ v`: [rows, heads, head_dim] in the dtype of q.

    q, k, v: [rows, heads, head_dim], any strides; keys and values of the history are read from `cache` (layout as in
    `append_reference`, which has to come first), those of candidates from k and v. Rows of no sequence are 0.
    """
    y = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for sequence in batch.sequences():
        mask = visible_paged(sequence, q.device)
        pages, slots = _places(batch, sequence, range(sequence.total))
        rows = slice(sequence.start, sequence.start + sequence.new + sequence.targets)
        own = slice(sequence.start + sequence.new, rows.stop)
        keys = torch.cat([cache[pages, 0, slots].to(q.dtype), k[own]])
        values = torch.cat([cache[pages, 1, slots].to(q.dtype), v[own]])
        for h in range(q.shape[1]):
            weights = F.silu(q[rows, h] @ keys[:, h].T * alpha) / batch.max_seqlen
            y[rows, h] = weights.masked_fill(~mask, 0.0) @ values[:, h]
    return y


def _places(batch: PagedBatch, sequence: PagedSequence, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot of tokens of a history."""
    token = torch.tensor(tokens, dtype=torch.int64, device=batch.page_ids.device)
    pages = batch.page_ids[sequence.first_page + token // batch.page_size].long()
    return pages, token % batch.page_size


def paged_attention_flops(sequences: Sequence[PagedSequence], heads: int, head_dim: int) -> int:
    """Operations of one layer's attention: four for each element of each visible pair of query and key."""
    pairs = 0
    for sequence in sequences:
        # new history: the cached, and of the new half of the square with the diagonal
        pairs += sequence.new * sequence.cached + sequence.new * (sequence.new + 1) // 2
        pairs += sequence.targets * (sequence.total + 1)
    return 4 * pairs * heads * head_dim
