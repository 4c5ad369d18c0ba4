"""Which tiles the Hopper attention kernels visit, mask and keep: their own C++ by a C++ compiler, against the mask."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

from smbench_kernels import hstu_attention_sm90, hstu_attention_sm90_schedule
from smbench_kernels.hstu import Jagged, visible

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")

TILES = (48, 64, 80)
BLOCK = 64
# length, candidates, context
SEQUENCES = [
    (1, 0, 0),
    (1, 1, 0),
    (47, 0, 47),
    (64, 0, 0),
    (65, 64, 1),
    (127, 64, 10),
    (128, 70, 3),
    (129, 3, 100),
    (192, 192, 0),
    (257, 100, 2),
    (300, 0, 130),
    (384, 129, 190),
    (385, 1, 0),
]

HARNESS = r"""
#include <algorithm>
#define __device__
using std::max;
using std::min;
%s
static Sequence made(int length, int targets, int contexts, int causal)
{
    static int offsets[2];
    offsets[0] = 0;
    offsets[1] = length;
    return Sequence(offsets, &targets, &contexts, 0, causal);
}
template <typename Tiles> static int listed(const Tiles &tiles, int *out)
{
    for (int i = 0; i < tiles.count; ++i)
        out[i] = tiles.at(i);
    return tiles.count;
}
extern "C" int query_tiles(int l, int t, int c, int causal, int key, int keys, int *out)
{
    return listed(Queries(made(l, t, c, causal), key, keys), out);
}
extern "C" int key_tiles(int l, int t, int c, int causal, int query, int queries, int *out)
{
    return listed(Keys(made(l, t, c, causal), query, queries), out);
}
extern "C" int all_visible(int l, int t, int c, int causal, int query, int queries, int key, int keys)
{
    return made(l, t, c, causal).all_visible(query, queries, key, keys);
}
extern "C" int visible(int l, int t, int c, int causal, int query, int key)
{
    return made(l, t, c, causal).visible(query, key);
}
extern "C" int has(int l, int t, int c, int causal, int queries, int keys)
{
    return Kept::has(made(l, t, c, causal), queries, keys);
}
extern "C" long long place(int pitch, int queries, int keys)
{
    const Kept kept = {nullptr, pitch};
    return kept.at(queries, keys) - static_cast<unsigned char *>(nullptr);
}
"""


@pytest.fixture(scope="module", params=TILES)
def schedule(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    folder = tmp_path_factory.mktemp("schedule")
    code, built = folder / "schedule.cpp", folder / "schedule.so"
    code.write_text(HARNESS % hstu_attention_sm90_schedule.SOURCE)
    command = [str(COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", f"-DTILE={request.param}", "-o", str(built)]
    subprocess.run([*command, str(code)], check=True)
    library = ctypes.CDLL(str(built))
    library.place.restype = ctypes.c_longlong
    return Schedule(library, request.param)


class Schedule:
    """The compiled structures for streamed tiles of `tile` rows."""

    def __init__(self, library: ctypes.CDLL, tile: int) -> None:
        self.library, self.tile = library, tile

    def tiles(self, name: str, sequence: tuple[int, int, int], causal: bool, first: int, rows: int) -> list[int]:
        out = (ctypes.c_int * 64)()
        count = getattr(self.library, name)(*sequence, int(causal), first, rows, out)
        return list(out[:count])

    def has(self, sequence: tuple[int, int, int], causal: bool) -> Callable[[int, int], bool]:
        return lambda queries, keys: bool(self.library.has(*sequence, int(causal), queries, keys))


def seen(sequence: tuple[int, int, int], causal: bool, size: int) -> torch.Tensor:
    """The mask, nothing visible past the sequence's end."""
    padded = torch.zeros(size, size, dtype=torch.bool)
    padded[: sequence[0], : sequence[0]] = visible(*sequence, causal, "cpu")
    return padded


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_every_visible_pair_is_in_one_visited_tile(
    schedule: Schedule, sequence: tuple[int, int, int], causal: bool
) -> None:
    mask, tile = seen(sequence, causal, 640), schedule.tile
    for name, rows, turned in (("query_tiles", 64, mask.T), ("key_tiles", 128, mask)):
        for first in range(0, sequence[0], rows):
            tiles = schedule.tiles(name, sequence, causal, first, rows)
            assert tiles
            assert len(set(tiles)) == len(tiles)
            assert all(start % tile == 0 and 0 <= start < sequence[0] for start in tiles)
            visited = sum(int(turned[first : first + rows, start : start + tile].sum()) for start in tiles)
            assert visited == int(turned[first : first + rows].sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_the_kernels_mask_is_the_definitions(schedule: Schedule, sequence: tuple[int, int, int], causal: bool) -> None:
    mask, edge = seen(sequence, causal, 640), sequence[0] + 2
    found = [[schedule.library.visible(*sequence, int(causal), q, k) for k in range(edge)] for q in range(edge)]
    assert torch.equal(torch.tensor(found, dtype=torch.bool), mask[:edge, :edge])
    # a tile that is said to need no mask needs none
    for query in range(0, sequence[0], 64):
        for key in range(0, sequence[0], schedule.tile):
            if schedule.library.all_visible(*sequence, int(causal), query, 64, key, schedule.tile):
                assert bool(mask[query : query + 64, key : key + schedule.tile].all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_what_one_kernel_reads_the_other_has_kept(
    schedule: Schedule, sequence: tuple[int, int, int], causal: bool
) -> None:
    """Rows past the sequence's end may hold anything: they make rows of dq that nobody stores."""
    has, mask, length = schedule.has(sequence, causal), seen(sequence, causal, 640), sequence[0]
    blocks = range(-(-length // BLOCK))
    for keys in blocks:
        tiles = schedule.tiles("query_tiles", sequence, causal, keys * BLOCK, BLOCK)
        written = {query for start in tiles for query in range(start, start + schedule.tile)}
        for queries in blocks:
            rows = range(queries * BLOCK, min((queries + 1) * BLOCK, length))
            if has(queries, keys):
                assert written.issuperset(rows)
            else:
                assert not mask[rows.start : rows.stop, keys * BLOCK : (keys + 1) * BLOCK].any()


def test_places_of_kept_blocks_are_apart_and_within_the_workspace(schedule: Schedule) -> None:
    for longest in (1, 64, 65, 640, 1000):
        offsets = torch.tensor([0, longest], dtype=torch.int32)
        for batch in (
            Jagged(offsets, longest),
            Jagged(offsets, longest, causal=False),
            Jagged(offsets, longest, num_contextuals=torch.tensor([1], dtype=torch.int32)),
        ):
            room = hstu_attention_sm90.workspace_of(batch)
            contexts = 1 if batch.num_contextuals is not None else 0
            has = schedule.has((longest, 0, contexts), batch.causal)
            blocks = range(-(-longest // BLOCK))
            places = [schedule.library.place(room.pitch, q, k) for q in blocks for k in blocks if has(q, k)]
            assert len(set(places)) == len(places)
            assert all(place % (BLOCK * BLOCK * 2) == 0 for place in places)
            assert max(places) + BLOCK * BLOCK * 2 <= room.pair_bytes


def test_pairs_are_shared_out_evenly_within_the_workspace() -> None:
    batch = Jagged(torch.zeros(33, dtype=torch.int32), 8192)
    room = hstu_attention_sm90.workspace_of(batch)
    assert room.pair_bytes == 128 * 129 // 2 * 64 * 64 * 2
    assert room.pairs_in(room.pair_bytes - 1, 128) == 0
    assert room.pairs_in(room.pair_bytes * 15, 128) == 15
    assert room.pairs_in(room.pair_bytes * 100, 128) == 64
    assert room.pairs_in(room.pair_bytes * 1000, 128) == 128
