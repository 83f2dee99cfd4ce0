"""Messages between ranks: autograd collectives, rows fetched inside an axis, pipeline sends, bounded waits.

Callers decide which rows or tokens go where. No layout and no parallel technique may enter.
"""

from parallel.comm.collectives import (
    copy_in,
    gather_tokens,
    join_tokens,
    reduce_out,
    reduce_tokens,
    split_tokens,
)
from parallel.comm.fetch import Fetch, FetchPlan, fetch_plan, make_fetch
from parallel.comm.linear_map import linear_map
from parallel.comm.pending import Pending
from parallel.comm.pipeline import Pipe
from parallel.comm.transport import Channel

__all__ = [
    "Channel",
    "Fetch",
    "FetchPlan",
    "Pending",
    "Pipe",
    "copy_in",
    "fetch_plan",
    "gather_tokens",
    "join_tokens",
    "linear_map",
    "make_fetch",
    "reduce_out",
    "reduce_tokens",
    "split_tokens",
]
