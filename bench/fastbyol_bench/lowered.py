"""The costs of a compiled step on an H100, counted without one: launches, GB and graph nodes.

python -m fastbyol_bench.lowered    # some minutes; writes bench/results/lowered.json
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fastbyol import load_config
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs.durable import write_atomically
from fastbyol_bench import graph_nodes, inductor_code
from fastbyol_bench.graph_nodes import Node, Operation
from fastbyol_bench.own_step import METHODS
from fastbyol_bench.results import Frozen, commit
from fastbyol_kernels.ahead_of_time import recording

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "bench" / "results" / "lowered.json"
BATCH, SIZE, PRECISION = 256, 96, "bf16"
# The settings of each recipe.
RECIPES = METHODS | {
    f"resnet50_{name}": (*sets, "model.encoder=resnet50") for name, sets in METHODS.items()
}
# The sources of the figures: the step, its parts and presets, and the code that counts.
SOURCES = (
    "fastbyol/model/*.py",
    "fastbyol/optim/arena.py",
    "fastbyol/optim/lars.py",
    "fastbyol/optim/schedule.py",
    "fastbyol/views.py",
    "fastbyol/engine/step.py",
    "fastbyol/engine/working_weights.py",
    "fastbyol/engine/addends.py",
    "fastbyol/engine/capture.py",
    "kernels/fastbyol_kernels/*.py",
    "kernels/fastbyol_kernels/**/*.py",
    "configs/blog.toml",
    "bench/fastbyol_bench/lowered.py",
    "bench/fastbyol_bench/mocked_gpu.py",
    "bench/fastbyol_bench/inductor_code.py",
    "bench/fastbyol_bench/graph_nodes.py",
)
NOT_ON_A_GPU = ("cpu.py", "native.py")  # ends of names: kernels of a CPU
INDUCTORS = "Inductor's kernels"
EXTERNAL = {"convolution": "convolutions", "convolution_backward": "convolutions"} | dict.fromkeys(
    ("addmm", "baddbmm", "bmm", "mm"), "matrix products"
)
ASSUMPTIONS = (
    "one launch per convolution, forward and per gradient, and per matrix product: what cuDNN and "
    "cuBLAS add is not known here",
    "one node per ATen operation: a workspace's memset is not seen",
    "GB as Inductor counts them (kernel_num_gb), overlap_gb of them read by windows that overlap "
    "(max pool); ours_gb: every tensor of a Triton kernel of ours read or written once a launch",
    "graphs traced on the CPU, then lowered for fake tensors of a mocked H100; nothing was run",
)


class Kind(Frozen):
    """Inductor's kernels of one kind: launches in a step and GB moved."""

    launches: NonNegativeInt
    gb: NonNegativeFloat


class External(Frozen):
    """The calls of foreign code in a compiled region, and their nodes in the graph."""

    calls: NonNegativeInt
    nodes: NonNegativeInt


class Region(Frozen):
    """A compiled region: Inductor's kernels by kind, and foreign calls by name.

    ``atomic`` launches add atomically: with any of them a step's bits vary from run to run.
    ``ours_gb`` are moved by our Triton kernels.
    """

    launches: NonNegativeInt
    atomic: NonNegativeInt
    gb: NonNegativeFloat
    ours_gb: NonNegativeFloat
    overlap_gb: NonNegativeFloat
    kinds: dict[str, Kind]
    external: dict[str, External]

    @model_validator(mode="after")
    def _adds_up(self) -> Region:
        _check("launches", self.launches, sum(kind.launches for kind in self.kinds.values()))
        _check("gb", self.gb, sum(kind.gb for kind in self.kinds.values()))
        return self


class Recipe(Frozen):
    """One step: ``launches`` and ``gb`` of Inductor's kernels, ``nodes`` of the whole graph.

    ``launches`` and ``gb`` leave out cuDNN, cuBLAS and our Triton kernels; ``ours_gb`` are those of
    our kernels in the compiled regions; ``nodes`` counts everything. ``kinds`` splits the nodes by
    kind. ``outside`` counts those outside the compiled regions by the function that launches them
    and by operation or kernel, ``ours`` our Triton launches inside them by module and kernel.
    """

    sets: tuple[str, ...]
    launches: NonNegativeInt
    gb: NonNegativeFloat
    ours_gb: NonNegativeFloat
    overlap_gb: NonNegativeFloat
    nodes: NonNegativeInt
    kinds: dict[str, NonNegativeInt]
    forward: Region
    backward: Region
    ours: dict[str, dict[str, PositiveInt]]
    outside: dict[str, dict[str, PositiveInt]]

    @model_validator(mode="after")
    def _adds_up(self) -> Recipe:
        regions = (self.forward, self.backward)
        _check("launches", self.launches, sum(region.launches for region in regions))
        _check("gb", self.gb, sum(region.gb for region in regions))
        _check("ours_gb", self.ours_gb, sum(region.ours_gb for region in regions))
        _check("overlap_gb", self.overlap_gb, sum(region.overlap_gb for region in regions))
        _check("nodes", self.nodes, sum(self.kinds.values()))
        external = sum(other.nodes for region in regions for other in region.external.values())
        outside = sum(count for counts in self.outside.values() for count in counts.values())
        _check("nodes", self.nodes, self.launches + external + outside)
        return self


class Versions(Frozen):
    """The versions of the software that lowered the step."""

    torch: str
    triton: str
    python: str


class Lowered(Frozen):
    """The content of ``bench/results/lowered.json``; ``sources`` is its code's ``fingerprint``."""

    schema_: Literal["fastbyol-lowered/3"] = Field("fastbyol-lowered/3", alias="schema")
    device: str
    batch: PositiveInt
    size: PositiveInt
    precision: str
    versions: Versions
    commit: str | None
    sources: str
    assumptions: tuple[str, ...]
    bn: Recipe
    gn_ws: Recipe
    resnet50_bn: Recipe
    resnet50_gn_ws: Recipe


def _check(name: str, total: float, parts: float) -> None:
    """Raise ValueError unless ``parts`` add up to ``total``; GB are rounded to a kilobyte."""
    if abs(total - parts) > 1e-5:
        raise ValueError(f"{name} is {total}, its parts make {parts}")


def fingerprint(root: Path = ROOT) -> str:
    """Return a digest of the code of ``SOURCES`` under ``root`` without comments and docstrings."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        if not path.name.endswith(NOT_ON_A_GPU):
            meaning = _toml if path.suffix == ".toml" else _code
            digest.update(
                f"{path.relative_to(root).as_posix()}\n{meaning(path.read_text('utf-8'))}\n".encode()
            )
    return digest.hexdigest()[:16]


def _toml(text: str) -> str:
    return json.dumps(tomllib.loads(text), sort_keys=True)


def _code(text: str) -> str:
    """Return a module's syntax tree without docstrings, equal for all versions of Python."""
    module = ast.parse(text)
    for node in ast.walk(module):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node):
            del node.body[0]
    return _plain(module)


def _plain(node: Any) -> str:
    """Return a dump of ``node`` without empty fields, which depend on the version of Python."""
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_plain(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        )
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_plain, node))}]" if isinstance(node, list) else repr(node)


def read(path: Path = PATH) -> Lowered:
    """Read a file that ``write`` made.

    Raises UsageError if the file is missing, has another schema or does not add up.
    """
    try:
        return Lowered.model_validate_json(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: `make lowered` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path}: {where}: {first['msg']}: `make lowered` renews it") from None


def write(lowered: Lowered, path: Path) -> None:
    """Write ``lowered`` to ``path`` as JSON, atomically."""
    text = json.dumps(lowered.model_dump(mode="json", by_alias=True), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def lower(batch: int = BATCH, size: int = SIZE) -> Lowered:
    """Lower and count all recipes for a mocked H100: BN with SGD, GN + WS with LARS, two encoders.

    Raises the exceptions of torch, Inductor or Triton. Run it in a process of its own: it patches
    torch, whose caches outlive the patches.
    """
    # Imported here because it loads Inductor, which readers of the file do not need.
    from fastbyol_bench import mocked_gpu

    architecture = mocked_gpu.ARCHITECTURE
    traced = {}
    for name, sets in RECIPES.items():
        config = load_config(
            "blog",
            [f"train.precision={PRECISION}", f"views.size={size}", "engine.kernels=triton", *sets],
        )
        with recording(architecture):
            state = TrainState.create(config, steps_per_epoch=1000)
        graphs = mocked_gpu.trace(state, batch, size)
        outside = graph_nodes.of_step(state, config, batch, architecture)
        _note(f"{name}: traced")
        # The stand-in has a gradient per leaf, and so must the region that it replaces.
        with recording(architecture), state.weights.in_use(2 * batch) as leaves:
            _same(f"{name}: gradients", len(leaves), graphs[1].num_results)
        inside = [graph_nodes.of_operations(graph.module.graph, architecture) for graph in graphs]
        _note(f"{name}: counted")
        traced[name] = (sets, graphs, inside, outside)
    recipes = {}
    with mocked_gpu.mocked_h100():
        for name, (sets, graphs, inside, outside) in traced.items():
            codes = []
            for graph in graphs:
                codes.append(mocked_gpu.lower(graph))
                _note(f"{name}: lowered {'backward' if graph.backward else 'forward'}")
            recipes[name] = _recipe(sets, codes, inside, outside)
    return Lowered(
        device=f"{mocked_gpu.H100.name}, mocked",
        batch=batch,
        size=size,
        precision=PRECISION,
        versions=Versions(
            torch=torch.__version__, triton=triton.__version__, python=platform.python_version()
        ),
        commit=commit(),
        sources=fingerprint(),
        assumptions=ASSUMPTIONS,
        **recipes,
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _same(what: str, one: object, other: object) -> None:
    if one != other:
        raise RuntimeError(f"{what}: {one} by one count and {other} by the other")


def _recipe(
    sets: tuple[str, ...],
    codes: Sequence[tuple[str, float]],
    inside: Sequence[Mapping[str, Operation]],
    outside: Counter[Node],
) -> Recipe:
    """Return the recipe from both regions' code and operations and the nodes outside them."""
    regions = [_region(*code, operations) for code, operations in zip(codes, inside, strict=True)]
    ours = sum(
        (operation.nodes for operations in inside for operation in operations.values()),
        Counter[Node](),
    )
    kinds: Counter[str] = Counter()
    for node, count in (outside + ours).items():
        kinds[node.kind] += count
    for region in regions:
        kinds[INDUCTORS] += region.launches
        for name, other in region.external.items():
            if not _is_ours(name):
                kinds[EXTERNAL.get(name, graph_nodes.OTHER)] += other.nodes
    return Recipe(
        sets=sets,
        launches=sum(region.launches for region in regions),
        gb=_gb(region.gb for region in regions),
        ours_gb=_gb(region.ours_gb for region in regions),
        overlap_gb=_gb(region.overlap_gb for region in regions),
        nodes=kinds.total(),
        kinds=dict(sorted(kinds.items())),
        forward=regions[0],
        backward=regions[1],
        ours=_by_origin(ours),
        outside=_by_origin(outside),
    )


def _region(text: str, overlap_gb: float, operations: Mapping[str, Operation]) -> Region:
    """Return the region of Inductor's code and of our operations in it."""
    code = inductor_code.parse(text)
    external: dict[str, External] = {}
    for name, nodes in code.external:
        before = external.get(name, External(calls=0, nodes=0))
        external[name] = External(calls=before.calls + 1, nodes=before.nodes + nodes)
    _same(
        "calls of our operations",
        {n: o.calls for n, o in operations.items()},
        {n: e.calls for n, e in external.items() if _is_ours(n)},
    )
    external |= {n: External(calls=o.calls, nodes=o.nodes.total()) for n, o in operations.items()}
    kinds = {}
    for kind in sorted({kernel.kind for kernel in code.kernels}):
        gb = [kernel.gb for kernel in code.kernels if kernel.kind == kind]
        kinds[kind] = Kind(launches=len(gb), gb=_gb(gb))
    return Region(
        launches=len(code.kernels),
        atomic=sum(kernel.atomic for kernel in code.kernels),
        gb=_gb(kind.gb for kind in kinds.values()),
        ours_gb=_gb(operation.num_bytes / 1e9 for operation in operations.values()),
        overlap_gb=_gb([overlap_gb]),
        kinds=kinds,
        external=dict(sorted(external.items())),
    )


def _is_ours(name: str) -> bool:
    return name.startswith("fastbyol.")


def _gb(parts: Iterable[float]) -> float:
    return round(sum(parts), 6)  # to a kilobyte


def _by_origin(nodes: Counter[Node]) -> dict[str, dict[str, int]]:
    origins: dict[str, dict[str, int]] = {}
    for node, count in sorted(nodes.items()):
        origins.setdefault(node.origin, {})[node.name] = count
    return dict(sorted(origins.items()))


def table(lowered: Lowered) -> str:
    """Return the totals as text, a line per recipe."""
    lines = [
        f"{'':15}{'launches':>9}{'GB':>8}{'ours':>8}{'forward':>9}{'GB':>8}{'ours':>8}"
        f"{'backward':>9}{'GB':>8}{'ours':>8}{'nodes':>7}"
    ]
    for name in RECIPES:
        recipe: Recipe = getattr(lowered, name)
        cells = [
            f"{part.launches:9}{part.gb:8.3f}{part.ours_gb:8.3f}"
            for part in (recipe, recipe.forward, recipe.backward)
        ]
        lines.append(f"{name:15}{''.join(cells)}{recipe.nodes:7}")
    return "\n".join(lines)


def main() -> None:
    """Lower both recipes and write the file. On failure, print one line and exit with code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbyol_bench.lowered", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=PATH, help="where to write (bench/results/lowered.json)"
    )
    path = parser.parse_args().out
    try:
        lowered = lower()
        write(lowered, path)
    except Exception as error:  # whatever torch's compiler raises ends here, as one line
        first = next(iter(str(error).strip().splitlines()), "")
        raise SystemExit(
            f"lowered: {type(error).__name__}: {first}: nothing was written to {path}"
        ) from error
    print(table(lowered))


if __name__ == "__main__":
    main()
