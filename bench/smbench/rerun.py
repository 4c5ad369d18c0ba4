"""Repeats somebody's run here: the recipe and the cells out of a bundle or run folder, as a plan for this machine.

Owns the refusals (no such device, another protocol). Does not own running (`runner`) nor the comparison at the end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smbench import plan, recipe, resources
from smbench.errors import UsageError
from smbench.plan import Here, Plan
from smbench.runfolder import Run


def plan_of(run: Run, profile: str | None, here: Here) -> Plan:
    """The plan that measures the very cells of a run here; another profile of its recipe only where `profile` says so.

    UsageError when this machine has no such device, or when this smbench measures the recipe by another protocol.
    """
    name = profile or run.profile_name
    _check_protocol(run)
    chosen = recipe.profile_named(run.recipe, name)
    if chosen.device == "cuda" and not here.gpu_present:
        on_cpu = [other for other, row in run.recipe.profile.items() if row.device == "cpu"]
        advice = f"; `--profile {on_cpu[0]}` runs what this machine can, whose numbers compare with none of these"
        raise UsageError(
            f"{run.folder.name} was measured with profile {name!r}, which needs an NVIDIA GPU, and none is visible; "
            f"see `smbench doctor`{advice if on_cpu else ''}"
        )
    model = run.recipe.instead(name, run.cells).get("model") if name == run.profile_name else None
    made = plan.make(run.recipe, run.recipe_text, name, here, (), str(model) if model is not None else None)
    if name != run.profile_name:
        return made
    wanted = {cell.cell_id for cell in run.cells}
    entries = [entry for entry in made.entries if entry.cell.cell_id in wanted]
    if len(entries) < len(wanted):
        raise UsageError(
            f"{run.folder.name}: {len(wanted) - len(entries)} of its {len(wanted)} cells are not in its recipe as this "
            f"smbench reads it; it was measured by smbench {run.smbench_version}"
        )
    return replace(made, entries=entries)


def default_folder(source: Path, root: Path) -> Path:
    """`runs/<name of the bundle or folder>-rerun`."""
    return root / "runs" / f"{source.resolve().name.removesuffix('.tar.gz')}-rerun"


def _check_protocol(run: Run) -> None:
    """A recipe that this smbench has under the same name says by which protocol its code measures."""
    folder = resources.recipes_dir()
    if run.recipe.name not in recipe.names(folder):
        return
    here = recipe.load(folder / f"{run.recipe.name}.toml").protocol_version
    if here != run.recipe.protocol_version:
        raise UsageError(
            f"{run.folder.name} was measured by protocol_version {run.recipe.protocol_version} of recipe "
            f"{run.recipe.name!r}, and this smbench measures by {here}: take smbench {run.smbench_version}"
        )
