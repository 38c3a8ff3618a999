"""What a revision of a deployment uses."""

from datetime import UTC, datetime

from services.deployer.domain import Bento, Revision
from services.deployer.uses import uses_of

MODEL = ("modelRepositories/iris/models/v1", "sha256:m")
REVISION = Revision(
    "d1",
    3,
    "r3",
    "{}",
    {
        "main": Bento("bentoRepositories/svc/bentos/v1", "sha256:a", "{}", (MODEL,)),
        "canary": Bento("bentoRepositories/svc/bentos/v2", "sha256:b", "{}", (MODEL,)),
    },
    "users/ann",
    datetime(2030, 1, 1, tzinfo=UTC),
)


def test_a_revision_uses_the_bentos_of_all_targets_their_models_once_and_what_was_built() -> None:
    built = {"builds/b1": ("bentoRepositories/svc/bentos/v1", "sha256:a", "sha256:environment")}
    found = uses_of("demo", REVISION, live=True, builds=built)
    assert {(use.resource, use.digest) for use in found} == {
        ("bentoRepositories/svc/bentos/v1", "sha256:a"),
        ("bentoRepositories/svc/bentos/v2", "sha256:b"),
        MODEL,
        ("builds/b1", "sha256:environment"),
    }
    assert len(found) == 4
    assert {(use.consumer, use.consumer_uid, use.live) for use in found} == {
        ("deployments/demo/revisions/3", "r3", True)
    }
