"""A bento's files give a recipe; equal bentos give equal ones."""

from dataclasses import replace
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition
from services.builder.recipe import TRACING, BentoFiles, environment_digest, make_recipe

IMAGE = {"python_version": "3.11", "commands": [], "post_commands": []}


def files(requirements: str = "tabulate\nbentoml==1.4.39\n", **manifest: Any) -> BentoFiles:
    return BentoFiles({"bentoml_version": "1.4.39", "image": IMAGE, **manifest}, requirements)


def old(version: str, requirements: str = "tabulate\n", **python: Any) -> BentoFiles:
    docker = {"python_version": "3.11", "distro": "debian"}
    return BentoFiles({"bentoml_version": version, "docker": docker, "python": python}, requirements, "3.11.7")


def test_a_plain_bento() -> None:
    recipe = make_recipe(files())
    assert (recipe.python, recipe.bentoml_version) == ("3.11", "1.4.39")
    assert recipe.requirements == ("tabulate", "bentoml==1.4.39")
    assert recipe.extras == TRACING
    assert (recipe.constraints, recipe.options, recipe.notes) == ((), (), ())


def test_digests_follow_what_is_resolved_and_nothing_else() -> None:
    recipe = make_recipe(files())
    assert recipe.digest("3.11.7") == make_recipe(files("# a comment\ntabulate\n\nbentoml==1.4.39\n")).digest("3.11.7")
    assert recipe.digest("3.11.7") == replace(recipe, notes=("x",)).digest("3.11.7")
    assert recipe.digest("3.11.7") != recipe.digest("3.11.8")
    assert recipe.digest() != make_recipe(files("tabulate<1\nbentoml==1.4.39\n")).digest()
    assert environment_digest("a", "3.11.7", "p") != environment_digest("a", "3.11.8", "p")
    assert environment_digest("a", "3.11.7", "p").startswith("sha256:")


def test_the_usual_index_is_the_operator_s() -> None:
    usual = "https://" + ".".join(("pypi", "org"))
    for url in (f"{usual}/simple", f"{usual}/simple/"):
        assert make_recipe(files(f"--index-url {url}\n\nbentoml==1.4.39\n")).options == ()
    assert make_recipe(files(f"--index-url {usual}/other\n\nbentoml==1.4.39\n")).options
    recipe = make_recipe(
        files("--index-url https://x/simple\n--extra-index-url https://y\n--trusted-host x\n--pre\na\n")
    )
    assert recipe.options == ("--index-url https://x/simple", "--extra-index-url https://y")
    assert recipe.insecure_hosts == ("x",)
    assert recipe.prerelease


def test_options_of_older_bentos_lie_in_their_manifest() -> None:
    recipe = make_recipe(
        old(
            "1.1.11",
            index_url="https://x/simple",
            extra_index_url=["https://y"],
            find_links="https://z",
            pip_args="--pre -U",
        )
    )
    assert recipe.options == ("--index-url https://x/simple", "--extra-index-url https://y", "--find-links https://z")
    assert recipe.prerelease
    assert any("-U" in note for note in recipe.notes)


@pytest.mark.parametrize(
    ("requirements", "expected"),
    [
        ("a\n", ("a", "bentoml==1.4.39")),
        ("bentoml[grpc]\n", ("bentoml[grpc]", "bentoml==1.4.39")),
        ("bentoml>=1.4\n", ("bentoml>=1.4", "bentoml==1.4.39")),
        ("bentoml==1.4.39\n", ("bentoml==1.4.39",)),
        ("bentoml==1.3.0\n", ("bentoml==1.3.0",)),
        ("bentoml @ https://x/bentoml.tar.gz\n", ("bentoml @ https://x/bentoml.tar.gz",)),
        ("bentoml @ file:///home/me/bentoml-1.4.39.whl\n", ("bentoml==1.4.39",)),
        ("bentoml[grpc] @ file:///home/me/b\n", ("bentoml[grpc]==1.4.39",)),
    ],
)
def test_the_bentoml_that_the_bento_names_is_there(requirements: str, expected: tuple[str, ...]) -> None:
    assert make_recipe(files(requirements)).requirements == expected


@pytest.mark.parametrize(
    ("version", "constraints"),
    [
        ("1.0.25", ("setuptools<81", "cattrs<23.2")),
        ("1.1.11", ("setuptools<81", "cattrs<23.2")),
        ("1.3.22", ("setuptools<81",)),
        ("1.2.20", ("setuptools<81", "pydantic>=2,<2.9")),
        ("1.4.0", ()),
    ],
)
def test_old_bentoml_gets_what_it_needs_to_start(version: str, constraints: tuple[str, ...]) -> None:
    recipe = make_recipe(old(version))
    assert recipe.requirements == ("tabulate", f"bentoml=={version}")
    assert recipe.constraints == constraints
    assert len(recipe.notes) == len(constraints)


def test_a_lock_that_would_not_start_gives_way_and_one_that_would_is_kept() -> None:
    recipe = make_recipe(old("1.0.25", "setuptools==82.0.0\ncattrs==22.2.0\n"))
    assert recipe.requirements == ("cattrs==22.2.0", "bentoml==1.0.25", "setuptools<81")
    assert recipe.constraints == ("setuptools<81",)
    assert "82.0.0" in recipe.notes[0]
    recipe = make_recipe(old("1.2.20", "pydantic==2.14.4\npydantic-core==2.50.5\nsetuptools==80.0\nattrs==26.1.0\n"))
    assert recipe.requirements == ("setuptools==80.0", "attrs==26.1.0", "bentoml==1.2.20", "pydantic>=2,<2.9")


def test_archives_in_the_bento_are_used_and_others_are_named() -> None:
    shipped = {"src/wheels/foo-1-py3-none-any.whl": "ab", "src/pkg": "cd"}
    given = replace(files("./wheels/foo-1-py3-none-any.whl\n./pkg[x]\nbar @ ./pkg\nbentoml==1.4.39\n"), shipped=shipped)
    recipe = make_recipe(given)
    assert recipe.requirements == (
        "shipped:src/wheels/foo-1-py3-none-any.whl",
        "shipped:src/pkg[x]",
        "bar @ shipped:src/pkg",
        "bentoml==1.4.39",
    )
    assert recipe.shipped == shipped
    with pytest.raises(FailedPrecondition) as caught:
        make_recipe(files("./wheels/other-1-py3-none-any.whl\n"))
    assert caught.value.reason == "REQUIREMENT_NOT_FOUND"
    assert "other-1" in caught.value.message
    with pytest.raises(FailedPrecondition):
        make_recipe(replace(files("../../etc/foo-1-py3-none-any.whl\n"), shipped=shipped))


def test_what_is_installed_editable_is_in_the_environment_too() -> None:
    given = replace(files("-e .\n--editable ./pkg[x]\n"), shipped={"src": "ab", "src/pkg": "cd"})
    recipe = make_recipe(given)
    assert recipe.requirements == ("shipped:src", "shipped:src/pkg[x]", "bentoml==1.4.39")
    assert not recipe.notes
    with pytest.raises(FailedPrecondition) as caught:
        make_recipe(files("-e /home/me/pkg\n"))
    assert caught.value.reason == "REQUIREMENT_NOT_FOUND"


def test_a_folder_of_archives_is_refused_in_words() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        make_recipe(files("--find-links ./wheels\nfoo\n"))
    assert caught.value.reason == "REQUIREMENT_NOT_FOUND"
    assert "./wheels/NAME.whl" in caught.value.message


def test_wheels_of_older_bentos_are_installed_unnamed() -> None:
    given = replace(old("1.1.11"), shipped={"env/python/wheels/foo-1-py3-none-any.whl": "ab"})
    assert "shipped:env/python/wheels/foo-1-py3-none-any.whl" in make_recipe(given).requirements


def test_a_bentoml_shipped_as_source_is_not_pinned_beside() -> None:
    given = replace(files("./wheels/bentoml-1.4.39.tar.gz\n"), shipped={"src/wheels/bentoml-1.4.39.tar.gz": "ab"})
    assert make_recipe(given).requirements == ("shipped:src/wheels/bentoml-1.4.39.tar.gz",)


@pytest.mark.parametrize(
    ("manifest", "version_txt", "python"),
    [
        ({"image": {"python_version": "3.12"}}, "", "3.12"),
        ({"image": {"python_version": "3.10.13"}}, "", "3.10.13"),
        ({"docker": {"python_version": "3.9"}}, "3.11.7", "3.9"),
        ({"docker": {"python_version": None}}, "3.11.7", "3.11"),
        ({"image": {"python_version": None, "base_image": "python:3.13-slim"}}, "", "3.13"),
    ],
)
def test_the_python_that_the_bento_names(manifest: dict[str, Any], version_txt: str, python: str) -> None:
    assert make_recipe(BentoFiles({"bentoml_version": "1.4.39", **manifest}, "a", version_txt)).python == python


@pytest.mark.parametrize(
    "manifest",
    [
        {"image": IMAGE},
        {"bentoml_version": "x y", "image": IMAGE},
        {"bentoml_version": "1.4.39"},
        {"bentoml_version": "1.4.39", "image": 7},
    ],
)
def test_a_bento_that_names_nothing_is_refused(manifest: dict[str, Any]) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        make_recipe(BentoFiles(manifest, "a"))
    assert caught.value.reason == "BENTO_INCOMPLETE"


def test_a_local_version_is_taken_as_its_public_one() -> None:
    assert make_recipe(files("a", bentoml_version="1.4.39+dirty")).bentoml_version == "1.4.39"


def test_what_applies_to_images_only_is_said() -> None:
    usual = "apt-get update && apt-get install -q -y ca-certificates gnupg2 bash build-essential git"
    image = {**IMAGE, "commands": [usual, "apt-get install -y ffmpeg"], "post_commands": ["python download.py"]}
    notes = make_recipe(files(image=image)).notes
    assert [note.startswith("WARNING: ") for note in notes] == [True, True]
    assert "ffmpeg" in notes[0]
    conda = {"dependencies": ["h2o"]}
    docker = {"python_version": "3.11", "system_packages": ["git"], "setup_script": "x.sh", "cuda_version": "12"}
    notes = make_recipe(BentoFiles({"bentoml_version": "1.4.39", "docker": docker, "conda": conda}, "a")).notes
    assert len(notes) == 4


def test_hashes_that_the_bento_demands_are_kept() -> None:
    assert make_recipe(files("a==1 --hash=sha256:aa\nbentoml==1.4.39\n")).hashes == {"a": ("sha256:aa",)}


def test_arguments_that_no_shell_would_read_are_named() -> None:
    with pytest.raises(FailedPrecondition, match="pip_args") as refused:
        make_recipe(old("1.1.11", pip_args="--foo 'x"))
    assert refused.value.reason == "BENTO_INCOMPLETE"


def test_models_that_no_image_has_are_named() -> None:
    hub = {"tag": "bert:1", "registry": "huggingface", "metadata": {"model_id": "google/bert"}}
    manifest = {"bentoml_version": "1.4.39", "image": {"python_version": "3.11"}, "models": [hub, {"tag": "iris:1"}]}
    recipe = make_recipe(BentoFiles(manifest, ""))
    assert [note for note in recipe.notes if "google/bert of Hugging Face is in no image" in note]
    assert not recipe.skipped and recipe.digest() == make_recipe(BentoFiles({**manifest, "models": ["x"]}, "")).digest()
