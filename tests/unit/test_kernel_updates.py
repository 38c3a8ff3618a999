"""Field masks and etags."""

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.errors import Aborted, InvalidArgument
from ekiben.identity.v1 import identity_pb2 as pb
from services.kernel import updates

ALLOWED = {"email", "first_name", "disabled"}


@pytest.mark.parametrize("mask", [None, FieldMask()])
def test_without_a_mask_the_populated_fields_change(mask: FieldMask | None) -> None:
    user = pb.User(name="users/a", email="a@b", uid="u", last_name="not allowed here")
    assert updates.paths(user, mask, ALLOWED) == {"email"}


def test_a_mask_may_clear_a_field() -> None:
    assert updates.paths(pb.User(), FieldMask(paths=["email"]), ALLOWED) == {"email"}


def test_a_star_replaces_all_that_may_change() -> None:
    assert updates.paths(pb.User(), FieldMask(paths=["*"]), ALLOWED) == ALLOWED


def test_output_only_identifier_and_etag_are_passed_over() -> None:
    mask = FieldMask(paths=["name", "uid", "create_time", "etag", "email"])
    assert updates.paths(pb.User(), mask, ALLOWED) == {"email"}


@pytest.mark.parametrize("path", ["nonsense", "last_name", "email.x", "", "Email"])
def test_a_path_that_cannot_change_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        updates.paths(pb.User(), FieldMask(paths=[path]), ALLOWED)
    assert caught.value.reason == "UPDATE_MASK_INVALID"


def test_etags_are_quoted_differ_with_each_part_and_are_compared_only_when_sent() -> None:
    etag = updates.etag_of("a", 1)
    assert etag.startswith('"') and etag.endswith('"')
    assert etag == updates.etag_of("a", 1) != updates.etag_of("a1", "")
    updates.check_etag("", etag)
    updates.check_etag(etag, etag)
    with pytest.raises(Aborted) as caught:
        updates.check_etag('"old"', etag)
    assert caught.value.reason == "ETAG_MISMATCH"
