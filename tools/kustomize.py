"""Renders the chart into deploy/kustomize/base, or with `--check` says whether that is fresh.

Without helm (`python -m tests.helm` builds it) the check compares what the chart was when it was rendered last.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "ekiben"
BASE = ROOT / "deploy" / "kustomize" / "base"
NAMESPACE = "ekiben"
_OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")
_CACHE = Path(os.environ.get("EKIBEN_TEST_CACHE") or Path.home() / ".cache" / "ekiben-tests")


def helm() -> str | None:
    """The program, installed or built for the tests."""
    built = sorted(_CACHE.glob("helm-v4*/helm"))
    return str(built[-1]) if built else shutil.which("helm")


def digest() -> str:
    """Of what the chart is."""
    hashed = hashlib.sha256()
    for file in sorted(path for path in CHART.rglob("*") if path.is_file() and "examples" not in path.parts):
        hashed.update(f"{file.relative_to(CHART)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return hashed.hexdigest()


def head() -> str:
    """What stands above each file."""
    return f"# Made by tools/kustomize.py from deploy/helm/ekiben {digest()[:16]}: change that, then `make generate`.\n"


def _without_helm(made: dict[str, Any]) -> dict[str, Any]:
    for labels in (made["metadata"], made.get("spec", {}).get("template", {}).get("metadata", {})):
        for name in _OF_HELM:
            labels.get("labels", {}).pop(name, None)
    return made


def render(program: str) -> dict[str, str]:
    """The files of the base."""
    done = subprocess.run(
        [program, "template", "ekiben", str(CHART), "--namespace", NAMESPACE],
        check=True,
        capture_output=True,
        text=True,
    )
    objects = [_without_helm(each) for each in yaml.safe_load_all(done.stdout) if each]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["platform.yaml"],
    }
    return {
        "kustomization.yaml": head() + yaml.safe_dump(kustomization, sort_keys=False),
        "platform.yaml": head() + yaml.safe_dump_all(objects, sort_keys=False, width=120),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    program = helm()
    there = {
        name: (BASE / name).read_text() if (BASE / name).exists() else ""
        for name in ("kustomization.yaml", "platform.yaml")
    }
    if program is None:
        if all(text.startswith(head()) for text in there.values()):
            return 0
        print(
            "deploy/kustomize is of another chart, and helm is not here: `python -m tests.helm` builds it; then "
            "`make generate`.",
            file=sys.stderr,
        )
        return 1
    made = render(program)
    if given.check:
        if stale := [name for name, text in made.items() if there[name] != text]:
            print(f"deploy/kustomize/base is not current: {', '.join(stale)}. Run `make generate`.", file=sys.stderr)
            return 1
        return 0
    BASE.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (BASE / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
