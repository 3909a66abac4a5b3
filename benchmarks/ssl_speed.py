"""Images per second of making views and of the training step of each self-supervised method, and which one bounds it.

An image is a training image: all its views together. Steps are timed on views that are ready, and views without a
network beside them; in a run with workers the slower of the two rates counts, without workers their times add up.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from itertools import repeat

import torch

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.config.starts import SSL_METHODS
from core.data.source import load_source
from core.errors import CommandParser, run_command
from core.runs.record import environment
from ssl_baselines.train import SelfSupervision, build_task
from ssl_baselines.views import ViewBatches, view_stream

WARM_UP = 2
VIEW_IMAGES = 1000  # at least: what workers make ahead must not count


def view_rate(task: SelfSupervision, workers: int) -> float:
    """Images per second of views made by `workers` processes (0: this one)."""
    plan = task.training.plan
    warm, batches = WARM_UP * max(1, workers), -(-VIEW_IMAGES // plan.batch_size)
    stream = view_stream(ViewBatches(task.images, task.method.views, plan, 0), 0, batches + warm, workers, False)
    for _ in range(warm):
        next(stream)
    started = time.perf_counter()
    made = sum(len(views[0]) for views in stream)
    return made / (time.perf_counter() - started)


def step_rate(task: SelfSupervision, rounds: int) -> float:
    """Images per second of the optimiser's step on views that are ready; median of `rounds`."""
    plan = task.training.plan
    task.stream = repeat(ViewBatches(task.images, task.method.views, plan, 0)[0])
    finish: Callable[[], None] = torch.cuda.synchronize if task.device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        task.training.optimiser_step()
        finish()
        seconds.append(time.perf_counter() - started)
    return plan.batch_size * plan.accumulation / statistics.median(seconds[WARM_UP:])


def measure(config: Config, method: str, workers: list[int], rounds: int) -> str:
    """One row of the table."""
    task = build_task(config, method, load_source(config.dataset))
    made = {count: view_rate(task, count) for count in workers}
    stepped = step_rate(task, rounds)
    alone = 1 / made[0] / (1 / made[0] + 1 / stepped)
    views = len(task.method.views)
    return (f"| {method} | {views} | {' | '.join(f'{rate:.0f}' for rate in made.values())} | {stepped:.1f} | "
            f"{100 * alone:.1f} % | {max(made.values()) / stepped:.0f} |")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.ssl_speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.ssl_speed --set ssl.batch_size=32 --workers 1 2")
    add_config_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=SSL_METHODS, default=list(SSL_METHODS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="processes that make views")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set, arguments.methods)
    workers = [0, *(count for count in arguments.workers if count > 0)]
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, GPU {machine['gpu']}, {torch.get_num_threads()} threads; "
          f"{config.finetune.encoder}, {config.dataset.image_size[0]}x{config.dataset.image_size[1]}, batch "
          f"{config.ssl.batch_size} x {config.ssl.accumulation}, preset {config.ssl.preset}")
    headings = " | ".join("views, here" if count == 0 else f"{count} worker{'s' * (count > 1)}" for count in workers)
    print(f"| method | views of an image | {headings} | step | views' share without workers | fastest views / step |")
    print(f"|---{'|---' * (len(workers) + 4)}|")
    for method in arguments.methods:
        print(measure(config, method, workers, arguments.rounds), flush=True)
    print(f"images per second; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    run_command(main)
