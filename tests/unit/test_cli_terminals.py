"""What is refused before anybody is asked."""

import pytest
from click.testing import CliRunner

from ekiben.cli.terminals import debug, exec_


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (debug, ["demo", "--image", " "], "name an image"),
        (exec_, ["demo", "--", "\udcff"], "no UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_said_in_words(command: object, words: list[str], said: str) -> None:
    done = CliRunner().invoke(command, words)  # type: ignore[arg-type]
    assert done.exit_code == 2 and said in done.output
