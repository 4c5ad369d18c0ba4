"""What a build needs of this machine and must not keep: how pip reaches its index, certificates, Debian's sources.

Owns what becomes a build secret and what of pip's configuration another machine can use. A secret exists while a step
runs, in no layer. Does not own the steps: docker/build/ has them.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from smbench.errors import UsageError

PIP_KEYS = ("default-timeout", "extra-index-url", "index-url", "proxy", "retries", "timeout", "trusted-host")
"""Settings of pip that say how to reach an index; any other is of this machine alone."""
BUNDLE_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
"""Where a machine whose network needs certificates of its own says which, in the order that pip looks."""


def pip_settings(listed: str) -> dict[str, list[str]]:
    """The settings in `pip config list` that a build can use, by key; places of this machine's own disk are left out.

    A later section replaces an earlier one as pip does it: global, then install, then the environment.
    """
    sections: dict[str, dict[str, list[str]]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, equals, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if equals and section in sections and key in PIP_KEYS:
            words = str(ast.literal_eval(value)).split()
            sections[section][key] = [word for word in words if not word.startswith(("file:", "/"))]
    found = {**sections["global"], **sections["install"], **sections[":env:"]}
    return {key: words for key, words in sorted(found.items()) if words}


def pip_conf(settings: Mapping[str, list[str]]) -> str:
    """A pip.conf."""
    return "".join(["[global]\n", *(f"{key} = {' '.join(words)}\n" for key, words in settings.items())])


def ca_bundle(named: str, pip_cert: str | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The certificates that a build has to trust; None where the usual ones do. UsageError where `named` is no file."""
    if named:
        if not Path(named).is_file():
            raise UsageError(f"CA_BUNDLE: {named} is not a file; name a bundle of PEM certificates")
        return Path(named)
    candidates = [pip_cert, *(environ.get(variable) for variable in BUNDLE_VARIABLES)]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def collect(folder: Path, ca: str, apt_conf: str, apt_sources: str) -> dict[str, Path]:
    """The secrets of this machine by their id in the Dockerfile; those that are made are written into `folder`."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    # a .venv without pip has nothing to say; neither has a machine without a configuration
    listed = done.stdout if done.returncode == 0 else ""
    secrets: dict[str, Path] = {}
    if settings := pip_settings(listed):
        secrets["pip_conf"] = folder / "pip.conf"
        secrets["pip_conf"].write_text(pip_conf(settings), encoding="utf-8")
    certs = [line.partition("=")[2] for line in listed.splitlines() if line.partition("=")[0].endswith(".cert")]
    if (bundle := ca_bundle(ca, str(ast.literal_eval(certs[-1])) if certs else None)) is not None:
        secrets["ca_bundle"] = bundle
    for name, file in (("apt_conf", apt_conf), ("apt_sources", apt_sources)):
        if file:
            if not Path(file).is_file():
                raise UsageError(f"{name.upper()}: {file} is not a file")
            secrets[name] = Path(file)
    return secrets
