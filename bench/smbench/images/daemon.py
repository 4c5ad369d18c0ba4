"""The docker daemon, asked and told. Owns how it is called and what is said of its absence, not what is built."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from smbench.errors import UsageError

NO_DOCKER = (
    "no docker on this machine: install it (Debian, Ubuntu: apt-get install docker.io), or do without: "
    "`make run RECIPE=…` measures in place, `make stack STACK=…` installs an engine for it"
)


def ask(docker: str, *arguments: str) -> str:
    """What a query prints. UsageError names the cause and the fix where there is no docker or no daemon."""
    try:
        done = subprocess.run([docker, *arguments], capture_output=True, text=True, check=False)
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(NO_DOCKER) from error
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UsageError(f"{docker} {arguments[0]}: {words}")
    return done.stdout.strip()


def require(docker: str) -> None:
    """UsageError where no daemon answers."""
    try:
        done = subprocess.run(
            [docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False
        )
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(NO_DOCKER) from error
    if done.returncode != 0:
        raise UsageError(
            f"no docker daemon answers ({(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}): start it "
            "(systemctl start docker), let this user reach it (group docker), or name another with DOCKER_HOST="
        )


def image_id(docker: str, name: str) -> str | None:
    """The id of an image on this machine, None where there is none of that name."""
    done = subprocess.run(
        [docker, "image", "inspect", "--format", "{{.Id}}", name], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def run(command: Sequence[str]) -> int:
    """Run a docker command with the terminal's output; returns its exit status."""
    return subprocess.run(command, env={**os.environ, "DOCKER_BUILDKIT": "1"}, check=False).returncode
