"""The prompts of a cell as a server gets them: token ids, or text where an engine's server takes no ids.

With ids every request has exactly the tokens that were drawn, whatever the tokenizer; making them of text is then not
part of a time to first token. Text is exact for a synthetic checkpoint, whose words are tokens; with another tokenizer
a text of random tokens becomes others again, a few more or less. Owns that form. Does not own which ids (`datasets`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smbench.worker import datasets, wordtokenizer

TAKES_TEXT_ALONE = frozenset({"lmdeploy"})
"""Engines whose /v1/completions takes any list as several prompts: lmdeploy 0.18 in serve/openai/endpoints."""
SYNTHETIC = "synthetic:"

Form = Literal["token ids", "text"]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a client sends."""

    prompts: Sequence[Sequence[int] | str]
    lengths: Sequence[int]
    """Tokens of each; what they were made of where they are not exact."""
    exact: bool
    """Whether a server must count just these."""
    form: Form
    record: Mapping[str, Any]
    """As it is stored: dataset, count, tokens, hashes."""


def of(job: Mapping[str, Any]) -> Sent:
    """The prompts of a cell. NotShareGpt and OSError as `datasets.draw` has them."""
    drawn = datasets.draw(job, 1)
    (ids,) = drawn.repetitions
    lengths = [len(tokens) for tokens in ids]
    if job["engine"]["engine"] not in TAKES_TEXT_ALONE:
        return Sent(ids, lengths, True, "token ids", drawn.record(0))
    folder = Path(job["engine"]["model"]["path"])
    if str(job["engine"]["model"]["name"]).startswith(SYNTHETIC):
        words = _words(folder)
        said = [[words.ids[token % len(words.ids)] for token in tokens] for tokens in ids]
        record = {**drawn.record(0), "sha256": datasets.tokens_sha256(said)}
        return Sent([words.text(tokens) for tokens in said], lengths, True, "text", record)
    record = {**drawn.record(0), "tokens": None, "sha256": None}
    return Sent(_texts(folder, ids), lengths, False, "text", record)


def _words(folder: Path) -> wordtokenizer.Words:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return wordtokenizer.Words(config["vocab_size"], config["bos_token_id"], config["eos_token_id"])


def _texts(folder: Path, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model's own tokenizer makes of token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(list(tokens)) for tokens in prompts]
