"""The data set that a config names: read from its folder or pack, phantoms written first."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import check_size
from core.data.layouts import read_layout
from core.data.packs import read_pack
from core.data.records import DataSource
from core.data.splits import keep_draw
from core.files import stamp
from core.phantoms.radiographs import write_phantom_radiographs
from core.phantoms.volumes import write_phantom_volumes


def load_source(config: DatasetConfig, keep_draws: bool = True) -> DataSource:
    """The data set that the config names: a folder in one of the layouts, or a pack (.npz). Phantoms are made here.

    The same object again, for all runs of a process, as long as no file of it changes. Splits that are drawn here are
    written down beside the data's description, unless `keep_draws` is false.
    """
    if config.phantom is not None and Path(config.root).suffix != ".npz":
        phantom = config.phantom
        write = {2: write_phantom_radiographs, 3: write_phantom_volumes}[len(phantom.size)]
        write(Path(config.root), phantom.count, phantom.size, phantom.seed)
    places = [config.root, *config.unlabelled_dirs, *([config.description] if config.description else [])]
    source = _read_source(config, tuple(stamp(Path(place)) for place in places))
    if keep_draws and source.draw is not None:
        keep_draw(source.draw)
    return source


@lru_cache(maxsize=4)
def _read_source(config: DatasetConfig, _stamps: tuple) -> DataSource:
    if Path(config.root).suffix == ".npz":
        return read_pack(config)
    source = read_layout(config.layout, config.root, unlabelled_dirs=config.unlabelled_dirs,
                         spacing_mm=config.spacing_mm, exclude=config.exclude, description=config.description,
                         dims=len(config.image_size), check_geometry=config.check_geometry)
    for record in source.records:
        if record.geometry is not None:
            check_size(record.image, record.geometry.size, config)
    return source
