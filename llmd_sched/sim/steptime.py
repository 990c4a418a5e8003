"""How long one engine step takes, as five coefficients, and the accelerators we know them for.

    step_s = b0 + b1·P + c·Σ pᵢ(ctxᵢ + pᵢ/2) + b2·N + k·Σ ctx

P is the number of prompt tokens computed in the step, in chunks pᵢ that find ctxᵢ tokens of their own context already
computed; N is the number of sequences in the step; the last sum goes over the contexts of the decoding sequences.
The terms are the weight read, the matrix products, causal attention, per-sequence overhead and the KV read.
"""

from __future__ import annotations

import msgspec


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one accelerator: step-time coefficients in seconds, and what the server allows by default."""

    model: str
    """The model name a server with this preset serves unless told otherwise."""
    step_base_s: float
    """b0: a step over nothing, mostly reading the weights."""
    prefill_token_s: float
    """b1: per prompt token computed."""
    attention_pair_s: float
    """c: per pair of a prompt token and a token it attends to."""
    sequence_s: float
    """b2: per sequence in the step, prefilling or decoding."""
    decode_context_token_s: float
    """k: per token of context a decoding sequence reads."""
    request_overhead_s: float
    """Between a request's arrival and the moment the engine can schedule it: HTTP, tokenizer, hand-over."""
    kv_blocks: int
    """Blocks of 16 tokens."""
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256

    def step_s(self, prefill_tokens: int, attention_pairs: float, sequences: int, decode_context_tokens: int) -> float:
        """Duration of a step in seconds; the arguments are P, Σ pᵢ(ctxᵢ + pᵢ/2), N and Σ ctx of the formula above."""
        return (
            self.step_base_s
            + self.prefill_token_s * prefill_tokens
            + self.attention_pair_s * attention_pairs
            + self.sequence_s * sequences
            + self.decode_context_token_s * decode_context_tokens
        )


def preset(name: str) -> Preset:
    """The preset of that name; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


PRESETS: dict[str, Preset] = {
    # Llama-3-8B-Instruct, one H100, vLLM 0.11: b0, b1, b2 and the overhead fitted to the KubeCon NA 2025 runs of
    # inference-perf by replaying them through the engine (time per output token within 7 % in all ten runs, mean TTFT
    # within 11 % in the seven unsaturated). k is the floor of 131,072 B/token over 3.35 TB/s, c is 4·32·32·128 FLOP
    # per pair at the efficiency of b1. Blocks as published for Llama-3.1-8B, vLLM 0.8.4.
    "llama-3-8b-h100": Preset(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        step_base_s=6.75e-3,
        prefill_token_s=19.0e-6,
        attention_pair_s=0.65e-9,
        sequence_s=26.5e-6,
        decode_context_token_s=0.039e-6,
        request_overhead_s=16.3e-3,
        kv_blocks=29_205,
    ),
    # Qwen3-32B, two H100, TP2: llm-d's single-request fit over 8k to 155k tokens, TTFT = 42.5 µs·P + 443 ps·P², is met
    # within 5 % on that range. c is twice 443 ps; b1 is 42.5 µs less what b0 and the fixed overhead add per token of
    # an 8192-token chunk. b0 is the weight read (32.8 GB at 3.35 TB/s, times 1.36, and launch overheads), b2 as for the
    # 8B model. k is 131,072 B per token and GPU at 78 % of 3.35 TB/s: at the floor of 0.039 µs eight of them would
    # serve more of b2b-saas under prefix affinity than llm-d measured. Blocks as published in the KV-cache-wins
    # appendix.
    "qwen3-32b-h100x2": Preset(
        model="Qwen/Qwen3-32B",
        step_base_s=14.0e-3,
        prefill_token_s=39.3e-6,
        attention_pair_s=0.886e-9,
        sequence_s=27e-6,
        decode_context_token_s=0.050e-6,
        request_overhead_s=16e-3,
        kv_blocks=19_208,
    ),
    # Qwen3-32B, one H200: fitted to 3,400 recorded rows. Idle queue: TTFT = 41.6 ms + 98 µs per uncached token. Inter-
    # token time 19.3 ms at 3 running and 20.3 ms at 22, at contexts of about 300 tokens. Saturated: 101 µs per token
    # with 8192-token steps. k is the floor of 262,144 B/token over 4.8 TB/s. The overhead is more than HTTP and
    # tokenizer cost (a request that met an empty engine took 22 ms): it stands for the step that asynchronous
    # scheduling has already queued when a request arrives. The gauge moves in steps of 1/4442 of 64-token blocks.
    "qwen3-32b-h200": Preset(
        model="Qwen/Qwen3-32B",
        step_base_s=19.1e-3,
        prefill_token_s=95.5e-6,
        attention_pair_s=2.1e-9,
        sequence_s=34e-6,
        decode_context_token_s=0.055e-6,
        request_overhead_s=22.5e-3,
        kv_blocks=17_768,
    ),
}
"""Published or recorded systems by name; the comment above each says where its numbers are from."""
