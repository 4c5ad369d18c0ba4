"""The published numbers load whole, in storage units, and a bad file says what is wrong with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from smbench import published
from smbench.errors import CorruptError, UsageError
from smbench.metrics import METRICS

FOLDER = Path(__file__).parent.parent / "recipes" / "published"

SMALL = """
format = 1
document = "000"
title = "two rows"
device = "a GPU"
arch = "sm86"
notes = []
versions = { torch = "2.3.0" }
source = { repository = "https://example.org", commit = "abc", licence = "none stated" }
protocol = { method = "graph", calls = 100 }
legend = {}
at = { rank = 16 }

[[table]]
path = "record.json"
at = { op = "bgmv_shrink" }
axes = ["batch"]
columns = [{ at = { provider = "jee" }, metric = "duration", unit = "ms" }]
rows = [
    [1, 0.5],
    [8, 2],
]
"""


def lora() -> published.Published:
    return published.load(FOLDER / "lora-rtx3090.toml")


def microseconds(op: str, config: str, seq_len: int, batch: int, hidden_size: int) -> dict[str, float]:
    """One published point by provider, rounded as a report prints it."""
    wanted = {"op": op, "config": config, "seq_len": seq_len, "batch": batch, "hidden_size": hidden_size}
    return {
        str(point.at["provider"]): round(point.value * 1e6, 2)
        for point in lora().points()
        if wanted.items() <= point.at.items()
    }


def test_every_file_of_published_numbers_loads_under_its_name() -> None:
    known = published.names(FOLDER)
    assert "lora-rtx3090" in known
    for name in known:
        numbers = published.load(published.find(name, FOLDER))
        assert all(point.value > 0 and point.metric in METRICS for point in numbers.points())


def test_lora_holds_every_record_of_the_four_result_files() -> None:
    numbers = lora()
    found = Counter((point.at["op"], point.at["config"], point.at["seq_len"]) for point in numbers.points())
    bgmv, sgmv = 3 * 8 * 48, 3 * 3 * 26
    assert found == {
        ("bgmv_shrink", "default", 1): bgmv,
        ("bgmv_expand", "default", 1): bgmv,
        ("bgmv_shrink", "tuned", 1): bgmv,
        ("bgmv_expand", "tuned", 1): bgmv,
        ("sgmv_shrink", "default", 128): sgmv,
        ("sgmv_expand", "default", 128): sgmv,
        ("sgmv_shrink", "default", 512): sgmv,
        ("sgmv_expand", "default", 512): sgmv,
    }
    assert [table.missing() for table in numbers.table] == [[]] * 8


def test_a_point_has_the_axes_of_our_cells_and_is_in_seconds() -> None:
    first = next(lora().points())
    assert first.at == {
        "op": "bgmv_shrink",
        "provider": "jee",
        "config": "default",
        "batch": 1,
        "hidden_size": 128,
        "seq_len": 1,
        "rank": 16,
        "num_loras": 8,
        "dtype": "float16",
    }
    assert (first.metric, first.unit, first.printed) == ("duration", "ms", 0.002256213426589966)
    assert first.value == pytest.approx(2.256213426589966e-6, rel=1e-12)


@pytest.mark.parametrize(
    ("op", "batch", "hidden_size", "punica", "further", "jee_default", "jee_tuned"),
    [
        ("bgmv_shrink", 1, 4096, 2.44, 2.13, 2.28, 2.01),
        ("bgmv_shrink", 1, 32000, 10.47, 2.79, 3.23, 2.74),
        ("bgmv_shrink", 1, 128256, 32.99, 6.45, 6.49, 4.46),
        ("bgmv_shrink", 16, 4096, 4.21, 3.36, 5.78, 3.04),
        ("bgmv_shrink", 16, 128256, 68.94, 88.90, 70.34, 42.59),
        ("bgmv_shrink", 56, 32000, 80.14, 101.43, 36.26, 48.26),
        ("bgmv_shrink", 56, 128256, 283.87, 327.74, 228.96, 176.95),
        ("bgmv_expand", 1, 4096, 1.59, 1.88, 1.50, 1.69),
        ("bgmv_expand", 16, 32000, 13.21, 24.84, 9.40, 19.23),
        ("bgmv_expand", 56, 4096, 5.98, 25.49, 10.76, 11.70),
        ("bgmv_expand", 56, 128256, 354.70, 384.61, 332.83, 266.83),
    ],
)
def test_bgmv_values(
    op: str, batch: int, hidden_size: int, punica: float, further: float, jee_default: float, jee_tuned: float
) -> None:
    default = microseconds(op, "default", 1, batch, hidden_size)
    assert default == {"jee": jee_default, "punica": punica, "further": further}
    assert microseconds(op, "tuned", 1, batch, hidden_size)["jee"] == jee_tuned


@pytest.mark.parametrize(
    ("op", "seq_len", "batch", "hidden_size", "jee", "punica", "further"),
    [
        ("sgmv_shrink", 128, 1, 4096, 5.66, 18.36, 7.58),
        ("sgmv_shrink", 128, 16, 10240, 55.89, 606.87, 120.36),
        ("sgmv_expand", 128, 8, 4096, 30.93, 87.85, 23.91),
        ("sgmv_shrink", 512, 16, 4096, 93.80, 988.50, 487.68),
        ("sgmv_expand", 512, 16, 4096, 214.04, 712.19, 185.50),
    ],
)
def test_sgmv_values(
    op: str, seq_len: int, batch: int, hidden_size: int, jee: float, punica: float, further: float
) -> None:
    assert microseconds(op, "default", seq_len, batch, hidden_size) == {
        "jee": jee,
        "punica": punica,
        "further": further,
    }


def test_an_incomplete_grid_lists_what_is_missing() -> None:
    grid = SMALL.replace('["batch"]', '["batch", "hidden_size"]').replace("[1, 0.5]", "[1, 128, 0.5]")
    grid = grid.replace("[8, 2]", "[8, 256, 2], [1, 256, 3.0]")
    assert published.parse(grid.encode(), "grid.toml").table[0].missing() == [{"batch": 8, "hidden_size": 128}]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('title = "two rows"', 'titel = "two rows"', "titel: unknown key; known keys here: arch, at"),
        ('device = "a GPU"\n', "", "device: this key is missing"),
        ('unit = "ms"', 'unit = "ms", note = 1', "columns[0].note: unknown key; known keys here: at, definition"),
        ('unit = "ms"', 'unit = "GB/s"', "'duration' is stored in s: 'GB/s' cannot be"),
        ('unit = "ms"', 'unit = "fortnight"', "unknown unit 'fortnight'; known: s, ms, us"),
        ('metric = "duration"', 'metric = "speed"', "unknown metric 'speed'; known: duration"),
        ("[8, 2]", "[8]", "rows[1] has 1 entries, not 1 axes + 1 columns"),
        ("[8, 2]", "[1, 2]", "rows[1] repeats the point {'batch': 1}"),
        ("[8, 2]", "[8.5, 2]", "rows[1]: the axes batch take integers and strings"),
        ("[8, 2]", "[8, -2]", "rows[1]: -2 is not a positive number"),
        ("[8, 2]", "[8, nan]", "rows[1]: nan is not a positive number"),
        ("[8, 2]", '[8, "oom"]', "rows[1]: 'oom' is not a positive number"),
        ('axes = ["batch"]', 'axes = ["op"]', "table[0].columns[0]: coordinate 'op' is given twice"),
        ("format = 1", "format = one", "not valid TOML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(old: str, new: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        published.parse(SMALL.replace(old, new, 1).encode(), "small.toml")
    assert str(caught.value).startswith("small.toml: ")
    assert complaint in str(caught.value)


def test_a_newer_format_asks_for_a_newer_smbench() -> None:
    with pytest.raises(CorruptError, match=r"small.toml: format 3 is newer than this smbench reads \(2\)"):
        published.parse(SMALL.replace("format = 1", "format = 3").encode(), "small.toml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no published numbers 'lora-rtx3091'.*did you mean 'lora-rtx3090'"):
        published.find("lora-rtx3091", FOLDER)
