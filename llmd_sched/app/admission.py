"""Who may go now: flow control when its gate is on, else the check of sheddable requests; and its metrics."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

from llmd_sched.catalog import Resolved
from llmd_sched.extproc.server import ExtProcServer
from llmd_sched.extproc.service import Admit, EndpointPicker
from llmd_sched.flow.controller import FlowControl
from llmd_sched.flow.dispatch import Dispatcher, shed
from llmd_sched.flow.gate import Gate
from llmd_sched.flow.program import Programs
from llmd_sched.flow.queues import Item
from llmd_sched.flow.reclaim import INFLIGHT_GRACE_S, SCRAPE_GRACE_S, Reclaimer
from llmd_sched.flow.saturation import SaturationDetector, Stages
from llmd_sched.telemetry import Gauge, Telemetry, pulled
from llmd_sched.types import Decision, End, Outcome, Request


def shedding(resolved: Resolved, picker: EndpointPicker) -> Admit:
    """Admission without flow control: at once, or not at all."""
    stages, router, clock = Stages(_detector(resolved)), picker.router, picker.clock

    async def admit(request: Request, subset: Collection[str] | None) -> Decision:
        now_s = clock()
        refusal = shed(request, lambda: stages.measure(router.load(now_s)).effective)
        if refusal is not None:
            raise refusal
        return picker.choose(request, subset, now_s)

    return admit


def _detector(resolved: Resolved) -> SaturationDetector:
    return resolved.kind(SaturationDetector)[resolved.detector]


def flow_gate(
    resolved: Resolved, picker: EndpointPicker, ext_proc: ExtProcServer, scrape_interval_s: float
) -> Gate | None:
    """None when the feature gate is off."""
    settings = resolved.flow_settings()
    if settings is None:
        return None
    router, detector = picker.router, _detector(resolved)
    reclaimer = None
    if resolved.flow_control is not None and resolved.flow_control.enable_eviction:
        grace_s = scrape_interval_s + SCRAPE_GRACE_S if detector.by_metrics else INFLIGHT_GRACE_S
        reclaimer = Reclaimer(grace_s)
    gate = Gate(
        Dispatcher(FlowControl(settings, picker.clock()), detector, router.load),
        picker.choose,
        abandon=lambda decision: picker.finish(decision.ticket, Outcome(end=End.ABORTED)),
        reclaimer=reclaimer,
        evict=ext_proc.evict,
        in_flight=lambda: len(router.open),
        clock=picker.clock,
    )
    router.on_finished = gate.finished
    router.pool.on_read.append(gate.wake)
    router.pool.on_change.append(lambda endpoints: gate.wake())
    return gate


class FlowMetrics:
    """Observes a gate, and tells of it when it is scraped."""

    def __init__(self, gate: Gate, telemetry: Telemetry, pool_name: str, detector: str) -> None:
        self._gate, self._telemetry, self._pool, self._detector = gate, telemetry, pool_name, detector
        self._queued_s = telemetry.histogram("flow_control_request_queue_duration_seconds")
        self._enqueue_s = telemetry.histogram("flow_control_request_enqueue_duration_seconds")
        cycle_s = telemetry.histogram("flow_control_dispatch_cycle_duration_seconds").labels()
        gate.on_end, gate.on_cycle = self._ended, cycle_s.observe
        if gate.reclaimer is not None:
            confirmed = telemetry.histogram("flow_control_revocation_confirmation_seconds").labels(pool_name)
            gate.reclaimer.on_confirmed = confirmed.observe
        telemetry.pull(self._read)

    def _ended(self, item: Item) -> None:
        request, outcome = item.request, str(item.outcome)
        labels = (request.model, request.target_model, request.fairness_id, item.priority)
        model, target, fairness, priority = self._telemetry.labels(*labels)
        self._queued_s.labels(fairness, priority, outcome, self._pool, model, target).observe(item.waited_s)
        self._enqueue_s.labels(fairness, priority, outcome).observe(item.enqueue_s)

    def _read(self) -> Iterator[Gauge]:
        """Runs in the scraping thread: it only reads, and what changes meanwhile is told next time."""
        flow, now_s, pool = self._gate.flow, time.monotonic(), self._pool
        queued = []
        for (fairness_id, priority, model, target), size in list(flow.sizes.items(now_s)):
            model, target, fairness_id, band = self._telemetry.labels(model, target, fairness_id, priority)
            queued.append(((fairness_id, band, pool, model, target), size))
        yield from pulled("flow_control_queue_size", [(labels, float(size[0])) for labels, size in queued])
        yield from pulled("flow_control_queue_bytes", [(labels, float(size[1])) for labels, size in queued])
        yield from self._saturation(now_s)
        yield from self._capacity()
        yield from self._reclaimed()
        yield from self._programs(now_s)
        yield from pulled("flow_control_errors_total", [((), float(self._gate.errors))])

    def _saturation(self, now_s: float) -> Iterator[Gauge]:
        measured = self._gate.dispatcher.measure(now_s)
        stages = {"prefill": measured.prefill, "decode": measured.decode, "effective": measured.effective}
        told = [((self._pool, stage), value) for stage, value in stages.items() if value is not None]
        yield from pulled("flow_control_pool_saturation", told)
        yield from pulled("flow_control_stale_endpoints", [((self._detector,), float(measured.stale))])

    def _capacity(self) -> Iterator[Gauge]:
        flow, pool = self._gate.flow, self._pool
        bands = list(flow.bands.items())
        requests = [((str(p), pool), b.requests / b.settings.max_requests) for p, b in bands]
        yield from pulled("flow_control_capacity_utilization_requests", requests)
        size = [((str(p), pool), b.size_bytes / b.settings.max_bytes) for p, b in bands]
        yield from pulled("flow_control_capacity_utilization_bytes", size)
        if flow.settings.max_requests:
            share = len(flow) / flow.settings.max_requests
            yield from pulled("flow_control_global_capacity_utilization_requests", [((pool,), share)])
        if flow.settings.max_bytes:
            share = flow.size_bytes / flow.settings.max_bytes
            yield from pulled("flow_control_global_capacity_utilization_bytes", [((pool,), share)])
        ended = [((str(o), str(p), pool), float(n)) for p, b in bands for o, n in list(b.outcomes.items())]
        yield from pulled("flow_control_requests_total", ended)

    def _reclaimed(self) -> Iterator[Gauge]:
        reclaimer, pool = self._gate.reclaimer, self._pool
        if reclaimer is None:
            return
        issued = [((str(priority), pool), float(n)) for priority, n in list(reclaimer.issued.items())]
        yield from pulled("flow_control_revocations_issued_total", issued)
        outcomes = [((outcome, pool), float(n)) for outcome, n in list(reclaimer.outcomes.items())]
        yield from pulled("flow_control_revocations_total", outcomes)
        yield from pulled("flow_control_reclaim_target", [((pool,), reclaimer.target)])
        yield from pulled("flow_control_pending_reclaim", [((pool,), float(reclaimer.pending))])

    def _programs(self, now_s: float) -> Iterator[Gauge]:
        lineups = [b.lineup for b in list(self._gate.flow.bands.values()) if isinstance(b.lineup, Programs)]
        if not lineups:
            return
        attained: dict[str, float] = {}
        for lineup in lineups:
            for program, tokens in lineup.attained_tokens(now_s).items():
                program = self._telemetry.labels("", "", program, 0)[2]
                attained[program] = attained.get(program, 0.0) + tokens
        served = [((program,), tokens) for program, tokens in attained.items()]
        yield from pulled("program_aware_attained_service_tokens", served)
        yield from pulled("program_aware_jains_fairness_index", [((), min(one.jains_index() for one in lineups))])
