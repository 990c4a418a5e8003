"""Every header and metadata key on the wire. Canonical name first, deprecated aliases after it."""

DESTINATION = "x-gateway-destination-endpoint"
"""Header and ``envoy.lb`` metadata key: the chosen ``ip:port``, or several, comma separated."""
DESTINATION_SUBSET = "x-gateway-destination-endpoint-subset"
DESTINATION_SCORES = "x-gateway-destination-endpoint-scores"

FAIRNESS_ID = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
MODEL_REWRITE = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
TTFT_SLO_MS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_SLO_MS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")

PREFILLER = "x-prefiller-host-port"
ENCODERS = "x-encoder-hosts-ports"
DATA_PARALLEL = "x-data-parallel-host-port"
SESSION_TOKEN = "x-session-token"
SESSION_ID = "x-session-id"
TEST_SELECTION = "test-epp-endpoint-selection"

DROPPED_REASON = "x-llm-d-request-dropped-reason"
REQUEST_ID = "x-request-id"
CONTENT_LENGTH = "content-length"
CONTENT_TYPE = "content-type"
PATHS = (":path", "x-original-path", "x-forwarded-path")
"""Where the request path is looked for, in this order."""
WENT_INTO_RESPONSE = "x-went-into-resp-headers"
"""Debug marker the reference sets on every response it sees."""

NAMESPACE_LB = "envoy.lb"
NAMESPACE_SUBSET = "envoy.lb.subset_hint"
NAMESPACE_OURS = "llmd"
"""Dynamic metadata of our own: what the scheduler tells the access log, and what the Lua filter noted."""

TICKET = "ticket"
REPLY_HEADERS = "reply_headers"
FIRST_BODY_US = "first_us"
LAST_BODY_US = "last_us"
BODY_EVENTS = "events"
BODY_TAIL = "tail"
STREAMED = "streamed"

PREFER = "prefer"
PREFER_CACHED = "if-available"
"""RFC 7240: answer 412 rather than compute a prompt that the chosen endpoint has nothing of in cache."""

READ = (*PATHS, REQUEST_ID, PREFER, *FAIRNESS_ID, *OBJECTIVE, *MODEL_REWRITE, *TTFT_SLO_MS, *TPOT_SLO_MS)
"""Request headers the scheduler looks at; where it is not sent all headers, it is sent these."""
