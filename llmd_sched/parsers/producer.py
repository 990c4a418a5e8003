"""Where the tokens of a prompt come from: estimated here, or rendered by a server that knows the model."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from llmd_sched.config import duration_s
from llmd_sched.parsers.media import HINTS, Estimate, Params
from llmd_sched.plugin import Plugin


class RenderBackend(Params, frozen=True):
    """A vLLM server that renders prompts; ``mmTimeout`` is the timeout for those with media."""

    url: str = "http://localhost:8000"
    timeout: str = "5s"
    mm_timeout: str = "30s"

    @property
    def timeout_s(self) -> float:
        return duration_s(self.timeout)

    @property
    def mm_timeout_s(self) -> float:
        return duration_s(self.mm_timeout)


class TokenProducer(Plugin, frozen=True):
    """Makes tokens of prompts.

    ``estimate``, the default: four bytes of text are a token, and media count what is configured. ``vllm``, or just
    ``modelName``: the real ones, from the render endpoints of a vLLM server that has ``modelName``; where it does not
    answer in time the request goes on with the estimate.
    """

    model_name: str = ""
    estimate: Estimate | None = None
    vllm: RenderBackend | None = None
    uds_tokenizer_config: Any = None

    @property
    def backend(self) -> RenderBackend | None:
        """The server that renders; None when tokens are estimated."""
        return self.vllm or (RenderBackend() if self.model_name else None)

    def headers(self) -> tuple[str, ...]:
        return HINTS

    def check(self) -> None:
        if self.uds_tokenizer_config is not None:
            raise ValueError(
                "udsTokenizerConfig is not supported; accepted: vllm: {url, timeout, mmTimeout} with modelName, "
                "which asks a vLLM server's render endpoints, or estimate"
            )
        if self.vllm is not None and self.estimate is not None:
            raise ValueError("only one of vllm and estimate can be given")
        if self.vllm is not None and not self.model_name:
            raise ValueError("vllm needs modelName, the name under which that server has the model")
        if self.backend is not None:
            self._check_backend(self.backend)

    def _check_backend(self, backend: RenderBackend) -> None:
        address = urlsplit(backend.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"vllm.url is {backend.url!r}; accepted: http:// or https:// and a host")
        for name, text in (("timeout", backend.timeout), ("mmTimeout", backend.mm_timeout)):
            if duration_s(text) <= 0:
                raise ValueError(f"vllm.{name} is {text!r}; accepted: a duration above 0")
