"""`smbench import`: other tools' result files become a side of a comparison. Thin; reads nothing itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smbench import terminal
from smbench.terminal import AsJson

if TYPE_CHECKING:
    from smbench.cell import AxisValue

commands = typer.Typer()


@commands.command("import")
def import_results(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Result files of other tools.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The import file (default: <first file>.import.json, here).")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="What to call it in a comparison.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="What it ran on: no file says so.")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="What served, e.g. vllm.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model, where a file has none or a served name.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", help="GPUs that shared the model.", min=1)
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option("--axis", help="NAME=VALUE: what else the files do not say, e.g. batch=8 input_len=1024."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read result files of vllm bench, sglang's bench, aiperf and guidellm into one that `compare` takes as a side."""
    from smbench import imports

    told = _axes(axis or [])
    if tensor_parallel is not None:
        told["tensor_parallel"] = tensor_parallel
    path = out or imports.default_path(files)
    if path.resolve() in [file.resolve() for file in files]:
        raise typer.BadParameter("that is one of the files that are read", param_hint="--out")
    imported = imports.make(files, label or files[0].name, device, engine, model, told)
    imports.write(imported, path)
    if as_json:
        terminal.say_json({"import": str(path), **imported.model_dump(mode="json")})
    else:
        terminal.say(imports.render(imported).rstrip("\n"))
        typer.echo(f"import: {terminal.shown(path)}", err=True)


def _axes(options: list[str]) -> dict[str, AxisValue]:
    found: dict[str, AxisValue] = {}
    for option in options:
        name, _, value = option.partition("=")
        if not (name and value):
            raise typer.BadParameter(f"{option!r}: give NAME=VALUE", param_hint="--axis")
        # a rate is text in our cells, whatever it looks like
        found[name] = int(value) if re.fullmatch(r"\d{1,18}", value) and name != "request_rate" else value
    return found
