"""Endpoint picker for LLM inference: routing by latency predictions learned from live traffic."""

__version__ = "0.1.0"
