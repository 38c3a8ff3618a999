"""What a process of its own does that a test must not: keep what it has for good."""

import gc
import subprocess
import sys

from services.kernel.endings import settled

PROGRAM = """
import gc
from services.kernel import endings

async def main() -> None:
    endings.settled()
    print(gc.get_freeze_count() > 10_000, gc.isenabled())

endings.run(main())
"""


def test_only_a_process_of_its_own_keeps_what_it_has_from_the_collector() -> None:
    before = gc.get_freeze_count()
    settled()
    assert gc.get_freeze_count() == before
    ran = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["True", "True"]
