"""What settings take at least is less than what they take, and is refused before anything is allocated."""

import pytest

from core import bounds
from core.config.unet import UNet as UNetConfig
from core.networks.unet import UNet
from core.runs.requirements import check_memory, check_places, check_samples, unet_weights
from tests.conftest import error_of


@pytest.mark.parametrize(("size", "config"), [
    ((32, 32), UNetConfig(base_channels=64)),
    ((32, 32), UNetConfig(base_channels=32, channel_multipliers=(1, 3), blocks_per_level=5, attention_heads=64)),
    ((32, 32), UNetConfig(base_channels=64, channel_multipliers=(4, 2, 1), blocks_per_level=1, linear_attention=False)),
    ((16, 16, 16), UNetConfig(base_channels=16, channel_multipliers=(1, 2, 4)))])
def test_the_bound_is_below_the_networks_own_count(size, config):
    network = UNet(config, 1, 1, size)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert 0.5 * numbers < unet_weights(config, len(size)) <= numbers


@pytest.mark.parametrize(("changes", "key"), [
    ({"dataset": {"image_size": [65536, 65536]}}, "dataset.image_size"),
    ({"dataset": {"canvas_size": [1 << 20, 1 << 20]}}, "dataset.image_size"),
    ({"unet": {"base_channels": 1_000_000}}, "unet.base_channels 1000000"),
    ({"unet": {"blocks_per_level": 10**9}}, "blocks_per_level 1000000000"),
    ({"ddpm": {"accumulation": 10**9}}, "ddpm.accumulation 1000000000"),
    ({"finetune": {"accumulation": 10**9, "sampling": "stream"}}, "finetune.accumulation 1000000000"),
    ({"ssl": {"batch_size": 10**9}}, "ssl.batch_size 1000000000"),
    ({"ddpm": {"sample_count": 10**9}}, "ddpm.sample_count 1000000000"),
    ({"ddpm": {"num_train_timesteps": 10**12}}, "ddpm.num_train_timesteps 1000000000000"),
])
def test_what_cannot_be_is_refused_by_key(make_config, tmp_path, changes, key):
    config = make_config(tmp_path, **changes)
    line = error_of(check_memory, config)
    assert key in line and "GiB of memory, and this machine has" in line


def test_what_can_be_is_not(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1000000 kB\nMemFree: 1 kB\nSwapTotal: 24 kB\n")
    monkeypatch.setattr(bounds, "CGROUPS", (tmp_path / "max",))
    assert bounds.machine_bytes() == 1000024 * 1024
    check_memory(make_config(tmp_path))
    (tmp_path / "max").write_text("100000\n")
    assert bounds.machine_bytes() == 100000
    assert "this machine has 0.0 GiB" in error_of(check_memory, make_config(tmp_path))
    (tmp_path / "max").write_text("max\n")
    assert bounds.machine_bytes() == 1000024 * 1024
    (tmp_path / "meminfo").unlink()
    assert bounds.machine_bytes() is None
    check_samples(make_config(tmp_path), "--count", 10**9)  # unknown: it is tried


def test_samples_side_by_side(make_config, tmp_path, run_main, config_file):
    assert "--count 1000000000, drawn side by side," in error_of(
        check_samples, make_config(tmp_path), "--count", 10**9)
    status, _, said = run_main("ddpm_pretraining.sample", "--config", config_file(), "--count", 10**9)
    assert status == 2 and said.startswith("error: --count 1000000000") and said.count("\n") == 1


@pytest.mark.parametrize("iteration", [-1, 0])
def test_samples_of_no_step_are_refused(run_main, config_file, iteration):
    status, _, said = run_main("ddpm_pretraining.sample", "--config", config_file(), "--iteration", iteration)
    assert (status, said.count("\n")) == (2, 1) and f"--iteration {iteration}: steps count from 1; choose " in said


def test_names_that_a_disk_cannot_hold(tmp_path):
    check_places([tmp_path / ("n" * 255)])
    assert "256 bytes where file systems allow 255" in error_of(check_places, [tmp_path / ("n" * 256)])
    assert "experiment.output_dir" in error_of(check_places, [tmp_path / "/".join(["n" * 200] * 21)])
