"""Values of the host reach a device in one way (parallel.sequence.host.to_device), and none are read back.

Such copies do nothing on CPUs, so only the sources show them. tests/host_waits.py finds what a run shows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.pages import PACKAGES, ROOT, name_of

# What runs before the first step or after the last (weights, checkpoints, commands), and virtual steps.
COLD = (
    "parallel/checkpoint/", "parallel/sharding/adopt.py", "parallel/sharding/param.py",
    "parallel/sharding/shard.py", "parallel/topology/mesh.py", "llm/decode.py", "llm/hf/", "llm/upcycle.py",
    "mm/checkpoint/", "parallel/published/", "mm/commands/", "mm/data/", "mm/inference/",
    "mm/virtual/",
)  # fmt: skip
MAKERS = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}  # of torch: from lists and arrays
METHODS = {"item", "cpu", "cuda", "nonzero", "pin_memory"}
# By file and function, what may stay.
ALLOWED = {
    ("parallel/sequence/host.py", "to_device", "from_numpy"): "the one way",
    ("parallel/sequence/host.py", "to_device", "pin_memory"): "the one way",
    ("parallel/sequence/host.py", "to_device", "to"): "the one way",
    ("encoders/media/pictures.py", "image_tensor", "from_numpy"): "decodes on the host",
    ("encoders/media/sounds.py", "read_samples", "from_numpy"): "decodes on the host",
    ("mm/ranks/batch.py", "_text", "from_numpy"): "text on the host, before to_device()",
    ("mm/ranks/decoding.py", "filled", "frombuffer"): "what a worker has decoded, on the host",
    ("mm/ranks/shared.py", "empty", "from_numpy"): "where workers decode to, on the host",
    ("mm/ranks/shared.py", "bytes_at", "frombuffer"): "where a worker decodes to, on the host",
    ("llm/model.py", "loss_rows", "nonzero"): "of labels on the host, while a batch is prepared",
    ("llm/offload.py", "back", "to"): "what was kept is pinned",
    ("parallel/schedule/executor/standin.py", "_stamp", "tensor"): "stand-ins have no device",
    ("mm/ranks/control.py", "_gather", "cpu"): "the messages before and after a step",
}


def names_a_device(call: ast.Call) -> bool:
    """Whether an argument is a device by its name, or by its keyword."""
    given = [*call.args, *(k.value for k in call.keywords)]
    last = [x.attr if isinstance(x, ast.Attribute) else getattr(x, "id", "") for x in given]
    return any("device" in name for name in last) or any(k.arg == "device" for k in call.keywords)


def copies(source: str) -> Iterator[tuple[str, str]]:
    """(function, what it calls) for each call that may copy between host and device."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, owner = node.func.attr, node.func.value
            of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
            made = name in (MAKERS if of_torch else METHODS)
            if made or (name == "to" and names_a_device(node)):
                yield function.name, name


def test_the_check_sees_copies() -> None:
    source = """
def f(x, device):
    a = torch.tensor([1], device=device)
    b = x.to(device)
    c = x.to(a.device, non_blocking=True)
    d = x.to(torch.float32), np.asarray(x)
    return a.item() + x.nonzero()
"""
    assert [what for _, what in copies(source)] == ["tensor", "to", "to", "item", "nonzero"]


def test_the_host_copies_in_one_way_and_reads_nothing() -> None:
    found = set()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = name_of(file)
            if not name.startswith(COLD):
                found |= {(name, *copy) for copy in copies(file.read_text())}
    assert found == set(ALLOWED)
