"""Settings of the builder. Environment: `EKIBEN_BUILDER_…`."""

from dataclasses import dataclass
from pathlib import Path

from services.kernel.settings import DatabaseSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings(DatabaseSettings):
    """Where the builder keeps what it makes, and how it works.

    Which index packages come from is uv's own affair: `UV_DEFAULT_INDEX`, `UV_INDEX`, `UV_FIND_LINKS`, proxies and
    certificates are taken from the environment of the builder's process.
    """

    data_dir: Path
    """environments/, locks/, cache/, logs/, pythons/ and more. Environments are linked out of the cache, so all of it
    should lie on one file system; replicas run from it, so a runtime elsewhere must see it at the same path."""
    run_dir: Path | None = None
    """For the sockets of running processes; a short path. `data_dir`/run where it is absent."""
    images: str = ""
    """Where images are kept: `oci:FOLDER`, an OCI layout, or `docker://HOST/PREFIX`, a registry. Empty for the layout
    `images` in `data_dir`."""
    images_listen: str = ""
    """Where images are served to container engines over HTTP (`/v2/`): `host:port` or `unix:/path`. The gateway
    forwards to it. Empty for nowhere."""
    workers: int = 1
    """Builds at a time. One by default: resolving and installing use every core by themselves."""
    python_preference: str = "managed"
    """`managed`: uv's interpreters, then the machine's, then a download; `system`: the machine's first;
    `only-managed`, `only-system`: no other."""
    python_downloads: bool = True
    """Whether uv may download an interpreter that is not there."""
    python_download_timeout_s: float = 120.0
    """Longest wait for such a download; an interpreter is 30 MB."""
    build_timeout_s: float = 3600.0
    """Longest a build may take, sources that are compiled included."""
    lease_s: float = 30.0
    """After this long without a sign of life a worker counts as dead and its build is taken up by another."""
    bases: str = "docker://docker.io/library/python:{python}-slim"
    """Which image others are put on, with `{python}` in the place of the minor version of a bento's Python;
    `oci:FOLDER:{python}` is a layout. What a name in a registry stands for is remembered, and asked again by builds
    with `force`. A bento's own `base_image` goes first, unless this has no `{python}`. Empty: no images are built."""
    attestations: bool = True
    """Attach a bill of material (CycloneDX) and the provenance (SLSA) to each image: 0.1 s of CPU."""
    signing_key_file: Path | None = None
    """Private key that signs each image, its bill and its provenance: PEM (ECDSA on P-256, Ed25519), or cosign's form;
    `ekiben images keygen` makes one. Without it nothing is signed."""
    signing_key_password_file: Path | None = None
    """File with the password of that key, where it is encrypted."""
    identity: str = "https://ekiben.dev/builders/platform"
    """URI that names this builder in the provenance, so that images of several platforms can be told apart."""
    images_compression: str = "gzip"
    """How layers of images are packed: `none`, `gzip`, `zstd`, `estargz` or `zstd:chunked`, or rules of which the first
    that fits where images are kept counts: `registry.example.com=zstd,*=gzip`. An image that is there already is not
    made again when it changes. docs/images.md says who reads what; `gzip`, the default, is read by everybody."""
    images_keep_newest: int = 10
    """So many images of each bento repository are kept, the newest ones, however old."""
    images_keep_days: float = 30.0
    """Images that no build gave and nobody pulled from `/v2/` for so long are deleted, except the newest ones and those
    that deployments use."""
    images_grace_s: float = 7200.0
    """How long a blob is kept that no image has. Builds write blobs before their image has them; so at least ten
    minutes more than `build_timeout_s` is taken."""
    images_collect_interval_s: float = 3600.0
    """How often images that are kept no longer, and such blobs, are looked for."""
    caches_keep_days: float = 30.0
    """What can be made again the same way (environments, bytecode, downloads) is taken away when no build used it for
    so long. Environments that deployments run from count as used."""
    caches_most_bytes: int = 0
    """Bound on the bytes of all that: where it is more, the longest unused goes first, however young it is, but for
    what a build may be using and what deployments run from. 0 for none."""
    locks_keep_days: float = 365.0
    """How long what requirements resolved to is kept after its last use: resolved anew, an image may become another."""
    logs_keep_days: float = 90.0
    """How long the logs of builds are kept."""
    caches_prune_interval_s: float = 21_600.0
    """How often all this is looked through. It reads every folder: a second of CPU for 100,000 files."""
    compile_bytecode: bool = False
    """Compile every module at build time. Off: what starting BentoML imports is compiled when the environment is
    checked. Measured with BentoML 1.4.39 on two cores: a replica's first start takes 3.3 s without any of it, 1.7 s
    with the check's, 1.5 s with all; all costs twice the check's CPU time, and disk that environments do not share."""

    @property
    def images_at(self) -> str:
        """Where images are kept, spelled out."""
        return self.images or f"oci:{self.data_dir.absolute() / 'images'}"

    def __post_init__(self) -> None:
        faults = self.database_faults()
        if self.workers < 1:
            faults.append(f"workers is {self.workers}; it must be at least 1.")
        if self.python_preference not in ("managed", "system", "only-managed", "only-system"):
            faults.append(
                f"python_preference is {self.python_preference!r}; "
                "it must be managed, system, only-managed or only-system."
            )
        if self.lease_s < 3:
            faults.append(f"lease_s is {self.lease_s}; it must be at least 3, since it is renewed each third of it.")
        if self.images and not self.images.startswith(("oci:", "docker://")):
            faults.append(f"images is {self.images!r}; it must begin with oci: or docker://.")
        if self.signing_key_file is not None and not self.attestations:
            faults.append("signing_key_file is set and attestations is off; leave attestations on to sign images.")
        methods = ("none", "gzip", "zstd", "estargz", "zstd:chunked")
        for rule in self.images_compression.split(","):
            if rule.strip() and rule.rpartition("=")[2].strip() not in methods:
                faults.append(
                    f"images_compression has {rule.strip()!r}; its method must be one of {', '.join(methods)}."
                )
        if self.images_keep_newest < 0 or self.images_keep_days < 0:
            faults.append("images_keep_newest and images_keep_days must not be negative.")
        if self.images_grace_s <= 0 or self.images_collect_interval_s <= 0:
            faults.append("images_grace_s and images_collect_interval_s must be positive.")
        for name in ("caches_keep_days", "caches_most_bytes", "locks_keep_days", "logs_keep_days"):
            if getattr(self, name) < 0:
                faults.append(f"{name} must not be negative.")
        if self.caches_prune_interval_s <= 0:
            faults.append("caches_prune_interval_s must be positive.")
        if self.build_timeout_s <= 0 or self.python_download_timeout_s <= 0:
            faults.append("build_timeout_s and python_download_timeout_s must be positive.")
        if faults:
            raise SettingsError(faults)
