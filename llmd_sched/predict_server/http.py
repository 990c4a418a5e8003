"""The routes of llm-d's trainer and of its predictor, on one port.

Errors are ``{"detail": text}``: 400 a value that cannot be, 413 a body beyond the limit, 422 a body of another shape
(the text says which row, which field and what is accepted), 503 nothing learned yet.
"""

from __future__ import annotations

import logging
import time
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from llmd_sched.predict_server import metrics, replies
from llmd_sched.predict_server.rows import BadRow, Bulk, LooseBulk, Row, Training, check, read_each
from llmd_sched.predict_server.service import NotReady, Service, Settings

MAX_BODY_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class FlushRequest(msgspec.Struct, frozen=True):
    flush_training_data: bool = True
    flush_test_data: bool = True
    flush_metrics: bool = True
    reason: str | None = None


# As lenient as the reference's parser, to which "5" and 5.0 are 5.
_row = msgspec.json.Decoder(Row, strict=False)
_bulk = msgspec.json.Decoder(Bulk, strict=False)
_loose_bulk = msgspec.json.Decoder(LooseBulk, strict=False)
_training = msgspec.json.Decoder(Training, strict=False)
_flush = msgspec.json.Decoder(FlushRequest)


class PredictServer:
    """Started, it serves; stopped, it has saved what it learned."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.service = Service(settings)
        self.metrics = metrics.Metrics(self.service)
        self._stack = AsyncExitStack()

    async def start(self) -> int:
        """Listen; returns the port. OSError when it cannot be had."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> int:
        self._stack.push_async_callback(self.service.stop)
        await self.service.start()
        runner = web.AppRunner(self.app(), access_log=None, shutdown_timeout=1.0)
        self._stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await web.TCPSite(runner, self.settings.host, self.settings.port, backlog=1024).start()
        port = int(runner.addresses[0][1])
        _log.info("predict-server on http://%s:%d", self.settings.host, port)
        return port

    async def stop(self) -> None:
        await self._stack.aclose()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._answered])
        app.add_routes(
            [
                web.post("/predict", self._predict),
                web.post("/predict/bulk", self._predict_loose),
                web.post("/predict/bulk/strict", self._predict_strict),
                web.post("/add_training_data_bulk", self._add_training_data),
                web.post("/flush", self._flush),
                web.post("/reload", self._reload),
                web.get("/status", self._status),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/data/status", self._data_status),
                web.get("/model/download/info", self._model_info),
                web.get("/", self._root),
            ]
        )
        return app

    @web.middleware
    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except msgspec.DecodeError as error:
            response = _detail(422, str(error))
        except BadRow as error:
            response = _detail(400, str(error))
        except NotReady as error:
            response = _detail(503, str(error))
        except web.HTTPRequestEntityTooLarge:
            response = _detail(413, f"the body exceeds {MAX_BODY_BYTES} bytes")
        except web.HTTPException as error:
            response = _detail(error.status, error.reason)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            response = _detail(500, "an internal error; the server's log says more")
        resource = request.match_info.route.resource
        self.metrics.count(resource.canonical if resource else "other", response.status)
        return response

    async def _predict(self, http: web.Request) -> web.Response:
        body, began_s = await http.read(), time.perf_counter()
        row = _row.decode(body)
        row.check("$")
        reply = replies.full_prediction(self.service, self.service.predict([row]))
        self.metrics.predicted(1, time.perf_counter() - began_s)
        return _json(reply)

    async def _predict_strict(self, http: web.Request) -> web.Response:
        body, began_s = await http.read(), time.perf_counter()
        rows = _bulk.decode(body).requests
        check(rows, "requests")
        predictions = replies.predictions(self.service, self.service.predict(rows))
        took_s = time.perf_counter() - began_s
        self.metrics.predicted(len(rows), took_s)
        return _json(replies.BulkReply(predictions, len(rows), len(rows), 0, 1e3 * took_s))

    async def _predict_loose(self, http: web.Request) -> web.Response:
        """Row by row: a bad row is an error of its own, and so is every row before anything is learned."""
        body, began_s = await http.read(), time.perf_counter()
        raws = _loose_bulk.decode(body).requests
        rows, errors = read_each(raws)
        found: dict[int, replies.Prediction] = {}
        try:
            if rows:
                predictions = replies.predictions(self.service, self.service.predict(list(rows.values())))
                found = dict(zip(rows, predictions, strict=True))
        except NotReady as error:
            errors |= dict.fromkeys(rows, str(error))
        took_s = time.perf_counter() - began_s
        self.metrics.predicted(len(found), took_s, refused=len(errors))
        return _json(replies.loose_reply(found, errors, raws, 1e3 * took_s))

    async def _add_training_data(self, http: web.Request) -> web.Response:
        entries = _training.decode(await http.read()).entries
        check(entries, "entries")
        await self.service.learn(entries)
        return _json({"message": f"Accepted {len(entries)} training samples."}, 202)

    async def _flush(self, http: web.Request) -> web.Response:
        asked = _flush.decode(await http.read() or b"{}")
        counts = self.service.flush() if asked.flush_training_data else (0, 0)
        if asked.flush_metrics:
            self.service.forget_errors()
        return _json(
            replies.flushed(
                *counts,
                training=asked.flush_training_data,
                test=asked.flush_test_data,
                metrics=asked.flush_metrics,
                reason=asked.reason,
            )
        )

    async def _reload(self, _: web.Request) -> web.Response:
        return _json(replies.reloaded(self.service))

    async def _status(self, http: web.Request) -> web.Response:
        return _json(replies.status(self.service, f"{http.scheme}://{http.host}"))

    async def _healthz(self, _: web.Request) -> web.Response:
        return _json({"status": "ok", "service": "predict-server"})

    async def _readyz(self, _: web.Request) -> web.Response:
        self.service.check_ready()
        return _json({"status": "ready"})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.page(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _data_status(self, _: web.Request) -> web.Response:
        return _json(replies.data_status(self.service))

    async def _model_info(self, _: web.Request) -> web.Response:
        return _json(replies.model_info(self.service))

    async def _root(self, _: web.Request) -> web.Response:
        return _json(replies.root(self.service))


def _json(reply: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(reply), status=status, content_type="application/json")


def _detail(status: int, text: str) -> web.Response:
    return _json({"detail": text}, status)
