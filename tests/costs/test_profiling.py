"""`python -m dag.bench profile`: the kernels of an epoch, by names that can be read."""

import csv
from pathlib import Path

import pytest
import torch

from dag import bench
from dag.costs import profiling
from dag.costs.kernel_names import short

ROOT = Path(__file__).parents[2]
AT, ITERATOR = "at::native::", "(at::TensorIteratorBase&)"
COPY = f"{AT}direct_copy_kernel_cuda{ITERATOR}::{{lambda()#3}}::operator()() const::{{lambda()#12}}::operator()() const"
SILU = (
    f"{AT}(anonymous namespace)::silu_kernel{ITERATOR}::{{lambda()#1}}::operator()() const::{{lambda(c10::BFloat16)#1}}"
)
MUL = f"{AT}BinaryFunctor<float, float, float, {AT}binary_internal::MulFunctor<float> >"
SUM = (
    f"{AT}func_wrapper_t<float, {AT}sum_functor<float, float, float>::operator(){ITERATOR}::{{lambda(float, float)#1}}>"
)


def copies(threads: int) -> str:
    """The name of PyTorch's kernel that copies to bfloat16, as CUPTI gives it."""
    implementation = f"{AT}gpu_kernel_impl_nocast<{COPY}::{{lambda(c10::BFloat16)#1}}>"
    return f"void {AT}elementwise_kernel<{threads}, 4, {implementation}{ITERATOR}::{{lambda(int)#1}}>(int, {implementation})"


NAMES = {
    "elementwise_kernel direct_copy_kernel_cuda BFloat16": copies(128),
    "vectorized_elementwise_kernel CUDAFunctor_add BFloat16": (
        f"void {AT}vectorized_elementwise_kernel<4, {AT}CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >(int)"
    ),
    "vectorized_elementwise_kernel BinaryFunctor float MulFunctor": (
        f"void {AT}vectorized_elementwise_kernel<4, {MUL}, std::array<char*, 3ul> >(int, {MUL}, std::array<char*, 3ul>)"
    ),
    "vectorized_elementwise_kernel silu_kernel BFloat16": (
        f"void {AT}vectorized_elementwise_kernel<4, {SILU}, std::array<char*, 2ul> >(int, {SILU})"
    ),
    "reduce_kernel ReduceOp float sum_functor": (
        f"void {AT}reduce_kernel<512, 1, {AT}ReduceOp<float, {SUM}, unsigned int, float, 4, 4> >({AT}ReduceOp<float>)"
    ),
    "RowwiseMomentsCUDAKernel BFloat16": (
        f"void {AT}(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, float, c10::BFloat16 const*)"
    ),
    "kernel __nv_bfloat16 float": (
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, float, false>(Params<int>)"
    ),
    "Kernel2 cutlass_80_tensorop_bf16_align8": "void cutlass::Kernel2<cutlass_80_tensorop_bf16_align8>(Params)",
    "fmha_cutlassB_bf16_aligned_64x64_k64_sm80": "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::P)",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
    "Memcpy DtoD (Device -> Device)": "Memcpy DtoD (Device -> Device)",
}


@pytest.mark.parametrize(("shown", "name"), NAMES.items(), ids=NAMES)
def test_a_kernels_name_can_be_read(shown: str, name: str) -> None:
    assert short(name) == shown


def test_kernels_of_one_name_are_one_row() -> None:
    spans = [(copies(128), (0.0, 2.0)), ("Memset (Device)", (2.0, 3.0)), (copies(512), (3.0, 4.0))]
    copied, filled = profiling._top(spans)
    assert copied == {"label": short(copies(128)), "calls": 2, "ms": 0.003, "percent": 75.0}
    assert filled["label"] == "Memset (Device)"


def test_the_gpu_is_busy_where_any_kernel_runs() -> None:
    assert profiling.busy_us([(5, 7), (0, 4), (3, 4.5), (6, 6.5)]) == 6.5
    assert profiling.busy_us([]) == 0
    assert profiling._idle(busy=250_000, seconds=1.0)["percent"] == 75.0


def test_a_profile_of_the_step(tmp_path: Path) -> None:
    result = tmp_path / "profile.csv"
    small = [word for override in ("sampler.steps=2", "train.micro_batch=2") for word in ("--set", override)]
    recipe = ["--recipe", str(ROOT / "recipes/tiny_cpu_db.yaml"), "--trajectories", "2"]
    assert bench.main(["profile", *recipe, *small, "--csv", str(result)]) == 0
    with result.open() as file:
        *operators, idle = csv.DictReader(file)
    assert len(operators) == 20
    took = [float(row["ms"]) for row in operators]
    assert took == sorted(took, reverse=True)
    assert 50 < sum(float(row["percent"]) for row in operators) <= 100
    assert any("convolution" in row["label"] for row in operators)
    if not torch.cuda.is_available():
        assert (idle["label"], idle["error"]) == ("GPU idle", "there is no GPU")
