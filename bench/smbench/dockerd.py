"""Talks to the docker daemon: what it is, which of our images it has, pushing them. Owns the SDK's use and its errors.

Does not own what runs in containers (containers.py) and starts none: `docker run` itself does, so that what a user is
shown is what runs.
"""

from __future__ import annotations

import importlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from smbench.containers import Daemon, Image, NoDaemon
from smbench.errors import UsageError

NAME = "smbench"
"""Of every image of ours, in the registry of whoever pushes it."""
ARCH_LABEL = "smbench.arch"
STACKS_LABEL = "smbench.stacks"
VERSION_LABEL = "org.opencontainers.image.version"

ANSWER_LIMIT_S = 20
PUSH_LIMIT_S = 900
"""Between two lines of a push; a layer has gigabytes."""
HOOKS = ("nvidia-container-runtime-hook", "nvidia-container-runtime")
"""With either in its path the daemon serves `--gpus`, whether or not a runtime is configured."""
SMALL_CHANGE = "FROM {reference}\nUSER 0:0\n"

Said = Callable[[str], None]


def ask() -> Daemon | NoDaemon:
    """The daemon and our images in it, or why there is none."""
    if shutil.which("docker") is None:
        return NoDaemon("docker is not installed")
    docker = _sdk()
    try:
        # the daemon and the credentials that the docker command would use: DOCKER_HOST, contexts
        client = docker.from_env(timeout=ANSWER_LIMIT_S)
        try:
            info = client.info()
            images = [*filter(None, map(_image, client.api.images(filters={"label": ARCH_LABEL})))]
        finally:
            client.close()
    except (docker.errors.DockerException, OSError) as error:
        return NoDaemon(_why(error))
    rootless = any("name=rootless" in option for option in info.get("SecurityOptions") or ())
    return Daemon(_has_nvidia(info), rootless, images)


def push(image: Image, repository: str, tag: str, as_root: bool, say: Said) -> str:
    """Tag an image, push it, and return its digest; `as_root` pushes it with root as its user.

    UsageError when the registry or the daemon refuses.
    """
    docker = _sdk()
    reference = f"{repository}:{tag}"
    try:
        client = docker.from_env(timeout=PUSH_LIMIT_S)
        try:
            if as_root:
                _with_root(client, image.reference, reference)
            else:
                client.api.tag(image.reference, repository, tag)
            digest = _digest(client.api.push(repository, tag=tag, stream=True, decode=True), reference, say)
            if as_root:
                # it is for the registry: here it would be a second image of the same arch and stack
                client.api.remove_image(reference)
            return digest
        finally:
            client.close()
    except (docker.errors.DockerException, OSError) as error:
        raise UsageError(f"{reference} was not pushed: {_why(error)}") from error


def _sdk() -> Any:
    """The docker SDK. By name, since a checkout's own folder `docker` stands in the way of type checkers."""
    return importlib.import_module("docker")


def _digest(lines: Iterator[Mapping[str, Any]], reference: str, say: Said) -> str:
    """The digest that a push ends with; each layer's state is said once."""
    said: set[tuple[str, str]] = set()
    digest = None
    for line in lines:
        if "error" in line:
            host = reference.split("/", 1)[0]
            raise UsageError(f"{reference} was not pushed: {line['error']}; is it `docker login {host}`?")
        digest = (line.get("aux") or {}).get("Digest", digest)
        state = (str(line.get("id", "")), str(line.get("status", "")))
        if state[0] and state[1] in ("Pushed", "Layer already exists") and state not in said:
            said.add(state)
            say(f"{state[0]}: {state[1].lower()}")
    if digest is None:
        raise UsageError(f"{reference} was pushed, and the registry told no digest: `docker pull` it and look")
    return str(digest)


def _with_root(client: Any, reference: str, tag: str) -> None:
    """The same layers under another tag, with root as the user."""
    client.images.build(fileobj=io.BytesIO(SMALL_CHANGE.format(reference=reference).encode()), tag=tag, rm=True)


def _image(entry: Mapping[str, Any]) -> Image | None:
    """One of ours: labelled and called so, since what is built on an image has its labels too. None for others."""
    labels = entry.get("Labels") or {}
    # the name that `make image` gives comes before those that a push adds
    tags = sorted(filter(_ours, entry.get("RepoTags") or ()), key=lambda tag: ("/" in tag, tag))
    digests = sorted(filter(_ours, entry.get("RepoDigests") or ()))
    if not tags and not digests:
        return None
    return Image(
        reference=[*tags, *digests][0],
        arch=str(labels[ARCH_LABEL]),
        stacks=frozenset(filter(None, str(labels.get(STACKS_LABEL, "")).split(","))),
        digest=digests[0].partition("@")[2] if digests else None,
        version=labels.get(VERSION_LABEL) or None,
        created=int(entry.get("Created") or 0),
    )


def _ours(reference: str) -> bool:
    """Whether `REGISTRY:PORT/YOU/NAME:TAG` or `…/NAME@DIGEST` is called smbench."""
    return reference.partition("@")[0].rpartition("/")[2].partition(":")[0] == NAME


def _has_nvidia(info: Mapping[str, Any]) -> bool:
    """Whether `--gpus` has somebody to serve it."""
    devices = info.get("DiscoveredDevices") or ()
    by_cdi = any(str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in devices)
    return "nvidia" in (info.get("Runtimes") or ()) or by_cdi or any(map(shutil.which, HOOKS))


def _why(error: BaseException) -> str:
    """Cause and fix in one line, from an error that wraps others."""
    causes = list(_causes(error))
    if any(isinstance(cause, PermissionError) for cause in causes):
        return (
            "docker's daemon refuses this user: sudo usermod -aG docker $USER, then log in again "
            "(or `newgrp docker` in this shell)"
        )
    if any(isinstance(cause, FileNotFoundError | ConnectionRefusedError) for cause in causes):
        return "docker is installed and its daemon is not running: sudo systemctl start docker"
    if any("timed out" in str(cause).lower() for cause in causes):
        return f"docker's daemon gave no answer within {ANSWER_LIMIT_S} s: sudo systemctl restart docker"
    return f"docker: {' '.join(str(error).split())[:300]}"


def _causes(error: object) -> Iterator[BaseException]:
    """An error and all that it wraps: as its cause, its context, or among its arguments."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        waiting += [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]
