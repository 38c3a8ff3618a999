"""The search language, names, labels and manifests under anything that a caller may send."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.errors import InvalidArgument
from services.registry.domain import Draft, Kind, check_labels, read_manifest
from services.registry.search import Label, Subject, parse
from services.registry.uploads import parse_resource

SUBJECTS = st.sampled_from(list(Subject))
WORD = st.text(string.ascii_letters + string.digits + "._/", min_size=1, max_size=12)
VALUE = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters='\0"\\'), min_size=1, max_size=20)
TAG = st.from_regex(r"[a-z0-9](?:[-._a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


@given(st.text(max_size=200), SUBJECTS)
def test_any_text_is_parsed_or_refused(text: str, subject: Subject) -> None:
    try:
        parse(text, subject, caller="users/me")
    except InvalidArgument as exc:
        assert exc.reason == "FILTER_INVALID"
        assert exc.violations


@given(st.lists(WORD, max_size=6), st.lists(st.tuples(WORD, VALUE), max_size=4), SUBJECTS)
def test_what_is_written_is_what_is_read(words: list[str], labels: list[tuple[str, str]], subject: Subject) -> None:
    text = " ".join([*words, *(f'label:{key}="{value}"' for key, value in labels)])
    search = parse(text, subject)
    assert list(search.words) == words
    assert [label.alternatives for label in search.labels] == [((key, value),) for key, value in labels]


@given(SUBJECTS, st.booleans())
def test_every_sort_and_flag_that_is_told_of_works(subject: Subject, descending: bool) -> None:
    for field in subject.sorts:
        search = parse(f"sort:{field}-{'desc' if descending else 'asc'}", subject)
        assert (search.sort, search.descending) == (field, descending)
    for flag in subject.flags:
        assert parse(f"is:{flag} not:{flag}", subject).flags == ((flag, True), (flag, False))


def test_pieces_of_the_language() -> None:
    search = parse(
        'big "two words" label:a=1,b -label:c=x creator:@me creator:bob in:name', Subject.MODELS, caller="users/al"
    )
    assert search.words == ("big", "two words")
    assert search.fields == ("name",)
    assert search.labels == (
        Label((("a", "1"), ("b", None)), wanted=True),
        Label((("c", "x"),), wanted=False),
    )
    assert search.creators == ("users/al", "users/bob")


@pytest.mark.parametrize(
    "text",
    [
        "colour:red",
        "-word",
        '"open',
        "sort:size",
        "sort:name-asc",
        "label:",
        "label:=x",
        "is:big",
        "x " * 60,
        "a" * 5000,
        "\0",
    ],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(text, Subject.BENTOS)


@given(st.dictionaries(st.text(max_size=140), st.text(max_size=1100), max_size=5))
def test_labels_are_kept_whole_or_refused(labels: dict[str, str]) -> None:
    fits = all(1 <= len(key) <= 128 and len(value) <= 1024 and "\0" not in key + value for key, value in labels.items())
    try:
        check_labels(labels)
        assert fits
    except InvalidArgument as exc:
        assert not fits
        assert exc.reason == "LABELS_INVALID"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["module", "models", "metadata", "dev", "bentoml_version", "x"]), JSON))
def test_facts_are_read_from_any_object(manifest: dict[str, object]) -> None:
    facts = read_manifest(json.dumps(manifest))
    assert facts.development == (manifest.get("dev") is True)
    assert "\0" not in facts.module


@given(st.text(max_size=60))
def test_any_manifest_is_read_or_refused(text: str) -> None:
    try:
        Draft(manifest=text).check()
    except InvalidArgument as exc:
        assert exc.reason == "MANIFEST_INVALID"


@given(st.sampled_from(list(Kind)), TAG, TAG)
def test_resource_names_come_back(kind: Kind, repository: str, version: str) -> None:
    assert parse_resource(kind.version_name(repository, version)) == (kind, repository, version)
