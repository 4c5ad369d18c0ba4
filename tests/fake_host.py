"""The real `smbench` command over a fake worker: `python fake_host.py RECIPES ARGUMENTS…`.

Owns what a test cannot pass on the command line: where recipes lie, which worker is started, no GPU whatever the
machine has, no figures, and, with FAKE_HOST_FILE_BYTES, a disk on which no file grows beyond that.
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


def without_figures(folder: Path) -> Analysis:
    from smbench import report, runfolder

    return report.analysis_of(runfolder.load(folder))


def main() -> None:
    from smbench import cli, resources, runner

    recipes = Path(sys.argv.pop(1))
    worker = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
    resources.recipes_dir = lambda: recipes
    runner.run = functools.partial(runner.run, worker_command=worker)
    cli._device_name = lambda: None
    if not os.environ.get("FAKE_HOST_REPORT"):
        cli._report = without_figures
    if limit := os.environ.get("FAKE_HOST_FILE_BYTES"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    cli.main()


if __name__ == "__main__":
    main()
