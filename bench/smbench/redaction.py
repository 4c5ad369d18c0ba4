"""Takes what names a person, a machine or a secret out of text. Owns the patterns and the placeholders.

A second line of defence: what a run records comes from allow-lists. So a doubtful word goes, and a name that is also a
word of the experiment (a user called `torch`) stays, since cutting it would cut the experiment. Does not own which
files are redacted, and changes no file.
"""

from __future__ import annotations

import getpass
import ipaddress
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

COMMON_NAMES = frozenset(
    (
        *("root", "user", "users", "admin", "administrator", "nobody", "ubuntu", "debian", "centos", "fedora", "rocky"),
        *(
            "ec2-user",
            "azureuser",
            "runner",
            "docker",
            "container",
            # the user of our own images
            "smbench",
            "localhost",
            "localdomain",
            "host",
            "node",
            "default",
        ),
        *("home", "test", "build", "worker", "gpu", "cuda", "python"),
    )
)
"""Account and machine names that everybody has: they name nobody, and are words of their own."""
SHORTEST_NAME = 3
SHORTEST_SECRET = 6
_SECRET_WORD = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|KEY|KEYS|CREDENTIALS?|COOKIE|PAT|AUTH|DSN|LICENSE)\d*"
)
_DULL = re.compile(r"(?i)true|false|yes|no|on|off|none|null|auto|default|enabled|disabled|\d{1,7}|/|\.+")

_TAIL = re.compile(
    r"(?:site-packages|dist-packages|lib/python3\.\d+|bench|kernels)/((?:[A-Za-z0-9_]+/){0,8}[A-Za-z0-9_]+\.(?:py|so))$"
)
"""The end of a path that is the same on every machine: traces of installed code stay readable."""
_PLAIN = r"[^\s'\"`<>|*?\\,;()\[\]{}:=&]"
_SHAPES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "SECRET",
        re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    ),
    (
        "SECRET",
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}"
            r"|github_pat_\w{16,}|glpat-[\w-]{10,}|xox[abeprs]-[\w-]{8,}|nvapi-[\w-]{10,}|npm_[A-Za-z0-9]{16,}"
            r"|pypi-[\w-]{16,}|AIza[\w-]{20,}|ya29\.[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|dop_v1_\w{16,}"
            r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
        ),
    ),
)
"""What is a secret by its looks alone."""
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    *_SHAPES,
    ("SECRET", re.compile(r"(?i)(?<=\bbearer )\s*[\w.~+/=-]{6,}|(?<=\bbasic )\s*[A-Za-z0-9+/]{8,}={0,2}(?![\w ])")),
    ("SECRET", re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")),
    (
        "SECRET",
        re.compile(
            r"(?i)(?:(?<=password)|(?<=passwd)|(?<=passphrase)|(?<=secret)|(?<=api[_-]key)|(?<=apikey)"
            # a model's tokens are no secrets: `per_token=3`
            r"|(?<=access[_-]key)|(?<=access[_-]token)|(?<=auth[_-]token)|(?<=api[_-]token)|(?<=refresh[_-]token)"
            r"|(?<=id[_-]token)|(?<=hf[_-]token)|(?-i:(?<=_TOKEN))|(?<=signature)|(?<=cookie))"
            r"(?P<keep>[\"']?\s*[=:]\s*[\"']?)(?!None\b|null\b|<|\d+\b)[^\s\"',;&]{6,}"
        ),
    ),
    ("EMAIL", re.compile(r"\b[\w.+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}\b")),
    (
        "MAC",
        re.compile(r"(?i)(?<![0-9a-f:-])[0-9a-f]{2}(?P<sep>[:-])(?:[0-9a-f]{2}(?P=sep)){4}[0-9a-f]{2}(?![0-9a-f:-])"),
    ),
    ("UUID", re.compile(r"(?i)\b(?:GPU|MIG)-[0-9a-f]{8}-[0-9a-f-]{20,}")),
    ("UUID", re.compile(r"(?i)(?<![0-9a-f-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f-])")),
)
_ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)|(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])"
)
_PATHS = re.compile(
    # in quotes a path may hold spaces
    r"(?<=['\"`])(?:file://)?/(?:[^'\"`\n/]+/?)+(?=['\"`])"
    rf"|(?:file://|(?<![\w.~:/<>\-])|(?<=[\w=]:)(?=/(?!/))|(?<=\s-[A-Za-z])|(?<=^-[A-Za-z]))/{_PLAIN}+"
    rf"|(?<![\w/])~[\w.-]*/{_PLAIN}+"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/](?![/\s])[^\s'\"`<>|*?,;()]+|\\\\[\w.$-]+\\[^\s'\"`<>|*?,;()]+"
)


@dataclass(frozen=True, slots=True)
class Personal:
    """What is private here, and so in nothing that leaves."""

    names: Mapping[str, str]
    """Host and user names, longest first, to their placeholder."""
    homes: tuple[str, ...]
    secrets: tuple[str, ...]
    """Values of environment variables whose names promise a secret, longest first."""

    @staticmethod
    def of_this_process(environ: Mapping[str, str] = os.environ) -> Personal:
        """The names, homes and secrets that this process can see."""
        users = {environ.get(key, "") for key in ("USER", "LOGNAME", "LNAME", "USERNAME", "SUDO_USER")}
        homes = {environ.get("HOME", ""), environ.get("USERPROFILE", "")}
        try:
            users.add(getpass.getuser())
            homes.add(str(Path.home()))
        # a container may run under a number that has no name
        except (KeyError, OSError, RuntimeError):
            users.discard("")
        hosts = {platform.node(), environ.get("HOSTNAME", ""), environ.get("COMPUTERNAME", "")}
        hosts |= {host.partition(".")[0] for host in hosts}
        homes = {home.rstrip("/") for home in homes if home.count("/") > 1 or "\\" in home}
        users |= {re.split(r"[\\/]", home)[-1] for home in homes}
        names = {user: "<USER>" for user in users} | {host: "<HOST>" for host in hosts}
        kept = {
            name: mark
            for name, mark in names.items()
            if len(name) >= SHORTEST_NAME and name.lower() not in COMMON_NAMES and not name.isdigit()
        }
        values = {value for name, value in environ.items() if _is_secret(name, value)}
        values |= {quote(value, safe="") for value in values}
        return Personal(_longest_first(kept), tuple(_longest_first(homes)), tuple(_longest_first(values)))


class Redactor:
    """Replaces what is private by placeholders, and counts what it replaced."""

    def __init__(self, personal: Personal, vocabulary: Iterable[str] = ()) -> None:
        """Names that are among the experiment's own words, `vocabulary`, are kept."""
        known = {word.lower() for word in vocabulary}
        self.kept = sorted(name for name in personal.names if name.lower() in known)
        """Names that stay because they cannot be told from words of the experiment."""
        self.counts: Counter[str] = Counter()
        """Replacements so far, by placeholder."""
        self._homes = personal.homes
        self._home_words = _alternatives(personal.homes)
        self._secrets = _alternatives(personal.secrets)
        names = {name.lower(): mark for name, mark in personal.names.items() if name.lower() not in known}
        self._names = names
        words = _alternatives(names)
        # an underscore parts words here: `alice_h200` names alice
        self._words = re.compile(rf"(?<![A-Za-z0-9])(?:{words.pattern})(?![A-Za-z0-9])", re.I) if words else None

    def text(self, text: str) -> str:
        """The text with placeholders."""
        found = self.secrets(text)
        found = _PATHS.sub(self._path, found)
        if self._home_words:
            found = self._home_words.sub(lambda _: self._count("<HOME>"), found)
        found = _ADDRESS.sub(self._address, found)
        return self._words.sub(lambda m: self._count(self._names[m[0].lower()]), found) if self._words else found

    def secrets(self, text: str) -> str:
        """The text with placeholders for secrets and addresses of people and hardware only."""
        return self._replaced(text, _RULES)

    def holds_secret(self, text: str) -> bool:
        """Whether a source file holds a known secret, or what looks like one; `password=` in code is none."""
        return self._replaced(text, _SHAPES) != text

    def _replaced(self, text: str, rules: Iterable[tuple[str, re.Pattern[str]]]) -> str:
        found = self._secrets.sub(lambda _: self._count("<SECRET>"), text) if self._secrets else text
        for mark, pattern in rules:
            found = pattern.sub(self._rule(mark), found)
        return found

    def tree(self, value: Any, versions: bool = False) -> Any:
        """A JSON value with every string in it redacted, keys included. With `versions`, a string that is nothing but a
        dotted number is one, and no address."""
        match value:
            case str():
                return value if versions and re.fullmatch(r"[\d.]+", value) else self.text(value)
            case list():
                # samples are long, and numbers say nothing
                return value if _all_numbers(value) else [self.tree(item, versions) for item in value]
            case tuple():
                return tuple(self.tree(item, versions) for item in value)
            case dict():
                return {self.text(key): self.tree(item, versions) for key, item in value.items()}
        return value

    def _rule(self, mark: str) -> Callable[[re.Match[str]], str]:
        return lambda match: match.groupdict().get("keep", "") + self._count(f"<{mark}>")

    def _path(self, match: re.Match[str]) -> str:
        path = match[0]
        home = path.startswith("~") or any(path == h or path.startswith((h + "/", h + "\\")) for h in self._homes)
        end = len(path) - len(path.rstrip("/."))
        tail = _TAIL.search(path)
        if not home and re.fullmatch(r"/[^/]?/?\d*", path):
            # `/s` or a lone slash is a unit or a division
            return path
        kept = f"/{tail[1]}" if tail else path[len(path) - end :] if end and path.endswith(".") else ""
        return self._count("<HOME>" if home else "<PATH>") + kept

    def _address(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        # `::` alone is code, and everybody has the loopback
        named = sum(bool(group) for group in match[0].split(":")) > 1 or address.version == 4
        return self._count("<IP>") if named and not (address.is_loopback or address.is_unspecified) else match[0]

    def _count(self, mark: str) -> str:
        self.counts[mark] += 1
        return mark


def _is_secret(name: str, value: str) -> bool:
    """Whether an environment variable's name promises a secret and its value can be one."""
    promising = any(_SECRET_WORD.search(part) for part in name.upper().split("_"))
    return promising and len(value) >= SHORTEST_SECRET and not _DULL.fullmatch(value)


def _alternatives(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the words, the longest first."""
    escaped = [re.escape(word) for word in words]
    return re.compile("|".join(escaped)) if escaped else None


def _longest_first(found: Any) -> Any:
    if isinstance(found, dict):
        return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))
    return sorted(found, key=lambda word: (-len(word), word))


def _all_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)
