"""Aliases and their history."""

from ekiben import names
from ekiben.errors import InvalidArgument
from ekiben.registry.v1 import aliases_pb2 as pb
from services.registry.domain import AliasChange, Kind
from services.registry.messages.catalog import to_timestamp


def alias(newest: AliasChange) -> pb.Alias:
    """The message of an alias, of its newest change (or of the newest at some time)."""
    return pb.Alias(
        name=newest.alias_name,
        version=_version(newest, newest.version),
        version_uid=newest.version_uid,
        update_time=to_timestamp(newest.create_time),
        updater=newest.user,
        reason=newest.reason,
        change=newest.name,
    )


def change(found: AliasChange) -> pb.AliasChange:
    """The message of a change."""
    return pb.AliasChange(
        name=found.name,
        create_time=to_timestamp(found.create_time),
        user=found.user,
        from_version=_version(found, found.before),
        to_version=_version(found, found.version),
        to_version_uid=found.version_uid,
        reason=found.reason,
    )


def version_id(name: str, kind: Kind, repository: str, field: str) -> str:
    """The id in the name of a version of this repository.

    Raises:
        InvalidArgument: NAME_INVALID, or a version of another repository (VERSION_OF_ANOTHER).
    """
    if kind is Kind.MODEL:
        model = names.Model.parse(name)
        parent, version = model.repository, model.model
    else:
        bento = names.Bento.parse(name)
        parent, version = bento.repository, bento.bento
    if parent != repository:
        raise InvalidArgument(
            f"{name} is no {kind} of {kind.repository_name(repository)}, and an alias names one of its own repository.",
            reason="VERSION_OF_ANOTHER",
            violations=[(field, f"must be a {kind} of {kind.repository_name(repository)}")],
            version=name,
        )
    return version


def _version(of: AliasChange, version: str) -> str:
    return of.kind.version_name(of.repository, version) if version else ""
