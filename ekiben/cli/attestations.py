"""Signatures and attestations of images: commands of `ekiben images`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ekiben.cli.becoming import become
from ekiben.cli.options import table_or_json

_FILE = click.Path(path_type=Path, dir_okay=False)
_IMAGE = click.argument("image", metavar="IMAGE")


def _trust(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say whose signatures count, and of which platform the image is."""
    for option in (
        click.option(
            "--platform", default="", metavar="OS/ARCH", help="Of an image for several: which; this machine's."
        ),
        click.option(
            "--identity",
            multiple=True,
            metavar="SUBJECT@@ISSUER",
            help="Trust this identity's keyless signatures; needs `pip install 'ekiben[keyless]'`. Repeatable.",
        ),
        click.option(
            "--key",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Trust the public keys of this PEM file, or of each *.pub of this folder. Repeatable.",
        ),
    ):
        command = option(command)
    return command


def of_build(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of `build`: what is attached to an image as it is made."""
    for option in (
        click.option("--no-attestations", is_flag=True, help="Attach neither bill of material nor provenance."),
        click.option("--password-file", type=_FILE, help="File with the signing key's password."),
        click.option(
            "--sign-key",
            type=_FILE,
            envvar="EKIBEN_SIGNING_KEY",
            help="Private key to sign the image with.  [env: EKIBEN_SIGNING_KEY]",
        ),
    ):
        command = option(command)
    return command


@click.command()
@_IMAGE
@click.option("--key", type=_FILE, envvar="EKIBEN_SIGNING_KEY", help="Private key.  [env: EKIBEN_SIGNING_KEY]")
@click.option("--password-file", type=_FILE, help="File with the key's password; asked for otherwise.")
@click.option("--keyless", is_flag=True, help="Sign by your identity, through Sigstore; needs its network.")
@click.option("--identity-token-file", type=_FILE, help="OpenID token for --keyless; else the CI's own, or a browser.")
@click.option("--older-clients", is_flag=True, help="Write the tag sha256-….sig too, for clients before cosign 3.")
def sign(
    image: str,
    key: Path | None,
    password_file: Path | None,
    keyless: bool,
    identity_token_file: Path | None,
    older_clients: bool,
) -> None:
    """Sign an image, by its digest. Of an image for several platforms each is signed, and their index.

    \b
    Examples:
      ekiben images keygen release.key
      ekiben images sign oci:images:1.0 --key release.key
      ekiben images sign docker://registry.example.com/acme/summarizer:1.0 --key release.key
    """
    arguments: list[object] = [image]
    arguments += ["--key", key] if key and not keyless else []
    arguments += ["--password-file", password_file] if password_file else []
    arguments += ["--keyless"] * keyless
    arguments += ["--identity-token-file", identity_token_file] if identity_token_file else []
    _run("sign", [*arguments, *["--older-clients"] * older_clients])


@click.command()
@_IMAGE
@_trust
@click.option("--whole", is_flag=True, help="Read every layer too, and check it against its digest.")
def verify(image: str, key: Sequence[Path], identity: Sequence[str], platform: str, whole: bool) -> None:
    """Say whether somebody you trust signed an image, and print the digest that is signed.

    Run the image by this digest: the tag may move. Ends with 1 where no signature counts, and says why.

    \b
    Examples:
      ekiben images verify oci:images:1.0 --key release.pub
      podman run registry.example.com/acme/summarizer@$(ekiben images verify docker://… --key release.pub)
    """
    _run("verify", [image, *_trusted(key, identity, platform), *["--whole"] * whole])


@click.command()
@_IMAGE
@_trust
@table_or_json("How to print.", "form")
def attestations(image: str, key: Sequence[Path], identity: Sequence[str], platform: str, form: str) -> None:
    """List what is said of an image: signatures, bill of material, provenance, and which keys signed it.

    \b
    Examples:
      ekiben images attestations oci:images:1.0
      ekiben images attestations oci:images:1.0 --key release.pub -o json
    """
    _run("attestations", [image, *_trusted(key, identity, platform), "--format", form])


@click.command()
@_IMAGE
@_trust
def sbom(image: str, key: Sequence[Path], identity: Sequence[str], platform: str) -> None:
    """Print the bill of material of an image: CycloneDX, as JSON.

    With --key or --identity only one that is signed by it.

    \b
    Examples:
      ekiben images sbom oci:images:1.0 > sbom.json
      ekiben images sbom docker://registry.example.com/acme/summarizer:1.0 --key release.pub
    """
    _run("sbom", [image, *_trusted(key, identity, platform)])


@click.command()
@_IMAGE
@_trust
def provenance(image: str, key: Sequence[Path], identity: Sequence[str], platform: str) -> None:
    """Print where an image comes from: SLSA provenance, as JSON.

    With --key or --identity only one that is signed by it.

    \b
    Examples:
      ekiben images provenance oci:images:1.0 --key release.pub
      ekiben images provenance oci:images:1.0 | jq .buildDefinition.resolvedDependencies
    """
    _run("provenance", [image, *_trusted(key, identity, platform)])


@click.command()
@click.argument("file", type=_FILE)
@click.option(
    "--kind", type=click.Choice(["ecdsa-p256", "ed25519"]), default="ecdsa-p256", show_default=True, help="Kind of key."
)
@click.option("--password-file", type=_FILE, help="File with a password for the key; asked for otherwise.")
@click.option("--no-password", is_flag=True, help="Leave the key open to whoever reads the file.")
@click.option("--cosign", is_flag=True, help="Write the private key in cosign's form instead of PKCS #8.")
def keygen(file: Path, kind: str, password_file: Path | None, no_password: bool, cosign: bool) -> None:
    """Make a key that signs images: FILE, and FILE with the suffix .pub for those who verify.

    \b
    Examples:
      ekiben images keygen release.key
      ekiben images keygen release.key --kind ed25519 --password-file password
    """
    arguments: list[object] = [file, "--kind", kind]
    arguments += ["--password-file", password_file] if password_file else []
    _run("keygen", [*arguments, *["--no-password"] * no_password, *["--cosign"] * cosign])


COMMANDS = (sign, verify, attestations, sbom, provenance, keygen)


def _trusted(keys: Sequence[Path], identities: Sequence[str], platform: str) -> list[object]:
    found: list[object] = []
    for key in keys:
        found += ["--key", key]
    for identity in identities:
        found += ["--identity", identity]
    return [*found, "--platform", platform] if platform else found


def _run(command: str, arguments: Sequence[object]) -> NoReturn:
    become("services.builder.image_signing", command, *arguments)
