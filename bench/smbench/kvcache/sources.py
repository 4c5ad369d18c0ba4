"""The repositories of the KV-cache build: from where, which commit, and whether they are there. Clones nothing.

A folder of mirrors stands for the host of the repositories: `SOURCE_DIR/OWNER/REPOSITORY.git`, each made with
`git clone --mirror`, submodules like any other. git itself is told to look there, so that the addresses written in the
repositories hold.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smbench.errors import UsageError
from smbench.kvcache.table import Source

ANSWER_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Pinned:
    """A repository and the commit that is built."""

    name: str
    source: Source
    commit: str
    mirrors: Path | None
    """The folder of mirrors, None where the repository's own address is used."""

    @property
    def git(self) -> tuple[str, ...]:
        """How git is called, so that it looks among the mirrors for everything of this host, submodules too."""
        if self.mirrors is None:
            return ("git",)
        return (
            "git",
            *("-c", f"url.{self.mirrors}/.insteadOf={self.source.host}"),
            *("-c", "protocol.file.allow=always"),
        )


def pin(sources: Mapping[str, Source], named: Mapping[str, str], source_dir: str) -> list[Pinned]:
    """Every repository with its commit: the table's, or the one that was named.

    UsageError for a commit that neither knows, and for a SOURCE_DIR that is no folder.
    """
    mirrors = Path(source_dir).resolve() if source_dir else None
    if mirrors is not None and not mirrors.is_dir():
        raise UsageError(f"SOURCE_DIR: {mirrors} is not a folder")
    found = []
    for name, source in sources.items():
        commit = named.get(name, "") or source.commit
        variable = f"{name.replace('-', '_').upper()}_COMMIT"
        if not commit:
            raise UsageError(
                f"{variable} is missing: the commit of {source.url} is not known ({source.note}); name the one to "
                f"build, which `git ls-remote {source.url} {source.branch}` prints, or `git rev-parse {source.branch}` "
                "in a mirror"
            )
        if not 7 <= len(commit) <= 40 or set(commit) - set("0123456789abcdef"):
            raise UsageError(f"{variable}: {commit!r} is not a commit's hash")
        found.append(Pinned(name, source, commit, mirrors))
    return found


def missing(pinned: Pinned) -> str | None:
    """Why a repository or its commit cannot be had, with the fix; None where it can."""
    if pinned.mirrors is None:
        done = _git("ls-remote", "--exit-code", "--heads", pinned.source.url, pinned.source.branch)
        if done.returncode == 0:
            return None
        # git's own code for an answer without such a branch
        gone = "has no such branch any more" if done.returncode == 2 else _last_words(done)
        return (
            f"source {pinned.name}: {pinned.source.url} ({pinned.source.branch}): {gone}; build from a mirror: "
            f"SOURCE_DIR=FOLDER with {pinned.source.mirror} in it"
        )
    mirror = pinned.mirrors / pinned.source.mirror
    if not mirror.is_dir():
        return (
            f"source {pinned.name}: {mirror} is not there: "
            f"`git clone --mirror {pinned.source.url} {mirror}` where it can be reached"
        )
    done = _git("-C", str(mirror), "rev-parse", "--quiet", "--verify", f"{pinned.commit}^{{commit}}")
    if done.returncode != 0:
        return f"source {pinned.name}: {mirror} has no commit {pinned.commit}: bring the mirror up to date"
    return None


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=ANSWER_LIMIT_S, check=False)
    except FileNotFoundError as error:
        raise UsageError("git is not installed: apt-get install git git-lfs") from error
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", f"no answer within {ANSWER_LIMIT_S} s")


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["git says nothing"])[-1]
