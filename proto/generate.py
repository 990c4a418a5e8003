"""Make ``llmd_sched/wire/*_pb2.py`` and ``*_pb2.pyi`` from the .proto files beside this script.

    python proto/generate.py [--out DIR]

DIR (default: the repository root) is the folder that holds or receives ``llmd_sched/wire``. Generated modules without
a .proto of their own are removed from there.
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write the modules under ``out``. Raises SystemExit with protoc's status when a file does not compile."""
    sources = sorted(path.relative_to(PROTO) for path in PROTO.rglob("*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    with importlib.resources.as_file(importlib.resources.files("grpc_tools") / "_proto") as well_known:
        includes = [f"--proto_path={PROTO}", f"--proto_path={well_known}"]
        outputs = [f"--python_out={out}", f"--pyi_out={out}"]
        status = protoc.main(["protoc", *includes, *outputs, *(path.as_posix() for path in sources)])
    if status:
        raise SystemExit(status)
    made = {out / path.parent / f"{path.stem}_pb2{suffix}" for path in sources for suffix in (".py", ".pyi")}
    for folder in {path.parent for path in made}:
        for stale in set(folder.glob("*_pb2.py*")) - made:
            stale.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the protobuf modules of llmd_sched.wire.")
    parser.add_argument("--out", type=Path, default=PROTO.parent, help="folder that receives llmd_sched/wire")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
