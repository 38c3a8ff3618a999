"""`python -m services.builder.image_signing`: signatures and attestations of images, wherever these are.

`ekiben images sign|verify|attestations|sbom|provenance|keygen` call it.
"""

import argparse
import asyncio
import getpass
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ekiben.errors import AlreadyExists, EkibenError, FailedPrecondition, InvalidArgument, NotFound
from services.builder.platforms import here
from services.content import open_images
from services.content.attestations import envelopes, keyless, keys, signing, verification
from services.content.attestations.keyless import Identity
from services.content.attestations.keys import Private
from services.content.attestations.verification import Attested, Trust
from services.content.files import write_whole
from services.content.images import Descriptor, Platform
from services.kernel.clock import SYSTEM


async def sign(image: str, key: Private | None, *, token: str = "", older_clients: bool = False) -> Descriptor:
    """Sign what a reference names, and each platform's manifest of an index; what was signed.

    Raises:
        EkibenError: as `open_images`, `ImageStore.find`, `keyless.seal`.
    """
    seal = signing.by_key(key) if key is not None else signing.by_identity(token)
    name = verification.repository_of(image)
    async with open_images(image, _say) as (store, reference):
        named = await store.find(reference)
        for subject in await verification.subjects(store, named):
            await signing.sign(store, subject, seal, name=name)
            if older_clients and key is not None:
                await signing.sign_for_older_clients(store, reference, subject, key, name=name)
            _say(f"Signed {subject.digest}.")
        return named


async def verify(image: str, platform: Platform, trust: Trust, *, whole: bool = False) -> verification.Verified:
    """Whose trusted signature an image has; with `whole`, every byte of it is read and checked too.

    Raises:
        EkibenError: as `verification.verify`; with `whole` also DataLoss (BLOB_DAMAGED), NotFound (BLOB_NOT_FOUND).
    """
    async with open_images(image, _say) as (store, reference):
        repository = verification.repository_of(image)
        found = await verification.verify(store, reference, platform, trust, SYSTEM.now(), repository=repository)
        if whole:
            _, content = await store.resolve(str(found.digest), platform)
            for layer in content.layers:
                async for _ in store.read(layer):
                    pass
        return found


async def attestations(image: str, platform: Platform, trust: Trust) -> list[Attested]:
    """What is said of an image: of what its reference names, and of its manifest for a platform."""
    async with open_images(image, _say) as (store, reference):
        named = await store.find(reference)
        manifest, _ = await store.resolve(str(named.digest), platform)
        found, repository = [], verification.repository_of(image)
        for digest in dict.fromkeys((named.digest, manifest.digest)):
            found += await verification.attested(store, digest, trust, SYSTEM.now(), repository=repository)
        return found


def one_of(found: Sequence[Attested], kind: str, image: str, *, signed: bool) -> Attested:
    """The attestation of a kind, a signed one before others.

    Raises:
        NotFound: there is none (ATTESTATION_NOT_FOUND).
        FailedPrecondition: with `signed`, none has a trusted signature (ATTESTATION_UNTRUSTED).
    """
    named = sorted((each for each in found if each.kind == kind), key=lambda each: not each.signers)
    if not named:
        raise NotFound(
            f"{image} has no {kind} attached. Images that Ekiben builds have one; a copy has it only where referrers "
            "were copied too.",
            reason="ATTESTATION_NOT_FOUND",
            image=image,
        )
    if signed and not named[0].signers:
        raise FailedPrecondition(
            f"The {kind} of {image} has no signature that is trusted. Without a key it is shown, as anybody may have "
            "written it.",
            reason="ATTESTATION_UNTRUSTED",
            image=image,
        )
    return named[0]


def keygen(path: Path, kind: str, password: bytes, *, cosign: bool) -> Path:
    """Write a new key to `path`, and its public half beside it; the latter's place.

    Raises:
        InvalidArgument: that would be one file (KEY_NAME_INVALID).
        AlreadyExists: there is one already (KEY_EXISTS).
    """
    if not path.name or path.suffix == ".pub":
        raise InvalidArgument(
            f"{str(path)!r} is no name for a private key: its public half is kept beside it as NAME.pub. Name "
            "release.key, say.",
            reason="KEY_NAME_INVALID",
        )
    public = path.with_suffix(".pub")
    for each in (path, public):
        if each.exists():
            raise AlreadyExists(
                f"{each} exists: a key that is replaced is lost. Name another file.", reason="KEY_EXISTS"
            )
    key = keys.generate(kind)
    write_whole(path, keys.private_pem(key, password, cosign=cosign), 0o600)
    write_whole(public, keys.public_pem(key.public_key()), 0o644)
    return public


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands."""
    given = _parser().parse_args(arguments)
    try:
        return _COMMANDS[given.command](given)
    except EkibenError as exc:
        print(f"Error: {exc.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as exc:
        print(f"Error: {exc}. Name files and folders that are there and yours.", file=sys.stderr)
        return 1


def _sign(given: argparse.Namespace) -> int:
    key = None if given.keyless else _private(given)
    token = given.identity_token_file.read_text().strip() if given.identity_token_file else ""
    found = asyncio.run(sign(given.image, key, token=token, older_clients=given.older_clients))
    print(found.digest)
    return 0


def _verify(given: argparse.Namespace) -> int:
    trust = _trust(given)
    if not trust:
        raise InvalidArgument("Name whom you trust: --key FILE, or --identity SUBJECT@@ISSUER.", reason="TRUST_MISSING")
    found = asyncio.run(verify(given.image, _platform(given), trust, whole=given.whole))
    _say(f"Signed by {', '.join(found.signers)}.")
    if not found.named:
        _say(
            f"WARNING: {given.image} is an index, which is not signed itself: only its image for {_platform(given)} "
            "is. Run that by the digest; who is given the name may run another of it."
        )
    print(found.digest)
    return 0


def _attestations(given: argparse.Namespace) -> int:
    found = asyncio.run(attestations(given.image, _platform(given), _trust(given)))
    if given.format == "json":
        print(json.dumps([_shown(each) for each in found], indent=2))
        return 0
    for each in sorted(found, key=lambda one: (one.kind, str(one.digest))):
        by = ", ".join(each.signers) or ("not trusted" if each.signed else "not signed")
        print(f"{each.kind:12} {each.size_bytes:>9,} B  {each.digest}  {by}")
    if not found:
        _say("Nothing is attached.")
    return 0


def _statement(given: argparse.Namespace) -> int:
    trust = _trust(given)
    found = asyncio.run(attestations(given.image, _platform(given), trust))
    one = one_of(found, given.command, given.image, signed=bool(trust))
    print(json.dumps(one.statement.predicate, indent=2, ensure_ascii=False))
    return 0


def _keygen(given: argparse.Namespace) -> int:
    password = b""
    if not given.no_password:
        password = _password(given.password_file, twice=True)
        if not password:
            raise InvalidArgument(
                "The password is empty. Give one, or --no-password where the file is safe by other means.",
                reason="KEY_PASSWORD_WRONG",
            )
    public = keygen(given.file, given.kind, password, cosign=given.cosign)
    _say(f"{given.file} signs; keep it, and its password, to yourself. {public} is for those who verify.")
    print(public)
    return 0


def _private(given: argparse.Namespace) -> Private:
    if given.key is None:
        raise InvalidArgument("Name the key that signs: --key FILE, or --keyless.", reason="KEY_MISSING")
    try:
        return keys.load_private(given.key, given.password_file)
    except InvalidArgument as exc:
        if exc.reason != "KEY_PASSWORD_WRONG" or given.password_file is not None or not sys.stdin.isatty():
            raise
        return keys.read_private(given.key.read_bytes(), _password(None), name=str(given.key))


def _password(file: Path | None, *, twice: bool = False) -> bytes:
    if file is not None:
        return file.read_bytes().strip(b"\r\n")
    if not sys.stdin.isatty():
        raise InvalidArgument(
            "There is nobody to ask for the password: give --password-file FILE.", reason="KEY_PASSWORD_WRONG"
        )
    first = getpass.getpass("Password of the key: ")
    if twice and getpass.getpass("The same again: ") != first:
        raise InvalidArgument("The passwords differ.", reason="KEY_PASSWORD_WRONG")
    return first.encode()


def _trust(given: argparse.Namespace) -> Trust:
    identities = [Identity.parse(each) for each in given.identity]
    if identities:
        keyless.require()
    return Trust(keys.load_trusted(given.key), identities)


def _platform(given: argparse.Namespace) -> Platform:
    return Platform.parse(given.platform) if given.platform else here()


def _shown(one: Attested) -> dict[str, object]:
    return {
        "kind": one.kind,
        "predicateType": one.statement.predicate_type,
        "digest": str(one.digest),
        "size": one.size_bytes,
        "signed": one.signed,
        "signers": list(one.signers),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.builder.image_signing")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("sign")
    made.add_argument("image")
    made.add_argument("--key", type=Path)
    made.add_argument("--password-file", type=Path)
    made.add_argument("--keyless", action="store_true")
    made.add_argument("--identity-token-file", type=Path)
    made.add_argument("--older-clients", action="store_true")
    for name in ("verify", "attestations", envelopes.KINDS[envelopes.SBOM], envelopes.KINDS[envelopes.PROVENANCE]):
        made = commands.add_parser(name)
        made.add_argument("image")
        made.add_argument("--key", type=Path, action="append", default=[])
        made.add_argument("--identity", action="append", default=[])
        made.add_argument("--platform", default="")
        if name == "verify":
            made.add_argument("--whole", action="store_true")
        if name == "attestations":
            made.add_argument("--format", default="table")
    made = commands.add_parser("keygen")
    made.add_argument("file", type=Path)
    made.add_argument("--kind", default=keys.KINDS[0])
    made.add_argument("--password-file", type=Path)
    made.add_argument("--no-password", action="store_true")
    made.add_argument("--cosign", action="store_true")
    return parser


_COMMANDS = {
    "sign": _sign,
    "verify": _verify,
    "attestations": _attestations,
    "sbom": _statement,
    "provenance": _statement,
    "keygen": _keygen,
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # A reader of the output that leaves is no error of ours.
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
