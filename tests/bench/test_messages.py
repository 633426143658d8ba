"""What a rank sends is what the network's norms and the layout of the message say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastbyol import load_config
from fastbyol.errors import UsageError
from fastbyol.model.byol import NUM_VIEWS, Online, Target
from fastbyol.model.norm import BatchNorm
from fastbyol_bench import messages
from fastbyol_bench.messages import NETWORKS, RANKS, Count, Kept
from sample_results import result

FP64, FP32 = 8, 4


@pytest.fixture(scope="module")
def counts() -> dict[str, Count]:
    return {name: messages.count("blog", name, messages.QUICK) for name in NETWORKS}


def channels(network: str) -> tuple[list[int], list[int]]:
    """The channels of the batch norms of the online and of the target network."""
    model = load_config("blog", [*messages.QUICK, *NETWORKS[network]]).model
    online, target = (
        [m.weight.numel() for m in net.modules() if isinstance(m, BatchNorm)]
        for net in (Online(model), Target(model))
    )
    return online, target


@pytest.mark.parametrize("network", [name for name in NETWORKS if "scope" not in name])
def test_a_norm_sends_its_moments_once_and_their_gradients_once(
    counts: dict[str, Count], network: str
) -> None:
    """Count, mean and M2 of each view in fp64, of both networks; backward two sums, of the online
    network. The contrastive loss without a queue sends the target's projections besides.
    """
    online, target = channels(network)
    count = counts[network]
    sent = [FP64 * NUM_VIEWS * (2 * size + 1) for size in online + target]
    if "without" in network:
        own = count.batch_size // RANKS
        sent.append(FP32 * NUM_VIEWS * own * 128)
    assert (count.forward.messages, count.forward.bytes) == (len(sent), sum(sent))
    back = [FP64 * NUM_VIEWS * 2 * size for size in online]
    assert (count.backward.messages, count.backward.bytes) == (len(back), sum(back))


def test_without_batch_norm_and_within_a_rank_nothing_but_the_sum_is_sent(
    counts: dict[str, Count],
) -> None:
    for name in ("gn + ws, MLPs none", "bn, `norm_scope` rank"):
        assert counts[name].forward.messages == counts[name].backward.messages == 0


def test_the_sum_is_one_message_that_begins_with_the_gradient(counts: dict[str, Count]) -> None:
    """The queue's keys are a batch of projections, and a rank's own norms add their statistics."""
    assert {count.summed.messages for count in counts.values()} == {1}
    bn, queue = counts["bn"], counts["bn, contrastive with a queue"]
    assert queue.summed.bytes - bn.summed.bytes == FP32 * queue.batch_size * 128
    own = counts["bn, `norm_scope` rank"]
    assert own.summed.bytes - bn.summed.bytes == FP32 * 2 * sum(map(sum, channels("bn")))
    for count in counts.values():
        assert 0.95 < count.gradient / count.summed.bytes < 1


def test_only_the_contrastive_loss_sends_more_for_more_images(counts: dict[str, Count]) -> None:
    for name, as_many in (("bn", True), ("bn, contrastive without one", False)):
        larger = messages.count("blog", name, [*messages.QUICK, "train.batch_size=6"])
        assert (larger.forward == counts[name].forward) is as_many
        assert larger.summed == counts[name].summed


def test_the_block_has_a_row_for_each_network_and_time(counts: dict[str, Count]) -> None:
    kept = Kept(schema="fastbyol-ranks/1", counts=tuple(counts.values()), times=result())
    text = f"before\n{messages.BEGIN}\nold\n{messages.END}\nafter\n"
    made = messages.fresh(text, kept)
    assert messages.fresh(made, kept) == made
    assert made.startswith(f"before\n{messages.BEGIN}\nCounted in a step of 2 ranks")
    assert made.endswith("\nafter\n")
    assert len(re.findall(r"^\| blog \|", made, re.MULTILINE)) == len(NETWORKS)
    assert "| blog | gn + ws, MLPs none | none | none | 1: " in made
    assert re.search(r"^\| two views of 96 px \| Pillow \| 4\.00 \| 0\.\d\d \| 5 \|$", made, re.M)
    assert messages.Kept.model_validate_json(messages.dumps(kept)) == kept


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(UsageError, match=name):
            messages.read(tmp_path / name)


@pytest.mark.skipif(not messages.KEPT.exists(), reason="nothing was measured yet")
def test_the_document_says_what_was_measured_and_what_is_sent() -> None:
    kept, text = messages.read(), messages.DOCUMENT.read_text("utf-8")
    assert messages.fresh(text, kept) == text, f"run: python -m {messages.__name__} --docs"
    assert not kept.times.quick
    assert [(count.preset, count.network) for count in kept.counts] == [
        (preset, network) for preset in messages.PRESETS for network in NETWORKS
    ]
    for network in ("bn", "gn"):
        now = messages.count("demo", network)
        assert now in kept.counts
