"""How much of the answers about held-out stamps is right, from what `mm eval` writes:

    python -m mm eval runs/tuxpaint --ask-samples 529 --tokens 48 --json answers.json
    python -m benchmarks.corpora.answers answers.json

Of pictures: the category. Of recordings: the language, and the characters of the name
that are wrong (insertions, deletions and substitutions over the characters of the right one). Beside each
stands what a model would reach that is blind or deaf: always the commonest answer, and for names the answers
of the same language to other recordings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import parser

Pair = tuple[str, str]  # (said, right)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("answers", type=Path, help="what mm eval --json wrote")
    args.add_argument("--show", type=int, default=0, metavar="N", help="print every N-th answer too")
    given = args.parse_args()
    answers = json.loads(given.answers.read_text())["exact_match"]["answers"]
    pairs = [(a["said"], a["answer"] if isinstance(a["answer"], str) else a["answer"][0]) for a in answers]
    for said, right in pairs[:: given.show] if given.show else []:
        print(f"{right!r:<60} {said!r}")
    spoken = [p for p in pairs if p[1][2:4] == ": "]
    seen = [p for p in pairs if p[1][2:4] != ": "]
    report("category", seen)
    report("language", [(a[:2], b[:2]) for a, b in spoken])
    right_language = [(a, b) for a, b in spoken if a[:2] == b[:2]]
    print(
        f"{'characters of names, wrong':<30} {error_rate(right_language):7.1%}  other recording's answer: "
        f"{error_rate(exchanged(right_language)):.1%}"
    )


def report(what: str, pairs: Sequence[Pair]) -> None:
    """The share that is right, beside that of the commonest right answer."""
    commonest = Counter(right for _, right in pairs).most_common(1)[0][1]
    good = sum(said == right for said, right in pairs)
    print(f"{what:<30} {good / len(pairs):7.1%}  of {len(pairs)}; commonest: {commonest / len(pairs):.1%}")


def exchanged(pairs: Sequence[Pair]) -> list[Pair]:
    """Each right name with what was said of the next recording of its language."""
    out = []
    for language in sorted({right[:2] for _, right in pairs}):
        own = [p for p in pairs if p[1][:2] == language]
        out += [(own[(i + 1) % len(own)][0], right) for i, (_, right) in enumerate(own)]
    return out


def error_rate(pairs: Sequence[Pair]) -> float:
    """Edits over the characters of the right names, without their languages."""
    return sum(edits(a[4:], b[4:]) for a, b in pairs) / sum(len(b) - 4 for _, b in pairs)


def edits(a: str, b: str) -> int:
    """The least insertions, deletions and substitutions that make b of a. O(len(a) len(b))."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


if __name__ == "__main__":
    main()
