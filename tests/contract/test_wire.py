"""Our protobuf definitions are Envoy's as far as they go, and the committed modules are made from them."""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message

from llmd_sched.wire import accesslog_pb2, als_pb2, core_pb2, ext_proc_pb2, http_status_pb2, processing_mode_pb2

ROOT = Path(__file__).resolve().parents[2]
WIRE = ROOT / "llmd_sched" / "wire"
DESCRIBE_XDS = Path(__file__).with_name("describe_xds.py")
MODULES = (accesslog_pb2, als_pb2, core_pb2, ext_proc_pb2, http_status_pb2, processing_mode_pb2)


def generate(proto: Path, out: Path) -> Path:
    """Run the generator that lies in ``proto``; return the folder with the generated modules."""
    subprocess.run([sys.executable, str(proto / "generate.py"), "--out", str(out)], check=True, timeout=120)
    return out / "llmd_sched" / "wire"


def generated(folder: Path) -> dict[str, str]:
    """File name -> text of the generated files in ``folder``."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if "_pb2.py" in path.name}


def gencode_version(text: str) -> tuple[int, ...]:
    """The protobuf version a generated module was made for, which is also the oldest runtime it accepts."""
    found = re.search(r"^# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)$", text, re.MULTILINE)
    assert found
    return tuple(int(part) for part in found.groups())


def file_descriptor(text: str) -> dict[str, Any]:
    """The definitions embedded in a generated module, without importing it."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "AddSerializedFile"
        ):
            return runpy.run_path(str(DESCRIBE_XDS))["describe"](ast.literal_eval(node.args[0]))
    raise AssertionError("no descriptor in a generated module")


def out_of_date(committed: dict[str, str], fresh: dict[str, str]) -> list[str]:
    """Names of the files that differ; where the tool's version does, only the definitions are compared."""
    changed = set(committed) ^ set(fresh)
    for name in set(committed) & set(fresh):
        module = name.removesuffix("i")
        if gencode_version(committed[module]) == gencode_version(fresh[module]):
            same = committed[name] == fresh[name]
        else:
            same = file_descriptor(committed[module]) == file_descriptor(fresh[module])
        if not same:
            changed.add(name)
    return sorted(changed)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return generated(generate(ROOT / "proto", tmp_path_factory.mktemp("fresh")))


def test_the_committed_modules_are_what_the_proto_files_generate(fresh: dict[str, str]) -> None:
    assert out_of_date(generated(WIRE), fresh) == []


def as_if_by_another_tool(modules: dict[str, str]) -> dict[str, str]:
    """The same definitions, generated for another protobuf version into different text."""
    mark = "Protobuf Python Version: "
    return {name: text.replace(mark, f"{mark}1") + "# more\n" for name, text in modules.items()}


def test_another_version_of_the_tool_is_no_difference(fresh: dict[str, str]) -> None:
    assert out_of_date(generated(WIRE), as_if_by_another_tool(fresh)) == []


def test_an_edited_proto_file_is_noticed_whatever_the_version_of_the_tool(tmp_path: Path) -> None:
    proto = shutil.copytree(ROOT / "proto", tmp_path / "proto")
    source = proto / "llmd_sched" / "wire" / "http_status.proto"
    source.write_text(source.read_text().replace("StatusCode code = 1;", "StatusCode code = 2;"))
    edited = generated(generate(proto, tmp_path / "out"))
    for modules in (edited, as_if_by_another_tool(edited)):
        changed = out_of_date(generated(WIRE), modules)
        assert {name.removesuffix("i") for name in changed} == {"http_status_pb2.py"}


def test_pyproject_asks_for_a_protobuf_runtime_the_modules_accept() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirement = next(line for line in project["dependencies"] if re.match(r"protobuf\b", line))
    lowest = re.search(r">=\s*([\d.]+)", requirement)
    assert lowest
    lower_bound = tuple(int(part) for part in lowest.group(1).split("."))
    needed = max(gencode_version(text) for name, text in generated(WIRE).items() if name.endswith(".py"))
    assert lower_bound >= needed


def xds(verb: str, name: str = "", stdin: bytes = b"") -> bytes:
    """What describe_xds.py answers."""
    command = [sys.executable, str(DESCRIBE_XDS), verb, *([name] if name else [])]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One line for each thing we define and upstream does not, or not so. What only upstream has is no difference."""
    return [
        f"{name}: {what} here, {theirs.get(name)} upstream" for name, what in ours.items() if theirs.get(name) != what
    ]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return json.loads(xds("describe"))


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    describe = runpy.run_path(str(DESCRIBE_XDS))["describe"]
    return {name: what for module in MODULES for name, what in describe(module.DESCRIPTOR.serialized_pb).items()}


def test_every_committed_module_is_compared_with_upstream() -> None:
    assert {f"{module.__name__.rpartition('.')[2]}.py" for module in MODULES} == {
        path.name for path in WIRE.glob("*_pb2.py")
    }


def test_every_message_field_enum_value_and_method_is_upstreams(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert differences(ours, theirs) == []
    assert len(ours) > 200


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("envoy.service.ext_proc.v3.ProcessingRequest.protocol_config", {"number": 12}),
        ("envoy.data.accesslog.v3.AccessLogCommon.stream_id", {"type": 12}),
        ("envoy.service.ext_proc.v3.HeaderMutation.set_headers", {"label": 1}),
        ("envoy.data.accesslog.v3.AccessLogCommon.metadata", {"type_name": ".google.protobuf.Struct"}),
        ("envoy.service.ext_proc.v3.BodyMutation.streamed_response", {"oneof": ""}),
        ("envoy.service.ext_proc.v3.ExternalProcessor.Process", {"server_streaming": False}),
    ],
)
def test_one_changed_property_is_noticed(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, change: dict[str, Any]
) -> None:
    mutated = copy.deepcopy(ours)
    assert change.keys() <= mutated[name].keys()
    mutated[name].update(change)
    assert len(differences(mutated, theirs)) == 1


@pytest.mark.parametrize("change", [{"envoy.type.v3.StatusCode.OK": 201}, {"envoy.type.v3.StatusCode.Fine": 200}])
def test_a_changed_or_invented_enum_value_is_noticed(
    ours: dict[str, Any], theirs: dict[str, Any], change: dict[str, int]
) -> None:
    assert len(differences(ours | change, theirs)) == 1


def test_method_paths_are_the_ones_envoy_calls() -> None:
    services = {**ext_proc_pb2.DESCRIPTOR.services_by_name, **als_pb2.DESCRIPTOR.services_by_name}
    assert {f"/{service.full_name}/{method.name}" for service in services.values() for method in service.methods} == {
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
        "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs",
    }


def as_dict(message: Message) -> dict[str, Any]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def duplex_response() -> ext_proc_pb2.ProcessingResponse:
    chunk = ext_proc_pb2.StreamedBodyResponse(body=b'{"model": "m"}\x00\xff', end_of_stream=True)
    mutation = ext_proc_pb2.BodyMutation(streamed_response=chunk)
    common = ext_proc_pb2.CommonResponse(body_mutation=mutation)
    return ext_proc_pb2.ProcessingResponse(request_body=ext_proc_pb2.BodyResponse(response=common))


def lean_response() -> ext_proc_pb2.ProcessingResponse:
    header = core_pb2.HeaderValue(key="x-gateway-destination-endpoint", raw_value=b"10.0.0.1:8000")
    option = core_pb2.HeaderValueOption(
        header=header, append_action=core_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    )
    headers = ext_proc_pb2.HeaderMutation(set_headers=[option], remove_headers=["x-old"])
    common = ext_proc_pb2.CommonResponse(header_mutation=headers, clear_route_cache=True)
    response = ext_proc_pb2.ProcessingResponse(request_body=ext_proc_pb2.BodyResponse(response=common))
    response.dynamic_metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:8000"}})
    response.override_message_timeout.FromMilliseconds(1500)
    return response


def immediate_response() -> ext_proc_pb2.ProcessingResponse:
    reply = ext_proc_pb2.ImmediateResponse(
        status=http_status_pb2.HttpStatus(code=http_status_pb2.TooManyRequests),
        body=b"inference error: ResourceExhausted - full",
        grpc_status=ext_proc_pb2.GrpcStatus(status=8),
        details="rejected-saturated",
    )
    return ext_proc_pb2.ProcessingResponse(immediate_response=reply)


@pytest.mark.parametrize("make", [duplex_response, lean_response, immediate_response])
def test_upstream_reads_a_processing_response_as_we_wrote_it(make: Any) -> None:
    message = make()
    read = json.loads(xds("parse", message.DESCRIPTOR.full_name, message.SerializeToString()))
    assert read == as_dict(message)
    assert read


def read_back(message: Message, content: dict[str, Any]) -> None:
    """Have upstream serialise ``content``, parse it into ``message`` of ours, and expect nothing lost or changed."""
    message.ParseFromString(xds("serialise", message.DESCRIPTOR.full_name, json.dumps(content).encode()))
    assert as_dict(message) == content


def test_we_read_a_processing_request_as_upstream_wrote_it() -> None:
    subset = {"x-gateway-destination-endpoint-subset": ["10.0.0.1:8000", "10.0.0.2"]}
    lines = [{"key": ":path", "raw_value": "L3YxL2NvbXBsZXRpb25z"}, {"key": "x-request-id", "value": "r1"}]
    message = ext_proc_pb2.ProcessingRequest()
    read_back(
        message,
        {
            "request_headers": {"headers": {"headers": lines}, "end_of_stream": True},
            "metadata_context": {"filter_metadata": {"envoy.lb.subset_hint": subset}},
            "attributes": {"envoy.filters.http.ext_proc": {"request.size": 12.0}},
            "protocol_config": {
                "request_body_mode": "BUFFERED",
                "response_body_mode": "FULL_DUPLEX_STREAMED",
                "send_body_without_waiting_for_header_response": True,
            },
        },
    )
    assert message.WhichOneof("request") == "request_headers"
    assert message.request_headers.headers.headers[0].raw_value == b"/v1/completions"
    assert message.protocol_config.request_body_mode == processing_mode_pb2.ProcessingMode.BUFFERED


def test_we_read_an_access_log_batch_as_upstream_wrote_it() -> None:
    entry = {
        "common_properties": {
            "start_time": "2025-01-02T03:04:05.678901Z",
            "time_to_first_upstream_tx_byte": "0.002500s",
            "time_to_last_upstream_rx_byte": "1.250s",
            "duration": "1.251s",
            "upstream_remote_address": {"socket_address": {"address": "10.0.0.1", "port_value": 8000}},
            "response_flags": {"downstream_connection_termination": True, "unauthorized_details": {}},
            "metadata": {"filter_metadata": {"llmd": {"ticket": "t-1", "first_us": 81250.0, "chunks": 17.0}}},
            "custom_tags": {"pool": "a"},
            "upstream_request_attempt_count": 1,
            "stream_id": "0b1f",
            "upstream_wire_bytes_received": "4096",
            "access_log_type": "DownstreamEnd",
        },
        "protocol_version": "HTTP2",
        "request": {
            "request_method": "POST",
            "path": "/v1/completions",
            "request_id": "r1",
            "request_body_bytes": "1024",
        },
        "response": {
            "response_code": 200,
            "response_body_bytes": "4000",
            "response_headers": {"content-type": "text/event-stream"},
            "response_code_details": "via_upstream",
        },
    }
    message = als_pb2.StreamAccessLogsMessage()
    identifier = {"node": {"id": "envoy-1", "cluster": "gateway"}, "log_name": "llmd"}
    read_back(message, {"identifier": identifier, "http_logs": {"log_entry": [entry]}})
    common = message.http_logs.log_entry[0].common_properties
    assert common.metadata.filter_metadata["llmd"]["ticket"] == "t-1"
    assert common.time_to_last_upstream_rx_byte.ToMicroseconds() == 1_250_000
    assert common.access_log_type == accesslog_pb2.DownstreamEnd


def test_fields_only_upstream_knows_are_skipped() -> None:
    content = {"node": {"id": "envoy-1", "cluster": "gateway", "locality": {"zone": "z"}}, "log_name": "llmd"}
    message = als_pb2.StreamAccessLogsMessage.Identifier()
    message.ParseFromString(xds("serialise", message.DESCRIPTOR.full_name, json.dumps(content).encode()))
    assert as_dict(message) == {"node": {"id": "envoy-1", "cluster": "gateway"}, "log_name": "llmd"}


@pytest.mark.parametrize("init", ["raise ImportError('the package of another wheel')\n", None])
def test_upstream_is_found_whatever_the_other_wheel_left_in_the_envoy_package(tmp_path: Path, init: str | None) -> None:
    """Another folder named envoy, first on the path, with an ``__init__`` of its own or with none."""
    other = tmp_path / "envoy"
    other.mkdir()
    if init is not None:
        (other / "__init__.py").write_text(init)
    command = [sys.executable, str(DESCRIBE_XDS), "describe"]
    done = subprocess.run(command, capture_output=True, timeout=120, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr.decode()
    assert "envoy.service.ext_proc.v3.ProcessingRequest" in json.loads(done.stdout)
