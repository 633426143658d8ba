"""The launches that are parsed from a module of Inductor's code."""

from __future__ import annotations

import pytest

from fastbyol_bench.inductor_code import Code, External, Kernel, parse

# Inductor's code for a convolution with batch norm, forward and backward, cut down: a kernel that
# is launched twice, one that is not launched, calls of cuDNN, cuBLAS and an operation of ours, and
# what launches nothing.
TEXT = """
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda

triton_poi_fused_relu_0 = async_compile.triton('triton_poi_fused_relu_0', '''
import triton
@triton_heuristics.pointwise(
    size_hints={'x': 1024},
    inductor_meta={'kernel_name': 'triton_poi_fused_relu_0', 'atomic_add_found': False,
    'kernel_num_gb': 0.25},
    min_elem_per_thread=0
)
@triton.jit
def triton_poi_fused_relu_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tl.store(out_ptr0, tl.load(in_ptr0))
''', device_str='cuda')

triton_red_fused_sum_1 = async_compile.triton('triton_red_fused_sum_1', '''
@triton_heuristics.reduction(
    size_hints={'x': 64, 'r0_': 512},
    inductor_meta={'atomic_add_found': True, 'kernel_num_gb': 0.5}
)
@triton.jit
def triton_red_fused_sum_1(in_ptr0, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    pass
''', device_str='cuda')

triton_per_fused_unused_2 = async_compile.triton('triton_per_fused_unused_2', '''
@triton_heuristics.persistent_reduction(inductor_meta={'kernel_num_gb': 64.0})
@triton.jit
def triton_per_fused_unused_2(in_ptr0):
    pass
''', device_str='cuda')

class Runner:
    def call(self, args):
        primals_1, = args
        args.clear()
        assert_size_stride(primals_1, (2, 3), (3, 1))
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            buf0 = empty_strided_cuda((2, 3), (3, 1), torch.float32)
            stream0 = get_raw_stream(0)
            triton_poi_fused_relu_0.run(primals_1, buf0, 6, stream=stream0)
            buf1 = extern_kernels.convolution(buf0, primals_1, stride=(1, 1), bias=None)
            buf2 = torch.ops.fastbyol.group_norm.default(buf1, None, 32, 1e-05, True)
            triton_poi_fused_relu_0.run(reinterpret_tensor(buf1, (2, 3), (3, 1), 0), buf0, 6,
            stream=stream0)
            extern_kernels.mm(buf0, buf1, out=buf2)
            buf3 = torch.ops.aten.convolution_backward.default(buf0, buf1, buf2, [0], [1, 1],
            [True, True, False])
            buf4 = torch.ops.aten.convolution_backward.default(buf0, buf1, buf2, [0], [1, 1],
            [False, True, False])
            triton_red_fused_sum_1.run(buf3, buf4, 2, 3, stream=stream0)
        return (buf4, )

def benchmark_compiled_module(args, times=10, repeat=10):
    return print_performance(lambda: call(list(args)), times=times, repeat=repeat)
"""
RELU, SUM = (
    Kernel("triton_poi_fused_relu_0", "pointwise", 0.25),
    Kernel("triton_red_fused_sum_1", "reduction", 0.5, atomic=True),
)


def test_launches_are_counted_as_they_are_called() -> None:
    code = parse(TEXT)
    assert sorted(code.kernels) == [RELU, RELU, SUM]
    assert sorted(code.external) == [
        External("convolution", 1),
        External("convolution_backward", 1),
        External("convolution_backward", 2),
        External("fastbyol.group_norm", 1),
        External("mm", 1),
    ]


def test_nothing_but_views_launches_nothing() -> None:
    assert parse(
        "def call(args):\n    return reinterpret_tensor(args[0], (2,), (1,), 0)\n"
    ) == Code((), ())


def test_a_call_that_is_not_known_is_refused_with_its_name() -> None:
    unknown = TEXT.replace("extern_kernels.mm(", "triton_tem_fused_mm_9.run(")
    with pytest.raises(
        ValueError, match=r"^line \d+ .* what triton_tem_fused_mm_9\.run launches is not known"
    ):
        parse(unknown)


def test_a_kernel_that_does_not_say_what_it_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="triton_red_fused_sum_1 does not say how many GB"):
        parse(TEXT.replace("'kernel_num_gb': 0.5", "'num_load': 1"))
