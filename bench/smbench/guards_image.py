"""The guard over images: numbers of an image that is not the card's are marked. Owns its words."""

from __future__ import annotations

from collections.abc import Iterator

from smbench.findings import Evidence, Finding


def forced_arch(evidence: Evidence) -> Iterator[Finding]:
    """The image was built for the card that it ran on."""
    forced = {
        entry.environment_id: entry.environment
        for entry in evidence.environments
        if (entry.environment.get("image") or {}).get("forced_arch")
    }
    results = [result for result in evidence.results if result.environment_id in forced]
    if not forced:
        return
    pairs = sorted(
        f"{environment['image'].get('arch')} on {(environment.get('gpu') or {}).get('name', 'an unknown card')}"
        for environment in forced.values()
    )
    yield Finding(
        "image",
        "warning",
        f"{len(results)} of {len(evidence.results)} results are from an image of another arch than the card, by "
        f"--force: {'; '.join(dict.fromkeys(pairs))}",
        "measure in the image of the card's arch before comparing",
    )
