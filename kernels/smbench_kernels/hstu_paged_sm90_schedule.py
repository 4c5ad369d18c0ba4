"""CUDA C++ of how a step's attention is shared among the multiprocessors: plain integers. Owns no kernel.

A *strip* is 128 rows of one head of one user; it visits tiles of the cached history, then of the step's own rows, as
`hstu_attention_sm90_schedule` has them. One thread block a multiprocessor works on strips, in one of two ways:

- **Whole**: strips are dealt out one by one, a few users at a time, their last rows first, since later rows see more.
  For many rows.
- **Cut**: as many thread blocks as a user has strips of all heads form a lane; all of a lane walk over the same tokens
  at the same time, so that these come from memory once, and whole pages of all heads. The tiles of all users are one
  line, cut into equal parts, one a lane. A strip that several lanes share is added up from their sums: by the first
  where they are few, which then has its own in registers; else by all, each some of the columns.

Macros: TILE (keys of a tile), PAGE (tokens of a page; one divides the other). The source of
`hstu_attention_sm90_schedule` comes before.
"""

from __future__ import annotations

MOST_USERS = 128

SOURCE = r"""
constexpr int STRIP = 128, MOST_USERS = 128;
/* lanes have at least so many tiles; what adding up costs, in tiles; sharers whose sums one of them gathers; heads of
   all users whose keys are read at a time where strips are whole: of 4096 tokens each, 8 of them take 33 MB */
constexpr int FEWEST_TILES = 4, CUT_COST = 8, FEW = 4, HEADS_AT_ONCE = 8;

/* users of a step: rows of new history and candidates, and how much history there is in all */
struct Users {
    const int *offsets, *targets, *totals;
    int count;
    __device__ Sequence sequence(int user) const { return Sequence(offsets, targets, nullptr, user, 1); }
    __device__ int cached(int user, const Sequence &rows) const { return totals[user] - rows.history_end; }
};

/* the tiles that a strip visits */
struct Visit {
    int of_cache;
    Keys own;
    __device__ Visit(const Sequence &rows, int cached, int row)
        : of_cache((cached + TILE - 1) / TILE), own(rows, row, STRIP)
    {
    }
    __device__ int count() const { return of_cache + own.count; }
};

/* How a tile of the cache is copied: in boxes of tokens, each within a page. Tokens past the cached ones may hold
   anything, also what is no number, so that no box may have them. A box of the last page therefore ends with the last
   cached token and begins before the page, or is all of it outside: the copy engine fills zeros in, whose scores and
   weights are 0. Keys that everybody sees need no order. */
struct Boxes {
    static constexpr int ROWS = PAGE < TILE ? PAGE : TILE, COUNT = TILE / ROWS, IN_PAGE = PAGE / ROWS;
    /* which page of the history, for one box of a tile */
    __device__ static int page(int tile, int box) { return (tile * COUNT + box) / IN_PAGE; }
    /* at which token of the page it begins, of `cached` tokens in all */
    __device__ static int token(int tile, int box, int cached)
    {
        const int in_page = (tile * COUNT + box) % IN_PAGE, left = cached - page(tile, box) * PAGE;
        if (left >= PAGE)
            return in_page * ROWS;
        return left - (max(1, (left + ROWS - 1) / ROWS) - in_page) * ROWS;
    }
};

/* how the work is shared; the same in every thread block */
struct Shares {
    int cut, strips, team, lanes, heads, users;
    int before[MOST_USERS + 1]; /* tiles of the users before: of each one's longest strip */
    /* before[] is filled. `tiles`: of one head of all users; `longest`: of one strip; `most`, `all`: strips of one
       head, of one user and together; on so many thread blocks */
    __device__ void decide(int tiles, int longest, int most, int all, int all_heads, int all_users, int blocks)
    {
        heads = all_heads;
        users = all_users;
        strips = most;
        team = strips * heads;
        lanes = strips ? max(1, min(blocks / team, line() / FEWEST_TILES)) : 0;
        const int whole_time = all * heads <= blocks ? longest : tiles * heads / blocks + longest / 2;
        const int cut_time = lanes ? line() / lanes + CUT_COST : 0;
        cut = team <= blocks && cut_time < whole_time;
    }
    __device__ int line() const { return before[users]; }
    __device__ int begin_of(int lane) const { return lane * line() / lanes; }
    __device__ int lane_of(int at) const { return ((at + 1) * lanes - 1) / line(); }
};

/* what one thread block does, piece after piece */
struct Walk {
    const Shares &shares;
    int block, blocks, at, stop, user;
    __device__ Walk(const Shares &shares, int block, int blocks)
        : shares(shares), block(block), blocks(blocks), at(block), stop(shares.team * shares.users), user(0)
    {
        if (shares.cut) {
            const int lane = block / shares.team;
            at = lane < shares.lanes ? shares.begin_of(lane) : 0;
            stop = lane < shares.lanes ? shares.begin_of(lane + 1) : 0;
            find();
        }
    }
    __device__ bool more() const { return at < stop; }
    __device__ void step()
    {
        if (!shares.cut) {
            /* there and back: who had the most of one round has the least of the next */
            const int round = at / blocks + 1;
            at = round * blocks + (round % 2 ? blocks - 1 - block : block);
            return;
        }
        at += min(weight() - within(), stop - at);
        find();
    }
    __device__ int weight() const { return shares.before[user + 1] - shares.before[user]; }
    /* of a cut line: the tile of the user's longest strip */
    __device__ int within() const { return at - shares.before[user]; }
    __device__ void find()
    {
        while (more() && at >= shares.before[user + 1])
            ++user;
    }
};

/* tiles [begin, end) of one strip, and which thread blocks have others of it */
struct Piece {
    int user, head, row, number, count, first, begin, end;
    __device__ explicit Piece(const Walk &walk)
    {
        const Shares &shares = walk.shares;
        number = 0;
        count = 1;
        first = walk.block;
        begin = 0;
        end = 1;
        if (!shares.cut) {
            /* a few users at a time, whose keys then stay in the L2; of them the last rows first */
            const int group = max(1, HEADS_AT_ONCE / shares.heads), of_group = group * shares.team;
            const int before = walk.at / of_group * group, at = walk.at % of_group;
            const int pairs = min(group, shares.users - before) * shares.heads;
            user = before + at % pairs / shares.heads;
            head = at % pairs % shares.heads;
            row = (shares.strips - 1 - at / pairs) * STRIP;
            return;
        }
        const int lane = walk.block / shares.team, strip = walk.block % shares.team;
        user = walk.user;
        head = strip / shares.strips;
        row = strip % shares.strips * STRIP;
        const int start = walk.at - walk.within(), first_lane = shares.lane_of(start);
        number = lane - first_lane;
        count = shares.lane_of(start + walk.weight() - 1) - first_lane + 1;
        first = first_lane * shares.team + strip;
        begin = walk.within();
        end = min(walk.weight(), begin + walk.stop - walk.at);
    }
    /* begin and end are of the longest strip; this one has `tiles` of its `weight` */
    __device__ void scale(const Walk &walk, int tiles)
    {
        if (walk.shares.cut) {
            begin = begin * tiles / walk.weight();
            end = end * tiles / walk.weight();
        } else {
            end = tiles;
        }
    }
    /* of those that share a strip, the thread block that has its `part`-th piece */
    __device__ int block_of(const Shares &shares, int part) const { return first + part * shares.team; }
    /* whether the thread block that has the first piece, which it does last, adds the others to its own sums */
    __device__ bool gathered() const { return count > 1 && count <= FEW; }
};
"""
