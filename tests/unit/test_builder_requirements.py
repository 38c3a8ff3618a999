"""Requirements files are read as pip reads them."""

import pytest

from services.builder import requirements
from services.builder.requirements import Option, Requirement


def only(line: str) -> Requirement:
    (found,) = requirements.parse(line)
    assert isinstance(found, Requirement)
    return found


def test_comments_blank_lines_and_continuations() -> None:
    text = (
        "\ufeff# head\n\na==1  # why\nb>=2 \\\n    --hash=sha256:AB \\\n    --hash=sha256:cd\nc @ https://x/y#egg=c\n"
    )
    assert list(requirements.logical_lines(text)) == [
        "a==1",
        "b>=2 --hash=sha256:AB --hash=sha256:cd",
        "c @ https://x/y#egg=c",
    ]
    assert only("b>=2 --hash=sha256:AB --hash sha256:cd").hashes == ("sha256:ab", "sha256:cd")
    assert only("b>=2 --hash=sha256:AB").text == "b>=2"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--index-url https://x/simple", "--index-url", "https://x/simple"),
        ("--index-url=https://x/simple?a=b", "--index-url", "https://x/simple?a=b"),
        ("-i https://x/simple", "--index-url", "https://x/simple"),
        ("-ihttps://x/simple", "--index-url", "https://x/simple"),
        ("-f ./wheels", "--find-links", "./wheels"),
        ("--no-index", "--no-index", ""),
        ("--trusted-host x.example", "--trusted-host", "x.example"),
    ],
)
def test_options(line: str, name: str, value: str) -> None:
    assert requirements.parse(line) == [Option(name, value)]


def test_command_line_arguments() -> None:
    assert requirements.parse_arguments("--pre --index-url 'https://x/simple' --no-index -f a --trusted-host=h") == [
        Option("--pre"),
        Option("--index-url", "https://x/simple"),
        Option("--no-index"),
        Option("--find-links", "a"),
        Option("--trusted-host", "h"),
    ]


@pytest.mark.parametrize(
    ("line", "name", "specifier", "pinned", "extras"),
    [
        ("Foo.Bar==1.0", "foo-bar", "==1.0", "1.0", ()),
        ("foo[b,a] >=1,<2 ; python_version > '3.8'", "foo", "<2,>=1", "", ("a", "b")),
        ("foo", "foo", "", "", ()),
        ("foo==1.*", "foo", "==1.*", "", ()),
    ],
)
def test_named(line: str, name: str, specifier: str, pinned: str, extras: tuple[str, ...]) -> None:
    found = only(line)
    assert (found.name, found.specifier, found.pinned, found.extras) == (name, specifier, pinned, extras)


@pytest.mark.parametrize(
    ("line", "name", "path"),
    [
        ("./wheels/foo-1-py3-none-any.whl", "", "./wheels/foo-1-py3-none-any.whl"),
        ("wheels/foo-1.tar.gz", "", "wheels/foo-1.tar.gz"),
        ("./pkg[extra]", "", "./pkg"),
        ("./pkg [extra]", "", "./pkg"),
        ("libs/pkg[extra]", "", "libs/pkg"),
        ("-e ./pkg", "", "./pkg"),
        ("--editable=.", "", "."),
        ("-e git+https://x/y.git@main#egg=y", "", ""),
        ("bentoml @ file:///home/me/bentoml-1.4.0.whl", "bentoml", "/home/me/bentoml-1.4.0.whl"),
        ("foo @ ./wheels/foo-1-py3-none-any.whl", "foo", "./wheels/foo-1-py3-none-any.whl"),
        ("file:///x/foo-1.whl", "", "/x/foo-1.whl"),
        ("foo @ https://x/foo-1-py3-none-any.whl", "foo", ""),
        ("git+https://x/y.git@main", "", ""),
    ],
)
def test_locations(line: str, name: str, path: str) -> None:
    found = only(line)
    assert (found.name, found.path) == (name, path)
    assert found.location


def test_what_cannot_be_read_is_kept_for_the_resolver_to_refuse() -> None:
    assert only("bad requirement !!") == Requirement("bad requirement !!")


def test_a_lock_is_read_with_its_hashes() -> None:
    lock = "a==1 \\\n    --hash=sha256:aa\nb @ file:///x/b-2.whl \\\n    --hash=sha256:bb\n"
    assert requirements.locked_versions(lock) == {"a": "1", "b": "file:///x/b-2.whl"}
    assert requirements.all_hashed(lock)
    assert not requirements.all_hashed(lock + "c==3\n")
