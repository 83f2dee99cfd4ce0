"""Hardware files: every shipped one is read, wrong ones are refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.errors import Refused
from mm.predict.hardware import FOLDER, Curve, from_mapping, known_hardware, load_hardware


def raw(name: str = "h100") -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def sections(value: Any) -> list[dict[str, Any]]:
    """All mappings that hold figures."""
    if not isinstance(value, dict):
        return []
    inner = [s for v in value.values() for s in sections(v)]
    return inner + [value] * any(isinstance(v, int | float | list) for v in value.values())


@pytest.mark.parametrize("name", known_hardware())
def test_every_file_is_read_and_says_where_its_figures_come_from(name: str) -> None:
    made = load_hardware(name)
    assert made.name == name
    assert load_hardware(FOLDER / f"{name}.yaml") == made
    found = sections({k: v for k, v in raw(name).items() if k != "links"}) + sections(
        {k: v for k, v in raw(name)["links"].items() if k != "node_size"}
    )
    assert found and all(s["source"] for s in found)


def test_what_is_asked_for_is_there() -> None:
    assert {"h100", "h200", "b200", "gb200", "a100", "cpu-gloo"} <= set(known_hardware())


def test_unknown_hardware_is_refused_with_what_is_known() -> None:
    with pytest.raises(Refused, match=r"unknown hardware h10; did you mean h100\? known: a100, .*h200"):
        load_hardware("h10")
    with pytest.raises(Refused, match=r"no/such\.yaml"):
        load_hardware("no/such.yaml")


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("memory.bytess", 1, "unknown key memory.bytess; did you mean bytes"),
        ("memory.bytes", "many", "memory.bytes: given 'many'"),
        ("memory.source", None, "memory.source is missing"),
        ("memory.reserved", 1e15, "memory.reserved: given 1e.15; needed: less than memory.bytes, 8"),
        ("peak.bfloat16", -1, "peak.bfloat16: given -1.0; needed: more than 0"),
        ("kernels.product.share", [0.5], "kernels.product: given 5 sizes and 1 shares"),
        ("kernels.attention.size", [4, 2, 8, 16], "kernels.attention.size: given .*ascending"),
        ("kernels.convolution.share", [1.5], "kernels.convolution.share: given .*at most 1"),
        ("memory.bandwidth", math.nan, "memory.bandwidth: given nan; needed: more than 0"),
        ("peak.bfloat16", math.inf, "peak.bfloat16: given inf"),
        ("links.inside.latency_s", math.nan, "links.inside.latency_s: given nan"),
        ("kernels.product.size", [1, 2, 3, 4, math.nan], "kernels.product.size: given .*ascending"),
        ("kernels.launch_s", -1e-6, "kernels.launch_s: given -1e-06; needed: 0 or more"),
        ("links.inside.efficiency", 0, "links.inside.efficiency: given 0.0; needed: above 0"),
        ("links.across.nics", 0, "links.across.nics: given 0; needed: more than 0"),
        ("links", None, "links is missing"),
    ],
)
def test_a_wrong_file_is_refused_in_words(path: str, value: Any, why: str, tmp_path: Path) -> None:
    given = raw()
    *folders, key = path.split(".")
    at = given
    for folder in folders:
        at = at[folder]
    if value is None:
        del at[key]
    else:
        at[key] = value
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(Refused, match=f"wrong.yaml: .*{why}"):
        load_hardware(file)


@pytest.mark.parametrize("text", [b"", b"- 1", b"a: [", b"name: x", b"\xff\xfe\x00"])
def test_what_is_no_hardware_at_all_is_refused(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    file.write_bytes(text)
    with pytest.raises(Refused, match=r"none.yaml: "):
        load_hardware(file)


def test_a_dtype_without_a_peak_is_refused_with_those_there_are() -> None:
    made = from_mapping(raw("cpu-gloo"), "here")
    with pytest.raises(Refused, match="no peak for float8; it has float64, float32, bfloat16"):
        made.peak_of("float8")


def test_a_curve_goes_through_its_points_and_is_flat_beyond_them() -> None:
    curve = Curve((0.1, 0.5, 0.4), "made up", (10, 1000, 4000))
    found = [curve.at(x) for x in (1, 10, 100, 1000, 4000, 1e9)]
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.4, 0.4])
