"""Where images are kept, and by what rows know it."""

from pathlib import Path

import pytest

from services.builder.places import Place


def test_a_layout_is_one_place_for_all_that_have_it_and_another_folder_is_another(tmp_path: Path) -> None:
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    shared = Place.at(f"oci:{tmp_path}/shared", mine, "site-1")
    assert Place.at(f"oci:{tmp_path}/shared", yours, "site-2").name == shared.name
    assert Place.at(f"oci:{tmp_path}/other", mine, "site-1").name != shared.name
    (tmp_path / "shared").rename(tmp_path / "moved")
    assert Place.at(f"oci:{tmp_path}/moved", mine, "site-1").name == shared.name


def test_the_layout_in_the_builders_own_folder_keeps_the_name_it_had(tmp_path: Path) -> None:
    assert Place.at(f"oci:{tmp_path}/images", tmp_path, "site-1").name == "oci:site-1"
    assert Place.at(f"oci:{tmp_path}/images", tmp_path / "another", "site-2").name == "oci:site-1"


def test_a_registry_is_known_by_its_name(tmp_path: Path) -> None:
    assert Place.at("docker://reg.example.com/ekiben", tmp_path, "s").name == "docker://reg.example.com/ekiben"
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_cannot_be_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Place.at(f"oci:{tmp_path}/file", tmp_path, "s")
