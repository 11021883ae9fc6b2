"""What helps a run that does not fit into memory."""

from __future__ import annotations


def out_of_memory_advice(
    *, micro_batch_size: int, gradient_checkpointing: bool, mode: str, sequence_length: int, sharded: bool
) -> str:
    """Which options would lower the memory of this very run, the cheapest first.

    >>> print(out_of_memory_advice(
    ...     micro_batch_size=1, gradient_checkpointing=True, mode="lora", sequence_length=4096, sharded=True))
    out of memory; what helps, the cheapest first: --sequence-length 2048
    """
    advice = []
    if micro_batch_size > 1:
        advice.append(f"--micro-batch-size {micro_batch_size // 2} (same result)")
    if not gradient_checkpointing:
        advice.append("--gradient-checkpointing (same result, about a third slower)")
    if not sharded:
        advice.append("more GPUs with examples/accelerate/fsdp2.yaml, which shards student and teacher")
    if mode == "full":
        advice.append("--mode attention or --mode lora")
    advice.append(f"--sequence-length {sequence_length // 2}")
    return "out of memory; what helps, the cheapest first: " + "; ".join(advice)
