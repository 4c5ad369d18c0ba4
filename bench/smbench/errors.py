"""Errors that a user can act on. Owns their exit codes; does not own how they are shown."""

from __future__ import annotations


class UsageError(Exception):
    """What was asked cannot be done as asked. The message names the file, the key and the fix. Exit code 2."""

    exit_code = 2


class CorruptError(Exception):
    """A file is damaged, of a newer format, or not comparable. Exit code 3."""

    exit_code = 3
