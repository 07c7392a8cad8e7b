"""Names of data sets, as they are given on the command line."""

from __future__ import annotations

from pathlib import Path

from ssad_hpo import data


def find_source(
    place: str | Path,
    *,
    category: str | None = None,
    anomaly: str | None = None,
    image_size: int = 64,
    skip_unreadable: bool = False,
) -> data.Source:
    """The address of a built-in data set ("gravel/cutavg") or of a folder in the published layout.

    Args:
        place: a folder, or a built-in name; a folder of that name goes first.
        category, anomaly, image_size, skip_unreadable: of a folder, see `ssad_hpo.data.load_folder`.

    Raises:
        ValueError: if it is neither.
    """
    if Path(place).is_dir():
        arguments = {"category": category, "anomaly": anomaly, "image_size": image_size}
        return data.Source("folder", {"root": str(place), "skip_unreadable": skip_unreadable, **arguments})
    if category is not None or anomaly is not None:
        raise ValueError(f"{place}: there is no such folder, and only folders have a category or an anomaly")
    try:
        return data.builtin(str(place))
    except ValueError as error:
        raise ValueError(f"{place}: there is no such folder; as a built-in {error}") from error
