"""The audit: rules over published or measured numbers. Pure; owns the list of rules and the order of findings.

A rule reads observations and what a file declares; it knows no document, no device and no value. Like a guard, a rule
changes no number: it says what was found, with its arithmetic, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from smbench import audit_bounds, audit_patterns, audit_statements
from smbench.guards import Finding
from smbench.observations import Dataset

RULES: Mapping[str, Callable[[Dataset], Iterator[Finding]]] = {
    "physics": audit_bounds.physics,
    "sensitivity": audit_patterns.sensitivity,
    "copied": audit_patterns.copied,
    "one_configuration": audit_patterns.one_configuration,
    "expectations": audit_statements.expectations,
    "conventions": audit_statements.conventions,
    "exercised": audit_bounds.exercised,
    "confounded": audit_statements.confounded,
    "tuned": audit_statements.tuned,
    "effect": audit_patterns.effect,
    "settings": audit_statements.settings,
    "missing": audit_statements.missing,
    "cache_rates": audit_bounds.cache_rates,
    "agreement": audit_statements.agreement,
    "shape": audit_patterns.shape,
    "unstated": audit_statements.unstated,
}
"""Every rule by name, in the order that a report prints."""


def examine(dataset: Dataset) -> list[Finding]:
    """The findings of all rules."""
    return [finding for rule in RULES.values() for finding in rule(dataset)]


def refuted(findings: Sequence[Finding]) -> bool:
    """Whether any number or claim cannot be true."""
    return any(finding.severity == "refuted" for finding in findings)
