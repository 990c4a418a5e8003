"""Whether a task was told to end."""

from __future__ import annotations

import asyncio


def cancelled() -> bool:
    """The running task was, also when what it waited for swallowed that: ``asyncio.wait_for`` of Python 3.11, which
    Redis' client uses, does so now and then. So loops that wait for such ask before they go round."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
