"""Launches are made once for the same tensors, again for others, and not kept without end."""

from __future__ import annotations

import pytest
import torch

from smbench_kernels import hstu_launches
from smbench_kernels.hstu_launches import Launch


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hstu_launches, "_KEPT", {})


class Maker:
    """Counts what is made and what is launched."""

    def __init__(self) -> None:
        self.made, self.launched = 0, 0

    def __call__(self) -> Launch:
        self.made += 1
        return self.launch

    def launch(self) -> None:
        self.launched += 1


def test_the_same_memory_gets_the_same_launch() -> None:
    x, make = torch.zeros(4, 8), Maker()
    for tensor in (x, x.view(4, 8), x):
        hstu_launches.run(("norm", hstu_launches.place(tensor), hstu_launches.place(None)), make)
    assert (make.made, make.launched) == (1, 3)
    # another place, fewer rows, rows further apart, and a tensor where there was none
    for tensor, other in ((torch.zeros(4, 8), None), (x[:3], None), (x.as_strided((2, 8), (16, 1)), None), (x, x)):
        hstu_launches.run(("norm", hstu_launches.place(tensor), hstu_launches.place(other)), make)
    assert (make.made, make.launched) == (5, 7)


def test_launches_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hstu_launches, "MOST", 3)
    make = Maker()
    for key in (*range(10), 9):
        hstu_launches.run(key, make)
        assert len(hstu_launches._KEPT) <= 3
    assert (make.made, make.launched) == (10, 11)


def test_without_a_gpu_no_device_runs_them() -> None:
    assert "compute capability 9.0" in (hstu_launches.missing(torch.device("cpu")) or "")
