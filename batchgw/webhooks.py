"""Webhook events: their payload, and their signature per Standard Webhooks. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

import msgspec

from batchgw.records import Delivery

SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
"""As the specification asks."""


def payload(delivery: Delivery) -> bytes:
    """The event as OpenAI sends it; the same bytes at every attempt."""
    return msgspec.json.encode(
        {
            "id": delivery.id,
            "object": "event",
            "created_at": int(delivery.created_s),
            "type": delivery.event,
            "data": {"id": delivery.batch_id},
        }
    )


def sign(secret: str, event_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The three headers. ``secret`` may be several, space separated, while one is being replaced.

    Raises ValueError for a secret that is none.
    """
    signed = f"{event_id}.{timestamp_s}.".encode() + body
    macs = [hmac.digest(key(one), signed, hashlib.sha256) for one in secret.split()]
    if not macs:
        raise ValueError(f"the webhook secret is empty; expected is {SECRET_PREFIX}<base64>")
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join("v1," + base64.b64encode(mac).decode() for mac in macs),
    }


def key(secret: str) -> bytes:
    """The bytes of one secret; ValueError says what is accepted, and never repeats the secret."""
    try:
        decoded = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        decoded = b""
    if not MIN_SECRET_BYTES <= len(decoded) <= MAX_SECRET_BYTES:
        wanted = f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes"
        raise ValueError(f"a webhook secret must be {SECRET_PREFIX} and the base64 of {wanted}")
    return decoded
