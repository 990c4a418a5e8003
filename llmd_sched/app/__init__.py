"""The composition root of ``serve``: configuration -> objects -> run; the one place that knows every concrete class.

settings    the command line
source      where endpoints, objectives and rewrites come from
scheduler   one running scheduler: start, health, drain, stop
"""

from llmd_sched.app.scheduler import Scheduler, serve
from llmd_sched.app.settings import ServeSettings

__all__ = ["Scheduler", "ServeSettings", "serve"]
