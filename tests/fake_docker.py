#!/usr/bin/env python3
"""A `docker` command whose containers are the real `smbench run` over a fake worker, on this very machine.

Owns what stands for images: FAKE_DOCKER_STACKS is a folder with one folder for each image, put on PYTHONPATH in its
containers, so that a recipe's `requires` finds in one image what it does not find in another. FAKE_DOCKER_JOURNAL gets
each command line; FAKE_DOCKER_RECIPES holds the recipes; with FAKE_DOCKER_CODE a container ends with that code at once.
The process becomes the container, so that a signal to one reaches the other, as docker's own proxy sees to.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(command) if option == name]


def main() -> None:
    command = sys.argv[1:]
    with Path(os.environ["FAKE_DOCKER_JOURNAL"]).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(command) + "\n")
    if code := os.environ.get("FAKE_DOCKER_CODE"):
        sys.exit(int(code))
    at = command.index("--entrypoint") + 2
    image, inner = command[at], command[at + 1 :]
    mounts = [dict(part.split("=", 1) for part in mount.split(",")) for mount in options(command, "--mount")]
    places = {mount["target"]: mount["source"] for mount in mounts}
    inner[inner.index("--out") + 1] = places[inner[inner.index("--out") + 1]]
    inside = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SMBENCH_")},
        **dict(variable.split("=", 1) for variable in options(command, "--env") if "=" in variable),
        "PYTHONPATH": str(Path(os.environ["FAKE_DOCKER_STACKS"]) / image.replace(":", "-")),
    }
    host = str(Path(__file__).with_name("fake_host.py"))
    os.execve(sys.executable, [sys.executable, host, os.environ["FAKE_DOCKER_RECIPES"], *inner], inside)


if __name__ == "__main__":
    main()
