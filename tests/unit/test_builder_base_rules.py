"""Which base a bento's image is put on."""

from typing import Any

import pytest

from ekiben.errors import InvalidArgument, PermissionDenied
from services.builder.base_rules import USUAL, check_own, choose


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
    assert choose(base, manifest, "3.11.7") == chosen


def test_a_rule_with_another_place_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"only \{python\} may stand in braces"):
        choose("docker://host/python:{version}", {}, "3.11")


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
    with pytest.raises(PermissionDenied, match="not one of acme") as refused:
        check_own(USUAL, {section: {"base_image": named}}, images, "acme")
    assert refused.value.reason == "BASE_DENIED"
    check_own("docker://reg.example.com/ekiben/other/iris:v1", {section: {"base_image": named}}, images, "acme")


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
    check_own(USUAL, {"image": {"base_image": named}}, images, "acme")
