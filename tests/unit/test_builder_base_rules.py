"""Which base a bento's image is put on."""

from typing import Any

import pytest

from ekiben.errors import InvalidArgument
from services.builder.base_rules import USUAL, choose


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
