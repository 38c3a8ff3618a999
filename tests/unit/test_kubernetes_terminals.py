"""What is asked of Kubernetes for a terminal, and what its error channel says."""

import os
import signal
import subprocess
import sys

from services.deployer.runtimes.kubernetes.names import CONTAINER
from services.deployer.runtimes.kubernetes.terminal import _HANG_UP, _MARKED, debugger, ended
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


def test_a_command_starts_as_if_nothing_had_come_before_it() -> None:
    def done(*command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*_MARKED, "t1", *command], capture_output=True, text=True, timeout=120)

    assert done("sh", "-c", "echo $EKIBEN_TERMINAL; exit 7").stdout == "t1\n"
    # SIGPIPE: what writes to a reader that is gone must end, as it does everywhere.
    assert done("sh", "-c", "kill -PIPE $$; echo survived").returncode == -signal.SIGPIPE
    missing = done("no-such-program")
    assert (missing.returncode, missing.stderr) == (127, "no-such-program: No such file or directory\n")
    assert done("/etc/hostname").returncode == 126


def test_a_hang_up_ends_all_of_one_terminal_and_nothing_else() -> None:
    """The scripts are run here as they are in a pod."""
    mine, other = (f"debug-t{os.urandom(8).hex()}" for _ in range(2))
    stubborn = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    children = f"{sys.executable} -c '{stubborn}' & wait"

    def started(name: str) -> "subprocess.Popen[bytes]":
        command = [*_MARKED, name, "sh", "-c", children]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        return process

    left, kept = started(mine), started(other)
    try:
        assert subprocess.run([*_HANG_UP, mine], capture_output=True, timeout=120).stdout == b"told\n"
        assert left.wait(60) and left.stdout is not None
        assert left.stdout.read() == b""  # Its child is gone too: nobody holds the pipe.
        assert kept.poll() is None
    finally:
        subprocess.run([*_HANG_UP, other], capture_output=True, timeout=120)
        kept.wait(60)
