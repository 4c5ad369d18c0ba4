"""`python -m smbench.fatbin list|strip|verify|survey`: device code of shared objects on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from smbench.errors import CorruptError, UsageError
from smbench.fatbin import survey, tree

MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 `verify` found something, 2 usage, 3 a file is not as it has to be."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (UsageError, CorruptError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smbench.fatbin", description=__doc__)
    commands = parser.add_subparsers(required=True)

    listing = commands.add_parser("list", help="what device code files hold")
    listing.add_argument("roots", nargs="+", type=Path, metavar="ROOT", help="a file or folder")
    listing.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    listing.set_defaults(run=_list)

    strip = commands.add_parser("strip", help="keep only what one compute capability loads")
    strip.add_argument("roots", nargs="+", type=Path, metavar="ROOT", help="a file or folder")
    strip.add_argument("--sm", required=True, type=_capability, help="compute capability, such as 90 or sm90")
    strip.add_argument("--manifest", required=True, type=Path, help="file to write: what was changed, with hashes")
    strip.add_argument("--leave", action="append", default=[], metavar="PATTERN", help="file name to leave as it is")
    strip.set_defaults(run=_strip)

    verify = commands.add_parser("verify", help="is anything left that the compute capability does not load?")
    verify.add_argument("roots", nargs="+", type=Path, metavar="ROOT", help="a file or folder")
    verify.add_argument("--sm", required=True, type=_capability, help="compute capability, such as 90 or sm90")
    verify.add_argument("--manifest", type=Path, help="manifest that `strip` wrote: hashes are checked too")
    verify.set_defaults(run=_verify)

    wheels = commands.add_parser("survey", help="what device code wheels carry, as TOML on standard output")
    wheels.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    wheels.add_argument("--sm", action="append", required=True, type=_capability, help="compute capability; repeat")
    wheels.add_argument("--date", required=True, help="date of the survey, such as 2026-01-31")
    wheels.set_defaults(run=_survey)
    return parser


def _capability(text: str) -> int:
    number = text.removeprefix("sm_").removeprefix("sm")
    if not number.isdecimal() or not 20 <= int(number) <= 999:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability such as 90 or sm90")
    return int(number)


def _list(options: argparse.Namespace) -> int:
    found = [report for path in tree.objects(options.roots) if (report := tree.held(path)) is not None]
    if options.json:
        rows = [{**asdict(report), "path": str(report.path)} for report in found]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    for report in found:
        sys.stdout.write(f"{report.path}: {report.size / MIB:.1f} MiB, {report.containers} containers\n")
        for target, count in report.images.items():
            sys.stdout.write(f"  {target:<14} {count:>6} images {report.image_bytes[target] / MIB:>9.1f} MiB\n")
        if report.placeholders:
            sys.stdout.write(f"  {report.placeholders} containers with a placeholder\n")
        for section, size in report.elsewhere_bytes.items():
            sys.stdout.write(f"  {section:<14} {size / MIB:.1f} MiB, never rewritten\n")
    return 0


def _strip(options: argparse.Namespace) -> int:
    before = tree.read_manifest(options.manifest) if options.manifest.exists() else None
    if before is not None and before["capability"] != options.sm:
        raise UsageError(
            f"{options.manifest}: records files stripped for sm_{before['capability']}, which cannot be stripped again "
            f"for sm_{options.sm}; begin from unstripped files and another manifest"
        )
    outcome = tree.strip_tree(options.roots, options.sm, options.leave, before)
    options.manifest.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tree.manifest(outcome, options.sm), indent=1) + "\n"
    options.manifest.write_text(text, encoding="utf-8")
    sys.stdout.write(
        f"stripped {len(outcome.files)} files for sm_{options.sm}: {outcome.freed_bytes / MIB:.1f} MiB freed\n"
    )
    for record in outcome.left:
        sys.stdout.write(f"left {record['path']}: {record['reason']}\n")
    if outcome.odd:
        listed = "\n  ".join(outcome.odd)
        raise CorruptError(
            f"not stripped, since not exactly of the known structure:\n  {listed}\n"
            "leave them as they are with --leave NAME, or build with STRIP=0"
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    manifest = None if options.manifest is None else tree.read_manifest(options.manifest)
    if manifest is not None and manifest["capability"] != options.sm:
        raise UsageError(f"{options.manifest}: is of sm_{manifest['capability']}, not of sm_{options.sm}")
    wrong = tree.check_tree(options.roots, options.sm, manifest)
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return 1 if wrong else 0


def _survey(options: argparse.Namespace) -> int:
    sys.stdout.write(survey.render([survey.wheel(path, options.sm) for path in options.wheels], options.date))
    return 0


if __name__ == "__main__":
    sys.exit(main())
