"""Profile handlers: which profiles run for a request."""

from __future__ import annotations

from llmd_sched.plugin import Handler


class SingleProfileHandler(Handler, frozen=True):
    """Runs the only profile once."""


HANDLERS: dict[str, type[Handler]] = {"single-profile-handler": SingleProfileHandler}
