"""CUDA C++ of which tiles our Hopper attention kernels visit, mask and keep: plain integers. Owns no kernel.

Macro: TILE (rows of a streamed tile).
"""

from __future__ import annotations

SOURCE = r"""
/* one sequence of the batch, in tokens: history ends where the candidates begin */
struct Sequence {
    int start, length, history_end, contextuals;
    bool causal;
    __device__ Sequence(const int *offsets, const int *targets, const int *contexts, int b, int causal)
        : start(offsets[b]), length(offsets[b + 1] - start), history_end(length - (targets ? targets[b] : 0)),
          contextuals(contexts ? contexts[b] : 0), causal(causal)
    {
    }
    __device__ bool visible(int query, int key) const
    {
        const bool ordered = key <= query || !causal || (query < contextuals && key < history_end);
        const bool apart = key >= history_end && query >= history_end && key != query;
        return query < length && key < length && ordered && !apart;
    }
    /* whether every key of [key, key + keys) is visible to every query of [query, query + queries) */
    __device__ bool all_visible(int query, int queries, int key, int keys) const
    {
        const bool inside = query + queries <= length && key + keys <= length;
        const bool ordered = !causal || key + keys - 1 <= query;
        return inside && ordered && (key + keys <= history_end || query + queries <= history_end);
    }
};

/* Where gradients of scores are kept between two kernels: blocks of 64 queries by 64 keys, 8 KiB each, all key blocks
   of a query block in order. In a block, parts of 16 queries after each other, in a part 16 keys after 16 keys, in them
   four times 8 keys by 8 queries, key by key: first queries before last, in these first keys before last. Where `pitch`
   is 0 only key blocks up to a query block's own have a place. */
struct Kept {
    static constexpr int ROWS = 64, BYTES = ROWS * ROWS * 2, PART_ROWS = 16, PART_BYTES = PART_ROWS * ROWS * 2;
    unsigned char *memory;
    int pitch;
    __device__ unsigned char *at(int queries, int keys) const
    {
        const int before = pitch ? queries * pitch : queries * (queries + 1) / 2;
        return memory + static_cast<long long>(before + keys) * BYTES;
    }
    /* whether a block has a place: it has whatever a query of it may see */
    __device__ static bool has(const Sequence &sequence, int queries, int keys)
    {
        const bool of_history = keys * ROWS < sequence.history_end;
        const bool of_context = queries * ROWS < sequence.contextuals && of_history;
        const bool ordered = !sequence.causal || queries >= keys || of_context;
        const bool apart = sequence.causal && !of_history && queries != keys;
        return max(queries, keys) * ROWS < sequence.length && ordered && !apart;
    }
};

/* the streamed tiles of TILE queries that see any of keys [key, key + keys): those of context, then from the
   first key on */
struct Queries {
    int before, first, count;
    __device__ Queries(const Sequence &sequence, int key, int keys)
    {
        first = sequence.causal ? key / TILE : 0;
        /* whole blocks of what is kept */
        const int context_end = (sequence.contextuals + Kept::ROWS - 1) / Kept::ROWS * Kept::ROWS;
        before = min(first, (context_end + TILE - 1) / TILE);
        const bool candidates = sequence.causal && key >= sequence.history_end;
        const int end = candidates ? min(sequence.length, key + keys) : sequence.length;
        before = candidates ? 0 : before;
        count = before + (end + TILE - 1) / TILE - first;
    }
    __device__ int at(int i) const { return (i < before ? i : first + i - before) * TILE; }
};

/* the streamed tiles of TILE keys that any of queries [query, query + queries) sees: those of history and context, then
   the candidates' own */
struct Keys {
    int before, apart, count;
    __device__ Keys(const Sequence &sequence, int query, int queries)
    {
        const int last = min(query + queries, sequence.length);
        const bool of_context = query < sequence.contextuals;
        const int history = min(sequence.history_end, sequence.causal && !of_context ? last : sequence.history_end);
        const bool to_candidates = !sequence.causal && query < sequence.history_end;
        before = ((to_candidates ? sequence.length : history) + TILE - 1) / TILE;
        /* candidates see themselves only: the tiles from their first one on that are not among those before */
        const int end = last > sequence.history_end ? (last + TILE - 1) / TILE : 0;
        apart = max(before, max(query, sequence.history_end) / TILE);
        count = before + max(0, end - apart);
    }
    __device__ int at(int i) const { return (i < before ? i : apart + i - before) * TILE; }
};
"""
