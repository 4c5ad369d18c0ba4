"""`python -m smbench.worker.benchserve ARGUMENT…`: `vllm bench serve` with the very prompts of a cell.

The command's own way to read prompts from a file needs pandas, applies the tokenizer again and shuffles. Here a dataset
`custom` is a file of JSON lines with `prompt`, a list of token ids or a text, and `output_tokens`, sent as they are and
in this order. Everything else, above all when requests are sent and what is timed, is vLLM's. Its command line is not
used since it looks for a distribution called `vllm`, which packages of the CPU backend are not.

Owns what requests consist of. Written against 0.26 and 0.32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CLIENT = "vllm bench serve"


def read(path: Path, tokenizer: Any, request: type[Any], prefix: str) -> list[Any]:
    """The requests of a file, as vLLM's class `request`. KeyError and ValueError where it is of another form."""
    found = []
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        prompt = row["prompt"]
        length = len(prompt) if isinstance(prompt, list) else len(tokenizer(prompt).input_ids)
        found.append(
            request(
                prompt=prompt,
                prompt_len=length,
                expected_output_len=int(row["output_tokens"]),
                request_id=f"{prefix}{index}",
            )
        )
    return found


def main(arguments: list[str]) -> None:
    """Run vLLM's client to its end; what it raises passes through."""
    import vllm
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    its_own = serve.get_samples

    def get_samples(given: argparse.Namespace, tokenizer: Any) -> list[Any]:
        if given.dataset_name != "custom":
            return list(its_own(given, tokenizer))
        return read(Path(given.dataset_path), tokenizer, SampleRequest, getattr(given, "request_id_prefix", ""))

    serve.get_samples = get_samples
    parser = FlexibleArgumentParser(prog=CLIENT)
    serve.add_cli_args(parser)
    serve.main(parser.parse_args([*arguments, "--metadata", f"client={CLIENT} {vllm.__version__}"]))


if __name__ == "__main__":
    main(sys.argv[1:])
