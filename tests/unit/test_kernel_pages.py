"""Page sizes are clamped, page tokens are bound to their request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben.errors import InvalidArgument
from ekiben.identity.v1 import identity_pb2 as pb
from services.kernel import pages

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner, max_size=4)
)


def test_page_sizes() -> None:
    assert [pages.page_size(size) for size in (0, 1, 1000, 1001)] == [50, 1, 1000, 1000]
    with pytest.raises(InvalidArgument) as caught:
        pages.page_size(-1)
    assert caught.value.violations[0][0] == "page_size"


def test_the_first_page_has_no_position() -> None:
    assert pages.decode(pb.ListSecretsRequest()) is None


@given(_json)
def test_a_token_gives_its_position_back_whatever_the_page_size(position: object) -> None:
    token = pages.encode(pb.ListSecretsRequest(filter="a", page_size=3), position)
    assert pages.decode(pb.ListSecretsRequest(filter="a", page_size=7, page_token=token)) == position


def test_a_token_of_another_filter_or_another_list_is_refused() -> None:
    token = pages.encode(pb.ListSecretsRequest(filter="a"), ["x"])
    for request in (
        pb.ListSecretsRequest(filter="b", page_token=token),
        pb.ListApiTokensRequest(filter="a", page_token=token),
    ):
        with pytest.raises(InvalidArgument) as caught:
            pages.decode(request)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


@given(st.text())
def test_no_text_passes_for_a_token(text: str) -> None:
    if text:
        with pytest.raises(InvalidArgument):
            pages.decode(pb.ListSecretsRequest(page_token=text))
