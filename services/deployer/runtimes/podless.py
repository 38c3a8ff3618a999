"""What runtimes without pods do about what is said of pods: refuse it in words, or say that it is passed over. Pure."""

from ekiben.errors import InvalidArgument
from services.deployer.runtimes import Pod, SetSpec

_ANYWHERE = ("termination_grace", "resources")


def refuse(spec: SetSpec, runtime: str) -> None:
    """Raises InvalidArgument where the spec has settings that only a cluster has (POD_SETTINGS_UNSUPPORTED)."""
    settings = spec.pod.settings
    found = [field.name for field, _ in settings.ListFields() if field.name not in _ANYWHERE]
    found += ["patch"] if spec.pod.patch else []
    given = settings.resources
    # Every GPU of the machine is seen by all that runs on it.
    named = {name for name in (*given.requests, *given.limits) if name not in ("cpu", "memory") and "gpu" not in name}
    found += [f"resources {name}" for name in sorted(named)] + (["resources.claims"] if given.claims else [])
    if found:
        raise InvalidArgument(
            f"The service {spec.service} has pod settings ({', '.join(found)}), which the runtime {runtime} does not "
            "know: it has no pods. Leave them out, or deploy to a Kubernetes cluster.",
            reason="POD_SETTINGS_UNSUPPORTED",
            service=spec.service,
            runtime=runtime,
        )


def note(pod: Pod) -> str:
    """What is passed over; empty for nothing."""
    return "the extras of the client speak of pods, which this runtime does not have" if pod.extra else ""
