"""Bodies that are nobody's business: routed by load alone and never looked into."""

from __future__ import annotations

from llmd_sched.plugin import Parsed, Parser


class PassthroughParser(Parser, frozen=True):
    """Takes any path that no other parser claims. No model, no prompt."""

    def parse(self, path: str, body: bytes) -> Parsed:
        return Parsed(names_model=False)
