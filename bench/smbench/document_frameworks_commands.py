"""How the servers of a run were started and loaded: the commands that ran, and requests that a reader can send.

Owns how a recorded command becomes text. Does not own the commands: drivers make them, and a cell's settings hold them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from smbench.analysis import Row
from smbench.document_frameworks_cells import ONLINE, serving_of
from smbench.views import View

SERVER, CLIENT = "server_command", "client_command"
"""Settings of an online cell that hold the command lines which ran, as lists of words."""
BREAK = " \\\n    "
PORT = 30000
"""The document's; a run takes a free one."""
PLACES = {"<port>": str(PORT), "<model>": "MODEL"}
"""What stands for a place of the machine in a recorded command, and what a reader sees."""


@dataclass(frozen=True, slots=True)
class QuickStart:
    """One engine's server and how it was loaded."""

    provider: str
    engine: str
    version: str
    setting: str
    """Of the cell that the commands are of."""
    server: str
    client: str | None


def quick_starts(view: View) -> list[QuickStart]:
    """The first served online cell of each provider, where its record holds the command."""
    found = []
    for provider in view.providers:
        row = next((row for row in view.rows(provider, ONLINE) if serving_of(row)), None)
        start = _of(row) if row else None
        if start:
            found.append(start)
    return found


def _of(row: Row) -> QuickStart | None:
    serving = serving_of(row)
    if serving is None:
        return None
    server, client = (_words(serving.settings.get(name)) for name in (SERVER, CLIENT))
    if not server:
        return None
    axes = row.cell.axes
    setting = ", ".join(f"{name} {axes[name]}" for name in ("request_rate", "max_concurrency", "num_prompts"))
    return QuickStart(
        row.cell.provider,
        serving.engine,
        serving.version,
        setting,
        command(server),
        command(client) if client else None,
    )


def command(words: Sequence[str]) -> str:
    """A command line as a shell takes it, an option a line."""
    shown = []
    for word in words:
        text = word
        for place, name in PLACES.items():
            text = text.replace(place, name)
        shown.append(text)
    lines: list[list[str]] = [[]]
    for word in shown:
        # the `-m` of an interpreter belongs to the program that it starts
        if word.startswith("-") and word != "-m" and lines[0]:
            lines.append([])
        lines[-1].append(word)
    return BREAK.join(" ".join(shlex.quote(word) for word in line) for line in lines)


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list | tuple) else []
