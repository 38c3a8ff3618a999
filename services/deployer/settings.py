"""Settings of the deployer."""

from dataclasses import dataclass
from pathlib import Path

from services.kernel.settings import DatabaseSettings, SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings(DatabaseSettings):
    """What the deployer is told at its start. Environment: `EKIBEN_DEPLOYER_…`."""

    data_dir: Path
    """Folder for bentos, models, logs and the homes of replicas. Belongs to one deployer."""
    run_dir: Path
    """Folder for Unix sockets. Its path must be short (a socket's path has at most 107 bytes); only the suite's
    user may enter it, since the services behind an entry service unpickle what they are sent."""
    runtime: str = "process"
    """How replicas run: `process`, in the environment that the builder makes; `podman`, as containers of the image that
    it makes, read-only, without privileges, as the user 1034; or `kubernetes`, as pods of that image."""
    podman_network: str = "host"
    """With `podman`, what `podman run --network` takes. Services reach one another by sockets whatever it is; telemetry
    needs the host's network, or an `otlp_http_endpoint` that can be reached from another one."""
    podman_runtime: str = ""
    """With `podman`, what `podman --runtime` takes. Empty for podman's own, or runc where only that works."""
    model_delivery: str = "layers"
    """How models come into the replicas of deployments that do not say it, those of `bentoml deploy` for instance:
    `layers` of the bento's image, or where they run on Kubernetes each as an `image-volume`."""
    image_policy: str = "off"
    """What is done about images that nobody trusted signed: `off`, nothing; `warn`, they run and the deployment says
    so; `enforce`, they are refused. The environments that `process` runs are signed by nobody: only what is deployed to
    clusters that were added can be then."""
    image_keys: tuple[Path, ...] = ()
    """PEM files of public keys, or folders of `*.pub`, whose signatures count. Read anew at each look. Lines
    `not-after:` and `images:` before a key bound it."""
    image_identities: tuple[str, ...] = ()
    """Identities whose signatures by Sigstore count: `SUBJECT@@ISSUER` each. Needs `pip install 'ekiben[keyless]'`."""
    kubeconfig: Path | None = None
    """With `kubernetes`, the file that says where the cluster is; where it is absent, the cluster of this pod."""
    kubernetes_context: str = ""
    """The context of the kubeconfig; empty for its current one."""
    kubernetes_namespace: str = "ekiben"
    """The namespace in which everything is; it must be there, and the credentials must allow serviceaccounts, secrets,
    services, pods, their logs, deployments, poddisruptionbudgets and networkpolicies in it, nothing else."""
    kubernetes_pull_host: str = ""
    """`HOST[:PORT]` under which nodes reach the platform's `/v2/`, where the builder keeps images in a folder."""
    kubernetes_pod_security: str = "restricted"
    """The pod security level that no patch of a deployment goes beyond, whatever the namespace enforces: `restricted`,
    `baseline`, or `privileged` for none."""
    kubernetes_pull_secret: str = ""
    """Name of a Secret of the namespace with the login for images (`kubectl create secret docker-registry`). Empty
    where none is needed, as for the platform's own `/v2/`, whose login the deployer makes and renews."""
    kubernetes_pull_token_s: float = 86400.0
    """How long a login for `/v2/` lives that the deployer made; it is renewed when half of that has gone."""
    kubernetes_gateway_service: str = ""
    """`NAME:PORT` of the gateway's Service in the namespace of the pods (PORT its number or name), to which Ingresses
    and HTTPRoutes of deployments lead. Empty where deployments are not exposed; then nobody needs rights for these."""
    exposure: str = ""
    """JSON of the `exposure` of deployments that have none of their own, without a host:
    `{"kind": "INGRESS", "tls": {"clusterIssuer": "letsencrypt"}}`. Empty exposes none."""
    exposure_domains: tuple[str, ...] = ()
    """Domains in or below which the host of an exposure must be, beside the deployment's own host name; empty for
    any."""
    kubernetes_metrics: tuple[str, ...] = ("gpu=DCGM_FI_DEV_GPU_UTIL", "qps=bentoml_service_requests_per_second")
    """What the cluster's custom metrics API calls, per pod, the metrics that clients scale by: `NAME=METRIC` each. The
    first default is that of NVIDIA's DCGM exporter, the second is for a rule of your metrics adapter."""
    secrets_key_file: Path | None = None
    """File with the key that seals the kubeconfigs of clusters; `secrets.key` in data_dir where it is absent, made when
    it is not there. Several deployers on one database need the same."""
    host: str = "127.0.0.1"
    """Host in the URLs of deployments: where the gateway's own ports for them are reached."""
    port_range: str = "7500-7999"
    """Ports of the gateway from which each deployment gets one of its own; `none` for host names alone."""
    domain: str = "localhost"
    """A deployment's host name is `NAME-NAMESPACE.DOMAIN`."""
    namespace: str = "default"
    """See `domain`."""
    public_url: str = "http://127.0.0.1:7400"
    """Where clients reach the platform."""
    otlp_http_endpoint: str = ""
    """`http://host:port` of the recorder's OTLP/HTTP receiver, for spans and monitored values of replicas; empty
    leaves their telemetry off, and so does, for pods, an address of loopback. Another one restarts all pods."""
    otlp_token_file: Path | None = None
    """File with the token for that receiver, which may do nothing else."""
    terminals: str = "developer"
    """Who may open terminals in replicas: `developer` (who may run any code in them anyhow), `admin`, or `off` for
    nobody."""
    terminal_limit_s: float = 3600.0
    """How long a terminal may be open; then its command is hung up."""
    terminal_recording_max_bytes: int = 16 << 20
    """Size at which a recording is full, and its terminal is closed: what is not recorded is not done."""
    terminal_keep_days: float = 90.0
    """How long recordings of terminals are kept; 0 keeps them for ever."""
    instance_types: tuple[str, ...] = ("cpu.small=0.5/512Mi", "cpu.1=1/2Gi", "cpu.2=2/4Gi", "cpu.4=4/8Gi")
    """Sizes that services may ask for: `NAME=CORES/MEMORY[/GPUS[/GPU_TYPE]]` each. On Kubernetes a GPU is
    `nvidia.com/gpu`, or the GPU_TYPE where that is a resource, as `amd.com/gpu`."""
    instance_types_file: Path | None = None
    """YAML file with more: a list, each with `name`, and if wanted `description`, `group`, `price`, `gpu_type` and
    pod settings (`resources`, `node_selector`, `tolerations`, `runtime_class`, …); see docs/kubernetes.md."""
    pass_environment: tuple[str, ...] = ("TZ",)
    """Variables of the platform's own environment that replicas get too. Few by default: tokens must not leak."""
    drain_s: float = 30.0
    """How long a replica may finish its requests once it gets no new ones; then they are cut off."""
    shutdown_drain_s: float = 8.0
    """The same when the deployer itself stops: a person is waiting for Ctrl-C."""
    orphan_grace_s: float = 15.0
    """How long replicas outlive a deployer that was killed, waiting to be adopted: longer than a restart takes."""
    owner_lease_s: float = 15.0
    """With several deployers on one database: after so long without a sign of life of the one that has the cluster
    another takes it."""
    probe_timeout_s: float = 2.0
    """How long a health probe waits. A hanging replica still accepts connections, so only an answer counts."""
    start_timeout_s: float = 1800.0
    """How long a replica may take to become ready: loading weights of many gigabytes takes a while."""
    liveness_s: float = 20.0
    """A replica that was ready and answers no liveness probe for this long is started again."""
    crashes_until_failed: int = 3
    """After so many ends of a replica that was never ready the rollout is called FAILED; it goes on trying."""
    log_max_bytes: int = 8 << 20
    """Size at which a replica's log file is rotated."""
    log_keep: int = 3
    """How many rotated files are kept for each replica."""

    def __post_init__(self) -> None:
        faults = self.database_faults()
        if self.has_ports:
            try:
                first, last = self.ports
            except ValueError:
                faults.append(f"port_range is {self.port_range!r}; it must be FIRST-LAST, or none.")
            else:
                if not 0 < first <= last < 65536:
                    faults.append(f"port_range is {self.port_range!r}; it must lie between 1 and 65535.")
        faults += self._policy_faults()
        if self.model_delivery not in ("layers", "image-volume"):
            faults.append(f"model_delivery is {self.model_delivery!r}; it must be layers or image-volume.")
        if not all(name and metric for name, metric in self.metric_names.items()):
            faults.append(f"kubernetes_metrics is {self.kubernetes_metrics!r}; each must be NAME=METRIC.")
        if self.runtime not in ("process", "podman", "kubernetes"):
            faults.append(f"runtime is {self.runtime!r}; it must be process, podman or kubernetes.")
        service, _, port = self.kubernetes_gateway_service.partition(":")
        if self.kubernetes_gateway_service and not (service and port):
            faults.append(f"kubernetes_gateway_service is {self.kubernetes_gateway_service!r}; it must be NAME:PORT.")
        if self.kubernetes_pod_security not in ("restricted", "baseline", "privileged"):
            level = self.kubernetes_pod_security
            faults.append(f"kubernetes_pod_security is {level!r}; it must be restricted, baseline or privileged.")
        if len(str(self.run_dir)) > 64:
            faults.append(f"run_dir has {len(str(self.run_dir))} characters; sockets in it need it to have at most 64.")
        if self.terminals not in ("developer", "admin", "off"):
            faults.append(f"terminals is {self.terminals!r}; it must be developer, admin or off.")
        if self.terminal_limit_s < 1 or self.terminal_recording_max_bytes < 1 << 16 or self.terminal_keep_days < 0:
            faults.append(
                "terminal_limit_s must be at least 1, terminal_recording_max_bytes at least 65536, terminal_keep_days "
                "at least 0."
            )
        if self.owner_lease_s < 1:
            faults.append(f"owner_lease_s is {self.owner_lease_s}; it must be at least 1.")
        if not 60 <= self.kubernetes_pull_token_s <= 30 * 86400:
            faults.append("kubernetes_pull_token_s must be from 60 to 2592000, 30 days.")
        for name in ("drain_s", "shutdown_drain_s", "orphan_grace_s", "probe_timeout_s", "liveness_s"):
            if getattr(self, name) < 0:
                faults.append(f"{name} must not be negative.")
        if faults:
            raise SettingsError(faults)

    def _policy_faults(self) -> list[str]:
        if self.image_policy not in ("off", "warn", "enforce"):
            return [f"image_policy is {self.image_policy!r}; it must be off, warn or enforce."]
        if self.image_policy == "off":
            return []
        if not self.image_keys and not self.image_identities:
            return ["image_policy needs whom to trust: set image_keys, or image_identities."]
        return []

    @property
    def metric_names(self) -> dict[str, str]:
        """`kubernetes_metrics` by what clients call them."""
        return {name: metric for name, _, metric in (each.partition("=") for each in self.kubernetes_metrics)}

    @property
    def has_ports(self) -> bool:
        """Whether deployments get ports of their own."""
        return self.port_range not in ("", "none")

    @property
    def ports(self) -> tuple[int, int]:
        """First and last port of `port_range`."""
        first, last = self.port_range.split("-")
        return int(first), int(last)
