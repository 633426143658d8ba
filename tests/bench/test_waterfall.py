"""A GPU's waterfall: every kernel of a replay has its part, and the parts add up."""

from __future__ import annotations

import pytest
import torch

from fastbyol_bench import waterfall
from fastbyol_bench.kernel_times import Kernel
from fastbyol_bench.own_step import OwnStep
from fastbyol_bench.suite import Setting
from fastbyol_bench.waterfall import GAPS, OTHERS, kind, of_kernels

# Names as a compiled step of ours launches them on sm_90, as cuDNN and cuBLAS call theirs, and as
# torch does.
NAMES = {
    "Memcpy DtoD (Device -> Device)": "copies and fills",
    "Memset (Device)": "copies and fills",
    "void at::native::vectorized_elementwise_kernel"
    "<4, at::native::FillFunctor<float> >": "copies and fills",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy"
    "<float, unsigned int, 1, 64, 64>": "copies and fills",
    "_draw_kernel": "views",
    "_blur_kernel": "views",
    "_sweep_kernel": "optimizer and moving average",
    "_norms_kernel": "optimizer and moving average",
    "_normalise_kernel": "norms, pooling, weight standardization",
    "_gradient_sums_kernel": "norms, pooling, weight standardization",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_"
    "tilesize128x128x64": "convolutions",
    "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolutions",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>": "convolutions",
    "void implicit_convolve_sgemm<float, float, 1024, 5, 5>": "convolutions",
    "nvjet_hsh_128x64_64x8_1x2_h_bz_TNN": "heads",
    "ampere_sgemm_128x32_tn": "heads",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "heads",
    "_pool_kernel": "norms, pooling, weight standardization",
    "_product_kernel": "heads",
    "triton_poi_fused__to_copy_4": "compiled elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, "
    "at::native::NormTwoOps<float> > >": OTHERS,
}  # fmt: skip


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_kernels_have_their_part(name: str, part: str) -> None:
    assert kind(name) == part


def test_parts_are_the_whole() -> None:
    """Check the median of each part over replays; the time between kernels is one of them."""

    def replay(views_s: float) -> list[Kernel]:
        return [
            Kernel("_crop_kernel", 5.0, views_s),
            Kernel("Memset (Device)", 15.0, 1.0),
            Kernel("_blur_kernel", 17.0, 2.0),
        ]

    parts = {
        part.name: part.seconds for part in of_kernels([replay(2.0), replay(4.0), replay(9.0)])
    }
    # 14 s from first to last, of which 4 + 2 are views' and 1 is the fill's.
    assert parts == {"copies and fills": 1.0, "views": 6.0, GAPS: 7.0}
    overlapping = [Kernel("_crop_kernel", 0.0, 4.0), Kernel("Memset (Device)", 1.0, 2.0)]
    assert GAPS not in {part.name for part in of_kernels([overlapping])}


def test_on_a_gpu_replays_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the recorded step is the engine's own, after a first replay."""
    made, calls = [], []

    def create(sets: list[str], **where: object) -> object:
        made.append((sets, where["device"]))
        return lambda: calls.append("replay")

    def recorded(call: object) -> tuple[Kernel, ...]:
        call()  # type: ignore[operator]
        return (Kernel("_crop_kernel", 0.0, 1.0),)

    monkeypatch.setattr(OwnStep, "create", staticmethod(create))
    monkeypatch.setattr(waterfall, "recorded", recorded)
    device = torch.device("cuda")
    parts = waterfall.measured(Setting(device, quick=False), size=96, batch=256)
    assert [(part.name, part.seconds) for part in parts] == [("views", 1.0)]
    assert made == [(["train.precision=bf16", "optim.name=lars"], device)]
    assert len(calls) == 1 + waterfall.RUNS
