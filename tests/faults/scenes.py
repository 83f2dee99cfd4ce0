"""Faults that need a start of their own: each scene starts a job, breaks something, sees how all ends, and
lets the job come to its end. A scene may be asked for a moment, as in `cut-off@save`; else it draws one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.faults import nodes
from tests.faults.agents import Agents, agents
from tests.faults.forge import Crowd, Job, children, timeout_of
from tests.faults.injected import END_S, LOST, Injected
from tests.mm.harness import free_port

AT_ONCE_S = 2.0  # a heartbeat, and what a busy machine adds
Scene = Callable[[Path, int, random.Random, str], Injected]


class Kind(NamedTuple):
    """A kind of fault with its scene. moments: those that it knows. missing: why it cannot be had here."""

    scene: Scene
    moments: tuple[str, ...]
    missing: Callable[[], str] = lambda: ""
    exact: bool = True  # whether the job ends with the undisturbed run's losses and weights, bit for bit


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((folder / "run").glob("step-*.tmp"))


def kept(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without."""
    return max((int(p.name[5:]) for p in (folder / "run").glob("step-*") if p.suffix == ""), default=0)


def one_message(said: str, *needed: str) -> list[str]:
    """What is wrong with what one side says: there must be one message, with these words."""
    lines = [
        text for text in said.splitlines() if text.startswith(("rank ", "PolyrankError: ", "Checkpoint"))
    ]
    wrong = [] if len(lines) == 1 else [f"{len(lines)} messages"]
    return wrong + [f"no word of {word}" for word in needed if not any(word in text for text in lines)]


def in_time(crowd: Crowd, seconds: float, after_s: float) -> list[str]:
    """What is wrong with how long an end has taken, after what had to be waited for."""
    limit = after_s + END_S * crowd.factor()
    return [f"took longer than {limit:.0f} s"] if seconds > limit else []


# one machine, `python -m mm train`


def _resume(path: Path, steps: int, found: Injected) -> None:
    job = Job(path, steps)
    code, _ = job.end(300.0)
    if code != 0:
        found.wrong.append(f"the last start ended with {code}")
        found.said += job.err.read_text()


def during_load(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """A rank is killed while a job resumes: as ranks meet, as they read the checkpoint, or soon after."""
    job = Job(path, steps)
    assert job.wait_for(5), job.err.read_text()
    job.launcher.send_signal(signal.SIGTERM)
    assert job.end(120.0)[0] == 0, job.err.read_text()
    job, rank = Job(path, steps), draw.randrange(2)
    until = {"meeting": lambda: True, "reading": job.reads, "ready": lambda: "resumed from" in job.said()}
    assert job.wait_for(0) and job.wait_until(until[moment]), job.err.read_text()
    time.sleep(draw.random() * 0.05)
    found = Injected("during-load", rank, job.steps() + 1)
    os.kill(job.ranks[rank], signal.SIGKILL)
    code, found.seconds = job.end(END_S + 60.0)
    found.wrong += in_time(job.crowd, found.seconds, 0.0) if code == 1 else [f"exit code {code}, not 1"]
    found.wrong += one_message(job.err.read_text(), f"rank {rank} was ended by SIGKILL")
    found.lost, found.said = max(0, job.steps() - kept(path.parent)), job.err.read_text()
    _resume(path, steps, found)
    return found


def term_during_save(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """SIGTERM while a checkpoint is written in the background: what is under way is published, and the last
    step is saved."""
    job = Job(path, steps)
    assert job.wait_for(draw.randrange(1, 9)) and job.wait_until(lambda: saving(path.parent)), job.said()
    found = Injected("term-during-save", -1, job.steps() + 1)
    job.launcher.send_signal(signal.SIGTERM)
    code, found.seconds = job.end(END_S + 60.0)
    found.wrong += in_time(job.crowd, found.seconds, 0.0) if code == 0 else [f"exit code {code}, not 0"]
    found.lost, found.said = job.steps() - kept(path.parent), job.err.read_text()
    found.wrong += [f"{found.lost} steps are lost"] if found.lost else []
    _resume(path, steps, found)
    return found


def writer(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """The process that writes a rank's checkpoints is killed, or the one that starts it."""
    job, rank = Job(path, steps), draw.randrange(2)
    assert job.wait_for(draw.randrange(1, 6)), job.said()
    # A rank forks nurseries, and each forks the one process that works.
    works = [pid for nursery in children(job.ranks[rank]) for pid in children(nursery)]
    if moment == "saving":
        job.wait_until(lambda: saving(path.parent))
    found = Injected("writer", rank, job.steps() + 1)
    for pid in works:
        os.kill(pid, signal.SIGKILL)
    code, found.seconds = job.end(LIMIT_S)
    found.said = job.err.read_text()
    if code != 4:
        found.wrong.append(f"exit code {code}, not 4")
    found.wrong += one_message(found.said, f"rank {rank}: the process that writes has ended", "are whole")
    found.lost = job.steps() - kept(path.parent)
    found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
    _resume(path, steps, found)
    return found


LIMIT_S = 120.0  # for what ends with the next checkpoint, on a busy machine


def no_chattr() -> str:
    """Why a folder of root's cannot be made read-only here; "" where it can."""
    return "" if os.geteuid() == 0 and shutil.which("chattr") else "chattr +i needs Linux and root"


def read_only(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """The run's folder and all in it can no longer be written, and later can."""
    job = Job(path, steps)
    assert job.wait_for(draw.randrange(5, 9)), job.said()
    found = Injected("read-only", -1, job.steps() + 1)
    run = path.parent / "run"
    try:
        locked = subprocess.run(["chattr", "-R", "-f", "+i", str(run)], capture_output=True)
        code, found.seconds = job.end(LIMIT_S)
    finally:
        subprocess.run(["chattr", "-R", "-f", "-i", str(run)], capture_output=True)
    found.said = job.err.read_text()
    if code != 4:
        found.wrong.append(f"exit code {code}, not 4 (chattr: {locked.returncode})")
    found.wrong += one_message(found.said, "the checkpoint of step", "are whole")
    found.lost = job.steps() - kept(path.parent)
    found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
    _resume(path, steps, found)
    return found


# two machines, torchrun


def _finish(job: Agents, found: Injected, least: int = 0) -> None:
    """The agents come to the end of the job."""
    ended = job.end(LIMIT_S * 2)
    if any(code != 0 for code, _ in ended.values()):
        found.wrong.append(f"the last start ended with {[code for code, _ in ended.values()]}")
        found.said += "\n".join(job.said(node) for node in ended)


def partition(name: str, path: Path, draw: random.Random, moment: str) -> Injected:
    """The network between two agents breaks: the cable is pulled, or loses all without a word."""
    folder = path.parent
    with nodes.network() as cable:
        with agents(path, free_port(), ["--nnodes=2"], cable) as job:
            wanted = draw.randrange(1, 9)
            until: dict[str, Callable[[], object]] = {
                "meeting": lambda: all(job.ranks(node) for node in job.nodes),
                "start": lambda: "all 2 ranks have started" in job.said(0),
                "step": lambda: job.steps() >= wanted,
                "save": lambda: saving(folder),
            }
            assert job.wait_for(until[moment]), job.said(0) + job.said(1)
            time.sleep(draw.random() * 0.1)
            found = Injected(name, 1, job.steps() + 1)
            (cable.pull if name == "cable-pulled" else cable.lose)()
            ended = job.end(timeout_of(path.parent) + END_S + 60.0)
            found.seconds = max(seconds for _, seconds in ended.values())
            found.said = job.said(0) + job.said(1)
            found.wrong += [f"node {n}: exit code {code}" for n, (code, _) in ended.items() if code != 1]
            found.wrong += in_time(job.crowd, found.seconds, timeout_of(path.parent))
            for node, word in enumerate(("rank 1", cable.address(0)) if moment != "meeting" else ("", "")):
                found.wrong += [f"node {node}: {why}" for why in one_message(job.said(node), word)]
            found.lost = job.steps() - kept(folder)
            found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
        cable.mend()
        with agents(path, free_port(), ["--nnodes=2"], cable) as job:
            _finish(job, found)
    return found


def pulled(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """The cable between two agents is pulled."""
    return partition("cable-pulled", path, draw, moment)


def cut_off(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """All that one agent's machine sends to the other is lost, without a word."""
    return partition("cut-off", path, draw, moment)


def _hit(job: Agents, draw: random.Random, moment: str) -> None:
    wanted = job.steps() + draw.randrange(1, 9)
    assert job.wait_for(lambda: job.steps() >= wanted), job.said(0) + job.said(1)
    if moment == "save":
        assert job.wait_for(lambda: saving(job.folder)), job.said(0) + job.said(1)


def restarted(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """A rank is killed under torchrun with restarts: its agents start all ranks again, by themselves."""
    with agents(path, free_port(), ["--nnodes=2", "--max-restarts=2"]) as job:
        _hit(job, draw, moment)
        rank = draw.randrange(2)
        found = Injected("torchrun", rank, job.steps() + 1)
        before = {node: job.ranks(node) for node in job.nodes}
        os.kill(before[rank][0], signal.SIGKILL)
        begun, crowd = time.monotonic(), Crowd()
        again = lambda: all(job.ranks(n) and job.ranks(n) != before[n] for n in job.nodes)  # noqa: E731
        while not again() and time.monotonic() < begun + LIMIT_S:
            crowd.look()
            time.sleep(0.01)
        found.seconds = time.monotonic() - begun
        found.wrong += in_time(crowd, found.seconds, timeout_of(path.parent))
        found.lost = max(0, found.step - 1 - kept(path.parent))
        found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
        found.said = job.said(0) + job.said(1)
        said = f"rank {rank} "
        found.wrong += [] if said in found.said else ["the rank is not named"]
        _finish(job, found)
    return found


def agent(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """An agent of torchrun is killed, its rank is not: nobody would see it go on."""
    slowly = path.with_name("pause")  # the job must not come to its end meanwhile
    with agents(path, free_port(), ["--nnodes=2"]) as job:
        _hit(job, draw, moment)
        slowly.write_text("0.2")
        node = draw.randrange(2)
        found = Injected("agent", node, job.steps() + 1)
        os.kill(job.nodes[node].agent(), signal.SIGKILL)
        ended = job.end(timeout_of(path.parent) + END_S + 60.0)
        found.seconds = max(seconds for _, seconds in ended.values())
        found.said = job.said(0) + job.said(1)
        if any(code is None for code, _ in ended.values()):
            found.wrong.append("processes are left")
        found.wrong += in_time(job.crowd, found.seconds, timeout_of(path.parent))
        # The first agent serves the store: without it ranks cannot tell each other.
        word = "has lost torchrun's agent" if node else "the job's store at"
        found.wrong += (
            [] if f"rank {node}" in found.said and word in found.said else ["the rank is not named"]
        )
        found.lost = job.steps() - kept(path.parent)
        found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
    slowly.unlink()
    with agents(path, free_port(), ["--nnodes=2"]) as job:
        _finish(job, found)
    return found


class Worlds:
    """How many ranks each start of a job has had that came to train, as its folder has it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "run" / "starts.jsonl"

    def seen(self) -> list[int]:
        """The starts, the first first."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [json.loads(line)["ranks"] for line in lines]

    def __call__(self, ranks: int) -> bool:
        """Whether the last start has so many ranks."""
        return self.seen()[-1:] == [ranks]


def _layouts(path: Path) -> None:
    """A layout for each number of ranks, that of two unlike the one without."""
    raw = yaml.safe_load(path.read_text()) | {"elastic": {1: "one.yaml", 2: "two.yaml"}}
    path.write_text(yaml.safe_dump(raw))
    for name, tp in (("one", 1), ("two", 2)):
        path.with_name(f"{name}.yaml").write_text(yaml.safe_dump({"layout": {"llm": {"tp": tp}}}))


def rejoin(path: Path, steps: int, draw: random.Random, moment: str) -> Injected:
    """A machine is switched off; the job goes on without it on the layout for that count, and takes it in
    again when it is back."""
    _layouts(path)
    options, on = ["--nnodes=1:2", "--rdzv-backend=c10d", "--max-restarts=9"], Worlds(path.parent)
    with agents(path, free_port(), options) as job:
        slowly = path.with_name("pause")
        slowly.write_text("0.1")
        job.wait_for(lambda: on(2), LIMIT_S)
        _hit(job, draw, moment)
        found = Injected("rejoin", 1, job.steps() + 1)
        begun, crowd = time.monotonic(), Crowd()
        job.stop(1)
        found.lost = max(0, job.steps() - kept(path.parent))
        alone = job.wait_for(lambda: crowd.look() or on(1), 60.0 + LIMIT_S)
        found.seconds = time.monotonic() - begun
        found.wrong += [] if alone else ["the job does not go on without the machine"]
        found.wrong += [f"{found.lost} steps are lost"] if found.lost > LOST else []
        some = job.steps() + 2
        job.wait_for(lambda: job.steps() >= some, LIMIT_S)
        slowly.write_text("1.0")  # the machine is to come back before the end
        job.start(1)
        back = job.wait_for(lambda: on(2), LIMIT_S)
        slowly.unlink()
        found.wrong += [] if back and job.steps() < steps - 2 else ["the machine is not taken in again"]
        found.wrong += [] if "tp2" in job.said(0) else ["not the layout that the config gives for two ranks"]
        found.said = job.said(0) + job.said(1)
        _finish(job, found)
    found.said += f"\nranks of each start: {on.seen()}" * bool(found.wrong)
    return found


def _nodes() -> str:
    return nodes.missing()


def _network() -> str:
    return nodes.missing(network=True)


PARTITIONS = ("meeting", "start", "step", "save")
SCENES = {
    "during-load": Kind(during_load, ("meeting", "reading", "ready")),
    "term-during-save": Kind(term_during_save, ("save",)),
    "writer": Kind(writer, ("idle", "saving")),
    "read-only": Kind(read_only, ("step",), no_chattr),
    "torchrun": Kind(restarted, ("step", "save"), _nodes),
    "agent": Kind(agent, ("step", "save"), _nodes),
    "cable-pulled": Kind(pulled, PARTITIONS, _network),
    "cut-off": Kind(cut_off, PARTITIONS, _network),
    "rejoin": Kind(rejoin, ("step",), _nodes, exact=False),
}


def play(name: str, path: Path, steps: int, draw: random.Random) -> Injected:
    """Play a scene, at the moment that the name asks for or one that is drawn."""
    kind, _, moment = name.partition("@")
    scene = SCENES[kind]
    return scene.scene(path, steps, draw, moment or draw.choice(scene.moments))
