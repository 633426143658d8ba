"""The house rules that a machine can hold: which way imports point, what the command line costs,
which names are banned.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastbyol"
KERNELS = ROOT / "kernels" / "fastbyol_kernels"
BENCH = ROOT / "bench" / "fastbyol_bench"

# A module may import from its own rank's folder and from lower ranks. The order is CONTRIBUTING's
# arrows, bottom first.
RANKS = (
    ("errors", "process", "text"),
    ("config", "files", "output"),
    ("build_ffcv", "config_io"),
    ("data", "views", "model", "optim"),
    ("runs",),
    ("evaluation",),
    ("registry",),
    ("engine",),
    ("show",),
    ("loggers",),
    ("fleet",),
    ("sweeps", "ablations", "exports"),
    ("api",),
    ("demo",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
KERNELS_IMPORT = {"torch", "triton", "numba", "numpy", "fastbyol_kernels"}
BANNED = {"utils.py", "helpers.py", "common.py", "misc.py"}

# Names that say how a value came about instead of what it is, and words for which the field has
# others (CONTRIBUTING's glossary).
VAGUE_NAMES = re.compile(
    r"given|known|found|said|told|held|doubt|doubts|settle|take|place|octets|halves|"
    r"floats|course|story|Course|Story|Speaker|GivenRates|keep_statistics|processor"
)
# Keys of what is written as JSON, which users read.
JSON_NAMES = {("verdict.py", "held"), ("doctor.py", "found")}
BANNED_WORDS = re.compile(r"\b(processors?|[Mm]achine code|[Oo]ctets?|[Ww]hat of)\b")
OLD_WORD = '"processor"'  # in configurations of early runs, which are still read
# The verbs that docstrings of functions begin with, in the imperative: a new one is added here.
VERBS = re.compile(
    r"Add|Advance|Answer|Append|Apply|Ask|Become|Blur|Build|Change|Check|Choose|"
    r"Claim|Close|Collect|Combine|Compare|Compile|Compute|Continue|Convert|Convolve|"
    r"Copy|Count|Crop|Decode|Delete|Describe|Divert|Do|Draw|Drop|Embed|End|Exchange|"
    r"Explain|Fall|Fill|Find|Fit|Flatten|Force|Format|Free|Give|Go|Group|Hand|Handle|"
    r"Hash|Have|Hold|Ignore|Import|Inspect|Interpolate|Invert|Jitter|Join|Judge|Keep|Kill|"
    r"Launch|Lay|Leave|Let|List|Load|Look|Lower|Make|Map|Measure|Merge|Minimise|Move|"
    r"Name|Normalise|Open|Overwrite|Pack|Parse|Plan|Predict|Prefetch|Prepare|Print|Probe|"
    r"Propagate|Prove|Put|Raise|Read|Record|Reflect|Release|Remove|Repeat|Replace|"
    r"Report|Resize|Restore|Return|Round|Run|Say|Scale|Send|Serve|Set|Shade|Show|"
    r"Solarize|Solve|Split|Stack|Standardize|Start|Stop|Store|Submit|Sum|Take|Tell|Time|Train|"
    r"Translate|Transpose|Turn|Update|Verify|View|Wait|Warm|Work|Write|Yield"
)


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py"), *BENCH.rglob("*.py")])


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, ``from a import b`` as a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    """The room of ``fastbyol.X...``: its first part, ``__init__`` for the package itself."""
    part = dotted.split(".")[1] if "." in dotted else "__init__"
    return part if part in RANK else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    inside = path.is_relative_to(PACKAGE)
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py") if inside else ""
    for name in imports(path):
        top = name.split(".")[0]
        if path.is_relative_to(BENCH):  # which may import everything but the tests
            assert top != "tests", f"{path.name} imports {name}"
            continue
        if not inside:
            assert top in {*sys.stdlib_module_names, *KERNELS_IMPORT}, f"kernels import {name}"
            continue
        assert top not in {"tests", "fastbyol_bench"} or own == "cli", f"{own} imports {name}"
        if top != "fastbyol":
            continue
        target = room(name)
        allowed = (
            target == own
            or RANK[target] < RANK[own]
            or (own == "__init__" and target == "__init__")
        )
        assert allowed, (
            f"{path.relative_to(ROOT)} (rank of {own}) imports {name} (rank of {target})"
        )


def named(path: Path) -> str:
    """The dotted name of a module; a package's is that of its ``__init__``."""
    top = next(folder.parent for folder in (PACKAGE, KERNELS, BENCH) if path.is_relative_to(folder))
    return ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Whether at once or inside a function.

    Who imports a module is not taken to import the packages around it.
    """
    paths = {named(path): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets = ({target, target.rpartition(".")[0]} & paths.keys() for target in imports(path))
        # Of a package and a module in it, the module is what is imported.
        graph[name] = {max(found, key=len) for found in targets if found} - {name}
    circles = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            circles.append(" <- ".join(circle))
            # Without one of its imports, the others show.
            graph[circle[1]].discard(circle[0])
        else:
            break
    assert not circles


def test_every_keyword_of_a_kernel_op_is_passed_by_someone() -> None:
    """Whatever only tests pass is nobody's: an option to be wired, or to be deleted."""
    passed: dict[str, list[ast.Call]] = {}
    for path in [*PACKAGE.rglob("*.py"), *BENCH.rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        names = [
            alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
        ]
        meant = {alias.asname: alias.name for alias in names if alias.asname}
        for node in nodes:
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                passed.setdefault(meant.get(name, name), []).append(node)
    idle = []
    for path in sorted(KERNELS.glob("*/__init__.py")):
        body = ast.parse(path.read_text("utf-8")).body
        for function in (
            node
            for node in body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ):
            positional = [argument.arg for argument in function.args.args]
            options = positional[len(positional) - len(function.args.defaults) :]
            options += [argument.arg for argument in function.args.kwonlyargs]
            calls = passed.get(function.name, [])
            idle += [
                f"{named(path)}.{function.name}({option}=)"
                for option in options
                if not any(_passes(call, option, positional) for call in calls)
            ]
    assert not idle


def _passes(call: ast.Call, option: str, positional: list[str]) -> bool:
    """Whether ``call`` may pass ``option``: by name, in its place, or in a ``**dict`` whose names
    cannot be seen here.
    """
    places = (
        len(positional) if any(isinstance(a, ast.Starred) for a in call.args) else len(call.args)
    )
    return option in positional[:places] or any(
        keyword.arg in (option, None) for keyword in call.keywords
    )


def test_every_room_has_a_rank() -> None:
    rooms = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert rooms == set(RANK)


def test_only_one_module_talks_to_other_ranks() -> None:
    users = [
        path
        for path in modules()
        if any(name.startswith("torch.distributed") for name in imports(path))
    ]
    assert [path.name for path in users] == ["ranks.py"]


def test_no_generic_names() -> None:
    assert not [path for path in modules() if path.name in BANNED]


def test_tests_mirror_the_code() -> None:
    """A test file bears the stem of the module it tests, in the folder of the same name.

    Faults are of no one module.
    """
    stems = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    stems |= {
        Path("kernels") / path.relative_to(KERNELS).with_suffix("")
        for path in KERNELS.rglob("*.py")
    }
    stems |= {
        Path("bench") / path.relative_to(BENCH).with_suffix("") for path in BENCH.rglob("*.py")
    }
    stems |= {
        Path("kernels") / path.parent.relative_to(KERNELS) for path in KERNELS.rglob("__init__.py")
    }
    stems |= {Path("house"), Path("docs"), Path("wheel"), Path("first_light"), Path("runs/old")}
    stems.add(Path("bench/gpu/carry"))  # bench/carry.sh
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    tests = [path for path in tests if path.parts[0] != "faults"]
    strays = [
        path for path in tests if path.with_name(path.stem.removeprefix("test_")) not in stems
    ]
    assert not strays


OLD_RUN = str(ROOT / "tests" / "runs" / "old" / "finished")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["sweep", "--help"],
        ["runs", str(Path(OLD_RUN).parent)],
        ["report", "RUN"],
        ["watch", "--help"],
        ["explain", "--diff", "blog", OLD_RUN],
    ],
    ids=" ".join,
)
def test_commands_that_compute_nothing_do_not_import_torch(
    tmp_path: Path, arguments: list[str]
) -> None:
    """Torch takes seconds to import. ``RUN`` is a copy of a finished run."""
    if "RUN" in arguments:
        shutil.copytree(OLD_RUN, tmp_path / "RUN")
    code = (
        "import sys, fastbyol, fastbyol.cli.main as m; m.app(sys.argv[1:], standalone_mode=False)"
    )
    code += "; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, KERNELS.parent)))}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_functions_of_the_command_line_fit_a_screen() -> None:
    """Signature and docstring count."""
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in (PACKAGE / "cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 40
    ]
    assert not long


def test_only_the_bench_command_imports_the_benchmarks() -> None:
    users = [
        f"{path.stem}.{getattr(node, 'name', '')}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        for part in ast.walk(node)
        if isinstance(part, ast.Import | ast.ImportFrom) and "fastbyol_bench" in ast.unparse(part)
    ]
    assert users == ["doctor.bench"]


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in modules():
        for node in ast.parse(path.read_text("utf-8")).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            )
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    """In the imperative.

    A property reads as what it is, and a private function may speak as it likes.
    """
    others = []
    for path in modules():
        for function in public_functions(ast.parse(path.read_text("utf-8"))):
            first = re.match(r"[\w-]+", ast.get_docstring(function) or "")
            if first and not VERBS.fullmatch(first[0]):
                others.append(
                    f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {first[0]}"
                )
    assert not others


def public_functions(scope: ast.AST) -> Iterator[ast.FunctionDef]:
    """Functions and methods whose names say that they are for others, properties left out."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(name.endswith("property") for name in decorators):
                yield node


def test_names_say_what_a_thing_is() -> None:
    vague = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = next(
                (
                    getattr(node, field)
                    for field in ("id", "attr", "arg", "name")
                    if hasattr(node, field)
                ),
                None,
            )
            if name and VAGUE_NAMES.fullmatch(name) and (path.name, name) not in JSON_NAMES:
                vague.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}")
    assert not vague


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page, or of a module's comments and strings, which docstrings and messages are."""
    if path.suffix == ".md":
        yield from enumerate(path.read_text("utf-8").splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def test_prose_uses_the_words_of_the_field() -> None:
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "bench").glob("README.md"),
    ]
    banned = [
        f"{path.relative_to(ROOT)}:{line} {match[0]}"
        for path in [*modules(), *pages]
        for line, text in prose(path)
        if (match := BANNED_WORDS.search(text)) and text != OLD_WORD
    ]
    assert not banned
