"""The record JSON of document 000: our medians under its keys, and a reader for files of that form.

Owns that format only; nothing of smbench reads these files back as measurements, since they say neither method nor L2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from smbench.analysis import Analysis
from smbench.errors import CorruptError
from smbench.views import slug


class Entry(BaseModel):
    """One number. The names are the document's, `batchs` included."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dur_ms: FiniteFloat
    """Milliseconds per call; ours is the median."""
    batchs: int
    hidden_size: int
    dtype: str
    seed: int


Series = Mapping[str, list[Entry]]
"""`<provider>_<op>` to its entries, in the order of the plan."""

_SERIES: TypeAdapter[dict[str, list[Entry]]] = TypeAdapter(dict[str, list[Entry]])


def records(analysis: Analysis) -> dict[str, Series]:
    """File name to content: one file for each of bgmv and sgmv, each sequence length and each measure.

    Cells without a number have no entry. The document has one file a script, since it has one length and one measure.
    """
    files: dict[str, dict[str, list[Entry]]] = {}
    for row in analysis.rows:
        cell, axes = row.cell, row.cell.axes
        batch, hidden_size = axes.get("batch"), axes.get("hidden_size")
        if not isinstance(batch, int) or not isinstance(hidden_size, int):
            continue
        for measure, summary in row.summaries.items():
            family = cell.subject.partition("_")[0]
            name = f"record_{family}_seqlen{axes.get('seq_len', 1)}_{slug(measure)}.json"
            entry = Entry(
                dur_ms=summary.median * 1e3,
                batchs=batch,
                hidden_size=hidden_size,
                dtype=f"torch.{axes.get('dtype')}",
                seed=cell.seed,
            )
            files.setdefault(name, {}).setdefault(f"{cell.provider}_{cell.subject}", []).append(entry)
    return dict(sorted(files.items()))


def dump(series: Series) -> bytes:
    """The bytes of a record file, one number a line."""
    lists = [
        f"{json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(vars(entry)) for entry in entries) + "\n ]"
        for name, entries in series.items()
    ]
    return ("{\n " + ",\n ".join(lists) + "\n}\n").encode()


def load(path: Path) -> dict[str, list[Entry]]:
    """A record file, ours or the document's. CorruptError names the file and what is wrong in it."""
    try:
        return _SERIES.validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CorruptError(f"{path.name}: {where}: {fault['msg']}") from error
