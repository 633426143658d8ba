"""The committed figures of a lowered step: schema, sums, and sources that have not changed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fastbyol.errors import UsageError
from fastbyol_bench import lowered
from fastbyol_bench.graph_nodes import ADD, COPY, OURS, Node, Operation
from sample_results import replace_at
from test_inductor_code import TEXT


def test_the_figures_are_whole_and_add_up() -> None:
    kept = lowered.read()
    assert (kept.batch, kept.size, kept.precision) == (
        lowered.BATCH,
        lowered.SIZE,
        lowered.PRECISION,
    )
    recipes = {name: getattr(kept, name) for name in lowered.RECIPES}
    assert {name: recipe.sets for name, recipe in recipes.items()} == lowered.RECIPES
    for name, recipe in recipes.items():
        # Sums within a recipe are checked as it is read. ResNet-18 has 20 convolutions, ResNet-50
        # 53: two networks forward, one backward, and the images take no gradient. Linear layers: 2
        # in each of three heads.
        convolutions = 53 if "resnet50" in name else 20
        assert recipe.forward.external["convolution"].nodes == 2 * convolutions
        assert recipe.backward.external["convolution_backward"].nodes == 2 * convolutions - 1
        assert recipe.kinds["matrix products"] == 6 + 8
        # A resumed run is the same bit for bit only where nothing is added in any order.
        assert recipe.forward.atomic == recipe.backward.atomic == 0
        # Gradients are copied, not added.
        assert "autograd" not in recipe.outside
    # The budgets: of all but convolutions with batch norm, and GB in the compiled regions.
    assert kept.bn.nodes - kept.bn.kinds["convolutions"] <= 200
    assert kept.bn.gb + kept.bn.ours_gb <= 6.3
    assert kept.gn_ws.gb + kept.gn_ws.ours_gb <= 4.8
    assert kept.gn_ws.nodes <= 200
    # Neither the sums of residual blocks' gradients nor the schedule have kernels of their own.
    # With batch norm the gradient of the stem's weight comes out of its blocks in one.
    # A network of more layers has no more of Inductor's.
    for name, recipe in recipes.items():
        assert recipe.launches == getattr(kept, name.removeprefix("resnet50_")).launches
        assert recipe.backward.kinds["pointwise"].launches == (2 if name.endswith("bn") else 1)
        assert recipe.kinds.keys() == {
            "Inductor's kernels", "convolutions", "copies", "matrix products", OURS
        }  # fmt: skip


def test_the_step_has_not_changed_since_it_was_lowered() -> None:
    assert lowered.read().sources == lowered.fingerprint(), (
        "the step has changed since it was lowered: `make lowered` renews it"
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of all sources of the figures."""
    for pattern in lowered.SOURCES:
        for path in lowered.ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(lowered.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path


def test_the_fingerprint_is_of_what_the_code_does(sources: Path) -> None:
    before = lowered.fingerprint(sources)
    assert before == lowered.fingerprint()
    step, cpu = (
        sources / "fastbyol/engine/step.py",
        sources / "kernels/fastbyol_kernels/batch_norm/cpu.py",
    )
    code = step.read_text()
    step.write_text(
        code.replace('"""The whole state', '"""# Another\n\nThe whole state').replace(
            "\n\n\nclass", "\n\n\n# Why\n\nclass"
        )
    )
    cpu.write_text("# of a CPU\n")
    assert lowered.fingerprint(sources) == before
    step.write_text(f"{code}\n\nMORE = 1\n")
    assert lowered.fingerprint(sources) != before
    step.write_text(code)
    assert lowered.fingerprint(sources) == before
    (sources / "kernels/fastbyol_kernels/another.py").write_text("")
    assert lowered.fingerprint(sources) != before


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("bn", "launches"), 1, "launches is 1"),
        (("bn", "forward", "gb"), 99.0, "gb is 99"),
        (("bn", "backward", "ours_gb"), 99.0, "ours_gb is"),
        (("bn", "kinds", "copies"), 9999, "nodes is"),
        (("gn_ws", "outside", "fastbyol_kernels.lars_ema.triton", "_sweep_kernel"), 71, "nodes is"),
        (("batch",), 0, "batch"),
        (("more",), 1, "more"),
    ],
)
def test_a_file_that_does_not_add_up_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: float, says: str
) -> None:
    content = json.loads(lowered.PATH.read_text())
    replace_at(content, path, value)
    (tmp_path / "lowered.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"{says}.*`make lowered` renews it"):
        lowered.read(tmp_path / "lowered.json")


def test_a_missing_file_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`make lowered` writes it"):
        lowered.read(tmp_path / "lowered.json")


def test_code_and_nodes_are_put_together() -> None:
    """Combine TEXT's three kernels (1 GB), four convolutions and a product with our kernels."""
    nodes = Counter({Node(OURS, "norm", "kernel"): 2, Node(COPY, "norm", "clone"): 1})
    ours = Operation(1, nodes, 250_000_000)
    outside = Counter({Node(ADD, "autograd", "add_"): 5})
    recipe = lowered._recipe(
        (),
        [(TEXT, 0.125), ("def call(args):\n    pass", 0.0)],
        [{"fastbyol.group_norm": ours}, {}],
        outside,
    )
    assert (recipe.launches, recipe.gb, recipe.overlap_gb) == (3, 1.0, 0.125)
    assert (recipe.ours_gb, recipe.forward.ours_gb, recipe.backward.ours_gb) == (0.25, 0.25, 0.0)
    assert recipe.kinds == {
        "Inductor's kernels": 3, "convolutions": 4, "matrix products": 1, "our Triton kernels": 2,
        "copies": 1, "adds": 5
    }  # fmt: skip
    assert recipe.nodes == 16
    assert recipe.forward.kinds == {
        "pointwise": lowered.Kind(launches=2, gb=0.5),
        "reduction": lowered.Kind(launches=1, gb=0.5),
    }
    assert (recipe.forward.atomic, recipe.backward.atomic) == (1, 0)
    assert recipe.ours == {"norm": {"kernel": 2, "clone": 1}}


def test_operations_that_inductor_drops_or_repeats_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="calls of our operations"):
        lowered._recipe((), [(TEXT, 0.0), (TEXT, 0.0)], [{}, {}], Counter())


def test_a_step_that_cannot_be_lowered_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> lowered.Lowered:
        raise RuntimeError("no lowering\nwith more lines")

    monkeypatch.setattr(lowered, "lower", broken)
    monkeypatch.setattr("sys.argv", ["lowered", "--out", str(tmp_path / "lowered.json")])
    with pytest.raises(
        SystemExit, match=r"^lowered: RuntimeError: no lowering: nothing was written to \S+$"
    ):
        lowered.main()
    assert not list(tmp_path.iterdir())
