"""How the paged Hopper kernel shares its work and copies pages: its own C++ by a C++ compiler, against plain models.

And what it refuses, and that its launch passes what the kernel declares. What it computes: test_hstu_inference_gpu.py.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smbench_kernels import (
    hstu_attention_sm90_schedule,
    hstu_block,
    hstu_launches,
    hstu_paged_attention,
    hstu_paged_sm90,
    hstu_paged_sm90_schedule,
    nvrtc,
)
from smbench_kernels.hstu_graphs import PaddedShape, empty_batch
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.hstu_paged_sm90_kernel import KERNEL

COMPILER = shutil.which("g++") or shutil.which("clang++")
compiled = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
TILES, STRIP, MOST_PIECES = (32, 64), 128, 1 << 16

HARNESS = r"""
#include <algorithm>
#define __device__
using std::max;
using std::min;
%s
static Shares shares;
static Users users;
extern "C" int share(const int *offsets, const int *targets, const int *totals, int count, int heads, int blocks)
{
    users = {offsets, targets, totals, count};
    int tiles = 0, longest = 0, most = 0, all = 0;
    shares.before[0] = 0;
    for (int user = 0; user < count; ++user) {
        const Sequence rows = users.sequence(user);
        int weight = 0;
        for (int row = 0; row < rows.length; row += STRIP) {
            const int visits = Visit(rows, users.cached(user, rows), row).count();
            tiles += visits;
            weight = max(weight, visits);
        }
        most = max(most, (rows.length + STRIP - 1) / STRIP);
        all += (rows.length + STRIP - 1) / STRIP;
        longest = max(longest, weight);
        shares.before[user + 1] = shares.before[user] + weight;
    }
    shares.decide(tiles, longest, most, all, heads, count, blocks);
    return shares.cut;
}
extern "C" int pieces(int block, int blocks, int *out)
{
    int found = 0;
    for (Walk walk(shares, block, blocks); walk.more(); walk.step()) {
        Piece piece(walk);
        const Sequence rows = users.sequence(piece.user);
        if (piece.row >= rows.length)
            continue;
        const Visit visit(rows, users.cached(piece.user, rows), piece.row);
        piece.scale(walk, visit.count());
        const int all[] = {piece.user, piece.head, piece.row, piece.begin, piece.end, piece.number, piece.count,
                           piece.first, piece.block_of(shares, piece.number), visit.count()};
        for (int value : all)
            out[found++] = value;
    }
    return found;
}
extern "C" int page(int tile, int box) { return Boxes::page(tile, box); }
extern "C" int token(int tile, int box, int cached) { return Boxes::token(tile, box, cached); }
"""
FIELDS = 10


def built(folder: Path, page_size: int, tile: int) -> ctypes.CDLL:
    code, library = folder / "paged.cpp", folder / "paged.so"
    code.write_text(HARNESS % (hstu_attention_sm90_schedule.SOURCE + hstu_paged_sm90_schedule.SOURCE))
    macros = [f"-DTILE={tile}", f"-DPAGE={page_size}"]
    subprocess.run([str(COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", *macros, "-o", library, code], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module", params=TILES)
def schedule(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("schedule"), 32, request.param)


Step = Sequence[tuple[int, int, int]]
"""(cached, new, candidates) of each user."""
STEPS: dict[str, Step] = {
    "document, batch 8": [(3968, 128, 256)] * 8,
    "document, batch 1": [(3968, 128, 256)],
    "nothing cached": [(0, 4096, 256)] * 8,
    "one token": [(0, 1, 0)],
    "padded": [(3968, 128, 256), (0, 0, 0), (0, 0, 0), (0, 0, 0)],
    "nobody": [(0, 0, 0)] * 3,
    "all kinds": [(100, 3, 7), (0, 0, 0), (1, 1, 1), (4000, 0, 300), (17, 700, 0), (0, 0, 5)],
}


def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int]:
    return (ctypes.c_int * len(values))(*values)


def every_piece(schedule: ctypes.CDLL, step: Step, heads: int, blocks: int) -> tuple[bool, list[list[list[int]]]]:
    """Whether strips are cut, and of each thread block its pieces."""
    offsets = [0]
    for _, new, targets in step:
        offsets.append(offsets[-1] + new + targets)
    kept = (
        integers(offsets),
        integers([targets for *_, targets in step]),
        integers([cached + new for cached, new, _ in step]),
    )
    cut = bool(schedule.share(*kept, len(step), heads, blocks))
    room = (ctypes.c_int * MOST_PIECES)()
    found = []
    for block in range(blocks):
        flat = list(room[: schedule.pieces(block, blocks, room)])
        found.append([flat[i : i + FIELDS] for i in range(0, len(flat), FIELDS)])
    return cut, found


def check_step(schedule: ctypes.CDLL, step: Step, heads: int, blocks: int) -> tuple[bool, list[int]]:
    """Every tile of every strip is in one piece, and who shares one knows of each other; the tiles of each block."""
    cut, work = every_piece(schedule, step, heads, blocks)
    tiles: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    sharing: dict[tuple[int, int, int], list[tuple[int, int, int, int, int]]] = defaultdict(list)
    wanted, places = {}, set()
    for block, pieces in enumerate(work):
        for user, head, row, begin, end, number, count, first, itself, visits in pieces:
            strip = (user, head, row)
            tiles[strip] += range(begin, end)
            sharing[strip].append((number, count, first, block, itself))
            wanted[strip] = visits
            if count > 1:
                # sums and counters of a launch lie apart
                place = 2 * block + (number == 0)
                assert place not in places
                places.add(place)
    expected = {
        (user, head, row)
        for user, (_, new, targets) in enumerate(step)
        for head in range(heads)
        for row in range(0, new + targets, STRIP)
    }
    assert set(tiles) == expected
    for strip, visited in tiles.items():
        assert sorted(visited) == list(range(wanted[strip]))
        numbers = sorted(number for number, *_ in sharing[strip])
        counts, firsts = {one[1] for one in sharing[strip]}, {one[2] for one in sharing[strip]}
        assert counts == {len(numbers)} and numbers == list(range(len(numbers))) and len(firsts) == 1
        assert all(block == itself for *_, block, itself in sharing[strip])
    shared = {strip: ones[0][2] for strip, ones in sharing.items() if len(ones) > 1}
    assert len(set(shared.values())) == len(shared)
    return cut, [sum(piece[4] - piece[3] for piece in pieces) for pieces in work]


@compiled
@pytest.mark.parametrize("blocks", [1, 2, 40, 132])
@pytest.mark.parametrize("name", STEPS)
def test_every_tile_of_every_strip_is_in_one_piece(schedule: ctypes.CDLL, name: str, blocks: int) -> None:
    check_step(schedule, STEPS[name], 4, blocks)


@compiled
def test_steps_drawn_at_random_are_shared_out_whole(schedule: ctypes.CDLL) -> None:
    seed = random.randrange(2**31)
    sys.stderr.write(f"seed {seed}\n")
    draw = random.Random(seed)
    for _ in range(60):
        most = draw.choice([3, 200, 3000])
        step = [
            (draw.randrange(most), draw.choice([0, 1, draw.randrange(most)]), draw.randrange(300))
            for _ in range(draw.randint(1, 9))
        ]
        check_step(schedule, step, draw.choice([1, 2, 4]), draw.choice([1, 7, 60, 132]))


@compiled
def test_the_documents_steps_keep_all_multiprocessors_at_work(schedule: ctypes.CDLL) -> None:
    """96 strips of 66 tiles on 132 multiprocessors: uncut, 36 of them would have nothing to do."""
    for batch, allowed in ((8, 1.02), (4, 1.05), (2, 1.10), (1, 1.05)):
        cut, tiles = check_step(schedule, [(3968, 128, 256)] * batch, 4, 132)
        assert cut and max(tiles) <= allowed * sum(tiles) / 132 + 1
    cut, tiles = check_step(schedule, [(0, 4096, 256)] * 8, 4, 132)
    assert not cut and max(tiles) <= 1.1 * sum(tiles) / 132


@compiled
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("page_size", hstu_paged_sm90.PAGE_SIZES)
def test_boxes_hold_each_cached_token_once_and_no_other(page_size: int, tile: int, tmp_path: Path) -> None:
    library = built(tmp_path, page_size, tile)
    rows = min(page_size, tile)
    for cached in (0, 1, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 191, 193, 256, 300):
        found = []
        for index in range(-(-cached // tile)):
            for box in range(tile // rows):
                first = library.token(index, box, cached)
                # what lies outside of the page is filled with zeros
                inside = range(max(0, first), min(page_size, first + rows))
                found += [library.page(index, box) * page_size + token for token in inside]
        assert sorted(found) == list(range(cached))


def tensors(heads: int = 2, page_size: int = 32) -> tuple[torch.Tensor, torch.Tensor, PagedBatch]:
    q = torch.zeros(9, heads, 256, dtype=torch.bfloat16)
    cache = torch.zeros(5, 2, page_size, heads, 256, dtype=torch.bfloat16)
    return q, cache, empty_batch(PaddedShape(2, 9), page_size, 64, torch.device("cpu"))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the processor pass for those of a Hopper card."""
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_processor_is_refused_with_the_reason() -> None:
    q, cache, batch = tensors()
    assert "9.0" in str(hstu_paged_sm90.supports(q, q, q, cache, batch))
    with pytest.raises(ValueError, match=r"9\.0"):
        hstu_paged_sm90.attend(q, q, q, cache, batch, 1.0, torch.empty_like(q), appends=True)


Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch]
REFUSED: list[tuple[Callable[[torch.Tensor, torch.Tensor, PagedBatch], Arguments], str]] = [
    (lambda q, cache, batch: (q.float(), q, q, cache, batch), "bfloat16 and float16"),
    (lambda q, cache, batch: (q[:, :, :128], q, q, cache, batch), "heads of 256"),
    (lambda q, cache, batch: (q, q, q, cache, replace(batch, page_size=48)), "16, 32, 64, 128 tokens, not 48"),
    (lambda q, cache, batch: (q, q, q, cache.transpose(2, 3), batch), "contiguous pages"),
    (
        lambda q, cache, batch: (q, q.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2], q, cache, batch),
        "k needs",
    ),
]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(
    change: Callable[[torch.Tensor, torch.Tensor, PagedBatch], Arguments], words: str
) -> None:
    assert words in str(hstu_paged_sm90.supports(*change(*tensors())))


def declared() -> list[str]:
    """The kinds of the kernel's parameters, as its source has them."""
    found = re.search(rf"\n{hstu_paged_sm90.NAME}\((.*?)\)\n", KERNEL, re.DOTALL)
    assert found
    return [kind(parameter) for parameter in found[1].split(",")]


def kind(parameter: str) -> str:
    if "TensorMap" in parameter:
        return "map"
    if "*" in parameter:
        return "pointer"
    return "long" if "long long" in parameter else parameter.split()[0]


def passed(argument: object) -> str:
    if isinstance(argument, ctypes.c_uint64):
        return "pointer"
    if isinstance(argument, ctypes.Array):
        return "map"
    return "long" if isinstance(argument, ctypes.c_int64) else type(argument).__name__


class Launched:
    """Takes the place of the compiled kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.arguments: list[list[Any]] = []
        self.dependent: list[bool] = []

    def launcher(
        self, grid: object, threads: int, shared: int, arguments: list[Any], *, dependent: bool
    ) -> Callable[[], None]:
        del grid, threads
        # what a block of Hopper can have, less what the kernel declares by itself
        assert shared <= 227 * 1024 - 600

        def run() -> None:
            self.arguments.append(arguments)
            self.dependent.append(dependent)

        return run


@pytest.fixture
def launched(hopper: None, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Nothing is compiled, encoded or launched."""
    del hopper
    some_map, kernel = (ctypes.c_char * 128)(), Launched()
    monkeypatch.setattr(hstu_paged_sm90, "compiled", lambda *_: kernel)
    monkeypatch.setattr(hstu_paged_sm90, "tensor_map", lambda *_: some_map)
    monkeypatch.setattr(hstu_paged_sm90, "page_map", lambda *_: some_map)
    monkeypatch.setattr(hstu_paged_sm90, "_blocks", lambda _: 132)
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    monkeypatch.setattr(hstu_launches, "_KEPT", {})
    return kernel


@pytest.mark.parametrize("max_rows", [384, 4352])
def test_the_kernel_gets_the_parameters_that_it_declares(launched: Launched, max_rows: int) -> None:
    """The driver takes an address a parameter and believes the kernel about what is there."""
    q, cache, batch = tensors()
    none = torch.empty(0)
    room = hstu_paged_sm90.Workspace(none, none)
    some_rows = replace(batch, max_rows=max_rows)
    hstu_paged_sm90.attend(q, q, q, cache, some_rows, 1.0, torch.empty_like(q), appends=True, workspace=room)
    assert [passed(argument) for argument in launched.arguments[0]] == declared()


def test_a_launch_is_made_once_for_the_same_tensors(launched: Launched) -> None:
    """And not for others, whatever the difference is."""
    (q, cache, batch), out = tensors(), torch.zeros(9, 2, 256, dtype=torch.bfloat16)
    room = hstu_paged_sm90.Workspace(torch.empty(1), torch.empty(1))

    def attend(q: torch.Tensor = q, batch: PagedBatch = batch, alpha: float = 1.0, **others: Any) -> int:
        chosen = {"appends": True, "workspace": room, "dependent": False, **others}
        hstu_paged_sm90.attend(q, q, q, cache, batch, alpha, out, **chosen)
        return id(launched.arguments[-1])

    first = attend()
    assert attend() == first
    changed = [
        attend(q=torch.zeros_like(q)),
        attend(alpha=0.5),
        attend(appends=False),
        attend(dependent=True),
        attend(batch=replace(batch, totals=batch.totals.clone())),
        attend(batch=replace(batch, max_seqlen=batch.max_seqlen + 1)),
        attend(workspace=hstu_paged_sm90.Workspace(torch.empty(1), torch.empty(1))),
    ]
    assert len({first, *changed}) == len(changed) + 1
    assert launched.dependent == [False] * 5 + [True] + [False] * 3


def test_the_block_lets_attention_begin_before_its_product_has_ended(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one launch appends and attends."""
    appended: list[object] = []
    monkeypatch.setattr(hstu_paged_attention, "append", appended.append)
    q, cache, batch = tensors()
    room = hstu_paged_sm90.Workspace(torch.empty(1), torch.empty(1))
    hstu_block._over_pages(cache, batch, 1.0, room)(q, q, q)
    assert launched.dependent == [True] and not appended
