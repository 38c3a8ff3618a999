"""Generates the Python code of the protos into `ekiben/`, or with `--check` says whether it is fresh.

The import path of generated code follows the path of its .proto file, so nothing needs rewriting.
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
# Descriptors with the protos' comments, which generated Python lacks: the gateway's API reference reads them.
DESCRIPTORS = Path("ekiben") / "api" / "descriptors.binpb"


def generate(into: Path) -> None:
    """Write modules, stubs and package files for every proto below `into`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{ROOT / 'third_party' / 'protos'}",
            f"-I{well_known}",
            f"--python_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}",
            f"--mypy_grpc_out=quiet:{into}",
            f"--descriptor_set_out={into / 'descriptors.binpb'}",
            "--include_source_info",
            *sources,
        ]
    )
    if code:
        raise SystemExit(f"protoc failed with exit status {code}; its own words are above.")
    for source in sources:
        folder = into / Path(source).parent
        while folder not in (into, into / "ekiben"):
            (folder / "__init__.py").touch()
            folder = folder.parent
    (into / DESCRIPTORS).write_bytes(compact((into / "descriptors.binpb").read_bytes()))


def compact(descriptor_set: bytes) -> bytes:
    """The descriptor set with only what readers need of its source information: leading comments, no positions."""
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptor_set)
    for file in files.file:
        commented = [
            descriptor_pb2.SourceCodeInfo.Location(path=location.path, leading_comments=location.leading_comments)
            for location in file.source_code_info.location
            if location.leading_comments
        ]
        del file.source_code_info.location[:]
        file.source_code_info.location.extend(commented)
    return files.SerializeToString(deterministic=True)


def differences(fresh: Path) -> list[str]:
    """Paths below `ekiben/` whose generated content is missing, stale or no longer made."""
    made = {path.relative_to(fresh) for path in fresh.rglob("*.py*") if path.name != "__init__.py"} | {DESCRIPTORS}
    kept = {path.relative_to(ROOT) for path in (ROOT / "ekiben").glob("*/v*/*_pb2*.py*")}
    kept |= {DESCRIPTORS} if (ROOT / DESCRIPTORS).exists() else set()
    stale = {path for path in made & kept if not filecmp.cmp(fresh / path, ROOT / path, shallow=False)}
    return sorted(str(path) for path in (made ^ kept) | stale)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the code is not fresh")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        if arguments.check:
            if found := differences(fresh):
                sys.exit("Generated code is not fresh; run `make generate`:\n  " + "\n  ".join(found))
            return
        for old in (ROOT / "ekiben").glob("*/v*/*_pb2*.py*"):
            old.unlink()
        shutil.copytree(fresh / "ekiben", ROOT / "ekiben", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
