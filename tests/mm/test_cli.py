"""The command line: arguments in any order, exit codes, one message, and clean ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm.cli import COMMANDS, main
from mm.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/digits.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


# After "$" a command line, below it the exit code and a part of the message. CONFIG: the shipped config.
REFUSALS = """
$
2 no command; commands: train, compare, plan, data, checkpoint, generate, eval, report, doctor
$ trian x
2 unknown command trian; did you mean train?
$ train
2 needed: one CONFIG file, given none
$ train CONFIG other.yaml
2 given configs/digits.yaml and other.yaml
$ train configs/digit.yaml
2 no config file configs/digit.yaml; there: configs/digits.yaml
$ train CONFIG --steps 3
2 unrecognized arguments: --steps
$ train configs
2 configs is a folder, not a config file; there: configs/digits.yaml
$ train README.md
2 README.md cannot be read as YAML
$ train configs/layouts/dp4.yaml
2 is a layout file; needed: a config
$ train CONFIG train.lr
2 an override is key=value, so train.lr=..
$ train CONFIG --nproc 1000000 --dry-run
2 1000000 ranks (--nproc, run.nproc); needed: at most
$ train CONFIG run.dir=README.md
2 run.dir README.md cannot be written: File exists
$ train CONFIG data.train=[none.tar]
3 no shard matches 'none.tar'
$ train CONFIG checkpoint.resume=none/here
4 checkpoint.resume=none/here does not exist
$ train CONFIG checkpoint.resume=docs
4 checkpoint.resume=docs is no checkpoint, and has none inside
$ train CONFIG checkpoint.weights=docs
4 docs is neither a checkpoint (with a manifest.json)
$ train CONFIG layout.visoin.tp=2
2 unknown key layout.visoin; did you mean vision?
$ train CONFIG layout.llm.TP=2
2 unknown key layout.llm.TP; known keys: ranks, tp
$ train CONFIG model.text.encoder=vit
2 model.text: no module can have this name
$ train CONFIG model.llm.preset=3
2 model.llm.preset is 3; needed: a name or a folder
$ train CONFIG model.vision.encoder=os:path
2 model.vision.encoder: 'os:path' is not a subclass
$ train CONFIG model.vision.encoder=os:no
2 module 'os' has no attribute 'no'; needed: package
$ train CONFIG model.vision.encoder=encoders:Encoder
2 no whole encoder: it lacks __init__, cost
$ train CONFIG model.vision.options.patch=0
2 model.vision: vit patch is 0; needed: at least 1
$ train CONFIG model.vision.options.channels=2
2 vit channels is 2; needed: 1 (grey) or 3
$ train CONFIG model.audio.options.mels=0
2 model.audio: fastconformer mels is 0
$ train CONFIG --dry-run model.vision.options.patch=3
3 does not fit model.vision: image of 8x12
$ train CONFIG --dry-run model.audio.options.rate=9000
3 this encoder needs 9000
$ train CONFIG --dry-run model.audio={encoder: vit}
3 ViT needs the metadata 'height', it has
$ train CONFIG --nproc 0
2 --nproc 0; needed: at least 1
$ train CONFIG --nproc two
2 argument --nproc: invalid int value
$ train CONFIG train.stpes=3
2 unknown key train.stpes; did you mean steps?
$ train CONFIG layout.llm.tp=3
2 tp=3 needs a multiple of 3 ranks, given 4; nearest: layout.llm.tp=4 or layout.llm.tp=2
$ train CONFIG layout.llm.etp=4 model.llm.expert_ffn=30
2 does not divide by etp=4; nearest: layout.llm.etp=2
$ train CONFIG model.llm.preset=nemotron-3-nao
2 did you mean nemotron-3-nano
$ train CONFIG schedule.kind=gpip
2 given 'gpip'; known: auto
$ train CONFIG layout.llm.pp=2 layout.llm.vpp=2 schedule.kind=1f1b
2 nearest: schedule.kind=interleaved
$ train CONFIG layout.llm.pp=4 model.llm.pattern=M*E
2 nearest: layout.llm.pp=2
$ train CONFIG layout.llm.ranks=0-7
2 '0-7' goes up to rank 7, but the job has 4 ranks (0-3); needed: ranks below 4, or a job of at least 8
$ train CONFIG train.steps=few
2 train.steps: given 'few'; needed: an integer
$ plan configs/llava-stages.yaml
2 needed: --stage, one of projector, instructions
$ plan configs/llava-stages.yaml --stage projetcor
2 unknown stage projetcor; did you mean projector?
$ compare configs/llava-stages.yaml --layouts a.yaml
2 needed: --stage, one of projector, instructions
$ compare CONFIG --layouts configs/layouts/dp4.yaml --json no/such/o.json
2 --json no/such/o.json: there is no folder no/such; needed: mkdir -p no/such
$ report none --out no/such/o.html
2 --out no/such/o.html: there is no folder no/such
$ train CONFIG layout.lmm.tp=2
2 lmm
$ train CONFIG model.llm.d_modle=3
2 unknown key model.llm.d_modle; did you mean d_model?
$ train CONFIG model.vision.encoder=vti
2 did you mean 'vit'?
$ compare CONFIG
2 needed: --layouts FILE
$ compare --layouts a.yaml CONFIG
2 needed: one CONFIG file, before --layouts
$ compare CONFIG --layouts none.yaml
2 no layout file none.yaml
$ compare CONFIG --layouts configs/layouts/dp4.yaml configs/layouts/disjoint-dp3-dp2.yaml
2 configs/layouts/disjoint-dp3-dp2.yaml: layout.llm.ranks '3-4' goes up to rank 4
$ compare CONFIG --layouts a.yaml --peak inf
2 --peak inf; needed: a device's peak in TFLOPS
$ compare CONFIG --layouts a.yaml --steps 1
2 needed: at least 2 steps
$ data
2 needed: data prepare NAME --out DIR
$ data prepare digits
2 needed: data prepare NAME --out DIR
$ data inspect none-*.tar
3 no shard matches
$ checkpoint verify
2 needed: checkpoint inspect PATH
$ checkpoint verify none
4 none: it does not exist; needed: the folder of a checkpoint
$ doctor now
2 doctor takes no arguments
"""


def refusals() -> list[tuple[str, int, str]]:
    """(command line, exit code, a part of the message) of each of REFUSALS."""
    found = re.findall(r"^\$ ?(.*)\n(\d) (.*)$", REFUSALS, re.M)
    return [(line.replace("CONFIG", CONFIG), int(code), part) for line, code, part in found]


@pytest.mark.parametrize(("line", "code", "part"), refusals())
def test_refusals_are_one_message_and_an_exit_code(
    line: str, code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = re.split(" (?![^{]*})", line) if line else []
    dry = ["--dry-run"] if argv[:2] == ["train", CONFIG] and "--dry-run" not in argv else []
    assert main(argv + dry) == code  # dry: the same checks, and no rank is started meanwhile
    out, err = capsys.readouterr()
    assert part in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert out == ""


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in overview
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0


def test_refusals_that_need_no_encoder_do_not_wait_for_torch(tmp_path: Path, processes: None) -> None:
    """The import takes seconds: 25 of silence before a misspelt layout was refused."""
    layout = tmp_path / "bad.yaml"
    layout.write_text("layout: {llm: {tp: 3}}")
    lines = [
        (["--help"], 0),
        (["train", "--steps"], 2),
        (["train", "none.yaml"], 2),
        *(
            (["train", CONFIG, word], code)
            for word, code in (
                ("train.stpes=3", 2),
                ("layout.visoin.tp=2", 2),
                ("layout.llm.tp=3", 2),
                ("layout.llm.ranks=0-7", 2),
                ("model.llm.d_modle=3", 2),
                ("model.llm.n_kv_heads=3", 2),
                ("model.llm.preset=nemotron-3-nao", 2),
                ("train.recompute=[mlpp]", 2),
                ("schedule.kind=gpip", 2),
                ("schedule.encoder_batch={visoin: 2}", 2),
                ("run.dir=README.md", 2),
                ("data.train=[none.tar]", 3),
            )
        ),
        (["train", CONFIG, "schedule.kind=fill", "layout.llm.pp=1"], 2),
        (["compare", CONFIG, "--layouts", str(layout)], 2),
    ]
    code = f"""
import sys
from mm.cli import main
for line, code in {lines!r}:
    assert main(line) == code, line
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        f"train {CONFIG} --dry-run --nproc 2 layout.llm.tp=2 train.global_batch=4",
        f"train train.global_batch=4 --nproc 2 {CONFIG} layout.llm.tp=2 --dry-run",
        f"--nproc 2 train --dry-run layout.llm.tp=2 train.global_batch=4 {CONFIG}",
    ],
)
def test_options_and_overrides_come_in_any_order(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 ranks") and "llm: tp2" in out and "4 samples" in out


def test_layouts_may_be_followed_by_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("layout: {llm: {tp: 3}}")
    assert main(["compare", CONFIG, "--layouts", str(bad), "run.nproc=5"]) == 2
    assert "tp=3 needs a multiple of 3 ranks, given 5" in capsys.readouterr().err
    swept = tmp_path / "train.lr=1"  # folders of sweeps are called so
    swept.mkdir()
    assert main(["compare", CONFIG, "--layouts", str(bad.rename(swept / "bad.yaml")), "run.nproc=5"]) == 2
    assert "train.lr=1/bad.yaml: layout.llm: tp=3 needs a multiple" in capsys.readouterr().err


def test_whatever_is_raised_is_reported_by_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoException(BaseException):  # as torch's CheckpointException
        pass

    def fail(args: Any, argv: list[str]) -> int:
        raise NoException("seen")

    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], run=fail))
    for rank, reports in (("1", True), ("0", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(launch, "reports", lambda error, reports=reports: reports)
        assert main(["doctor"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("rank 1 failed:\nTraceback") and "seen" in err if reports else not err


def command(tmp_path: Path, *more: str) -> list[str]:
    small = ["train.global_batch=4", "data.eval=[]", f"run.dir={tmp_path}", "model.llm.pattern=M*"]
    return ["train", CONFIG, *small, *more]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def started(argv: list[str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A long job that has done a step."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mm", *argv], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and losses(run_dir))
        yield process
    finally:
        process.kill()


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals ranks when their launcher ends")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path, processes: None) -> None:
    with started(command(tmp_path, "--nproc", "1", "train.steps=100000"), tmp_path) as job:
        ranks = children(job.pid)
        assert len(ranks) == 1
        job.kill()
        job.wait()
        try:
            wait_for(lambda: not any(alive(r) for r in ranks), 60)
        finally:
            for r in filter(alive, ranks):
                os.kill(r, signal.SIGKILL)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(p) for p in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_missing_package_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "mm.plan.blueprint", raising=False)
    assert main(["train", CONFIG, "--dry-run"]) == 1
    err = capsys.readouterr().err
    assert "is not installed for" in err and ".venv/bin/python" in err and "Traceback" not in err
