"""Data sets as `Task`s: embedded testbeds and image folders. Ground truth comes by separate calls.

`load(source)` gives images without labels; `read_labels(source)` gives the labels of the same images,
and is for judging a choice after it was made. A `Source` is the address of a data set, fit for a file.
"""

from ssad_hpo.data.decode import DataError, find_images, read_images
from ssad_hpo.data.folder import (
    CategoryError,
    find_anomalies,
    find_categories,
    folder_labels,
    load_folder,
    load_folders,
)
from ssad_hpo.data.source import (
    Source,
    builtin,
    builtin_names,
    find_source,
    load,
    load_images,
    read_labels,
)
from ssad_hpo.data.testbed import controlled_labels, controlled_task, semantic_labels, semantic_task

__all__ = [
    "CategoryError",
    "DataError",
    "Source",
    "builtin",
    "builtin_names",
    "controlled_labels",
    "controlled_task",
    "find_anomalies",
    "find_categories",
    "find_images",
    "find_source",
    "folder_labels",
    "load",
    "load_folder",
    "load_folders",
    "load_images",
    "read_images",
    "read_labels",
    "semantic_labels",
    "semantic_task",
]
