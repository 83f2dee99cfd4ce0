"""An encoder that does what a file asks of it, on the rank and in the forward that the file names."""

import contextlib
import ctypes
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from examples.sensor_encoder import SensorConfig, SensorEncoder


@dataclass(frozen=True)
class FaultyConfig(SensorConfig):
    """asks: a file with {"rank": .., "does": ..}, which is removed when it is done. A file `pause` beside it
    has the seconds that each forward takes longer."""

    asks: str = ""


class FaultyEncoder(SensorEncoder):
    Config = FaultyConfig

    def __init__(self, cfg, axes, *, device=None, dtype=None):
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.asks = Path(cfg.asks)

    def forward(self, batch):
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(self.asks.with_name("pause").read_text()))
        try:
            ask = json.loads(self.asks.read_text())
        except (FileNotFoundError, ValueError):
            return super().forward(batch)
        if str(ask["rank"]) == os.environ["RANK"]:
            self.asks.unlink()
            FAULTS[ask["does"]]()
        return super().forward(batch)


def never_returns():
    while True:
        time.sleep(0.01)


def keeps_the_interpreter():
    libc = ctypes.PyDLL(None)  # unlike CDLL it keeps the interpreter's lock
    while True:
        libc.usleep(1000000 - 1)
        libc.sleep(600)


def raises():
    raise ValueError("a sensor of another kind")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def stops():
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS = {f.__name__: f for f in (never_returns, keeps_the_interpreter, raises, dies, stops)}
