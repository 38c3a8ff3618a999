"""What uv prints becomes a reason and a sentence. The texts are uv's own."""

import pytest

from services.builder import failures

TEXTS = [
    (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because there is no version of tabulate==99.9 and you require tabulate==99.9, we can conclude that your "
        "requirements are unsatisfiable.",
        "REQUIREMENT_UNSATISFIABLE",
        "tabulate==99.9",
    ),
    (
        "  × No solution found when resolving dependencies:\n"
        "  ╰─▶ Because there is no version of tabulate==99.9 and you require tabulate==99.9,\n"
        "      we can conclude that your requirements are unsatisfiable.",
        "REQUIREMENT_UNSATISFIABLE",
        "tabulate==99.9",
    ),
    (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because this-does-not-exist was not found in the package registry and you require this-does-not-exist, "
        "we can conclude that your requirements are unsatisfiable.",
        "REQUIREMENT_NOT_FOUND",
        "this-does-not-exist",
    ),
    (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because you require numpy==2.4.6 and numpy<2, we can conclude that your requirements are unsatisfiable.",
        "REQUIREMENT_UNSATISFIABLE",
        "numpy==2.4.6",
    ),
    (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because tensorflow==1.15.0 has no wheels with a matching Python ABI tag (e.g., `cp311`) and you require "
        "tensorflow==1.15.0, we can conclude that your requirements are unsatisfiable.\n\nhint: You require CPython 3.11",
        "REQUIREMENT_UNSATISFIABLE",
        "tensorflow==1.15.0",
    ),
    (
        "error: Failed to download `foo @ https://127.0.0.1:9/foo-1.0-py3-none-any.whl`\n"
        "  cause: Request failed after 3 retries in 10.5s\n"
        "  cause: Failed to fetch: https://127.0.0.1:9/foo-1.0-py3-none-any.whl\n"
        "  cause: error sending request for url (https://127.0.0.1:9/foo-1.0-py3-none-any.whl)\n"
        "  cause: client error (Connect)\n  cause: tcp connect error\n  cause: Connection refused (os error 111)",
        "INDEX_UNREACHABLE",
        "foo",
    ),
    (
        "error: Request failed after 3 retries in 7.2s\n"
        "  cause: Failed to fetch: http://127.0.0.1:9/simple/tabulate/\n"
        "  cause: error sending request for url (http://127.0.0.1:9/simple/tabulate/)\n"
        "  cause: client error (Connect)\n  cause: dns error",
        "INDEX_UNREACHABLE",
        "tabulate",
    ),
    (
        "error: Couldn't parse requirement in `f.txt` at position 0\n"
        "  cause: Expected one of `@`, `(`, `<`, `=`, `>`, `~`, `!`, `;`, found `r`\n"
        "         bad requirement !!\n             ^",
        "REQUIREMENT_INVALID",
        "bad requirement !!",
    ),
    (
        "error: Distribution not found at: file:///tmp/wheels/nothing-1.0-py3-none-any.whl",
        "REQUIREMENT_NOT_FOUND",
        "nothing-1.0-py3-none-any.whl",
    ),
    ("error: Failed to write file\n  cause: No space left on device (os error 28)", "DISK_FULL", None),
]


@pytest.mark.parametrize(("text", "reason", "requirement"), TEXTS)
def test_uv_s_words(text: str, reason: str, requirement: str | None) -> None:
    failure = failures.parse(text, doing="resolving the requirements")
    assert (failure.reason, failure.metadata.get("requirement")) == (reason, requirement)
    if requirement:
        assert requirement in failure.message
    assert failure.message.endswith((".", "^", ")")) or failure.message
    assert failures.to_error(failure).reason == reason


def test_unknown_words_are_passed_on() -> None:
    failure = failures.parse("error: the moon is down", doing="installing the packages")
    assert failure.reason == "UV_FAILED"
    assert "the moon is down" in failure.message
    assert failures.parse("", doing="x").message.endswith("it printed nothing")


def test_credentials_are_never_repeated() -> None:
    text = "error: Failed to fetch: `https://me:hunter2@x/simple/foo/`\n cause: HTTP status client error (401 Unauthorized)"
    failure = failures.parse(text, doing="x")
    assert failure.reason == "INDEX_REFUSED"
    assert "hunter2" not in failure.message + str(failure.metadata)


def test_messages_fit_into_a_status() -> None:
    failure = failures.parse("error: No solution found\n cause: Because " + "x depends on y and " * 1000, doing="x")
    assert len(failure.message) < 1500
