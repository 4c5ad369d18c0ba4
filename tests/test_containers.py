"""Where a run takes place and the exact command lines of its containers: facts in, decisions out, no daemon."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from smbench import containers
from smbench.containers import Daemon, Image, InContainers, InPlace, NoDaemon, Task, Wish, choose, next_image
from smbench.errors import UsageError
from smbench.place import ImageHere

DIGEST = "sha256:" + "ab" * 32
KERNELS = Image("smbench:kernels-sm89", "sm89", frozenset({"kernels"}), None, "0.1.0", 1)
VLLM = Image("smbench:vllm-sm89", "sm89", frozenset({"vllm"}), DIGEST, "0.1.0", 2)
EVERY = Image("smbench:all-sm89", "sm89", frozenset({"kernels", "vllm", "sglang"}), None, "0.1.0", 3)
OLD_CARD = Image("smbench:all-sm86", "sm86", frozenset({"kernels", "vllm"}), None, "0.1.0", 4)
CPU = Image("smbench:kernels-cpu", "cpu", frozenset({"kernels"}), None, "0.1.0", 5)


def daemon(*images: Image, nvidia: bool = True, rootless: bool = False) -> Daemon:
    return Daemon(nvidia, rootless, images)


def in_containers(*images: Image, wish: Wish | None = None, needed: str = "kernels") -> list[str]:
    """The references of the images that a run on an L40 would use."""
    chosen = choose(wish or Wish(), None, daemon(*images), "sm89", "cuda", set(needed.split()))
    assert isinstance(chosen, InContainers)
    used: list[str] = []
    left = set(needed.split())
    while image := next_image(chosen.images, left, used, (wish or Wish()).stack):
        used.append(image.reference)
        left -= image.stacks
    return used


def reason(wish: Wish, host: Daemon | NoDaemon, card: str | None = "sm89", needed: str = "kernels vllm") -> str:
    """Why such a run takes place without containers."""
    chosen = choose(wish, None, host, card, "cuda", set(needed.split()))
    assert isinstance(chosen, InPlace)
    return chosen.reason


def refusal(wish: Wish, host: Daemon | NoDaemon, card: str | None = "sm89", device: str = "cuda") -> str:
    with pytest.raises(UsageError) as refused:
        choose(wish, None, host, card, "cuda" if device == "cuda" else "cpu", {"kernels"})
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_one_container_for_each_stack_that_is_needed() -> None:
    assert in_containers(KERNELS, VLLM, OLD_CARD, needed="kernels vllm") == [
        "smbench:vllm-sm89",
        "smbench:kernels-sm89",
    ]
    assert in_containers(KERNELS, VLLM, needed="vllm") == ["smbench:vllm-sm89"]


def test_one_container_for_all_stacks_where_there_is_such_an_image() -> None:
    assert in_containers(KERNELS, VLLM, EVERY, needed="kernels vllm sglang") == ["smbench:all-sm89"]
    # one stack alone: its own image is the smaller one
    assert in_containers(KERNELS, EVERY, needed="kernels") == ["smbench:kernels-sm89"]


def test_what_the_image_of_several_lacks_is_left_to_an_image_of_its_own() -> None:
    trt = dataclasses.replace(VLLM, reference="smbench:trtllm-sm89", stacks=frozenset({"trtllm"}))
    assert in_containers(trt, EVERY, needed="vllm sglang trtllm") == ["smbench:all-sm89", "smbench:trtllm-sm89"]


def test_a_stack_that_is_asked_for_is_the_only_one_that_runs() -> None:
    assert in_containers(KERNELS, VLLM, wish=Wish(stack="vllm"), needed="kernels vllm") == ["smbench:vllm-sm89"]
    assert in_containers(KERNELS, VLLM, EVERY, wish=Wish(stack="all"), needed="kernels") == ["smbench:all-sm89"]


def test_of_two_builds_the_newer_one_runs() -> None:
    newer = dataclasses.replace(KERNELS, reference="smbench:again", created=9)
    assert in_containers(KERNELS, newer) == ["smbench:again"]


@pytest.mark.parametrize(
    ("host", "says"),
    [
        (NoDaemon("docker is not installed"), "docker is not installed"),
        (daemon(KERNELS, nvidia=False), "nvidia-container-toolkit"),
        (daemon(), "no image of kernels or vllm for sm89: make image ARCH=sm89"),
        (daemon(OLD_CARD), "(images here are for sm86): make image ARCH=sm89"),
    ],
    ids=["no docker", "no nvidia runtime", "no image", "images of another arch"],
)
def test_what_docker_lacks_is_said_and_the_run_takes_place_here(host: Daemon | NoDaemon, says: str) -> None:
    assert says in reason(Wish(), host)
    # who asks for an image does not get a run without one
    for wish in (Wish(where="docker"), Wish(arch="sm89"), Wish(stack="vllm")):
        with pytest.raises(UsageError, match="to run in place"):
            choose(
                wish, None, host, "sm89", "cuda", {"vllm"} if isinstance(host, Daemon) and host.images else {"kernels"}
            )


def test_the_missing_image_is_named_with_the_command_that_makes_it() -> None:
    assert "make image ARCH=sm89 STACK=kernels" in refusal(Wish(where="docker"), daemon(VLLM))
    wish = Wish(stack="sglang")
    with pytest.raises(UsageError, match=r"no image of kernels or sglang for sm89: make image ARCH=sm89 STACK=sglang"):
        choose(wish, None, daemon(VLLM), "sm89", "cuda", {"kernels", "sglang"})
    with pytest.raises(UsageError, match=r"no missing cell needs stack 'vllm'; needed: sglang"):
        choose(Wish(stack="vllm"), None, daemon(VLLM), "sm89", "cuda", {"sglang"})


def test_an_arch_that_is_not_the_cards_is_refused_unless_forced() -> None:
    said = refusal(Wish(arch="sm86"), daemon(OLD_CARD))
    assert said.startswith("ARCH=sm86, and this card is sm89") and "FORCE=1" in said
    chosen = choose(Wish(arch="sm86", force=True), None, daemon(OLD_CARD), "sm89", "cuda", {"kernels"})
    assert isinstance(chosen, InContainers) and (chosen.arch, chosen.images) == ("sm86", [OLD_CARD])


def test_without_a_card_no_gpu_image_runs() -> None:
    assert "no NVIDIA GPU is visible: take ARCH=cpu" in refusal(Wish(arch="sm89"), daemon(KERNELS), None, "cpu")


def test_a_card_that_does_not_tell_its_arch_is_measured_here() -> None:
    assert "compute capability" in reason(Wish(), daemon(KERNELS), card=None)


def test_the_cpu_profile_needs_no_image_unless_one_is_asked_for() -> None:
    here = choose(Wish(), None, daemon(CPU), None, "cpu", {"kernels"})
    assert isinstance(here, InPlace) and "ARCH=cpu" in here.reason
    for wish in (Wish(arch="cpu"), Wish(stack="kernels"), Wish(where="docker")):
        chosen = choose(wish, None, daemon(CPU, nvidia=False), None, "cpu", {"kernels"})
        assert isinstance(chosen, InContainers) and chosen.images == [CPU]


def test_inside_an_image_everything_takes_place_there() -> None:
    inside = ImageHere("sm89", ("vllm",))
    for wish in (Wish(), Wish(arch="sm89"), Wish(stack="vllm"), Wish(where="here")):
        chosen = choose(wish, inside, NoDaemon("not asked"), "sm89", "cuda", {"vllm"})
        assert chosen == InPlace("already inside an image (vllm for sm89)")
    for wish, says in (
        (Wish(where="docker"), "has no docker"),
        (Wish(arch="sm90"), "ARCH=sm90"),
        (Wish(stack="sglang"), "STACK=sglang"),
    ):
        with pytest.raises(UsageError, match=says):
            choose(wish, inside, NoDaemon("not asked"), "sm89", "cuda", {"vllm"})


def test_here_is_here_although_docker_could() -> None:
    assert reason(Wish(where="here"), daemon(KERNELS)) == "WHERE=here"
    assert "leave one of the two out" in refusal(Wish(where="here", stack="vllm"), daemon(VLLM))


def task(**changes: Any) -> Task:
    plain = Task(
        recipe="gptq",
        profile="full",
        folder=Path("/home/u/runs/gptq-l40"),
        caches={Path("/home/u/c"): PurePosixPath("/cache")},
        user="1001:1002",
        rootless=False,
        gpu=True,
        again="smbench launch gptq --profile full",
        name="smbench-gptq-l40-7-vllm",
    )
    return dataclasses.replace(plain, **changes)


def test_the_command_line_of_a_gpu_container_word_for_word() -> None:
    assert containers.command_line(VLLM, task(), last=True) == [
        *["docker", "run", "--rm", "--init", "--pull", "never"],
        *["--name", "smbench-gptq-l40-7-vllm", "--label", "smbench.recipe=gptq"],
        *["--user", "1001:1002", "--security-opt", "no-new-privileges", "--network", "none", "--gpus", "all"],
        *["--shm-size", "16g", "--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864:67108864"],
        *["--stop-timeout", "30"],
        *["--mount", "type=bind,source=/home/u/runs/gptq-l40,target=/workspace/runs/gptq-l40"],
        *["--mount", "type=bind,source=/home/u/c,target=/cache"],
        *["--env", "SMBENCH_AGAIN=smbench launch gptq --profile full"],
        *["--env", f"SMBENCH_IMAGE_DIGEST={DIGEST}", "--env", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"],
        *["--entrypoint", "smbench", "smbench:vllm-sm89"],
        *["run", "gptq", "--profile", "full", "--out", "/workspace/runs/gptq-l40", "--json"],
    ]


def test_nothing_of_the_host_is_handed_in_but_what_is_mounted_on_purpose() -> None:
    line = " ".join(containers.command_line(CPU, task(gpu=False, environ={"SECRET": "s", "HF_TOKEN": "t"}), last=True))
    assert "docker.sock" not in line and "privileged" not in line.replace("no-new-privileges", "")
    assert (
        "--ulimit" not in line
        and "--gpus" not in line
        and "NVIDIA" not in line
        and "DIGEST" not in line
        and "HF_TOKEN" not in line
    )
    assert "--network none" in line and "SECRET" not in line


def test_a_download_is_what_opens_the_network_and_its_token_is_in_no_command_line() -> None:
    command = containers.command_line(VLLM, task(environ={"SMBENCH_DOWNLOAD": "1", "HF_TOKEN": "hf_x"}), last=True)
    assert "--network" not in command and "HF_HUB_OFFLINE=0" in command and "SMBENCH_DOWNLOAD=1" in command
    assert command[command.index("HF_TOKEN") - 1] == "--env" and not any("hf_x" in part for part in command)


def test_what_chooses_the_device_holds_inside_too() -> None:
    command = containers.command_line(VLLM, task(environ={"CUDA_VISIBLE_DEVICES": "1"}), last=True)
    assert "CUDA_VISIBLE_DEVICES=1" in command


def test_options_go_on_to_the_run_and_only_the_last_container_packs() -> None:
    command = containers.command_line(
        VLLM, task(model="synthetic:tiny", price=1.5, force=True, providers=["a", "b"]), last=False
    )
    inner = command[command.index("smbench:vllm-sm89") + 1 :]
    assert inner[6:] == [
        *["--provider", "a", "--provider", "b", "--model", "synthetic:tiny", "--price", "1.5"],
        *["--force", "--no-pack", "--json"],
    ]


def test_a_model_of_the_host_is_mounted_read_only_under_its_own_name(tmp_path: Path) -> None:
    weights = tmp_path / "my, model"
    weights.mkdir()
    command = containers.command_line(VLLM, task(model=str(weights)), last=True)
    assert f'type=bind,"source={weights}","target=/models/my, model",readonly' in command
    assert command[command.index("--model") + 1] == "/models/my, model"


def test_a_file_of_conversations_is_mounted_read_only_and_a_profiler_is_told(tmp_path: Path) -> None:
    file = tmp_path / "sharegpt.json"
    file.write_text("[]")
    command = containers.command_line(VLLM, task(sharegpt=file, trace="torch"), last=True)
    assert f"type=bind,source={file},target=/datasets/sharegpt.json,readonly" in command
    assert command[command.index("--sharegpt") + 1] == "/datasets/sharegpt.json"
    assert command[command.index("--trace") + 1] == "torch"


def test_caches_are_one_folder_an_arch_and_weights_are_the_callers_own() -> None:
    home = Path("/home/u")
    assert containers.caches({}, home, "sm89") == {
        home / ".cache/smbench/images/sm89": PurePosixPath("/cache"),
        home / ".cache/smbench/models": PurePosixPath("/cache/.cache/smbench/models"),
        home / ".cache/huggingface": PurePosixPath("/cache/huggingface"),
    }
    moved = containers.caches({"SMBENCH_CACHE": "/disk/s", "HF_HOME": "/disk/hf"}, home, "sm90")
    assert list(moved) == [Path("/disk/s/images/sm90"), Path("/disk/s/models"), Path("/disk/hf")]


def test_under_a_rootless_daemon_root_is_the_caller_and_limits_cannot_be_raised() -> None:
    command = containers.command_line(VLLM, task(rootless=True), last=True)
    assert command[command.index("--user") + 1] == "0:0" and "--ulimit" not in command


def test_names_and_tags_are_ones_that_docker_takes() -> None:
    assert containers.container_name("gptq l40/é-7") == "smbench-gptq-l40--7"
    assert containers.pushed_tag(dataclasses.replace(EVERY, version="0.1.0+g1a2b"), "9") == "all-sm89-0.1.0-g1a2b"
    assert containers.pushed_tag(dataclasses.replace(VLLM, version=None), "9") == "vllm-sm89-9"


@pytest.mark.parametrize(("given", "hint"), [("sm98", "ARCH=sm90"), ("sm8", "ARCH=sm8")])
def test_an_unknown_name_gets_the_known_ones_and_the_nearest(given: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"unknown ARCH '{given}'; known: cpu, sm80, sm90; did you mean {hint}"):
        containers.known("ARCH", given, ["sm80", "sm90", "cpu"])
