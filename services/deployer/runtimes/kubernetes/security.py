"""Whether a pod keeps to a level of the pod security standards, whatever its namespace enforces. Pure.

Patches have the last word over a pod, and those who may deploy are not those who run the cluster: so the platform holds
pods to a level itself, where a namespace is not labelled to do so.

Source: kubernetes.io/docs/concepts/security/pod-security-standards, of 1.36.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from services.deployer.runtimes.kubernetes.names import Object

_CAPABILITIES = frozenset(
    [
        "AUDIT_WRITE",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    ]
)
_SELINUX = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS = frozenset(
    [
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_wmem",
    ]
)
_ARMOUR = "container.apparmor.security.beta.kubernetes.io/"
_VOLUMES = frozenset(
    [
        "name",
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
        "image",
    ]
)


def faults(template: Object, level: str) -> list[str]:
    """What of a pod template the level does not allow, in words. What is none at all the cluster finds."""
    found: list[str] = []
    pod = _of(template, "spec")
    if level != "privileged":
        annotations = _of(_of(template, "metadata"), "annotations")
        found += [f"annotation {key}" for key, value in annotations.items() if _ARMOUR in key and value == "unconfined"]
        found += _baseline(pod)
    if level == "restricted":
        found += _restricted(pod)
    return list(dict.fromkeys(found))


def _baseline(pod: Object) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in _items(pod, "volumes"):
        if "hostPath" in volume:
            yield f"volume {volume.get('name')} is a hostPath"
    shared = _of(pod, "securityContext")
    for sysctl in _items(shared, "sysctls"):
        if sysctl.get("name") not in _SYSCTLS:
            yield f"sysctl {sysctl.get('name')}"
    yield from _contained("the pod", shared)
    for container in _containers(pod):
        name, own = f"container {container.get('name')}", _of(container, "securityContext")
        yield from _contained(name, own)
        if own.get("privileged"):
            yield f"{name} is privileged"
        if added := sorted(set(_list(_of(own, "capabilities"), "add")) - _CAPABILITIES):
            yield f"{name} adds the capabilities {', '.join(added)}"
        if own.get("procMount", "Default") != "Default":
            yield f"{name} has another procMount"
        if any(port.get("hostPort") for port in _items(container, "ports")):
            yield f"{name} has a hostPort"
        if any(_hosts(each) for each in (*_probes(container), *_of(container, "lifecycle").values())):
            yield f"{name} probes another host"


def _contained(who: str, context: Mapping[str, Any]) -> Iterator[str]:
    if _of(context, "windowsOptions").get("hostProcess"):
        yield f"{who} is a host process"
    selinux = _of(context, "seLinuxOptions")
    if selinux.get("type", "") not in _SELINUX or selinux.get("user") or selinux.get("role"):
        yield f"{who} has seLinuxOptions"
    for profile in ("seccompProfile", "appArmorProfile"):
        if _of(context, profile).get("type") == "Unconfined":
            yield f"{who} has an unconfined {profile}"


def _restricted(pod: Object) -> Iterator[str]:
    for volume in _items(pod, "volumes"):
        if kinds := sorted(set(volume) - _VOLUMES):
            yield f"volume {volume.get('name')} is a {kinds[0]}"
    shared = _of(pod, "securityContext")
    if shared.get("runAsUser") == 0:
        yield "the pod runs as root"
    for container in _containers(pod):
        name, own = f"container {container.get('name')}", _of(container, "securityContext")
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name} must set allowPrivilegeEscalation: false"
        if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
            yield f"{name} must set runAsNonRoot: true"
        if own.get("runAsUser") == 0:
            yield f"{name} runs as root"
        profile = _of(own, "seccompProfile") or _of(shared, "seccompProfile")
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name} must set a seccompProfile"
        capabilities = _of(own, "capabilities")
        if "ALL" not in _list(capabilities, "drop"):
            yield f"{name} must drop the capabilities ALL"
        if added := sorted(set(_list(capabilities, "add")) - {"NET_BIND_SERVICE"}):
            yield f"{name} adds the capabilities {', '.join(added)}"


def _containers(pod: Object) -> Iterator[Object]:
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from _items(pod, kind)


def _probes(container: Object) -> Iterator[Any]:
    yield from (container.get(name) for name in ("startupProbe", "readinessProbe", "livenessProbe"))


def _hosts(handler: Any) -> bool:
    return isinstance(handler, dict) and any(bool(_of(handler, kind).get("host")) for kind in ("httpGet", "tcpSocket"))


def _of(of: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _list(of: Mapping[str, Any], key: str) -> list[str]:
    found = of.get(key)
    return [str(each) for each in found] if isinstance(found, list) else []


def _items(of: Mapping[str, Any], key: str) -> list[Object]:
    found = of.get(key)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
