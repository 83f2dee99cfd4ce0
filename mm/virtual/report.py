"""A virtual step as text and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from mm.virtual.match import Result
from mm.virtual.records import Call, Trace

SHOWN = 12  # lines of a table


def as_json(trace: Trace) -> dict[str, Any]:
    """What --json writes of one rank."""
    memory = trace.memory
    return {
        "rank": trace.rank,
        "world": trace.world,
        "peak_memory_bytes": memory.peak,
        "memory_by_kind": dict(memory.by_kind),
        "memory_by_module": dict(memory.by_module),
        "flops_by_module": trace.flops_by_module,
        "calls": [_call(c) for c in trace.calls],
        "host_waits": [asdict(w) for w in trace.host_waits],
        "peak_during": memory.during,
        "live_at_peak": [asdict(x) for x in memory.live],
        "kernels": [asdict(k) for k in trace.kernels],
        "notes": list(trace.notes),
    }


def _call(call: Call) -> dict[str, Any]:
    out: dict[str, Any] = {
        k: getattr(call, k) for k in ("op", "group", "members", "bytes", "dtype", "crosses_nodes")
    }
    extra: dict[str, Any] = {"peer": call.peer, "during": call.during, "posted": call.posted}
    if call.sends:
        extra |= {"sends": call.sends, "receives": call.receives}
    return out | extra


def match_json(result: Result) -> dict[str, Any]:
    """What --json writes of a match."""
    return {
        "ok": result.ok,
        "problems": result.problems,
        "calls": result.calls,
        "communicators": result.communicators,
    }


def text(trace: Trace) -> str:
    """One rank for people."""
    memory = trace.memory
    lines = [f"rank {trace.rank} of {trace.world}, one step; {'; '.join(trace.notes)}"]
    lines.append(f"peak memory {_mib(memory.peak)}, during {memory.during}")
    for title, parts in (("kind", memory.by_kind), ("module", memory.by_module)):
        shown = ", ".join(f"{k} {_mib(n)}" for k, n in parts.items() if n)
        lines.append(f"  by {title}: {shown}")
    lines.append("  largest then:")
    for x in memory.live[:SHOWN]:
        lines.append(f"    {_mib(x.bytes):>12}  {x.kind} of {x.module}, {x.made_by} x {x.count}  {x.where}")
    flops = trace.flops_by_module
    lines.append("FLOPs: " + ", ".join(f"{m} {n / 1e12:.3f} T" for m, n in flops.items()))
    lines += _calls(trace)
    lines.append(f"host waits: {sum(w.count for w in trace.host_waits)}")
    for w in trace.host_waits:
        lines.append(f"  {w.count:>6}  {w.file}:{w.line}  {w.why}, {w.phase}")
    return "\n".join(lines)


def _calls(trace: Trace) -> list[str]:
    """Calls by group and operation: how often, how many bytes."""
    count: Counter[tuple[str, str, bool]] = Counter()
    size: Counter[tuple[str, str, bool]] = Counter()
    for c in trace.calls:
        key = c.group, c.op, c.crosses_nodes
        count[key] += 1
        size[key] += c.bytes
    lines = [f"calls: {len(trace.calls)}, {_mib(sum(size.values()))}"]
    for key, n in count.items():
        where = "across nodes" if key[2] else "inside a node"
        lines.append(f"  {n:>6}  {key[1]:<14} {key[0]:<28} {_mib(size[key]):>12}  {where}")
    return lines


def match_text(result: Result) -> str:
    """A match for people."""
    if result.ok:
        return f"all {result.calls} calls on {result.communicators} communicators meet"
    return "calls do not meet: " + "; ".join(result.problems)


def _mib(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
