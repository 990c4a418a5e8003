"""multipart/form-data as it arrives: events in the order of the form, never a whole file in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from batchgw.errors import InvalidRequest

OVERHEAD_BYTES = 1 << 20
"""What a form may hold beside its file."""
MAX_FIELD_BYTES = 8 << 10
MAX_FIELDS = 32
MAX_FILENAME_CHARS = 255


class Field(msgspec.Struct, frozen=True):
    name: str
    value: str


class FileStart(msgspec.Struct, frozen=True):
    name: str
    filename: str


class FileData(msgspec.Struct, frozen=True):
    data: bytes


class FileEnd(msgspec.Struct, frozen=True):
    pass


Event = Field | FileStart | FileData | FileEnd


class FormReader:
    """``feed`` gives the events of the bytes so far, ``close`` that it was whole. Both raise InvalidRequest."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            shown = content_type[:80]
            raise InvalidRequest(
                f"Content-Type is {shown!r}; multipart/form-data with a boundary is expected.", code="invalid_form"
            )
        self._events: list[Event] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._value = bytearray()
        self._in_file = self._whole = False
        self._fields = 0
        try:
            self._parser = MultipartParser(boundary, self._callbacks())  # type: ignore[arg-type]
        except FormParserError as e:
            raise _broken(e) from None

    def feed(self, data: bytes) -> list[Event]:
        try:
            self._parser.write(data)
        except FormParserError as e:
            raise _broken(e) from None
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        if not self._whole:
            raise InvalidRequest("The form ended before its closing boundary.", code="invalid_form")

    def _callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._headers = {}
        self._value = bytearray()
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise InvalidRequest(f"The form has more than {MAX_FIELDS} fields.", code="invalid_form")

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._in_file = filename is not None or self._name == "file"
        if self._in_file:
            self._events.append(FileStart(self._name, clean(_text(filename or b""))))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._events.append(FileData(data[start:end]))
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"The form field has more than {MAX_FIELD_BYTES} bytes.", self._name[:80])

    def _part_end(self) -> None:
        if self._in_file:
            self._events.append(FileEnd())
            return
        try:
            self._events.append(Field(self._name, self._value.decode()))
        except UnicodeDecodeError:
            raise InvalidRequest("The form field is not UTF-8.", self._name[:80]) from None

    def _end(self) -> None:
        self._whole = True


async def events(stream: AsyncIterator[bytes], content_type: str, limit_bytes: int) -> AsyncIterator[Event]:
    """``limit_bytes`` is of the file the form may hold."""
    reader, size = FormReader(content_type), 0
    async for piece in stream:
        size += len(piece)
        if size > limit_bytes + OVERHEAD_BYTES:
            raise too_large(limit_bytes)
        for event in reader.feed(piece):
            yield event
    reader.close()


async def content(form: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    """The bytes of the file that has just started; leaves the form at what follows it."""
    async for event in form:
        if not isinstance(event, FileData):
            return
        yield event.data


def too_large(limit_bytes: int) -> InvalidRequest:
    message = f"File size exceeds the maximum allowed size of {limit_bytes} bytes"
    return InvalidRequest(message, "file", "file_too_large")


def clean(filename: str) -> str:
    """The last part of a path of any system, without control characters; empty when nothing is left."""
    name = re.split(r"[/\\]", filename)[-1]
    name = "".join(c for c in name if c.isprintable())[:MAX_FILENAME_CHARS].strip()
    return "" if name in (".", "..") else name


def _text(filename: bytes) -> str:
    return filename.decode("utf-8", "replace")


def _broken(error: FormParserError) -> InvalidRequest:
    return InvalidRequest(f"The body is not valid multipart/form-data: {error}", code="invalid_form")
