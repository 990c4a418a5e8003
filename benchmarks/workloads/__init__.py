"""What the simulated cluster is asked: workloads, public traces, and scenarios with their engines and load ladders.

    scenario, point = find("C5")
    Cluster(scenario.cluster(config, seed=1)).run(scenario.arrivals(point.rate_per_s, seed=1))

A workload is a frozen value; its arrivals are a function of rate, duration and seed alone, so every arm of a comparison
gets the same ones. They are made one at a time, as they are used: in memory are one prompt and a few numbers per
conversation that is under way.
"""

from benchmarks.workloads.combined import Mixed, Shifted, WithSlos
from benchmarks.workloads.draws import Draw, Fixed, LogNormal, Normal, Uniform
from benchmarks.workloads.scenarios import SCENARIOS, WORKLOADS, Point, Scenario, find
from benchmarks.workloads.shapes import Conversations, Independent, ItemWorkload, SharedPrefix, Workload
from benchmarks.workloads.traces import Traced, burstgpt_csv, read, traced

__all__ = [
    "SCENARIOS",
    "WORKLOADS",
    "Conversations",
    "Draw",
    "Fixed",
    "Independent",
    "ItemWorkload",
    "LogNormal",
    "Mixed",
    "Normal",
    "Point",
    "Scenario",
    "SharedPrefix",
    "Shifted",
    "Traced",
    "Uniform",
    "WithSlos",
    "Workload",
    "burstgpt_csv",
    "find",
    "read",
    "traced",
]
