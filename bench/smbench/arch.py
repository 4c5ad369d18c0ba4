"""What is known of hardware: the rows of docker/archs.toml as values.

Owns the format of that file and the questions asked of it. Owns no figures: those are rows of the file, each with its
source. A figure that is absent there is None here, prints as "unknown", and is never borrowed from another product.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictInt, ValidationError, model_validator

from smbench.errors import CorruptError, UsageError
from smbench.faults import explain
from smbench.recipe import Table

FORMAT = 2
"""Version of the archs.toml format. History: 1 = arch and device rows; 2 = base, worker and stack rows."""

TensorDtype = Literal["float16", "bfloat16", "tf32"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Arch(Table):
    """`[arch.<name>]`: the limits of one compute capability, or `cpu`, which has none of them."""

    name: str
    """The key of the row, such as `sm89`."""
    compute_capability: Annotated[tuple[StrictInt, StrictInt], Field(strict=False)] | None = None
    """Major and minor. TOML has lists only, so the list is taken as the pair."""
    shared_memory_per_block_bytes: Count | None = None
    """What one thread block can use after opting in; a kernel that asks for more does not launch."""
    shared_memory_per_sm_bytes: Count | None = None
    registers_per_sm: Count | None = None
    """32-bit registers."""
    max_registers_per_thread: Count | None = None
    max_warps_per_sm: Count | None = None
    max_blocks_per_sm: Count | None = None
    max_threads_per_block: Count | None = None
    warp_size: Count | None = None
    products: list[str]
    """Examples, for help texts; the `[device]` rows say which arch a product has."""
    source: Annotated[str, Field(min_length=1)]


class Device(Table):
    """`[device."<name>"]`: one product's vendor figures, dense, under the name that NVML and torch report."""

    name: str
    """The key of the row, such as `NVIDIA H200`."""
    arch: str
    memory_bytes: Count | None = None
    """Capacity as the vendor names it; the driver reports a little less."""
    memory_bandwidth_bytes_per_s: Positive | None = None
    l2_bytes: Count | None = None
    sm_count: Count | None = None
    boost_clock_hz: Positive | None = None
    """The clock that `fp32_flops_per_s` is stated at."""
    tensor_clock_hz: Positive | None = None
    """The clock that `tensor_flops_per_s` is stated at, where that is not `boost_clock_hz`."""
    tensor_flops_per_s: Mapping[TensorDtype, Positive] = Field(default_factory=dict)
    """Dense tensor-core peak by input dtype, accumulating in float32."""
    float16_accumulate_flops_per_s: Positive | None = None
    """Dense float16 peak accumulating in float16, where the product runs that faster."""
    fp32_flops_per_s: Positive | None = None
    """Peak of the ordinary float32 units."""
    tdp_w: Positive | None = None
    source: Annotated[str, Field(min_length=1)]
    note: str | None = None

    def tensor_peak_flops_per_s(self, dtype: str, clock_hz: float | None = None) -> float | None:
        """Dense tensor peak of `dtype`, at the SM clock `clock_hz` or, without one, at the vendor's stated clock.

        The stated clock is no bound: an H200's peak is stated at 1830 MHz, and it runs at 1980. None where the table
        does not say the peak, or does not say the clock that scaling needs.
        """
        peak = next((peak for known, peak in self.tensor_flops_per_s.items() if known == dtype), None)
        if peak is None or clock_hz is None:
            return peak
        stated_hz = self.tensor_clock_hz or self.boost_clock_hz
        return None if stated_hz is None else peak * clock_hz / stated_hz


class Base(Table):
    """`[base]`: the image that ours start from."""

    image: Annotated[str, Field(pattern=r"@sha256:[0-9a-f]{64}$")]
    """By digest, so that it is one image and no tag."""
    source: Annotated[str, Field(min_length=1)]


class Worker(Table):
    """`[worker]`: what the worker itself imports, besides torch."""

    requires: list[str]
    """Requirements that every lock of a stack is resolved from as well."""


class Build(Table):
    """`[stack.<name>.build.<cuda or cpu>]`: the packages of a stack for one kind of machine."""

    lock: Annotated[str, Field(pattern=r"^[a-z0-9-]+\.txt$")]
    """File in docker/locks/ that has all of them by version and hash."""
    requires: Annotated[list[str], Field(min_length=1)]
    """Requirements that the lock is resolved from."""
    without: list[str] = Field(default_factory=list)
    """Packages that the lock leaves out: torch, where its build is a choice of the machine, or what is not needed."""
    torch: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")]
    """Version of torch; installed on its own where `without` names it."""


class Stack(Table):
    """`[stack.<name>]`: one virtual environment of the images, and of `.stacks/` beside a checkout."""

    name: str
    """The key of the row, such as `vllm`."""
    title: str
    module: str
    """The package that must be importable there."""
    build: Annotated[dict[Literal["cuda", "cpu"], Build], Field(min_length=1)]


class ArchTable(Table):
    """The whole of docker/archs.toml."""

    format: int
    arch: dict[str, Arch]
    base: Base
    worker: Worker
    stack: dict[str, Stack]
    device: dict[str, Device]

    @model_validator(mode="before")
    @classmethod
    def _name_rows(cls, data: Any) -> Any:
        """Each row learns its key, so that it can be passed on alone."""
        if not isinstance(data, dict):
            return data
        return {
            key: {name: {"name": name, **row} if isinstance(row, dict) else row for name, row in rows.items()}
            if key in ("arch", "stack", "device") and isinstance(rows, dict)
            else rows
            for key, rows in data.items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for table, rows in (("arch", self.arch), ("stack", self.stack), ("device", self.device)):
            for key, row in rows.items():
                if row.name != key:
                    raise ValueError(f"{table}.{key}.name: the key is the name; leave `name = {row.name!r}` out")
        for name, device in self.device.items():
            if device.arch not in self.arch:
                raise ValueError(f"device.{name}.arch: unknown arch {device.arch!r}; known: {', '.join(self.arch)}")
        owners: dict[tuple[int, int], str] = {}
        for name, arch in self.arch.items():
            if arch.compute_capability is not None and owners.setdefault(arch.compute_capability, name) != name:
                raise ValueError(
                    f"arch.{name}.compute_capability: {arch.compute_capability} is already "
                    f"arch.{owners[arch.compute_capability]}"
                )
        return self

    def device_named(self, name: str) -> Device | None:
        """The row of a product by the name that NVML or torch reports, None when nothing is known of it."""
        return self.device.get(name)

    def arch_of_capability(self, capability: tuple[int, int]) -> Arch | None:
        """The arch with exactly this compute capability, None when there is no row for it."""
        return next((arch for arch in self.arch.values() if arch.compute_capability == capability), None)


def load(path: Path) -> ArchTable:
    """The table in a file. UsageError names file, key path and the known keys; CorruptError for a newer format."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name}: not valid TOML: {error}") from error
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CorruptError(f"{path.name}: format {version} is newer than this smbench reads ({FORMAT}); update smbench")
    try:
        return ArchTable.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, ArchTable, path.name))) from error
