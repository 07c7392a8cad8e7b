"""Files of labels that a user wrote: a CSV of path and label. For judging what was already chosen, alone."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from ssad_hpo.files import open_regular, reading

GOOD_WORDS = ("0", "good", "normal", "ok", "negative", "false", "no")
ANOMALOUS_WORDS = (
    "1", "anomalous", "anomaly", "bad", "defect", "defective", "ng", "nok", "positive", "true", "yes",
)  # fmt: skip
_WORDS = dict.fromkeys(GOOD_WORDS, 0) | dict.fromkeys(ANOMALOUS_WORDS, 1)
_MOST_BYTES = 2**28


def read_label_file(path: Path) -> dict[Path, int]:
    """Labels by image file, 1 anomaly, 0 normal, in the order of the file.

    Args:
        path: of a CSV file with the columns path and label, maybe others, with commas or semicolons between
            them. Labels are 0 or 1, or words such as good and defect. Paths that are not absolute start here
            or beside the file.

    Raises:
        FileError: for a file that is not so, a word that is not known, an image that is not there or has two
            labels. OSError: if it cannot be opened.
    """
    remedy = "write a line `path,label` and one such as `images/1.png,good` for each image"
    with reading(path, "cannot be read as labels", remedy):
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
        text = content.decode("utf-8-sig", errors="surrogateescape")
        first = text.partition("\n")[0]
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in first else ",")
        names = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        if missing := [name for name in ("path", "label") if name not in names]:
            raise ValueError(f"expected the columns path and label, it has no {missing[0]}")
        found: dict[Path, int] = {}
        named: dict[str, Path] = {}
        for row in rows:
            place, word = row[names["path"]] or "", (row[names["label"]] or "").strip()
            if not place and not word:
                continue
            where = f"line {rows.line_num}"
            if word.lower() not in _WORDS:
                known = f"{' '.join(GOOD_WORDS)}; {' '.join(ANOMALOUS_WORDS)}"
                raise ValueError(f"{where}: expected one of {known}, got {word!r:.40}")
            image = _found(Path(place), path.parent)
            if image is None:
                raise ValueError(f"{where}: there is no image {place!r:.200}")
            same = named.setdefault(os.path.realpath(image), image)  # however its path is written
            if found.setdefault(same, _WORDS[word.lower()]) != _WORDS[word.lower()]:
                raise ValueError(f"{where}: {place!r:.200} has another label further up")
        if not found:
            raise ValueError("it has no label")
    return found


def _found(image: Path, beside: Path) -> Path | None:
    return next((place for place in (image, beside / image) if os.path.isfile(place)), None)
