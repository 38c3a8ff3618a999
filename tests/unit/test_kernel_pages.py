"""Page sizes are clamped, page tokens are bound to their request."""

import base64
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.errors import InvalidArgument
from ekiben.identity.v1 import identity_pb2 as pb
from services.kernel import pages

_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def test_page_sizes() -> None:
    assert [pages.page_size(size) for size in (0, 1, 1000, 1001)] == [50, 1, 1000, 1000]
    with pytest.raises(InvalidArgument) as caught:
        pages.page_size(-1)
    assert caught.value.violations[0][0] == "page_size"


def test_the_first_page_has_no_position() -> None:
    assert pages.decode(pb.ListSecretsRequest(), str) is None


@given(st.integers(-(2**63), 2**63 - 1), _texts)
def test_a_token_gives_its_position_back_whatever_the_page_size(number: int, text: str) -> None:
    token = pages.encode(pb.ListSecretsRequest(filter="a", page_size=3), number, text)
    assert pages.decode(pb.ListSecretsRequest(filter="a", page_size=7, page_token=token), int, str) == (number, text)


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_comes_back_to_the_microsecond(moment: datetime) -> None:
    token = pages.encode(pb.ListSecretsRequest(), moment)
    assert pages.decode(pb.ListSecretsRequest(page_token=token), datetime) == (moment,)


@pytest.mark.parametrize(
    "made_up",
    [[], [1], ["a"], [1, 2], [True, "a"], [2**63, "a"], [1, "\0"], [1, "\ud800"], [1, None], [1, "a", 1], {}, 7],
)
def test_a_token_that_somebody_made_up_gives_values_of_the_kinds_or_is_refused(made_up: object) -> None:
    request = pb.ListSecretsRequest()
    body = json.dumps(made_up, separators=(",", ":")).encode()
    request.page_token = base64.urlsafe_b64encode(pages._sum(request, body) + body).decode()
    with pytest.raises(InvalidArgument) as caught:
        pages.decode(request, int, str)
    assert caught.value.reason == "PAGE_TOKEN_INVALID"


def test_a_token_of_another_filter_or_another_list_is_refused() -> None:
    token = pages.encode(pb.ListSecretsRequest(filter="a"), "x")
    for request in (
        pb.ListSecretsRequest(filter="b", page_token=token),
        pb.ListApiTokensRequest(filter="a", page_token=token),
    ):
        with pytest.raises(InvalidArgument) as caught:
            pages.decode(request, str)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


@given(st.text())
def test_no_text_passes_for_a_token(text: str) -> None:
    if text:
        with pytest.raises(InvalidArgument):
            pages.decode(pb.ListSecretsRequest(page_token=text), str)
