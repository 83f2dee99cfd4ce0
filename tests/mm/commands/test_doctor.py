"""The doctor reports what is installed, what is missing and whether the default job can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.commands import doctor


def test_two_ranks_meet_over_gloo(processes: None) -> None:
    seconds, error = doctor.ping()
    assert error is None and seconds > 0


def test_ranks_that_do_not_meet_are_an_error_not_a_hang(
    monkeypatch: pytest.MonkeyPatch, processes: None
) -> None:
    monkeypatch.setattr(doctor, "_PING", "import time; time.sleep(600)")
    assert doctor.ping(0.2)[1] == "no answer within 0.2 s"
    monkeypatch.setattr(doctor, "_PING", "raise OSError('no route')")
    assert doctor.ping()[1] == "OSError: no route"


def test_this_machine_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_transformers", lambda: "transformers")
    monkeypatch.setattr(doctor, "ping", lambda: (1.5, None))
    text, healthy = doctor.examine()
    assert healthy and text.endswith("the default job can run")
    for part in (
        "python 3.",
        "cores",
        "free disk",
        "torch ",
        "torchvision: ",
        "gloo",
        "threads",
        "shards",
        "1.5 s",
        "plug-ins: find both so, before their code is imported; transformers",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("package", "healthy", "part"),
    [
        ("pydantic", False, "the default job cannot run: pydantic is missing (pip install -e .)"),
        ("torch", False, "torch is missing"),
        ("torchvision", True, "missing   <- a fallback is used"),
    ],
)
def test_a_missing_package_is_named(
    package: str, healthy: bool, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else found(name))
    monkeypatch.setattr(doctor, "_transformers", lambda: "transformers")
    monkeypatch.setattr(doctor, "ping", lambda: (1.5, None))
    text, well = doctor.examine()
    assert well is healthy and part in text


@pytest.mark.parametrize(
    ("found", "imports", "end"),
    [
        (None, "", "transformers is not installed (only some plug-ins want it)"),
        ("5.1", "", "transformers 5.1 can be imported"),
        (
            "5.1",
            "operator torchvision::nms is absent\n..",
            "cannot be imported: operator torchvision::nms is absent",
        ),
    ],
)
def test_plug_ins_are_told_what_they_find(
    found: str | None, imports: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        assert name.startswith("transformers")
        if imports:
            raise RuntimeError(imports)

    monkeypatch.setattr(doctor, "_version", lambda name: found)
    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert doctor._transformers().endswith(end)


def test_missing_data_and_a_broken_backend_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch==0.1", "numpy>=1"]')
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "ping", lambda: (60.0, "no answer within 60 s"))
    monkeypatch.setattr(doctor, "_transformers", lambda: "transformers")
    text, healthy = doctor.examine()
    assert not healthy and "no shipped data" in text and "two gloo ranks cannot meet: no answer" in text
    assert "<- differs" in text and doctor.pins() == [("torch", "0.1")]
