"""gRPC health (grpc.health.v1), with ``List`` and what the reference says of names it does not know."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

Status = health_pb2.HealthCheckResponse


class Health(HealthServicer):  # type: ignore[misc]
    """A name never set is SERVICE_UNKNOWN with leader election; without, it is answered as all others are."""

    def __init__(self, *, electing: bool) -> None:
        super().__init__()
        self._electing = electing
        self._told: dict[str, Any] = {}

    async def set(self, service: str, status: Any) -> None:
        self._told[service] = status
        await super().set(service, status)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in self._told:
            return Status(status=Status.SERVICE_UNKNOWN if self._electing else self._told.get("", Status.NOT_SERVING))
        return await super().Check(request, context)

    async def List(self, request: health_pb2.HealthListRequest, context: Any) -> health_pb2.HealthListResponse:
        told = {name: Status(status=status) for name, status in self._told.items()}
        return health_pb2.HealthListResponse(statuses=told)
