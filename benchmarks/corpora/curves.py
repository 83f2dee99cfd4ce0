"""Draw the losses and lifts of a run's metrics.jsonl. It needs matplotlib: pip install -e '.[docs]'.

python -m benchmarks.corpora.curves runs/tuxpaint docs/corpora-tuxpaint.svg
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import parser

WINDOW = 15  # steps that a training loss is the mean of


def main() -> None:
    args = parser(__doc__)
    args.add_argument("run", type=Path, help="the folder of a run")
    args.add_argument("out", type=Path, help="picture to write, such as a.svg or a.png")
    given = args.parse_args()
    lines = [json.loads(line) for line in (given.run / "metrics.jsonl").read_text().splitlines()]
    draw([x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x], given.out)
    print(given.out)


def draw(steps: list[dict], evaluations: list[dict], out: Path) -> None:
    """Training losses by modality and the held-out loss on the left, lifts on the right."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "polyrank", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained")
    for modality in sorted({m for x in steps for m in x["loss_by_modality"]}):
        own = [
            (x["step"], x["loss_by_modality"][modality]) for x in steps if modality in x["loss_by_modality"]
        ]
        at, means = [], []
        for i in range(WINDOW, len(own) + 1, WINDOW):
            part = own[i - WINDOW : i]
            tokens = sum(x["tokens"] for _, x in part)
            at.append(part[-1][0])
            means.append(sum(x["loss"] * x["tokens"] for _, x in part) / tokens)
        left.plot(at, means, label=f"training: {modality}")
    when = [x["step"] for x in evaluations]
    left.plot(when, [x["eval_loss"] for x in evaluations], "k.-", label="held out: all")
    left.set(xlabel="step", ylabel="nats a token", ylim=(0, None), title="loss")
    for modality in evaluations[-1]["modality_lift"]:
        right.plot(when, [x["modality_lift"][modality] for x in evaluations], ".-", label=modality)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="step", ylabel="nats a token", title="lift on held-out data")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
