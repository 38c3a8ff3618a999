"""What Ctrl-C does to a program while it starts, and afterwards."""

import os
import signal
import subprocess
import sys
from pathlib import Path

INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    def interruptible() -> None:
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=120, preexec_fn=interruptible
    )


def test_the_command_ends_without_a_word_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(INTERRUPT)
    # What the installed script does.
    done = run(
        tmp_path, sys.executable, "-P", "-c", "import sys\nfrom ekiben.launch import command\nsys.exit(command())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_program_that_the_command_becomes_does_so_too(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INTERRUPT)
    done = run(tmp_path, sys.executable, "-P", "-m", "ekiben.launch", "program")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_program_that_runs_is_interrupted_in_words(tmp_path: Path) -> None:
    body = "".join(f"    {line}\n" for line in INTERRUPT.splitlines())
    (tmp_path / "program.py").write_text(f"def main():\n{body}    raise SystemExit(3)\n")
    done = run(tmp_path, sys.executable, "-P", "-m", "ekiben.launch", "program", "--option")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_program_has_its_arguments_and_gives_its_status(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\ndef main():\n    print(sys.argv[1:])\n    return 4\n")
    done = run(tmp_path, sys.executable, "-P", "-m", "ekiben.launch", "program", "--option", "x")
    assert (done.returncode, done.stdout, done.stderr) == (4, "['--option', 'x']\n", "")
