"""Which base a bento's image is put on."""

from dataclasses import replace
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from services.builder.base_rules import USUAL, check_own, choose
from services.builder.recipe import BentoFiles


@pytest.mark.parametrize(
    "base, manifest, chosen",
    [
        ("", {}, "docker://docker.io/library/python:3.11-slim"),
        ("", {"image": {"base_image": "python:3.11-slim"}}, "docker://docker.io/library/python:3.11-slim"),
        ("oci:/bases:py{python}", {"docker": {"base_image": None}}, "oci:/bases:py3.11"),
        (USUAL, {"image": {"base_image": "nvcr.io/nvidia/cuda:12"}}, "docker://nvcr.io/nvidia/cuda:12"),
        (USUAL, {"docker": {"base_image": "python:3.11-alpine"}}, "docker://python:3.11-alpine"),
        ("oci:/bases:mine", {"image": {"base_image": "nvcr.io/nvidia/cuda:12"}}, "oci:/bases:mine"),
        (USUAL, {"image": "junk", "docker": None}, "docker://docker.io/library/python:3.11-slim"),
    ],
)
def test_a_rule_is_for_bentos_without_a_base_of_their_own_and_an_image_for_all(
    base: str, manifest: dict[str, Any], chosen: str
) -> None:
    assert choose(base, BentoFiles(manifest, ""), "3.11.7") == chosen


def test_a_rule_with_another_place_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"only \{python\} may stand in braces"):
        choose("docker://host/python:{version}", BentoFiles({}, ""), "3.11")


@pytest.mark.parametrize(
    "images, named",
    [
        ("docker://reg.example.com/ekiben", "reg.example.com/ekiben/other/iris:v1"),
        ("docker://reg.example.com/ekiben/", "docker://REG.example.com:443/ekiben/other/iris@sha256:" + "a" * 64),
        ("docker://reg.example.com/ekiben", "reg.example.com/ekiben/acme-2/iris"),
        ("docker://reg.example.com", "reg.example.com/other/iris:v1"),
        ("docker://docker.io", "other/iris"),
        ("docker://docker.io/ekiben", "index.docker.io/ekiben/other/iris:v1"),
    ],
)
@pytest.mark.parametrize("section", ["image", "docker"])
def test_another_organizations_image_is_no_base(images: str, named: str, section: str) -> None:
    of_section = BentoFiles({section: {"base_image": named}}, "")
    with pytest.raises(PermissionDenied, match="not one of acme") as refused:
        check_own(USUAL, of_section, images, "acme")
    assert refused.value.reason == "BASE_DENIED"
    check_own("docker://reg.example.com/ekiben/other/iris:v1", of_section, images, "acme")


@pytest.mark.parametrize(
    "images, named",
    [
        ("docker://reg.example.com/ekiben", "reg.example.com/ekiben/acme/iris:v1"),
        ("docker://reg.example.com/ekiben", "reg.example.com/bases/python:3.11"),
        ("docker://reg.example.com/ekiben", "nvcr.io/ekiben/other/iris"),
        ("docker://docker.io/ekiben", "python:3.11-alpine"),
        ("oci:/images", "reg.example.com/ekiben/other/iris"),
    ],
)
def test_an_own_image_and_one_from_elsewhere_is_a_base(images: str, named: str) -> None:
    check_own(USUAL, BentoFiles({"image": {"base_image": named}}, ""), images, "acme")


CUDA = "nvidia/cuda:11.6.2-cudnn8-runtime-ubuntu20.04"
USUALLY = "docker.io/library/python:3.9-slim"


@pytest.mark.parametrize(
    "docker, begins, chosen",
    [
        ({"distro": "alpine"}, "FROM python:3.9-alpine as base-container", "python:3.9-alpine"),
        ({"distro": "debian", "cuda_version": "11.6.2"}, f"FROM {CUDA} as base-container", CUDA),
        (
            {"distro": "ubi8"},
            "FROM registry.access.redhat.com/ubi8/python-39:1",
            "registry.access.redhat.com/ubi8/python-39:1",
        ),
        ({"distro": "amazonlinux"}, "FROM x AS y\nRUN z\nfrom --platform=linux/amd64 amazonlinux:2", "amazonlinux:2"),
        ({"distro": "debian", "dockerfile_template": "t"}, "FROM own.example.com/base:1", "own.example.com/base:1"),
        ({"distro": "debian"}, "FROM python:3.9-slim as base-container", USUALLY),
        ({"distro": "debian", "dockerfile_template": "t"}, "FROM python:3.9-slim as base-container", USUALLY),
        ({"distro": "debian"}, "FROM continuumio/miniconda3:latest as base-container", USUALLY),
        ({"distro": "alpine", "base_image": "python:3.9-slim"}, "FROM python:3.9-slim as base-container", USUALLY),
    ],
)
def test_an_old_bento_has_the_system_that_it_asks_for(docker: dict[str, Any], begins: str, chosen: str) -> None:
    files = BentoFiles({"docker": docker}, "", dockerfile=f"# x\n{begins}\nENV LANG=C.UTF-8\n")
    assert choose("", files, "3.9") == f"docker://{chosen}"
    assert choose("oci:/bases:mine", files, "3.9") == "oci:/bases:mine"


@pytest.mark.parametrize(
    "begins", ["FROM python:3.9-alpine AS own\nRUN x\nFROM own", "ARG V=3.9\nFROM python:$V-alpine"]
)
def test_a_dockerfile_that_begins_with_nothing_that_can_be_said_is_refused(begins: str) -> None:
    files = BentoFiles({"docker": {"dockerfile_template": "t"}}, "", dockerfile=begins)
    with pytest.raises(FailedPrecondition) as caught:
        choose(USUAL, files, "3.9")
    assert caught.value.reason == "TEMPLATE_UNSUPPORTED"
    assert choose("oci:/bases:mine", files, "3.9") == "oci:/bases:mine"


def test_another_organizations_image_is_no_base_after_from_either() -> None:
    files = BentoFiles({"docker": {"distro": "alpine"}}, "", dockerfile="FROM reg.example.com/ekiben/other/iris:v1\n")
    with pytest.raises(PermissionDenied):
        check_own(USUAL, files, "docker://reg.example.com/ekiben", "acme")


DENIED = "reg.example.com/ekiben/other/iris:v1"


@pytest.mark.parametrize(
    "dockerfile",
    [
        f"FROM {DENIED} AS theirs\nFROM python:3.9-slim\nCOPY --from=theirs /x /x",
        f"FROM --platform=linux/amd64 {DENIED} AS theirs\nFROM python:3.9-slim",
        f"FROM python:3.9-slim\nCOPY --chown=1:1 --from={DENIED} /x /x",
        f"FROM python:3.9-slim\nRUN --mount=type=bind,from={DENIED},target=/x cp -r /x /y",
        f'FROM python:3.9-slim\nCOPY --from="{DENIED}" /x /x',
        "FROM python:3.9-slim\nARG X=reg\nCOPY --from=$X /x /x",
        "FROM oci:/data/builder/images:other/iris:v1 AS theirs\nFROM python:3.9-slim",
        "FROM python:3.9-slim\nCOPY --from=containers-storage:[overlay@/x]theirs /x /x",
        f"FROM python:3.9-slim\nRUN --mount=type=bind,fr\\om={DENIED},target=/x cp -r /x /y",
        f"FROM python:3.9-slim\nRUN --network=none --mount='type=bind, from'={DENIED},target=/x cp -r /x /y",
        f"FROM python:3.9-slim\nRUN --mount=type=bind,fr\\\nom={DENIED},target=/x cp -r /x /y",
        f'FROM python:3.9-slim\nCOPY --"from"={DENIED} /x /x',
        f'FROM "{DENIED}" AS theirs\nFROM python:3.9-slim',
        f"FROM python:3.9-slim\nRUN true <<CMD\nCOPY --from={DENIED} /x /x\nCMD",
    ],
)
def test_a_dockerfile_copies_from_no_other_organizations_image(dockerfile: str) -> None:
    files = BentoFiles({"docker": {"dockerfile_template": "t"}}, "", dockerfile=dockerfile)
    for base in (USUAL, "oci:/bases:mine"):
        with pytest.raises(PermissionDenied) as refused:
            check_own(base, files, "docker://reg.example.com/ekiben", "acme")
        assert refused.value.reason == "BASE_DENIED"


def test_a_dockerfile_copies_from_its_stages_and_from_images_of_others() -> None:
    dockerfile = (
        "FROM --platform=$BUILDPLATFORM golang:1.22 AS Built\nRUN make x from=$Y\nFROM python:3.9-slim\nCOPY --from=built /x /x\n"
        "COPY --from=0 /y /y\nCOPY --from=reg.example.com/ekiben/acme/iris:v1 /z /z\n"
        f"RUN --mount=type=cache,target=/c tool --from={DENIED}\n"
    )
    files = BentoFiles({"docker": {"dockerfile_template": "t"}}, "", dockerfile=dockerfile)
    check_own("oci:/bases:mine", replace(files, dockerfile=f"FROM {DENIED}"), "docker://reg.example.com/ekiben", "acme")
    check_own(USUAL, files, "docker://reg.example.com/ekiben", "acme")


@pytest.mark.parametrize(
    "command",
    [
        f"--mount=type=bind,from={DENIED},target=/x cp -r /x /y",
        f'--mount=type=cache,target=/c --mount=target=/x,"from={DENIED}" cp -r /x /y',
        f"--mount=type=bind,\\\nfrom={DENIED},target=/x cp -r /x /y",
        "--mount=from=oci:/data/builder/images:other/iris:v1,target=/x cp -r /x /y",
        f"--mount=type=tmpfs,target=/t \x0c--mount=from={DENIED},target=/x cp -r /x /y",
        f"--mount=type=tmpfs,target=/t \u2028--mount=from={DENIED},target=/x cp -r /x /y",
        f"--mount='type=bind,target=/x\x1c',from={DENIED} cp -r /x /y",
    ],
)
@pytest.mark.parametrize("name", ["commands", "post_commands"])
def test_a_command_reads_no_other_organizations_image(command: str, name: str) -> None:
    files = BentoFiles({"image": {name: ["echo 1", command]}}, "")
    with pytest.raises(PermissionDenied) as refused:
        check_own(USUAL, files, "docker://reg.example.com/ekiben", "acme")
    assert refused.value.reason == "BASE_DENIED"


def test_what_a_command_itself_says_of_images_is_no_matter() -> None:
    commands = [f"tool --from={DENIED}", f"true\nCOPY --from={DENIED} /x /x", "--mount=from=acme/x,target=/x ls /x"]
    commands.append(f"--network=none\nFROM {DENIED}")  # what a shell runs: no stage
    check_own(USUAL, BentoFiles({"image": {"commands": commands}}, ""), "docker://reg.example.com/ekiben", "acme")
