"""The composition root: from settings to a running process, and to the one-off commands."""

from batchgw.app.chores import add_key, collect, revoke_key
from batchgw.app.service import Role, serve

__all__ = ["Role", "add_key", "collect", "revoke_key", "serve"]
