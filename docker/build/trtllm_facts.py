"""Writes /etc/smbench/image.json of an image with TensorRT-LLM: what every result records of it.

Owns the file's content for these images; image_facts.py does it for the others. There is no SBOM of ours: most of the
image is NVIDIA's, which publishes its own. Standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

FORMAT = 1
OUTPUT = Path("/etc/smbench/image.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--lock", type=Path, required=True)
    arguments = parser.parse_args()
    facts = {
        "format": FORMAT,
        "name": arguments.image,
        "arch": arguments.arch,
        "stacks": ["trtllm"],
        "commit": os.environ.get("SMBENCH_COMMIT") or None,
        "created": datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC).isoformat(),
        "base": os.environ.get("BASE_ID") or None,
        "sources": os.environ.get("SOURCES") or None,
        "stripped": False,
        "locks": {"smbench": hashlib.sha256(arguments.lock.read_bytes()).hexdigest()},
        "files": {},
        "baked": {},
        "sbom_sha256": None,
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
