"""The parts of `benchmarks.gpu`, each run in a process of its own: generators of rows, as soon as each is measured."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import parameters, peak_functions
from benchmarks.networks import NETWORKS, TrainingStep, placed, step_flops
from core.config.ddpm import DDPM
from core.config.load import load_config
from core.data.dataset import load_images
from core.data.source import load_source
from core.training.batches import step_generator
from core.training.cuda_graphs import WARM_UP
from core.training.device import autocast, resolve_device
from core.training.run_log import read_metrics
from ddpm_pretraining.diffusion import Diffusion
from ddpm_pretraining.sampling import sample
from ddpm_pretraining.train import Denoising
from study.launch import launched

Row = dict[str, Any]
FLAT, DEEP = (256, 256), (96, 96, 96)
OURS = (("ours", 64, FLAT, 32), ("ours", 64, FLAT, 8), ("ours", 128, FLAT, 16), ("ours", 256, FLAT, 8),
        ("ours", 32, DEEP, 1))
PEERS = (("monai", 64, FLAT, 32), ("lucidrains", 64, FLAT, 32), ("monai", 64, FLAT, 8), ("lucidrains", 64, FLAT, 8),
         ("monai", 32, DEEP, 1))
KINDS = {"convolutions and products": ("fprop", "dgrad", "wgrad", "gemm", "nvjet", "cutlass", "sdpa", "flash", "fmha"),
         "attention kernels": ("see_keys", "key_gradients", "read_queries", "query_gradients"),
         "normalisation": ("moments", "affine", "partial_gradients", "finish_gradients", "apply_gradient", "filter",
                           "GroupNorm", "RowwiseMoments", "softmax", "standardize"),
         "copies between layouts": ("nchwToNhwc", "nhwcToNchw", "transpose"),
         "copies": ("copy_kernel", "CatArray", "Memcpy", "Memset")}


def wait() -> None:
    """Return when the GPU has done its work; on a CPU, where the parts can be tried out, at once."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(function: Callable[[], Any], rounds: int = 6, warm_up: int = WARM_UP + 2) -> float:
    """Median seconds of a call whose work is done when it ends."""
    seconds = []
    for _ in range(warm_up + rounds):
        started = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])


def make_step(name: str, base: int, size: tuple[int, ...], batch: int, replaying: bool = True) -> TrainingStep:
    """A training step of a network of `benchmarks.networks`."""
    torch.manual_seed(0)
    images = torch.rand((batch, 1, *size), device=resolve_device("auto"))
    return TrainingStep(placed(NETWORKS[name](base, size, True), images), images, replaying)


def start() -> Iterator[Row]:
    """Seconds until the first step is done, and until steps are replayed, of base 64, batch 8."""
    started = time.perf_counter()
    step = make_step("ours", 64, FLAT, 8)
    step("bf16")
    wait()
    first = time.perf_counter() - started
    for _ in range(WARM_UP + 1):
        step("bf16")
    wait()
    yield {"first step, s": first, "replayed from, s": time.perf_counter() - started}


def peaks() -> Iterator[Row]:
    """A large matrix product, a large convolution, a large copy."""
    device = resolve_device("auto")
    for name, (function, flops) in peak_functions(device, 2).items():
        yield {"what": name, "TFLOP/s": flops / median_seconds(function) / 1e12}
    source = torch.empty(2**30 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    yield {"what": "copy, bytes read and written", "TB/s": moved / median_seconds(lambda: target.copy_(source)) / 1e12}


def steps(which: tuple[tuple[str, int, tuple[int, ...], int], ...]) -> Iterator[Row]:
    """One optimiser step of each network."""
    for name, base, size, batch in which:
        row = {"network": name, "base": base, "size": "x".join(map(str, size)), "batch": batch}
        try:
            step = make_step(name, base, size, batch)
            median = median_seconds(partial(step, "bf16"))
            flops = step_flops(name, base, size, batch, True)
            row |= {"parameters, M": parameters(step.network) / 1e6, "ms": median * 1000, "images/s": batch / median,
                    "TFLOP/s": flops / median / 1e12}
            if torch.cuda.is_available():
                row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            del step
        except (ImportError, RuntimeError) as error:  # not installed; no memory left
            row["failed"] = " ".join(str(error).split())[:160]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield row


def kind_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in kernel for word in words)), "other elementwise")


def profiled(name: str, base: int, size: tuple[int, ...], batch: int) -> Row:
    """Milliseconds on the device by kind of kernel, the rest of the step, and kernels a step."""
    step = make_step(name, base, size, batch)
    median = median_seconds(partial(step, "bf16"))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step("bf16")
        wait()
    kernels = [event for event in seen.events() if str(event.device_type).endswith("CUDA")
               and "Optimizer" not in event.name]
    row: Row = {"network": name, "base": base, "batch": batch, "kernels": len(kernels), "ms": median * 1000}
    row |= dict.fromkeys((*KINDS, "other elementwise"), 0.0)
    for event in kernels:
        row[kind_of(event.name)] += event.time_range.elapsed_us() / 1000
    return row | {"gaps": median * 1000 - sum(row[kind] for kind in (*KINDS, "other elementwise"))}


def profiles() -> Iterator[Row]:
    """A step by kind of kernel."""
    for case in OURS[:2]:
        yield profiled(*case)


def sampling() -> Iterator[Row]:
    """Images drawn by base 64: 16 of them by DDIM, launch by launch at first and then replayed."""
    device = resolve_device("auto")
    model: nn.Module = make_step("ours", 64, FLAT, 1).network
    for steps_of in (10, 50, 500):  # the first warms up
        config = DDPM(sampling_steps=steps_of)
        with autocast(device, "bf16"):
            started = time.perf_counter()
            sample(Diffusion(config, device), model, (16, 1, *FLAT), step_generator(0, 0, 0, device), "ddim")
            wait()
        seconds = time.perf_counter() - started
        yield {"DDIM steps": steps_of, "images": 16, "seconds": seconds, "images/s": 16 / seconds}


def study_config(folder: Path, *overrides: str) -> Any:
    """configs/config.json on 170 phantom radiographs below `folder`."""
    return load_config("configs/config.json", [
        f"experiment.output_dir={folder}/runs", f"dataset.root={folder}/data", f"dataset.cache_dir={folder}/cache",
        "dataset.layout=cephalo", 'dataset.phantom={"count": 170, "size": [300, 242]}', *overrides])


def data() -> Iterator[Row]:
    """Drawing batches (gather, augment, noise) against the step that takes them."""
    with tempfile.TemporaryDirectory() as folder:
        config = study_config(Path(folder))
        started = time.perf_counter()
        images = load_images(load_source(config.dataset).pretraining_records(), config.dataset)
        filled = time.perf_counter() - started
        task = Denoising(config, Path(folder), images, None)
        for batch in (8, 32):
            indices = np.arange(batch) % len(images.records)
            generator = step_generator(0, 0, 0, task.device)
            seconds = median_seconds(partial(task.draw, indices, generator), 20)
            yield {"batch": batch, "ms a batch": seconds * 1000, "images/s": batch / seconds,
                   "phantoms written and decoded, s": filled}


def pretraining() -> Iterator[Row]:
    """Pre-training as configs/config.json says, 500 of its 10,000 steps, with state, validation and samples."""
    with tempfile.TemporaryDirectory() as folder:
        config = study_config(Path(folder), "ddpm.iterations=500", "ddpm.checkpoint_iterations=[500]",
                              "ddpm.sample_every=500")
        load_images(load_source(config.dataset).pretraining_records(), config.dataset)
        started = time.perf_counter()
        launched(config, ("pretrain",), None, None, False)
        seconds = time.perf_counter() - started
        lines = read_metrics(config.experiment_dir / "ddpm" / "metrics.jsonl")
        last = [line["images_per_second"] for line in lines if "images_per_second" in line][-5:]
        rate, batch = statistics.median(last), config.ddpm.batch_size
        yield {"steps": 500, "batch": batch, "seconds": seconds, "images/s at the end": rate,
               "10,000 steps at that rate, minutes": 10000 * batch / rate / 60}


def finetuning() -> Iterator[Row]:
    """Ten fine-tuning runs of 400 steps x 8 images from scratch, one after the other, each scored beside the next."""
    with tempfile.TemporaryDirectory() as folder:
        config = study_config(Path(folder), 'finetune.backbones=["scratch"]', "finetune.shots=[10]",
                              f"finetune.draws={list(range(10))}")
        source = load_source(config.dataset)
        load_images(source.require("train"), config.dataset)
        started = time.perf_counter()
        launched(config, ("finetune",), None, None, False)
        yield {"runs": 10, "steps": 400, "batch": config.finetune.batch_size, "processes": 1,
               "seconds": time.perf_counter() - started}


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], float]] = {  # and the seconds it may take; in this order
    "start, cold": (start, 75), "start, from the cache": (start, 30), "steps": (partial(steps, OURS), 75),
    "peers": (partial(steps, PEERS), 50), "fine-tuning": (finetuning, 180), "peaks": (peaks, 20), "data": (data, 25),
    "sampling": (sampling, 25), "pre-training": (pretraining, 60), "profile": (profiles, 40)}
