"""What is asked of Kubernetes for a terminal, and what its error channel says."""

from services.deployer.runtimes.kubernetes.names import CONTAINER
from services.deployer.runtimes.kubernetes.terminal import debugger, ended
from services.deployer.runtimes.sessions import ExecSpec


def test_a_debug_container_may_do_nothing_that_the_restricted_standard_forbids() -> None:
    made = debugger(ExecSpec("uid", "pod", ("sh",), tty=True, debug_image="tools", name="debug-t1"))
    assert made["targetContainerName"] == CONTAINER and made["command"] == ["sh"]
    secured = made["securityContext"]
    assert secured["runAsNonRoot"] and not secured["allowPrivilegeEscalation"]
    assert secured["capabilities"] == {"drop": ["ALL"]} and secured["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "command" not in debugger(ExecSpec("uid", "pod", (), debug_image="tools", name="debug-t1"))


def test_an_exit_status_is_told_from_a_command_that_could_not_be_run() -> None:
    assert ended({"status": "Success"}) == (0, "")
    causes = [{"reason": "ExitCode", "message": "137"}]
    assert ended({"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}) == (137, "")
    missing = {"status": "Failure", "reason": "InternalError", "message": "exec: no such file"}
    assert ended(missing) == (None, "exec: no such file")
