"""A worker that answers a tuning request with made-up outcomes: `python fake_tuner.py REQUEST`.

A point with batch 8 has no right configuration; at batch 16 the process dies in the middle of its event. The library of
peers is what `FAKE_TUNER_LIBRARY` says; none if that is empty.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def emit(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    emit("ready", environment_id="e", environment={"libraries": {"triton": "9.9"}}, timer_checks=[])
    emit("compiled", binaries=7, seconds=0.5)
    for point in request["points"]:
        axes = point["axes"]
        if axes["batch"] == 16 and not os.environ.get("FAKE_TUNER_SURVIVES"):
            sys.stdout.write('{"event":"tuned","subj')
            sys.stdout.flush()
            os._exit(1)
        found = {"config": {"BLOCK": 10 * axes["batch"]}, "time_s": 1e-6, "candidates": 100, "timed": 20}
        peer = {}
        if point["provider"]:
            library = os.environ.get("FAKE_TUNER_LIBRARY", "vllm 0.26.0")
            if not library:
                emit("untunable", provider=point["provider"], reason="vllm is not installed in this stack")
                continue
            known = {"subject": point["subject"], "provider": point["provider"], "axes": axes, "library": library}
            if any(known.items() <= row.items() for row in request["known"]):
                continue
            peer = {"provider": point["provider"], "library": library}
        emit("tuned", subject=point["subject"], axes=axes, seconds=0.1, **peer, **({} if axes["batch"] == 8 else found))
    for known in request["known"][: request["quality_points"]]:
        emit(
            "quality",
            subject=known["subject"],
            axes=known["axes"],
            seconds=0.1,
            ratio=1.01,
            kept_ratio=1.05,
        )
    emit("done")


if __name__ == "__main__":
    main()
