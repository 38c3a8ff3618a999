"""Filters of lists of deployments. Pure."""

from collections.abc import Callable

from ekiben.errors import InvalidArgument
from services.deployer.domain import Deployment

MAX_FILTER_CHARS = 4096
"""Each word is held against each deployment."""


def filter_of(text: str) -> Callable[[Deployment], bool]:
    """What deployments match: `label:KEY[=VALUE]`, `is:dev`, and words of their names; all of them must.

    Raises:
        InvalidArgument: it is too long (FILTER_INVALID).
    """
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidArgument(
            f"The filter has {len(text):,} characters, more than {MAX_FILTER_CHARS:,}.",
            reason="FILTER_INVALID",
            violations=[("filter", f"at most {MAX_FILTER_CHARS:,} characters")],
        )
    tests: list[Callable[[Deployment], bool]] = []
    for word in text.split():
        kind, _, value = word.partition(":")
        if kind == "label" and value:
            key, equals, wanted = value.partition("=")
            tests.append(lambda d, k=key, e=equals, w=wanted: k in d.labels and (not e or d.labels[k] == w))  # type: ignore[misc]
        elif word == "is:dev":
            tests.append(lambda d: d.dev)
        else:
            tests.append(lambda d, w=word: w.lower() in d.name)  # type: ignore[misc]
    return lambda deployment: all(test(deployment) for test in tests)
