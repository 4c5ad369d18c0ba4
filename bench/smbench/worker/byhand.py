"""The commands of a cell as they stand in its record: what a reader runs to do the same by hand, naming no place.

Owns that form. `<model>` stands for the checkpoint, `<port>` for the port, `<file>` for any other file of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from smbench.worker.engines import ServeCommand
from smbench.workloads import SHARING, shared_tokens

MODEL, PORT, FILE = "<model>", "<port>", "<file>"


def server(command: ServeCommand, model: Path, port: int) -> list[str]:
    """A server's command line."""
    words = list(command.argv)
    rest = [_placeless(before, word, str(model), str(port)) for before, word in pairwise(words)]
    return [Path(words[0]).name, *rest]


def client(axes: Mapping[str, Any], served: str, seed: int, warmups: int) -> list[str]:
    """`vllm bench serve` for the load of a cell. By hand the client draws prompts of the same lengths itself."""
    words = ["vllm", "bench", "serve", "--backend", "openai", "--port", PORT, "--endpoint", "/v1/completions"]
    words += ["--model", served, "--tokenizer", MODEL, *_dataset(axes)]
    words += ["--num-prompts", str(axes["num_prompts"]), "--request-rate", str(axes["request_rate"])]
    if int(axes["max_concurrency"]):
        words += ["--max-concurrency", str(axes["max_concurrency"])]
    words += ["--num-warmups", str(warmups), "--seed", str(seed), "--temperature", "0", "--ignore-eos"]
    return [*words, "--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result", "--save-detailed"]


def _dataset(axes: Mapping[str, Any]) -> list[str]:
    length, output = int(axes["input_len"]), str(axes["output_len"])
    match axes["dataset"]:
        case "shared-prefix":
            shared, prefixes = shared_tokens(axes), -(-int(axes["num_prompts"]) // SHARING)
            name = "--prefix-repetition"
            lengths = [f"{name}-prefix-len", str(shared), f"{name}-suffix-len", str(length - shared)]
            return [
                *("--dataset-name", "prefix_repetition", *lengths),
                *(f"{name}-num-prefixes", str(prefixes), f"{name}-output-len", output),
            ]
        case "sharegpt":
            return ["--dataset-name", "sharegpt", "--dataset-path", FILE, "--sharegpt-output-len", output]
        case _:
            lengths = ["--random-input-len", str(length), "--random-output-len", output]
            return ["--dataset-name", "random", *lengths]


def _placeless(before: str, word: str, model: str, port: str) -> str:
    """A word of a command line, which follows `before`, without what is of this machine alone."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else (before, "", word)
    if value == model:
        place = MODEL
    # a length may be the same number
    elif value == port and option.endswith("port"):
        place = PORT
    elif value.startswith(("/", "~")):
        place = FILE
    else:
        return word
    return f"{option}{equals}{place}" if equals else place
