"""The command that measures a GPU: parts that fail are rows, kernels are classed; the parts themselves need a GPU."""

import json

import pytest

from benchmarks.gpu import main, rows_of, show
from benchmarks.gpu_parts import kind_of
from core.errors import run_command


def test_a_part_that_fails_or_takes_too_long_is_a_row(tmp_path):
    failed, = rows_of("nonsense", 60, str(tmp_path))
    assert "invalid choice: 'nonsense'" in failed["failed"]
    assert list(rows_of("pre-training", 0.5, str(tmp_path))) == [{"failed": "not done after 0 s"}]
    assert show([{"ms": 2.34567, "batch": 8}, failed]).splitlines()[2] == "| 2.346 | 8 |  |"


@pytest.mark.parametrize(("kernel", "kind"), [
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolutions and products"),
    ("nvjet_sm90_tst_128x256_64x4", "convolutions and products"), ("query_gradients", "attention kernels"),
    ("partial_gradients", "normalisation"), ("standardize_filters", "normalisation"),
    ("void cudnn::engines_precompiled::nhwcToNchwKernel<__nv_bfloat16>", "copies between layouts"),
    ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
    ("void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<c10::BFloat16>>", "other elementwise")])
def test_kernels_by_name(kernel, kind):
    """Names as a profile of an H100 has them."""
    assert kind_of(kernel) == kind


def test_without_a_gpu_it_says_what_there_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run_command(main)
    assert "no CUDA GPU is visible; python -m benchmarks.counting" in capsys.readouterr().err


def test_what_was_measured_is_kept_after_every_part(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gpu.rows_of", lambda part, seconds, cache: iter([{"part": part, "ms": 1.5}]))
    from benchmarks.gpu import measure

    measure(["peaks", "steps"], 1, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert kept == {"peaks": [{"part": "peaks", "ms": 1.5}], "steps": [{"part": "steps", "ms": 1.5}]}
    assert "not begun" in measure(["peaks"], 0.01, tmp_path)["peaks"][0]["failed"]
