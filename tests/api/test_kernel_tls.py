"""TLS and mutual TLS, with certificates made for the test."""

import dataclasses
import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ekiben import errors
from ekiben.channel import Tls, open_channel
from services.kernel import telemetry
from services.kernel.app import Component
from services.kernel.peers import Peers
from services.kernel.settings import PeerSettings, SettingsError
from tests.api.test_kernel_telemetry import Receiver, recorder
from tests.fixtures_kernel import run_server, short_path, until

__all__ = ["short_path"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(self._name, self._key, ca=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> Pair:
        """A certificate for localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, ca=False)
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


async def check(address: str, tls: Tls | None) -> bool:
    """Whether a health check gets through."""
    async with open_channel(address, tls=tls) as channel:
        request = health_pb2.HealthCheckRequest()
        await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return True


async def test_a_server_with_a_certificate_speaks_tls_to_who_trusts_it_and_to_nobody_else(
    short_path: Path, authority: Authority
) -> None:
    pair = authority.issue("server")
    stranger = Authority(short_path, "stranger")
    tls = {"tls_cert_file": pair.cert, "tls_key_file": pair.key}
    async with run_server(short_path, Component("a"), listen="127.0.0.1:0", **tls) as running:
        assert await check(running.address, Tls(authority.file))
        assert await check(f"https://{running.address}", Tls(authority.file))
        assert await check(running.address, Tls(authority.file, server_name="localhost"))
        for wrong in (None, Tls(stranger.file), Tls(), Tls(authority.file, server_name="elsewhere")):
            with pytest.raises(errors.Unavailable):
                await check(running.address, wrong)


async def test_mutual_tls_lets_in_only_who_shows_a_certificate_of_ours(short_path: Path, authority: Authority) -> None:
    server, client = authority.issue("server"), authority.issue("client")
    stranger = Authority(short_path, "stranger").issue("stranger-client")
    tls = {"tls_cert_file": server.cert, "tls_key_file": server.key, "tls_client_ca_file": authority.file}
    async with run_server(short_path, Component("a"), listen="127.0.0.1:0", **tls) as running:
        assert await check(running.address, Tls(authority.file, client.cert, client.key))
        for wrong in (Tls(authority.file), Tls(authority.file, stranger.cert, stranger.key)):
            with pytest.raises(errors.Unavailable):
                await check(running.address, wrong)


async def test_peers_dial_over_mutual_tls_by_their_settings(short_path: Path, authority: Authority) -> None:
    server, client = authority.issue("server"), authority.issue("client")
    tls = {"tls_cert_file": server.cert, "tls_key_file": server.key, "tls_client_ca_file": authority.file}
    async with run_server(short_path, Component("a"), listen="127.0.0.1:0", **tls) as running:
        peers = Peers(
            PeerSettings(
                service_token_file=running.settings.service_token_file,
                registry=running.address,
                tls_ca_file=authority.file,
                tls_cert_file=client.cert,
                tls_key_file=client.key,
            ),
            "builder",
        )
        await health_pb2_grpc.HealthStub(peers.registry).Check(health_pb2.HealthCheckRequest(), timeout=5)
        await peers.close()


async def test_spans_go_to_the_recorder_over_mutual_tls(short_path: Path, authority: Authority) -> None:
    server = authority.issue("server")
    tls = {"tls_cert_file": server.cert, "tls_key_file": server.key, "tls_client_ca_file": authority.file}
    receiver = Receiver()
    async with run_server(short_path, recorder(receiver), listen="127.0.0.1:0", **tls) as running:
        settings = dataclasses.replace(running.settings, otlp_endpoint=running.address, otlp_ca_file=authority.file)
        spans = telemetry.setup("gateway", settings)
        with telemetry.tracer().start_as_current_span("seen"):
            pass
        await until(lambda: receiver.named("seen"), "the span to come")
        await spans.close()


async def test_a_unix_socket_needs_no_tls(short_path: Path, authority: Authority) -> None:
    pair = authority.issue("server")
    async with run_server(short_path, Component("a"), tls_cert_file=pair.cert, tls_key_file=pair.key) as running:
        assert await check(running.address, None)


async def test_a_missing_certificate_is_a_wrong_setting(short_path: Path) -> None:
    tls = {"tls_cert_file": short_path / "no.crt", "tls_key_file": short_path / "no.key"}
    with pytest.raises(SettingsError, match=r"no\.key"):
        async with run_server(short_path, Component("a"), listen="127.0.0.1:0", **tls):
            pass


@pytest.mark.parametrize(
    "address", ["", "nonsense", "host:", ":1", "host:99999", "ftp://x:1", "http://", "http://x:1/path", "unix:"]
)
async def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        open_channel(address)
    assert caught.value.reason == "ADDRESS_INVALID"
