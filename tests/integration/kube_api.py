"""An API server double over real HTTP: lists in pages, watches, leases, token and access reviews, and ways to fail.

Objects are plain dictionaries. Every write gets the next resource version; a watch replays what came after the version
it asks for, unless that was forgotten (410). Label selectors are of the form ``a=b,c=d``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from llmd_sched.kube.client import ApiClient

Object = dict[str, Any]

PODS = "api/v1/pods"
POOLS = "apis/inference.networking.k8s.io/v1/inferencepools"
OBJECTIVES = "apis/llm-d.ai/v1alpha2/inferenceobjectives"
REWRITES = "apis/llm-d.ai/v1alpha2/inferencemodelrewrites"
LEGACY_OBJECTIVES = "apis/inference.networking.x-k8s.io/v1alpha2/inferenceobjectives"
LEGACY_REWRITES = "apis/inference.networking.x-k8s.io/v1alpha2/inferencemodelrewrites"
LEASES = "apis/coordination.k8s.io/v1/leases"
NAMESPACE = "serving"


class Watcher:
    """One open watch."""

    def __init__(self, kind: str, params: dict[str, str], response: web.StreamResponse, request: web.Request) -> None:
        self.kind, self.params, self.response, self.request = kind, params, response, request
        self.ended = asyncio.Event()
        self.lock = asyncio.Lock()
        self.version = int(params["resourceVersion"])

    async def send(self, type_: str, obj: Object, pieces: int = 1) -> None:
        line = json.dumps({"type": type_, "object": obj}).encode() + b"\n"
        size = -(-len(line) // pieces)
        for at in range(0, len(line), size):
            await self.response.write(line[at : at + size])
            await asyncio.sleep(0)

    async def cut(self, type_: str, obj: Object) -> None:
        """Break off in the middle of a line."""
        line = json.dumps({"type": type_, "object": obj}).encode()
        await self.response.write(line[: len(line) // 2])
        self.drop()

    def drop(self) -> None:
        """The connection is gone, without an end of the reply."""
        if self.request.transport is not None:
            self.request.transport.abort()
        self.ended.set()


class KubeApi:
    def __init__(self) -> None:
        self.kinds = {PODS, POOLS, OBJECTIVES, REWRITES, LEASES}
        """What the server knows; add the LEGACY ones, or remove some."""
        self.forbidden: set[str] = set()
        self.objects: dict[str, dict[str, Object]] = {}
        self.version = 100
        self.forgotten = 0
        """Versions up to here are answered with 410."""
        self.watchers: list[Watcher] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, kind and query of every request."""
        self.tokens: dict[str, Object] = {}
        self.readers: set[str] = set()
        self.bearers: list[str] = []
        self.statuses: list[int] = []
        """The next requests are answered with these."""
        self.pieces = 1
        self.hang = False
        self.events: list[tuple[int, str, str, Object, Object | None]] = []
        self.port = 0
        self._runner: web.AppRunner | None = None

    # What tests do to it.

    async def put(self, kind: str, obj: Object) -> Object:
        name = obj["metadata"]["name"]
        old = self.objects.setdefault(kind, {}).get(name)
        self.version += 1
        obj = {**obj, "metadata": {"namespace": NAMESPACE, **obj["metadata"], "resourceVersion": str(self.version)}}
        self.objects[kind][name] = obj
        await self._happened(kind, "MODIFIED" if old else "ADDED", obj, old)
        return obj

    async def delete(self, kind: str, name: str) -> None:
        obj = self.objects[kind].pop(name)
        self.version += 1
        last = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        await self._happened(kind, "DELETED", last, obj)

    async def _happened(self, kind: str, type_: str, obj: Object, old: Object | None) -> None:
        self.events.append((self.version, kind, type_, obj, old))
        for watcher in self.open(kind):
            await self._replay(watcher)

    def open(self, kind: str) -> list[Watcher]:
        return [w for w in self.watchers if w.kind == kind and not w.ended.is_set()]

    async def bookmark(self, kind: str) -> None:
        for watcher in self.open(kind):
            await watcher.send("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})

    async def expire(self, kind: str) -> None:
        """Forget all versions so far, and say so in the open watches."""
        self.forgotten = self.version
        self.version += 1
        for watcher in self.open(kind):
            await watcher.send("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
            watcher.ended.set()

    def counted(self, kind: str) -> Counter[str]:
        """How many lists, watches, gets, posts and puts of a kind there were."""
        return Counter(
            ("watch" if "watch" in query else "list") if "limit" in query or "watch" in query else method.lower()
            for method, asked, query in self.requests
            if asked == kind
        )

    # The server.

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/apis/authentication.k8s.io/v1/tokenreviews", self._token_review),
                web.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", self._access_review),
                web.get("/{root:apis?/.+}/namespaces/{namespace}/{resource}", self._list_or_watch),
                web.post("/{root:apis?/.+}/namespaces/{namespace}/{resource}", self._create),
                web.get("/{root:apis?/.+}/namespaces/{namespace}/{resource}/{name}", self._get),
                web.put("/{root:apis?/.+}/namespaces/{namespace}/{resource}/{name}", self._update),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        for watcher in self.watchers:
            watcher.ended.set()
        assert self._runner is not None
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        kind = _kind(request)
        self.requests.append((request.method, kind, dict(request.query)))
        self.bearers.append(request.headers.get("Authorization", ""))
        if self.hang:
            await asyncio.sleep(60)
        if self.statuses:
            return _status(self.statuses.pop(0), "as the test wants it")
        if kind in self.forbidden:
            return _status(403, f"{kind} is forbidden")
        if "namespace" in request.match_info and kind not in self.kinds:
            return _status(404, "the server could not find the requested resource")
        response: web.StreamResponse = await handler(request)
        return response

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        if "watch" in request.query:
            return await self._watch(request)
        kind, query = _kind(request), request.query
        matching = [o for o in self._sorted(kind) if _matches(o, query)]
        start = int(query.get("continue", "0"))
        end = start + int(query.get("limit", "500"))
        meta = {"resourceVersion": str(self.version)}
        if end < len(matching):
            meta["continue"] = str(end)
        return web.json_response({"kind": "List", "metadata": meta, "items": matching[start:end]})

    def _sorted(self, kind: str) -> Iterator[Object]:
        return iter(o for _, o in sorted(self.objects.get(kind, {}).items()))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if int(request.query["resourceVersion"]) < self.forgotten:
            return _status(410, "too old resource version")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        watcher = Watcher(_kind(request), dict(request.query), response, request)
        self.watchers.append(watcher)
        try:
            await self._replay(watcher)
            await watcher.ended.wait()
        finally:
            watcher.ended.set()
        return response

    async def _replay(self, watcher: Watcher) -> None:
        async with watcher.lock:
            for version, kind, type_, obj, old in list(self.events):
                if kind == watcher.kind and version > watcher.version and not watcher.ended.is_set():
                    watcher.version = version
                    before, after = old is not None and _matches(old, watcher.params), _matches(obj, watcher.params)
                    if type_ != "DELETED" and before != after:
                        type_ = "ADDED" if after else "DELETED"
                    if before or after:
                        await watcher.send(type_, obj, self.pieces)

    async def _get(self, request: web.Request) -> web.Response:
        obj = self.objects.get(_kind(request), {}).get(request.match_info["name"])
        return _status(404, "not found") if obj is None else web.json_response(obj)

    async def _create(self, request: web.Request) -> web.Response:
        obj = await request.json()
        if obj["metadata"]["name"] in self.objects.get(_kind(request), {}):
            return _status(409, "already exists")
        return web.json_response(await self.put(_kind(request), obj), status=201)

    async def _update(self, request: web.Request) -> web.Response:
        obj, kind = await request.json(), _kind(request)
        stored = self.objects.get(kind, {}).get(request.match_info["name"])
        if stored is None:
            return _status(404, "not found")
        if stored["metadata"]["resourceVersion"] != obj["metadata"].get("resourceVersion"):
            return _status(409, "the object has been modified")
        return web.json_response(await self.put(kind, obj))

    async def _token_review(self, request: web.Request) -> web.Response:
        user = self.tokens.get((await request.json())["spec"]["token"])
        return web.json_response({"status": {"authenticated": user is not None, "user": user or {}}}, status=201)

    async def _access_review(self, request: web.Request) -> web.Response:
        spec = (await request.json())["spec"]
        asked = spec["nonResourceAttributes"] == {"path": "/metrics", "verb": "get"}
        allowed = asked and bool({spec["user"], *spec["groups"]} & self.readers)
        return web.json_response({"status": {"allowed": allowed}}, status=201)


def _kind(request: web.Request) -> str:
    info = request.match_info
    return f"{info['root']}/{info['resource']}" if "root" in info else request.path.lstrip("/")


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


def _matches(obj: Object, query: Any) -> bool:
    meta = obj["metadata"]
    wanted = [part.split("=") for part in query.get("labelSelector", "").split(",") if part]
    names = [part.split("=")[1] for part in query.get("fieldSelector", "").split(",") if part]
    return all(meta.get("labels", {}).get(k) == v for k, v in wanted) and all(meta["name"] == n for n in names)


@asynccontextmanager
async def running(api: KubeApi | None = None) -> AsyncIterator[tuple[KubeApi, ApiClient]]:
    """A server and a client of it."""
    api = api or KubeApi()
    await api.start()
    client = ApiClient(f"http://127.0.0.1:{api.port}")
    try:
        yield api, client
    finally:
        await client.close()
        await api.stop()


def pool_object(ports: tuple[int, ...] = (8000,), name: str = "pool", **labels: str) -> Object:
    spec: Object = {"selector": {"matchLabels": labels or {"app": "vllm"}}}
    spec["targetPorts"] = [{"number": port} for port in ports]
    return {"metadata": {"name": name}, "spec": spec}


def pod_object(
    name: str, ip: str, ready: bool = True, annotations: dict[str, str] | None = None, **labels: str
) -> Object:
    conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"name": name, "labels": labels or {"app": "vllm"}, "annotations": annotations or {}},
        "spec": {"containers": [{"name": "engine"}]},
        "status": {"podIP": ip, "conditions": conditions},
    }


def objective_object(name: str, priority: int | None, pool: str = "pool", group: str | None = None) -> Object:
    ref = {"name": pool} if group is None else {"name": pool, "group": group}
    spec: Object = {"poolRef": ref}
    if priority is not None:
        spec["priority"] = priority
    return {"metadata": {"name": name}, "spec": spec}


def rewrite_object(name: str, model: str, target: str, pool: str = "pool") -> Object:
    rule = {"matches": [{"model": {"value": model}}], "targets": [{"modelRewrite": target}]}
    return {
        "metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"poolRef": {"name": pool}, "rules": [rule]},
    }
