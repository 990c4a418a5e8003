"""Every plugin type (``table``), what a configuration means (``resolve``), the objects it describes (``build``)."""

from llmd_sched.catalog.build import build_parsers, build_router
from llmd_sched.catalog.declare import Declared
from llmd_sched.catalog.resolve import Resolved, resolve
from llmd_sched.catalog.table import TYPES

__all__ = ["TYPES", "Declared", "Resolved", "build_parsers", "build_router", "resolve"]
