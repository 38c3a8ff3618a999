"""The real command in a subprocess against a real gRPC server."""

import json
import stat
from pathlib import Path

import yaml

from ekiben.builder.v1 import builder_pb2
from ekiben.deployer.v1 import deployer_pb2
from ekiben.recorder.v1 import recorder_pb2
from ekiben.registry.v1 import registry_pb2
from tests.fixtures_cli import Platform, bento_folder, ekiben, model_folder, platform

__all__ = ["platform"]

State = deployer_pb2.Deployment


async def test_models_are_pushed_listed_and_pulled_by_short_names(platform: Platform, tmp_path: Path) -> None:
    for version in ("v1", "v2", "v3"):
        model_folder(tmp_path, version=version)
        assert (await ekiben(platform, "models", "push", f"iris:{version}", home=tmp_path)).code == 0
    listed = await ekiben(platform, "models", "list", "-o", "json", home=tmp_path)
    found = json.loads(listed.out)
    assert [item["name"].rpartition("/")[2] for item in found] == ["v3", "v2", "v1"]  # over two pages
    assert found[0]["content"]["state"] == "READY" and found[0]["createTime"].endswith("Z")
    as_yaml = await ekiben(platform, "model", "ls", "-o", "yaml", "--limit", "1", home=tmp_path)
    assert [item["name"] for item in yaml.safe_load(as_yaml.out)] == ["modelRepositories/iris/models/v3"]
    table = (await ekiben(platform, "models", "list", home=tmp_path)).out.splitlines()
    assert table[0].split()[:3] == ["MODEL", "STATE", "SIZE"] and table[1].split()[:2] == ["iris:v3", "READY"]
    assert "\x1b" not in "".join(table)
    got = await ekiben(platform, "model", "get", "iris", "-o", "name", home=tmp_path)
    assert got.out == "modelRepositories/iris/models/v3\n"
    pulled = await ekiben(platform, "models", "pull", "iris:v2", home=tmp_path, BENTOML_HOME=str(tmp_path / "other"))
    folder = Path(pulled.out.strip())
    assert folder == tmp_path / "other" / "models" / "iris" / "v2" and (folder / "model.yaml").is_file()
    assert (folder.parent / "latest").read_text() == "v2"


async def test_labels_are_changed_one_by_one(platform: Platform, tmp_path: Path) -> None:
    model_folder(tmp_path)
    await ekiben(platform, "models", "push", "iris", home=tmp_path)
    changed = await ekiben(
        platform, "models", "update", "iris:v1", "-l", "a=b=c", "--remove-label", "stage", "-o", "json", home=tmp_path
    )
    assert json.loads(changed.out)["labels"] == {"a": "b=c"}
    report = tmp_path / "report.json"
    report.write_text('{"accuracy":\n 0.9}')
    annotated = ("models", "update", "iris:v1", "-a", "by=ci", "--annotation-file", f"report={report}")
    assert (await ekiben(platform, *annotated, home=tmp_path)).code == 0
    kept = await ekiben(platform, "models", "update", "iris:v1", "--remove-annotation", "by", home=tmp_path)
    assert 'report={"accuracy": … (18 B)' in kept.out and "by=ci" not in kept.out
    assert (await ekiben(platform, *annotated[:3], "--annotation-file", "a=/nowhere", home=tmp_path)).code == 2
    nothing = await ekiben(platform, "models", "update", "iris:v1", home=tmp_path)
    assert nothing.code == 2 and "Nothing to change" in nothing.err


async def test_delete_needs_a_version_and_viewers_may_not(platform: Platform, tmp_path: Path) -> None:
    model_folder(tmp_path)
    await ekiben(platform, "models", "push", "iris", home=tmp_path)
    assert "iris:VERSION" in (await ekiben(platform, "models", "delete", "iris", home=tmp_path)).err
    refused = await ekiben(platform, "models", "delete", "iris:v1", home=tmp_path, EKIBEN_API_TOKEN="ekb_viewer")
    assert refused.code == 1 and refused.err.startswith("Error: ") and "Traceback" not in refused.err
    assert (await ekiben(platform, "models", "rm", "iris:v1", home=tmp_path)).code == 0
    gone = await ekiben(platform, "models", "get", "iris:v1", home=tmp_path)
    assert gone.code == 1 and gone.err.startswith(
        "Error: Model 'modelRepositories/iris/models/v1' does not exist.\n`ekiben "
    )


async def test_bento_is_pushed_with_its_models(platform: Platform, tmp_path: Path) -> None:
    model_folder(tmp_path)
    bento_folder(tmp_path, models="[{tag: 'iris:v1', registry: default}]")
    pushed = await ekiben(platform, "bentos", "push", "summarizer", "-o", "json", home=tmp_path)
    assert json.loads(pushed.out)["content"]["state"] == "READY", pushed.err
    assert "modelRepositories/iris/models/v1" in platform.models.versions.items


async def test_bento_of_the_local_store_is_pushed_when_it_is_deployed(platform: Platform, tmp_path: Path) -> None:
    bento_folder(tmp_path)
    ran = await ekiben(platform, "deployments", "create", "summarizer", "--no-wait", home=tmp_path)
    assert ran.code == 0 and "in the local BentoML store only" in ran.err, ran.err
    assert "bentoRepositories/summarizer/bentos/v1" in platform.bentos.versions.items
    neither = await ekiben(platform, "deployments", "create", "nonsense", "--no-wait", home=tmp_path)
    assert neither.code == 1 and "does not exist" in neither.err


async def test_folder_that_was_not_built_says_so(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "service.py").touch()
    ran = await ekiben(platform, "bentos", "push", str(tmp_path), home=tmp_path)
    assert ran.code == 1 and "bentoml build" in ran.err


def ready_bento(platform: Platform) -> None:
    """A bento of two services on the platform."""
    manifest = {"entry_service": "Summarizer", "services": [{"name": "Summarizer"}, {"name": "Words"}]}
    name = "bentoRepositories/summarizer/bentos/v1"
    platform.bentos.versions.items[name] = registry_pb2.Bento(name=name, manifest=json.dumps(manifest))


async def test_deployment_is_created_from_flags_and_followed_until_it_runs(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    platform.builds.states = [
        builder_pb2.Build(name="builds/b", step="resolving", state=builder_pb2.Build.RUNNING),
        builder_pb2.Build(name="builds/b", state=builder_pb2.Build.SUCCEEDED),
    ]
    platform.deployments.states = [
        State(state=State.BUILDING, build="builds/b"),
        State(state=State.DEPLOYING, observed_generation=1, reconciling=True),
        State(state=State.RUNNING, observed_generation=1, urls=["http://demo.localhost:7400"]),
    ]
    platform.deployments.breaks = 1
    ran = await ekiben(
        platform,
        *("deployments", "create", "summarizer", "--name", "demo", "-e", "A=1", "-e", "B=x=y", "-s", "hub"),
        *("--replicas", "2", "--replicas", "Words=3", "--config-override", "Words.traffic.timeout=30"),
        *("--config-override", "Words.workers=cpu_count", "--capture-percent", "10", "--instance-type", "small"),
        home=tmp_path,
    )
    assert ran.code == 0, ran.err
    assert ran.out == "http://demo.localhost:7400\n"
    assert "resolving" in ran.err and "demo runs summarizer:v1 at http://demo.localhost:7400" in ran.err
    assert platform.deployments.watches == 2  # the first broke before the last state
    sent = platform.deployments.requests[0].deployment
    assert sent.template.bento == "bentoRepositories/summarizer/bentos/v1"
    assert [(env.name, env.value) for env in sent.template.envs] == [("A", "1"), ("B", "x=y")]
    assert list(sent.template.secrets) == ["secrets/hub"]
    assert {name: scaling.min_replicas for name, scaling in sent.scaling.items()} == {"Summarizer": 2, "Words": 3}
    words = sent.template.services["Words"].config_overrides
    assert words["traffic"]["timeout"] == 30 and words["workers"] == "cpu_count"
    assert sent.template.services["Summarizer"].instance_type == "small"
    assert sent.capture.sample_percent == 10 and not sent.capture.disabled


async def test_a_canary_s_bento_is_what_its_short_name_stands_for(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    file = tmp_path / "demo.yaml"
    canary = "{versions: {next: {bento: 'summarizer:latest', weight_percent: 10, secrets: [hub]}}}"
    file.write_text(f"{{name: demo, bento: summarizer, template: {{canary: {canary}}}}}")
    for command in (("create",), ("update", "demo")):
        ran = await ekiben(platform, "deployments", *command, "-f", str(file), "--no-wait", home=tmp_path)
        assert ran.code == 0, ran.err
    sent = platform.deployments.requests[0].deployment.template
    version = sent.canary.versions["next"]
    assert version.bento == sent.bento == "bentoRepositories/summarizer/bentos/v1"
    assert list(version.secrets) == ["secrets/hub"]
    assert len(platform.deployments.requests) == 1 and "so already" in ran.err
    file.write_text(file.read_text().replace("summarizer:latest", "summarizer:nowhere"))
    ran = await ekiben(platform, "deployments", "update", "demo", "-f", str(file), home=tmp_path)
    assert ran.code == 1 and "nowhere" in ran.err and len(platform.deployments.requests) == 1


async def test_logs_ask_for_as_much_of_the_past_as_is_wanted_over_a_break_too(
    platform: Platform, tmp_path: Path
) -> None:
    line = deployer_pb2.LogLine(replica="demo-a", service="Svc", text="hello")
    line.time.FromSeconds(1_800_000_000)
    platform.deployments.log = [line]
    logs = ("deployments", "logs", "demo")
    asked = platform.deployments.requests
    assert (await ekiben(platform, *logs, home=tmp_path)).out == "demo-a | hello\n"
    assert not asked[0].HasField("tail_lines") and not asked[0].HasField("since_time")
    ran = await ekiben(platform, *logs, "--since", "2026-11-26T12:00:00Z", "-o", "json", home=tmp_path)
    assert json.loads(ran.out)["text"] == "hello" and asked[1].since_time.seconds == 1_795_694_400
    platform.deployments.breaks = 5  # The channel asks again by itself first.
    ran = await ekiben(platform, *logs, "--tail", "0", "--follow", "--no-prefix", home=tmp_path)
    assert ran.out == "hello\n", ran.err
    first, again = asked[2], asked[-1]
    assert (first.HasField("tail_lines"), first.tail_lines, first.HasField("since_time")) == (True, 0, False)
    # What was printed while the deployer was away is asked for, and nothing older.
    assert again.tail_lines > 0 and again.since_time.seconds > 1_700_000_000
    platform.deployments.log = []
    ran = await ekiben(platform, *logs, "--replica", "nobody", home=tmp_path)
    assert ran.out == "" and "Nothing of the kind was printed; `ekiben deployments replicas demo`" in ran.err


async def test_deployment_whose_build_fails_prints_the_log_and_exits_1(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    failed = builder_pb2.Build(name="builds/b", bento="bentoRepositories/summarizer/bentos/v1")
    failed.state, failed.failure.message = builder_pb2.Build.FAILED, "nonsense==9 was not found"
    platform.builds.states = [failed]
    condition = deployer_pb2.Condition(type="Built", status=deployer_pb2.Condition.FALSE, message="The build failed.")
    platform.deployments.states = [
        State(state=State.FAILED, observed_generation=1, build="builds/b", conditions=[condition])
    ]
    ran = await ekiben(platform, "deployment", "create", "summarizer:v1", "--name", "demo", home=tmp_path)
    assert ran.code == 1 and ran.out == ""
    for said in ("demo is FAILED", "no version of nonsense==9", "nonsense==9 was not found"):
        assert said in ran.err


async def test_update_sends_only_what_changes(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    demo = State(name="deployments/demo", etag='"1"', labels={"a": "b"})
    demo.template.bento = "bentoRepositories/summarizer/bentos/v1"
    demo.template.envs.add(name="OLD", value="1")
    platform.deployments.deployments[demo.name] = demo
    ran = await ekiben(
        platform, *("deployments", "update", "demo", "--unset-env", "OLD", "-e", "NEW=2", "--no-wait"), home=tmp_path
    )
    assert ran.code == 0, ran.err
    request = platform.deployments.requests[0]
    assert list(request.update_mask.paths) == ["template"] and request.deployment.etag == '"1"'
    assert [(env.name, env.value) for env in request.deployment.template.envs] == [("NEW", "2")]
    same = await ekiben(platform, "deployments", "update", "demo", "-e", "NEW=2", home=tmp_path)
    assert same.code == 0 and "so already" in same.err and len(platform.deployments.requests) == 1


async def test_what_get_prints_can_be_given_to_create(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    demo = State(name="deployments/demo", state=State.RUNNING, uid="u", generation=4, urls=["http://x"])
    demo.template.bento = "bentoRepositories/summarizer/bentos/v1"
    demo.capture.sample_percent = 0
    platform.deployments.deployments[demo.name] = demo
    file = tmp_path / "demo.yaml"
    file.write_text((await ekiben(platform, "deployments", "get", "demo", "-o", "yaml", home=tmp_path)).out)
    ran = await ekiben(
        platform, "deployments", "create", "-f", str(file), "--name", "second", "--no-wait", home=tmp_path
    )
    assert ran.code == 0, ran.err
    sent = platform.deployments.requests[0].deployment
    assert sent.name == "deployments/second" and sent.uid == "" and sent.capture.HasField("sample_percent")
    file.write_text("bento: summarizer\nscaling: {Nonsense: {minReplica: 2}}\n")
    bad = await ekiben(platform, "deployments", "create", "-f", str(file), home=tmp_path)
    assert bad.code == 1 and "minReplica" in bad.err


async def test_delete_waits_until_it_is_gone(platform: Platform, tmp_path: Path) -> None:
    platform.deployments.deployments["deployments/demo"] = State(name="deployments/demo")
    ran = await ekiben(platform, "deployments", "delete", "demo", home=tmp_path)
    assert ran.code == 0 and "Deleted deployment demo." in ran.err


async def test_each_call_joins_one_trace_whose_id_is_printed(platform: Platform, tmp_path: Path) -> None:
    platform.deployments.deployments["deployments/demo"] = State(name="deployments/demo")
    ran = await ekiben(platform, "--trace", "deployments", "get", "demo", home=tmp_path)
    trace = ran.err.split()[1]
    assert len(trace) == 32 and platform.deployments.traceparents[0].split("-")[1] == trace


async def test_predictions_are_filtered_and_shown(platform: Platform, tmp_path: Path) -> None:
    prediction = recorder_pb2.Prediction(
        name="predictions/p1", deployment="deployments/demo", status=200, method="POST", path="/summarize"
    )
    prediction.latency.FromMilliseconds(12)
    prediction.trace_id = "ab" * 16
    prediction.request.text, prediction.request.headers["content-type"] = '{"text":"é"}', "application/json"
    prediction.response.body = b"\xff\x00"
    prediction.monitor_entries.add(monitor="iris", data='{"species": "setosa"}')
    platform.predictions.predictions = [prediction]
    ran = await ekiben(
        platform,
        *("predictions", "list", "-d", "demo", "--since", "1h", "--status", "2xx", "--trace", "ab" * 16),
        home=tmp_path,
    )
    assert ran.code == 0 and "12.0 ms" in ran.out, ran.err
    asked = platform.predictions.asked[0]
    assert (asked.deployment, asked.status, asked.trace_id) == ("deployments/demo", "2xx", "ab" * 16)
    assert asked.start_time.seconds > 0 and not asked.HasField("end_time")
    shown = (await ekiben(platform, "predictions", "show", "p1", home=tmp_path)).out
    for text in ("POST /summarize", '"text": "é"', "2 bytes that are not text", "Monitor iris", "setosa"):
        assert text in shown
    tail = await ekiben(platform, "predictions", "tail", "-o", "json", home=tmp_path)
    assert json.loads(tail.out)["name"] == "predictions/p1"
    bad = await ekiben(platform, "predictions", "list", "--since", "yesterday", home=tmp_path)
    assert bad.code == 2 and "is not a time" in bad.err


async def test_token_value_is_printed_alone(platform: Platform, tmp_path: Path) -> None:
    ran = await ekiben(platform, "tokens", "create", "ci", "--role", "viewer", "--expires", "90d", home=tmp_path)
    assert ran.out == "ekb_new\n", ran.err
    token = platform.accounts.tokens[0]
    assert token.role == 2 and token.expire_time.seconds
    assert (await ekiben(platform, "tokens", "list", home=tmp_path)).out.splitlines()[1].split()[1] == "ci"


async def test_secret_is_made_of_literals_files_and_env_files(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("KEY\n")
    (tmp_path / ".env").write_text("# comment\nexport A='quoted'\n\nB=b=c\n")
    ran = await ekiben(
        platform,
        *("secrets", "create", "hub", "--literal", "T=v", "--from-file", str(tmp_path / "key.pem")),
        *("--from-env-file", str(tmp_path / ".env"), "--stage", "runtime"),
        home=tmp_path,
    )
    assert ran.code == 0, ran.err
    secret = platform.secrets.secrets["secrets/hub"]
    assert {item.key: item.value for item in secret.items} == {"T": "v", "A": "quoted", "B": "b=c", "key.pem": "KEY\n"}


async def test_login_keeps_a_context_that_only_its_owner_reads(platform: Platform, tmp_path: Path) -> None:
    bad = await ekiben(None, "login", platform.endpoint, "--token", "ekb_nonsense", home=tmp_path, EKIBEN_API_TOKEN="")
    assert bad.code == 1 and "ekiben login" in bad.err
    ran = await ekiben(None, "login", platform.endpoint, "--token", "ekb_dev", home=tmp_path, EKIBEN_API_TOKEN="")
    assert ran.code == 0 and "as dev (developer)" in ran.err, ran.err
    file = tmp_path / ".config" / "ekiben" / "config.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    listed = await ekiben(None, "deployments", "list", "-o", "json", home=tmp_path, EKIBEN_API_TOKEN="")
    assert (listed.code, listed.out) == (0, "[]\n"), listed.err
    # The context's token goes to the context's endpoint only.
    other = await ekiben(None, "--endpoint", "http://localhost:1", "models", "list", home=tmp_path, EKIBEN_API_TOKEN="")
    assert "does not answer" in other.err
    contexts = await ekiben(None, "contexts", "list", "-o", "json", home=tmp_path)
    assert json.loads(contexts.out)[0]["loggedIn"] is True and "ekb_dev" not in contexts.out
    await ekiben(None, "logout", home=tmp_path)
    without = await ekiben(None, "deployments", "list", home=tmp_path, EKIBEN_API_TOKEN="")
    assert without.code == 1 and "Run `ekiben login" in without.err


async def test_admin_token_of_this_machine_is_used_without_asking(platform: Platform, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "admin-token").write_text("ekb_admin\n")
    ran = await ekiben(None, "login", platform.endpoint, home=tmp_path, EKIBEN_API_TOKEN="", EKIBEN_DATA=str(data))
    assert ran.code == 0 and "as admin (admin)" in ran.err, ran.err


async def test_server_that_is_away_is_said_so_in_two_lines(tmp_path: Path) -> None:
    ran = await ekiben(None, "models", "list", home=tmp_path, EKIBEN_ENDPOINT="http://127.0.0.1:1")
    assert ran.code == 1 and ran.out == ""
    assert ran.err.splitlines()[0] == "Error: http://127.0.0.1:1 does not answer."
    assert "Is `ekiben up` running?" in ran.err and "Traceback" not in ran.err
    debug = await ekiben(None, "models", "list", "--debug", home=tmp_path, EKIBEN_ENDPOINT="http://127.0.0.1:1")
    assert "Traceback" in debug.err


async def test_replica_that_crashes_is_quoted_once(platform: Platform, tmp_path: Path) -> None:
    ready_bento(platform)
    words = "It exited with 1. Its last lines:\nValueError: no weights"
    wrong = [
        deployer_pb2.Condition(type=kind, status=deployer_pb2.Condition.FALSE, message=message)
        for kind, message in (("Available", words), ("Progressing", f"Revision 1 does not start. {words}"))
    ]
    platform.deployments.states = [State(state=State.FAILED, observed_generation=1, conditions=wrong)]
    ran = await ekiben(platform, "deployments", "create", "summarizer", "--name", "demo", home=tmp_path)
    assert ran.code == 1 and ran.err.count("ValueError: no weights") == 1, ran.err
    assert "ekiben deployments logs demo" in ran.err
