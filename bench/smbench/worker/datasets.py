"""Which prompts the repetitions of a batch consist of. Owns what the axis `dataset` means for token ids.

Does not own how single prompts are drawn (`prompts`), nor the form of a user's file (`sharegpt`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbench.worker import prompts, sharegpt
from smbench.workloads import SHARING, prompts_of

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of all repetitions of a cell."""

    dataset: str
    repetitions: Sequence[Prompts]
    """Warm-ups first."""
    file: Path | None

    def record(self, first_counted: int) -> dict[str, Any]:
        """As it is stored, of the first repetition that counts."""
        chosen = self.repetitions[first_counted]
        return {
            "dataset": self.dataset,
            "count": len(chosen),
            "tokens": sum(map(len, chosen)),
            "sha256": tokens_sha256(chosen),
            "file_sha256": None if self.file is None else sharegpt.file_sha256(self.file),
        }


def draw(job: Mapping[str, Any], repetitions: int) -> Drawn:
    """The prompts of a cell. Those of a seed differ in every repetition, those of a file are the same in all.

    sharegpt.NotShareGpt for a file of another form, or with too few prompts; OSError where it cannot be read.
    """
    axes, engine = job["axes"], job["engine"]
    count, length = prompts_of(job["subject"], axes), int(axes["input_len"])
    dataset = str(axes.get("dataset", "random"))
    if dataset == "sharegpt":
        file = Path(engine["sharegpt"])
        chosen = sharegpt.draw(file, _tokenizer(Path(engine["model"]["path"])), int(job["seed"]), count, length)
        return Drawn(dataset, [chosen] * repetitions, file)
    one = prompts.prompt_with_prefix if dataset == "shared-prefix" else prompts.prompt
    vocabulary, seed = int(engine["model"]["vocabulary"]), int(job["seed"])
    # a repetition begins with a group of its own, or a cache of prefixes would know it from the one before
    stride = -(-count // SHARING) * SHARING
    drawn = [[one(seed, vocabulary, length, r * stride + i) for i in range(count)] for r in range(repetitions)]
    return Drawn(dataset, drawn, None)


def tokens_sha256(sequences: Sequence[Sequence[int]]) -> str:
    """Of token ids: decimal, a space between two, a line for each sequence."""
    return hashlib.sha256("\n".join(" ".join(map(str, ids)) for ids in sequences).encode()).hexdigest()


def _tokenizer(folder: Path) -> Any:
    """Text to token ids, as the model's own tokenizer has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text).input_ids
