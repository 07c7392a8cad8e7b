"""Data sets: embedded testbeds and image folders. A loader gives images and, where it is known, ground truth.

`load(source)` gives images without labels; `read_labels(source)` gives the labels of the same images,
and is for judging a choice after it was made. A `Source` is the address of a data set, fit for a file.
"""

from ssad_hpo.data.dataset import DataSet
from ssad_hpo.data.folder import (
    CategoryError,
    find_categories,
    load_folder,
    load_folders,
)
from ssad_hpo.data.labelled import read_label_file
from ssad_hpo.data.pixels import WHOLE_DEPTH, DataError
from ssad_hpo.data.reading import find_images, read_contents, read_images, read_whole, skipped
from ssad_hpo.data.source import (
    Source,
    builtin,
    find_source,
    holds_out,
    load,
    load_images,
    read_labels,
    unlabeled_files,
)
from ssad_hpo.data.testbed import controlled_data, semantic_data

__all__ = [
    "WHOLE_DEPTH",
    "CategoryError",
    "DataError",
    "DataSet",
    "Source",
    "builtin",
    "controlled_data",
    "find_categories",
    "find_images",
    "find_source",
    "holds_out",
    "load",
    "load_folder",
    "load_folders",
    "load_images",
    "read_contents",
    "read_images",
    "read_label_file",
    "read_labels",
    "read_whole",
    "semantic_data",
    "skipped",
    "unlabeled_files",
]
