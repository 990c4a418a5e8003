"""``llmd-sched sim-engine``: the step machine behind real HTTP, as a vLLM server looks from outside.

POST /v1/completions and /v1/chat/completions (whole or streamed), GET /v1/models, /health, /metrics. Every reply says
in ``x-inference-pod`` which engine gave it; the request header ``X-Return-Error: <status>`` forces a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from llmd_sched.sim.engine import Engine, EngineConfig, Policy, Refusal, SimRequest
from llmd_sched.sim.exposition import CONTENT_TYPE, Exposition
from llmd_sched.sim.openai import ApiError, Ask, Wording, block_hashes, parse_chat, parse_completion
from llmd_sched.sim.realtime import RealTime
from llmd_sched.sim.replies import Replies, Reply
from llmd_sched.sim.steptime import PRESETS, preset

MAX_BODY_BYTES = 64 << 20
POD_HEADER = "x-inference-pod"
FORCED_ERROR_HEADER = "X-Return-Error"


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One simulated model server."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    """0 lets the system choose; ``SimServer.start`` returns the choice."""
    model: str = ""
    """The name served; empty is the preset's."""
    name: str = ""
    """The pod name in ``x-inference-pod``; empty is ``sim-<port>``."""
    speedup: float = 1.0
    seed: int = 0

    @property
    def served_model(self) -> str:
        return self.model or self.engine.preset.model


class SimServer:
    """A server that is started, serves, and is closed."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._model = config.served_model
        self._created = int(time.time())
        self.engine = Engine(config.engine, random.Random(config.seed))
        self.exposition = Exposition(self.engine, self._model)
        self._replies = Replies(self.exposition, config.speedup, config.engine.preset.request_overhead_s)
        self._clock = RealTime(self.engine, config.speedup, self._replies.on_step)
        self._name = config.name
        self._runner: web.AppRunner | None = None
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; returns the port. OSError when it cannot be had."""
        self._runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.host, self._config.port, backlog=1024)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        port = int(self._runner.addresses[0][1])
        self._name = self._name or f"sim-{port}"
        self._loop_task = asyncio.create_task(self._clock.run())
        return port

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; raises what the engine loop raises, should it ever."""
        assert self._loop_task is not None, "start() comes first"
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, self._loop_task}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if self._loop_task.done():
            self._loop_task.result()

    async def close(self) -> None:
        """Cut what is under way and stop listening."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
        if self._runner is not None:
            await self._runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        app.on_response_prepare.append(self._sign)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    async def _sign(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers[POD_HEADER] = self._name

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        card = {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "llmd-sched",
            "root": self._model,
            "parent": None,
            "max_model_len": self._config.engine.longest_tokens,
        }
        return _json(200, msgspec.json.encode({"object": "list", "data": [card]}))

    async def _metrics(self, _: web.Request) -> web.Response:
        self.exposition.behind_s = self._clock.behind_s
        self.exposition.behind_total_s = self._clock.behind_total_s
        return web.Response(body=self.exposition.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        return await self._complete(http, parse_completion)

    async def _chat_completions(self, http: web.Request) -> web.StreamResponse:
        return await self._complete(http, parse_chat)

    async def _complete(self, http: web.Request, parse: Callable[[bytes], Ask]) -> web.StreamResponse:
        arrival_s = self._clock.now_s()
        _forced_error(http)
        reply = self._submit(parse(await http.read()), arrival_s)
        try:
            return await (self._stream(http, reply) if reply.ask.stream else self._whole(reply))
        finally:
            # Cancelled when the client goes away; then the engine must not compute on.
            if self._replies.drop(reply):
                self._clock.abort(reply.id)

    def _submit(self, ask: Ask, arrival_s: float) -> Reply:
        if ask.model not in (None, self._model):
            raise ApiError(404, f"the model {ask.model!r} does not exist; this server has {self._model!r}")
        limit_tokens = self._config.engine.longest_tokens
        output_tokens, finish_reason = ask.output_tokens(limit_tokens - ask.prompt_tokens)
        wording = Wording(ask, self._replies.next_id(ask.chat), self._model, int(time.time()))
        reply = Reply(wording.reply_id, ask, wording, output_tokens, finish_reason)
        reply.arrival_s = arrival_s
        refusal = self._clock.submit(
            SimRequest(
                id=reply.id,
                prompt_tokens=ask.prompt_tokens,
                output_tokens=output_tokens,
                arrival_s=arrival_s,
                block_hashes=block_hashes(ask.prompt, ask.cache_salt),
                priority=ask.priority,
            )
        )
        if refusal is Refusal.TOO_LONG:
            total = f"{ask.prompt_tokens} prompt tokens and {output_tokens} output tokens"
            raise ApiError(400, f"{total} exceed this model's maximum context length of {limit_tokens} tokens")
        if refusal is Refusal.QUEUE_FULL:
            raise ApiError(503, f"the waiting queue is full ({self._config.engine.max_waiting} requests)")
        self._replies.add(reply)
        return reply

    async def _whole(self, reply: Reply) -> web.Response:
        await reply.done
        return _json(200, reply.wording.whole(reply.emitted, reply.finish_reason, reply.usage()))

    async def _stream(self, http: web.Request, reply: Reply) -> web.StreamResponse:
        if http.version < (1, 1):
            raise ApiError(400, "streaming needs HTTP/1.1")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(http)  # before the first token, as vLLM does; never suspends, so no token is missed
        reply.transport = http.transport
        await reply.done
        await response.write_eof(reply.wording.closing(reply.usage() if reply.ask.include_usage else None))
        return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _json(error.status, error.body())


def _json(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")


def _forced_error(http: web.Request) -> None:
    wanted = http.headers.get(FORCED_ERROR_HEADER)
    if wanted is None:
        return
    if not (wanted.isascii() and wanted.isdigit() and 400 <= int(wanted) <= 599):
        raise ApiError(400, f"{FORCED_ERROR_HEADER} must be a status from 400 to 599, not {wanted!r}")
    raise ApiError(int(wanted), f"forced by {FORCED_ERROR_HEADER}")


async def serve(config: ServerConfig, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set. OSError when the port cannot be had."""
    server = SimServer(config)
    try:
        port = await server.start()
        sys.stderr.write(f"sim-engine: {config.served_model} on http://{config.host}:{port}\n")
        await server.run(stop)
    finally:
        await server.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``llmd-sched sim-engine``."""
    parser.add_argument("--preset", required=True, help=f"step times: {', '.join(sorted(PRESETS))}")
    parser.add_argument("--port", type=int, required=True, help="0 lets the system choose")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", default="", help="name served (default: the preset's)")
    parser.add_argument("--name", default="", help="pod name in x-inference-pod (default: sim-PORT)")
    parser.add_argument("--speedup", type=float, default=1.0, help="divide all modelled durations by this")
    parser.add_argument("--max-num-seqs", type=int, help="sequences per step (default: the preset's)")
    parser.add_argument("--kv-blocks", type=int, help="KV-cache blocks of 16 tokens (default: the preset's)")
    parser.add_argument("--max-model-len", type=int, help="prompt plus output in tokens (default: the KV cache)")
    parser.add_argument("--max-waiting", type=int, default=1000, help="beyond it requests are refused with 503")
    parser.add_argument("--policy", choices=[policy.value for policy in Policy], default=Policy.FCFS.value)
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of log-normal step noise, e.g. 0.05")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")


def config_of(args: argparse.Namespace) -> ServerConfig:
    """The configuration the options describe; ValueError names a bad one."""
    chosen = {"max_num_seqs": args.max_num_seqs, "kv_blocks": args.kv_blocks}
    overrides = {name: value for name, value in chosen.items() if value is not None}
    if args.speedup <= 0:
        raise ValueError(f"--speedup must be positive, not {args.speedup}")
    engine = EngineConfig(
        preset=msgspec.structs.replace(preset(args.preset), **overrides),
        max_model_len=args.max_model_len,
        max_waiting=args.max_waiting,
        policy=Policy(args.policy),
        noise_sigma=args.noise,
    )
    return ServerConfig(
        engine=engine,
        host=args.host,
        port=args.port,
        model=args.model,
        name=args.name,
        speedup=args.speedup,
        seed=args.seed,
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. 0 after a clean stop, 1 when it could not start (one line says why)."""
    try:
        config = config_of(args)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve_until_signal(config))
    except ValueError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}")
    return 0


def _failed(reason: str) -> int:
    sys.stderr.write(f"sim-engine: {reason}\n")
    return 1


async def _serve_until_signal(config: ServerConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, stop)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
