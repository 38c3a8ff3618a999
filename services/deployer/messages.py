"""Protos to domain and back. Plain functions."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import events_pb2, exposure_pb2
from services.deployer.domain import Cluster, Condition, Deployment, InstanceType, Revision, Status, refuse
from services.deployer.runtimes import Event, Line, ReplicaStatus, SetStatus
from services.kernel.updates import etag_of


def template_json(template: pb.Template) -> str:
    """A template as text; equal templates give equal texts."""
    return json.dumps(json_format.MessageToDict(template, preserving_proto_field_name=True), sort_keys=True)


def template(text: str) -> pb.Template:
    """A template from its text."""
    return json_format.Parse(text, pb.Template(), ignore_unknown_fields=True)


def scaling_json(scaling: Mapping[str, pb.Scaling]) -> str:
    """Scaling by service as text."""
    values = {
        service: json_format.MessageToDict(one, preserving_proto_field_name=True) for service, one in scaling.items()
    }
    return json.dumps(values, sort_keys=True)


def scaling(text: str) -> dict[str, pb.Scaling]:
    """Scaling by service from its text."""
    return {
        service: json_format.ParseDict(value, pb.Scaling(), ignore_unknown_fields=True)
        for service, value in json.loads(text or "{}").items()
    }


def capture_json(capture: pb.CapturePolicy | None) -> str:
    """A capture policy as text; empty for none."""
    return "" if capture is None else json_format.MessageToJson(capture, preserving_proto_field_name=True, indent=None)


def capture(text: str) -> pb.CapturePolicy | None:
    """A capture policy from its text."""
    return json_format.Parse(text, pb.CapturePolicy(), ignore_unknown_fields=True) if text else None


def exposure_json(exposure: exposure_pb2.Exposure | None) -> str:
    """An exposure as text; empty for none."""
    if exposure is None:
        return ""
    return json.dumps(json_format.MessageToDict(exposure, preserving_proto_field_name=True), sort_keys=True)


def exposure(text: str) -> exposure_pb2.Exposure | None:
    """An exposure from its text."""
    return json_format.Parse(text, exposure_pb2.Exposure(), ignore_unknown_fields=True) if text else None


def deployment(of: Deployment, latest: Revision, urls: Sequence[str]) -> pb.Deployment:
    """The resource. `latest` is its newest revision, `urls` where it is reached."""
    name = f"deployments/{of.name}"
    status = of.status
    result = pb.Deployment(
        name=name,
        uid=of.uid,
        labels=of.labels,
        cluster=f"clusters/{of.cluster}",
        template=template(latest.template),
        scaling=scaling(of.scaling),
        capture=capture(of.capture),
        exposure=exposure(of.exposure),
        access_authorization=of.access_authorization,
        dev=of.dev,
        state=pb.Deployment.State.Value(status.state),
        conditions=[condition(one) for one in status.conditions],
        urls=urls,
        latest_revision=f"{name}/revisions/{of.latest_revision}",
        serving_revision=f"{name}/revisions/{status.serving_revision}" if status.serving_revision else "",
        generation=of.generation,
        observed_generation=status.observed_generation,
        reconciling=status.observed_generation != of.generation or not status.settled,
        creator=of.creator,
        etag=etag_of(of.uid, of.generation),
        terminated=of.terminated,
        build=of.build,
        kubernetes_namespace=of.kubernetes_namespace,
        create_time=time(of.create_time),
        update_time=time(of.update_time),
    )
    if of.deleting:
        result.state = pb.Deployment.TERMINATING
    for service, (desired, total, ready, updated) in status.counts.items():
        result.replica_counts[service].CopyFrom(
            pb.ReplicaCounts(desired=desired, total=total, ready=ready, updated_ready=updated)
        )
    return result


def condition(of: Condition) -> pb.Condition:
    """One condition."""
    status = {True: pb.Condition.TRUE, False: pb.Condition.FALSE, None: pb.Condition.UNKNOWN}[of.status]
    when = time(of.transition_time) if of.transition_time else None
    return pb.Condition(type=of.type, status=status, reason=of.reason, message=of.message, transition_time=when)


def revision(of: Revision, name: str, status: Status) -> pb.Revision:
    """One revision of the deployment with the id `name`."""
    return pb.Revision(
        name=f"deployments/{name}/revisions/{of.number}",
        uid=of.uid,
        template=template(of.template),
        create_time=time(of.create_time),
        creator=of.creator,
        serving=status.serving_revision == of.number,
        rolled_back_to=f"deployments/{name}/revisions/{of.rolled_back_to}" if of.rolled_back_to else "",
        bento_digest=of.bentos["main"].digest,
    )


def replica(of: ReplicaStatus, in_set: SetStatus) -> pb.Replica:
    """One replica."""
    return pb.Replica(
        replica=of.replica,
        service=in_set.service,
        revision=f"{in_set.deployment}/revisions/{in_set.revision}",
        state=pb.Replica.State.Value(of.phase.value),
        message=of.message,
        restart_count=of.restart_count,
        start_time=time(of.start_time) if of.start_time else None,
        target=in_set.target,
    )


def since(request: pb.ReadLogsRequest) -> datetime | None:
    """From when on lines are wanted.

    Raises:
        InvalidArgument: no time that there is (FIELDS_INVALID).
    """
    if not request.HasField("since_time"):
        return None
    try:
        return request.since_time.ToDatetime(UTC)
    except (ValueError, OverflowError):
        refuse([("since_time", "must be a time of the years 1 to 9999")])
        return None


def line(of: Line) -> pb.LogLine:
    """One line of a log."""
    return pb.LogLine(replica=of.replica, service=of.service, time=time(of.time), text=of.text)


def event(of: Event, name: str) -> events_pb2.Event:
    """One event of the deployment with the id `name`."""
    return events_pb2.Event(
        uid=of.id,
        time=time(of.time),
        first_time=time(of.first_time),
        count=of.count,
        warning=of.warning,
        reason=of.reason,
        message=of.message,
        object=of.object,
        source=of.source,
        service=of.service,
        replica=of.replica,
        revision=f"deployments/{name}/revisions/{of.revision}" if of.revision else "",
        target=of.target,
    )


def instance_type(of: InstanceType) -> pb.InstanceType:
    """One instance type."""
    described = f"{of.cpu_millicores / 1000:g} CPU, {of.memory_bytes / (1 << 30):g} GiB"
    if of.gpu_count:
        described += f", {of.gpu_count} GPU {of.gpu_type}".rstrip()
    return pb.InstanceType(
        name=f"instanceTypes/{of.name}",
        display_name=of.name,
        description=of.description or described,
        cpu_millicores=of.cpu_millicores,
        memory_bytes=of.memory_bytes,
        gpu_count=of.gpu_count,
        gpu_type=of.gpu_type,
        pod=of.pod,
        group=of.group or ("gpu" if of.gpu_count else "cpu"),
        price=of.price,
    )


def cluster(of: Cluster, runtime: str, detail: str = "") -> pb.Cluster:
    """One cluster, without its credentials."""
    return pb.Cluster(
        name=f"clusters/{of.name}",
        uid=of.uid,
        description=of.description,
        runtime=runtime,
        create_time=time(of.create_time),
        namespaces=of.namespaces,
        pull_host=of.pull_host,
        pull_secret=of.pull_secret,
        otlp_http_endpoint=of.otlp_http_endpoint,
        server=of.server,
        update_time=time(of.update_time) if of.update_time else None,
        detail=detail,
    )


def time(of: object) -> Timestamp:
    """A timestamp."""
    stamp = Timestamp()
    stamp.FromDatetime(of)  # type: ignore[arg-type]
    return stamp
