"""The real `smbench` command over a fake worker: `python fake_host.py RECIPES ARGUMENTS…`.

Owns what a test cannot pass on the command line: where recipes lie, which worker is started, no GPU whatever the
machine has, and, unless FAKE_HOST_REPORT is set, an analysis in place of a whole report with its figures, and no
bundle. With FAKE_HOST_FILE_BYTES it is a disk on which no file grows beyond that.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smbench.analysis import Analysis

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


def without_figures(folder: Path) -> Analysis:
    from smbench import report, runfolder

    return report.analysis_of(runfolder.load(folder))


def replacements(recipes: Path) -> list[tuple[object, str, object]]:
    """Module, name and what stands there in a test."""
    from smbench import cli, report, resources, runner
    from smbench.plan import Here

    changed: list[tuple[object, str, object]] = [
        (resources, "recipes_dir", lambda: recipes),
        (runner, "run", functools.partial(runner.run, worker_command=WORKER)),
        (cli, "_here", Here),
    ]
    if os.environ.get("FAKE_HOST_REPORT"):
        return changed
    return [*changed, (report, "render", without_figures), (cli, "_packed", lambda folder: None)]


def main() -> None:
    from smbench import cli

    for module, name, value in replacements(Path(sys.argv.pop(1))):
        setattr(module, name, value)
    if limit := os.environ.get("FAKE_HOST_FILE_BYTES"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    cli.main()


if __name__ == "__main__":
    main()
