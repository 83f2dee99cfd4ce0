"""The best layouts of Nemotron 3 models with two encoders, predicted: python -m benchmarks.planning.whatif.

Searches each model on each number of devices, writes what was found as docs/whatif/MODEL-DEVICES.json, and
the page docs/whatif.md from these files. `--only nano-256` searches one; `--page` none.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mm.config.schema import Config, load_config
from mm.errors import Refused
from mm.predict.hardware import load_hardware
from mm.search.explain import seconds_lines
from mm.search.plan import SECONDS, Plan, Planner
from mm.search.predictor import on_nodes
from mm.search.written import as_json, named

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "nano": "Nemotron 3 Nano (31.6B, 3.6B active)",
    "super": "Nemotron 3 Super (120.7B, 12.8B active)",
    "ultra": "Nemotron 3 Ultra (549B, 56B active)",
}
DEVICES = (256, 1024)
HARDWARE = "h100"
SAMPLES = 2  # a device in a step
GOALS = ("best", "homogeneous", "colocated", "disjoint", "mixed", "75% of the memory")
PAYS = 1.01  # times as fast from which on heterogeneity is said to pay
PARTS = 5  # sentences of a breakdown


@dataclass(frozen=True)
class Case:
    """A model on some devices."""

    model: str
    devices: int

    @property
    def name(self) -> str:
        """As in nano-256."""
        return f"{self.model}-{self.devices}"

    @property
    def overrides(self) -> list[str]:
        """Beside the config: as many samples a device everywhere."""
        return [f"train.global_batch={SAMPLES * self.devices}"]

    @property
    def path(self) -> str:
        """Of the config, from the repository's root."""
        return f"configs/{self.model}-1024-colocated.yaml"

    @property
    def command(self) -> str:
        """What finds it alone."""
        given = f"--devices {self.devices} --hardware {HARDWARE} {' '.join(self.overrides)}"
        return f"python -m mm plan {self.path} {given}"

    def config(self) -> Config:
        """The config, with its overrides, on the hardware's nodes."""
        cfg = load_config(ROOT / self.path, self.overrides)
        return on_nodes(cfg, self.devices, load_hardware(HARDWARE))


CASES = [Case(model, n) for model in MODELS for n in DEVICES]


def searched(case: Case, seconds: float) -> dict[str, Any]:
    """What a search finds in so many processor seconds: the JSON of `plan`, with layouts in words."""
    cfg = case.config()
    plan: Plan = Planner(cfg, case.devices, load_hardware(HARDWARE), top=1, limit=seconds).plan()
    shown = {name: j for names, j in named(plan) for name in names} | {"best": plan.best[0]}
    found = as_json(plan, cfg)
    return {
        "command": f"{case.command} --seconds {seconds:g}",
        "date": datetime.now(UTC).date().isoformat(),
        "described": {name: judged.candidate.describe() for name, judged in shown.items()},
        "explained": {name: seconds_lines(j.prediction) for name, j in shown.items() if j.prediction},
        **found,
        "samples": plan.note.split(" (")[0],  # without the folder that was looked into
    }


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/whatif.md. found: by case."""
    dates = sorted({str(one["date"]) for one in found.values()})
    seconds = sum(float(one["seconds"]) for one in found.values())
    lines = [*HEAD, *_summary(found), ""]
    for case in CASES:
        if case.name in found:
            lines += _section(case, found[case.name])
    lines += [
        f"Searched on {' and '.join(dates)}, {seconds:.0f} processor seconds in all. A search that ended",
        "early has the best of what it predicted, and says how much faster what was left out can be at most.",
        "Its bounds are loose on large spaces: that figure says more of the bounds than of the layouts.",
    ]
    return "\n".join(lines) + "\n"


HEAD = [
    "# What if: Nemotron 3 with eyes and ears on H100",
    "",
    "Which layout would train Nemotron 3 Nano, Super and Ultra with an encoder of the size of C-RADIO-H and",
    "one of the size of Parakeet, on 256 and 1,024 H100 in nodes of eight? All of it is predicted",
    "([planning.md](planning.md), [planning_search.md](planning_search.md)); nothing here was run. Made by",
    "",
    "    python -m benchmarks.planning.whatif [--seconds S] [--only nano-256] [--page]",
    "",
    f"A step has {SAMPLES} samples a device, made up: of four lengths, 1,638 to 4,096 tokens, up to half of",
    "them rows of pictures and sounds. `data.context` is 4,096, the dtype bfloat16, weights and optimizer",
    "state float32. [Homogeneous](planning_search.md#what-is-searched) is the same tp, cp and dp for all",
    "modules on the same ranks, tuned in all else as hard as the others. The H100 and its links are those of",
    "`configs/hardware/h100.yaml`.",
    "",
]


def _summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a case, and the verdict by category."""
    out = ["## In short", "", "Seconds of a step, and how many times as long as the best:", ""]
    out += ["| model | devices | best | TFLOPS a device | homogeneous | colocated | disjoint | mixed |"]
    out += ["|---|---|---|---|---|---|---|---|"]
    for case in CASES:
        head = f"| {MODELS[case.model]} | {case.devices:,} |"
        one = found.get(case.name)
        if one is None:
            out.append(f"{head} none found in the time of its search |" + " |" * 5)
            continue
        best = one["best_of"]["best"]
        cells = [f"{best['step_s']:.3g} s, {best['placement']}", f"{best['tflops_per_device']:.0f}"]
        for name in GOALS[1:5]:
            entry = one["best_of"].get(name)
            times = 0.0 if entry is None else entry["step_s"] / best["step_s"]
            cells.append(f"{entry['step_s']:.3g} s, {times:.2f}" if entry else "none found")
        out.append(f"{head} {' | '.join(cells)} |")
    return [*out, "", *_verdict(found), "", *_judged(found)]


def _verdict(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    pays, not_ = [], []
    for case in CASES:
        entries = found[case.name]["best_of"] if case.name in found else {}
        if entries.get("homogeneous"):
            gain = entries["homogeneous"]["step_s"] / entries["best"]["step_s"]
            (pays if gain >= PAYS else not_).append(f"{case.model} on {case.devices:,} ({gain:.3f})")
    return [
        "Times as fast as the best homogeneous layout is the best of all, of what was found:",
        "",
        f"- Heterogeneity pays: {', '.join(pays) or 'nowhere'}.",
        f"- It does not: {', '.join(not_) or 'nowhere'}.",
    ]


def _judged(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether the figures are plausible, and what they come from."""
    every = list(found.values())
    if not every:
        return []
    best = [one["best_of"]["best"] for one in every]
    low, high = (f(e["tflops_per_device"] for e in best) for f in (min, max))
    tokens = [e["tokens_per_s_per_device"] * e["step_s"] for e in best]
    shares = [share for one in every if (share := _encoders_share(one)) is not None]
    said = [
        f"**Plausible?** {low:.0f} to {high:.0f} TFLOPS a device are few beside dense models: "
        "[published runs](planning_published.md) of those reach 210 to 520. Experts' products are small and "
        "get a lower share of the peak (assumed in the hardware file, not fitted), a step has only about "
        f"{sum(tokens) / len(tokens):,.0f} tokens a device, and experts on several nodes exchange all rows "
        "over their links. Where weights need a pipeline, few micro-batches of unequal lengths leave it "
        "idle. A larger `train.global_batch` gives fuller pipelines; it was not changed here.",
        "**Memory.** The best fill a device almost wholly, and predicted memory is some per cent off "
        "([planning_published.md](planning_published.md)). Who runs one should take the best within 75 % of "
        "the memory, a row of each table.",
    ]
    if shares:
        between = f"{min(shares):.0%} to {max(shares):.0%}"
        said.insert(
            1,
            f"**Encoders on devices of their own.** Encoders are {between} of the computation of the best "
            "layouts. Devices for them alone wait unless they are as small a share of all, while the "
            "language model's must still divide by its pipeline and expert ranks.",
        )
    return [line for text in said for line in (*textwrap.wrap(text, 110), "")][:-1]


def _encoders_share(one: Mapping[str, Any]) -> float | None:
    """Of the seconds in which the best computes, those of encoders."""
    parts = one["best_of"]["best"]["breakdown"]
    computed = {key: s for key, s in parts.items() if key.endswith(".compute")}
    return 1 - computed.get("llm.compute", 0.0) / sum(computed.values()) if computed else None


def _section(case: Case, one: Mapping[str, Any]) -> list[str]:
    out = [f"## {MODELS[case.model]} on {case.devices:,}", "", f"    {case.command}", ""]
    out += [
        f"{one['considered']:,} candidates, {one['predicted']} predicted in full, in {one['seconds']:.0f}",
        f"processor seconds; the whole result: [{case.name}.json](whatif/{case.name}.json).",
        "",
        "| | step | tokens/s a device | TFLOPS a device | peak memory | idle | proved |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in GOALS:
        entry = one["best_of"].get(name)
        if entry is None:
            out.append(f"| {name} | none found | | | | | {_proved(one, name)} |")
            continue
        out.append(
            f"| {name} | {entry['step_s']:.4g} s | {entry['tokens_per_s_per_device']:.4g} | "
            f"{entry['tflops_per_device']:.4g} | {entry['peak_memory_bytes'] / 1e9:.3g} GB | "
            f"{entry['bubble_fraction']:.0%} | {_proved(one, name)} |"
        )
    out.append("")
    for name in GOALS:
        if name in one["described"]:
            out.append(f"- {name}: {one['described'][name]}")
    out += ["", "Of the seconds of the mean rank in the best:", ""]
    out += [f"- {sentence}" for sentence in one["explained"]["best"][:PARTS]]
    return [*out, "", *_compared(one), *_apart(one), ""]


def _compared(one: Mapping[str, Any]) -> list[str]:
    """Where the seconds of the best homogeneous layout go beside those of the best."""
    best, plain = (one["best_of"].get(name) for name in ("best", "homogeneous"))
    if plain is None:
        return ["No homogeneous layout was found that fits."]
    gain = plain["step_s"] / best["step_s"]
    if gain < PAYS:
        return [f"The best homogeneous layout takes {gain:.3f} times as long: heterogeneity gains nothing."]
    less = {k: v - _by_what(best)[k] for k, v in _by_what(plain).items()}
    parts = sorted(less.items(), key=lambda item: -abs(item[1]))[:3]
    words = ", ".join(f"{abs(s):.3g} s {'less' if s > 0 else 'more'} {what}" for what, s in parts if s)
    return [f"The best homogeneous layout takes {gain:.3f} times as long. Beside it the best has {words}."]


def _apart(one: Mapping[str, Any]) -> list[str]:
    """What devices of encoders alone cost in the best disjoint layout."""
    entry = one["best_of"].get("disjoint")
    if entry is None:
        return []
    idle, ranks = f"{entry['bubble_fraction']:.0%}", entry["layout"]["llm"]["ranks"]
    first, last = (int(n) for n in ranks.split("-"))
    size = last - first + 1
    return [
        f"The best disjoint layout gives the language model {size:,} devices, and its devices are idle for "
        f"{idle} of the step."
    ]


def _by_what(entry: Mapping[str, Any]) -> defaultdict[str, float]:
    out: defaultdict[str, float] = defaultdict(float)
    for key, seconds in entry["breakdown"].items():
        out[key.rsplit(".", 1)[-1]] += seconds
    return out


def _proved(one: Mapping[str, Any], goal: str) -> str:
    """What is proved of a goal, without its name."""
    said: str = one["proofs"].get(goal, "")
    return said.split(": ", 1)[-1].removesuffix(".").replace("the search ended early; ", "ended early, ")


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of each search")
    parser.add_argument("--only", choices=[case.name for case in CASES], help="search this one")
    parser.add_argument("--page", action="store_true", help="search nothing")
    args = parser.parse_args(argv)
    folder = ROOT / "docs" / "whatif"
    folder.mkdir(exist_ok=True)
    for case in CASES:
        if not args.page and args.only in (None, case.name):
            try:
                text = json.dumps(searched(case, args.seconds), indent=1)
            except Refused as error:
                print(f"{case.name}: {error}", flush=True)
                continue
            (folder / f"{case.name}.json").write_text(text + "\n")
            print(f"{case.name}: {folder / f'{case.name}.json'}", flush=True)
    found = {c.name: json.loads(p.read_text()) for c in CASES if (p := folder / f"{c.name}.json").is_file()}
    (ROOT / "docs" / "whatif.md").write_text(page(found))


if __name__ == "__main__":
    main()
