"""What the command line says of recipes and plans. Thin; plans nothing, runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from smbench import terminal
from smbench.terminal import AsJson

if TYPE_CHECKING:
    from smbench.plan import Plan, Planned

commands = typer.Typer()


@commands.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """The recipes, their profiles and sizes."""
    from smbench import recipe, resources

    found = [recipe.load(recipe.find(name, resources.recipes_dir())) for name in recipe.names(resources.recipes_dir())]
    sizes = {entry.name: {profile: len(entry.cells(profile)) for profile in entry.profile} for entry in found}
    if as_json:
        terminal.say_json(
            [{"name": r.name, "title": r.title, "document": r.document, "cells": sizes[r.name]} for r in found]
        )
        return
    terminal.say_table(
        ("recipe", "document", "profiles (cells)", "title"),
        [
            (entry.name, entry.document, ", ".join(f"{p} ({n})" for p, n in sizes[entry.name].items()), entry.title)
            for entry in found
        ],
    )


def say(resolved: Plan, cells: bool, as_json: bool) -> None:
    """A plan, by cell or by what cells have in common, with its estimate."""
    if as_json:
        terminal.say_json(_as_json(resolved))
        return
    terminal.say(f"recipe {resolved.recipe.name}, profile {resolved.profile_name}: {len(resolved.entries)} cells")
    if cells:
        terminal.say_table(
            ("cell", "what", "stack", "outcome"),
            [(entry.cell.cell_id, entry.cell.label(), entry.stack, _outcome(entry)) for entry in resolved.entries],
        )
    else:
        groups: dict[tuple[str, str, str, str], int] = {}
        for entry in resolved.entries:
            outcome = _outcome(entry)
            key = (entry.cell.subject, entry.cell.provider, entry.stack, outcome)
            groups[key] = groups.get(key, 0) + 1
        terminal.say_table(
            ("op", "provider", "stack", "cells", "outcome"),
            [(op, name, stack, str(count), outcome) for (op, name, stack, outcome), count in groups.items()],
        )
    estimate = resolved.profile.estimate
    terminal.say(f"estimate: {resolved.estimate_s() / 60:.1f} minutes (basis: {estimate.source})")


def _outcome(entry: Planned) -> str:
    if entry.unsupported:
        return f"unsupported: {entry.unsupported}"
    if entry.skipped:
        return f"skipped: {entry.skipped}"
    return f"verified: {entry.untimed}" if entry.untimed else "timed"


def _as_json(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.name,
        "profile": plan.profile_name,
        "estimate_s": plan.estimate_s(),
        "cells": [
            {
                "cell_id": entry.cell.cell_id,
                **entry.cell.model_dump(),
                "stack": entry.stack,
                "unsupported": entry.unsupported,
                "skipped": entry.skipped,
                "untimed": entry.untimed,
            }
            for entry in plan.entries
        ],
    }
