"""The example of docs/python.md, as it is written."""

import re
import sys

from tests.platform import ROOT, Platform, run


def test_the_example_of_the_page_about_python_runs(platform: Platform) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
    said = run([sys.executable, "-c", example], env=platform.client_env()).stdout.splitlines()
    assert said[0].startswith("modelRepositories/greetings/models/v1 sha256:")
    assert said[0].endswith(" True")
    assert said[1].startswith("modelRepositories/greetings/models/v1 ")
    assert said[2:] == ["hello", "DEPLOYMENT_NOT_FOUND deployments/nowhere does not exist."]
