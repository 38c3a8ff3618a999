"""Names parse to parts and back, and refuse what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben import names
from ekiben.errors import InvalidArgument

EXAMPLES = [
    names.Organization("default"),
    names.User("admin"),
    names.ApiToken("Tok_1.2"),
    names.Secret("aws"),
    names.AuditEntry("01ab"),
    names.ModelRepository("my.model-2_x"),
    names.Model("iris", "v1"),
    names.BentoRepository("b"),
    names.Bento("summarization", "2kd3kfs"),
    names.Upload("u"),
    names.Build("b"),
    names.Deployment("a-1"),
    names.Revision("a", 12),
    names.InstanceType("cpu.1"),
    names.Cluster("local"),
    names.Prediction("6b1f9b0e-5b5d-4ad1-9d0a-6a1d0c4b7a51"),
    names.Trace("0" * 31 + "a"),
]
_tag = st.from_regex(names._TAG[0], fullmatch=True)


@pytest.mark.parametrize("name", EXAMPLES, ids=lambda name: type(name).__name__)
def test_parse_and_format_are_inverse(name: names.ResourceName) -> None:
    assert type(name).parse(str(name)) == name


@given(_tag, _tag)
def test_any_tag_of_bentoml_is_a_model_and_comes_back(repository: str, version: str) -> None:
    model = names.Model(repository, version)
    assert names.Model.parse(str(model)) == model == names.Model.from_tag(model.tag)


@given(st.text())
def test_no_text_makes_parse_fail_with_anything_but_name_invalid(text: str) -> None:
    for cls in (names.Model, names.Revision, names.Trace):
        try:
            assert str(cls.parse(text)) == text
        except InvalidArgument as exc:
            assert exc.reason == "NAME_INVALID" and exc.violations


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "models/a",
        "modelRepositories/",
        "modelRepositories/A",
        "modelRepositories/a/",
        "modelRepositories/-",
        "modelRepositories/../models",
        "modelRepositories/a\n",
        "modelRepositories/" + "a" * 300,
    ],
)
def test_bad_names_are_refused_with_the_form_that_was_expected(bad: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.ModelRepository.parse(bad)
    assert "modelRepositories/{repository}" in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("bad", ["Upper", "1a", "a_b", "a-", "-", "a" * 64, ""])
def test_a_deployment_is_what_a_host_name_may_hold(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        names.Deployment(bad)


def test_a_wildcard_is_taken_only_where_it_is_asked_for() -> None:
    assert names.ModelRepository.parse("modelRepositories/-", wildcard=True).repository == names.WILDCARD
    with pytest.raises(InvalidArgument):
        names.ModelRepository.parse("modelRepositories/-")


@pytest.mark.parametrize("bad", ["0", "01", "-1", "x", "1" * 11])
def test_revisions_count_from_one(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        names.Revision.parse(f"deployments/a/revisions/{bad}")


def test_a_tag_without_version_means_the_latest() -> None:
    assert names.Bento.from_tag("b") == names.Bento("b", "latest")
