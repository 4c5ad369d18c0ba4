"""Writes what an image is: /etc/smbench/sbom.json (CycloneDX) and /etc/smbench/image.json, which every result records.

Runs in the image's build, over the files of the very image. Owns both files' content; does not own their use: the
worker records image.json (smbench/worker/environment.py), a bundle packs both (smbench/bundle.py). Nothing in them
depends on when or where the image is built, SOURCE_DATE_EPOCH aside: the same image has the same SBOM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

FORMAT = 1
HOME = Path("/opt/smbench")
FILES = HOME / "files"
OUTPUT = Path("/etc/smbench")
COMMAND = "smbench"
"""What the command line's own environment is called beside the stacks."""
NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")
"""Of names that are URLs (RFC 4122): the serial number is one of its name-based ones."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def environments(stacks: list[str]) -> dict[str, Path]:
    """site-packages of the command line and of each stack."""
    roots = {COMMAND: HOME / "venv", **{stack: HOME / "stacks" / stack for stack in stacks}}
    return {name: next(root.glob("lib/python3*/site-packages")) for name, root in roots.items()}


def original_hashes(stack: str) -> Mapping[str, str]:
    """SHA-256 by path below the stack, taken before any device code was stripped; empty for the command line."""
    listing = FILES / f"{stack}.sha256"
    if not listing.exists():
        return {}
    rows = (line.split("  ", 1) for line in listing.read_text(encoding="utf-8").splitlines())
    return {path: digest for digest, path in rows}


def distribution_component(found: Distribution, environment: str, site: Path, original: Mapping[str, str]) -> Component:
    """One installed package, with the native libraries in it: what stripping changes is named by its original hash."""
    name, version = found.metadata["Name"], found.version
    purl = PackageURL("pypi", None, name.lower().replace("_", "-"), version)
    root = site.parent.parent.parent
    native = [
        (path, original[path])
        for file in found.files or ()
        if (path := Path(str(found.locate_file(file))).resolve().relative_to(root).as_posix()) in original
        and ".so" in Path(path).suffixes
    ]
    stated = found.metadata.get("License-Expression")
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        purl=purl,
        bom_ref=f"{environment}/{name}@{version}",
        licenses=[LicenseFactory().make_from_string(stated)] if stated else (),
        components=[
            Component(
                name=path,
                type=ComponentType.FILE,
                bom_ref=f"{environment}/{path}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            )
            for path, digest in sorted(native)
        ],
    )


def environment_component(name: str, site: Path, lock: Path) -> Component:
    """One virtual environment with its packages, and the hashes of its lock and of the list of all its files."""
    original = original_hashes(name)
    listing = FILES / f"{name}.sha256"
    properties = [Property(name="smbench:lock_sha256", value=sha256(lock.read_bytes()))]
    if listing.exists():
        properties.append(Property(name="smbench:files_sha256", value=sha256(listing.read_bytes())))
    found = sorted(distributions(path=[str(site)]), key=lambda one: one.metadata["Name"].lower())
    return Component(
        name=f"environment {name}",
        type=ComponentType.APPLICATION,
        bom_ref=f"environment/{name}",
        properties=properties,
        components=[distribution_component(one, name, site, original) for one in found],
    )


def debian_components() -> Iterator[Component]:
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    distribution = release["ID"].strip('"')
    codename = release.get("VERSION_CODENAME", "").strip('"')
    query = ["dpkg-query", "--show", "--showformat=${Package}\t${Version}\t${Architecture}\n"]
    rows = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    for name, version, architecture in (row.split("\t") for row in sorted(rows)):
        purl = PackageURL("deb", distribution, name, version, {"arch": architecture, "distro": codename})
        yield Component(
            name=name,
            version=version,
            type=ComponentType.LIBRARY,
            purl=purl,
            bom_ref=f"deb/{name}:{architecture}@{version}",
        )


def baked_kernels(stack: str) -> int:
    """How many kernels the stack ships compiled."""
    facts = HOME / "baked" / stack / "share" / "smbench" / "triton" / "baked.json"
    return int(json.loads(facts.read_text(encoding="utf-8"))["kernels"]) if facts.exists() else 0


def bill(image: str, arch: str, locks: Mapping[str, Path], created: datetime) -> str:
    """The SBOM as JSON."""
    sites = environments([name for name in locks if name != COMMAND])
    version = next(one.version for one in distributions(path=[str(sites[COMMAND])], name="smbench"))
    whole = Component(name=f"smbench-{image}-{arch}", version=version, type=ComponentType.CONTAINER, bom_ref="image")
    parts = [*(environment_component(name, sites[name], lock) for name, lock in locks.items()), *debian_components()]
    bom = Bom(components=parts)
    bom.metadata.component = whole
    bom.metadata.timestamp = created
    bom.register_dependency(whole, parts)
    return render(bom, uuid.uuid5(NAMESPACE, render(bom, uuid.UUID(int=0))))


def render(bom: Bom, serial: uuid.UUID) -> str:
    bom.serial_number = serial
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--locks", nargs="+", required=True, metavar="NAME=FILE")
    arguments = parser.parse_args()
    locks = {name: Path(file) for name, _, file in (pair.partition("=") for pair in arguments.locks)}
    stacks = [name for name in locks if name != COMMAND]
    created = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sbom = bill(arguments.image, arguments.arch, locks, created).encode()
    (OUTPUT / "sbom.json").write_bytes(sbom)
    facts = {
        "format": FORMAT,
        "name": arguments.image,
        "arch": arguments.arch,
        "stacks": stacks,
        "commit": os.environ.get("SMBENCH_COMMIT") or None,
        "created": created.isoformat(),
        "base": os.environ.get("BASE_ID") or None,
        "stripped": any((FILES / f"{stack}.stripped.json").exists() for stack in stacks),
        "locks": {name: sha256(lock.read_bytes()) for name, lock in locks.items()},
        "files": {stack: sha256((FILES / f"{stack}.sha256").read_bytes()) for stack in stacks},
        "baked": {stack: baked_kernels(stack) for stack in stacks},
        "sbom_sha256": sha256(sbom),
    }
    (OUTPUT / "image.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"image {arguments.image} for {arguments.arch}: SBOM sha256 {facts['sbom_sha256']}\n")


if __name__ == "__main__":
    main()
