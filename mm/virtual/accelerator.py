"""A device that is an accelerator to all code and has no hardware: it holds fake tensors only.

Code that asks whether its device is the CPU takes the branch of an accelerator there, copies between host and
device are seen, and streams and events exist and do nothing. Torch offers this for out-of-tree devices
(PrivateUse1, "torch.utils.backend_registration"). A process registers it once, and before its first
backward: autograd makes its threads for the devices that it then knows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "virtual"


class VirtualStream:
    """A queue of work that is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> VirtualStream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: VirtualStream) -> None:
        """Order after all work of another stream."""

    def wait_event(self, event: VirtualEvent) -> None:
        """Order after an event."""

    def record_event(self, event: VirtualEvent | None = None) -> VirtualEvent:
        """Mark this place of the queue."""
        return event or VirtualEvent()


class VirtualEvent:
    """A place in a queue, always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: VirtualStream | None = None) -> None:
        """Mark a place of a stream."""

    def wait(self, stream: VirtualStream | None = None) -> None:
        """Let a stream wait."""

    def query(self) -> bool:
        """Whether the place is reached."""
        return True

    def synchronize(self) -> None:
        """Let the host wait."""


class _Device(_DummyBackendModule):
    """What torch.get_device_module() gives for the device."""

    Stream, Event = VirtualStream, VirtualEvent

    def current_stream(self, device: object = None) -> VirtualStream:
        """The stream that work is put on."""
        return VirtualStream()

    def stream(self, stream: VirtualStream) -> VirtualStream:
        """A context in which work is put on `stream`."""
        return stream

    def device(self, device: object) -> contextlib.AbstractContextManager[None]:
        """A context in which a device is current; there is one."""
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast, which recomputation enters in a backward, may cast to; nothing is cast here."""
        return [torch.bfloat16, torch.float16]

    def set_device(self, device: object) -> None:
        """Make a device current; there is one."""

    def synchronize(self, device: object = None) -> None:
        """Let the host wait for all work."""


def accelerator() -> torch.device:
    """The device; registers it at the first call. Raises RuntimeError where another backend has its place."""
    taken = torch._C._get_privateuse1_backend_name()
    if taken == "privateuseone":
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Device())
    elif taken != NAME:
        raise RuntimeError(f"the device {taken!r} is registered with torch, which has room for one more only")
    return torch.device(NAME, 0)
