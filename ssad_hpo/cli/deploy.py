"""The commands that take a detector elsewhere: export, register."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from click.exceptions import Exit

from ssad_hpo.cli.display import plain, say, warn
from ssad_hpo.cli.options import TRUST
from ssad_hpo.files import unwritable

_SINGLE_HELP = "The selected candidate alone, where several are combined."


@click.command(epilog="Example: `ssad-hpo export NAME --format onnx --out detector.onnx`")
@click.argument("place", metavar="RUN-or-DETECTOR")
@click.option("--format", "file_format", default="onnx", help="Of the file: onnx or torch.")
@click.option("--out", type=Path, required=True, help="The file to write.")
@click.option("--single", is_flag=True, help=_SINGLE_HELP)
@click.option(*TRUST[0], **TRUST[1])
def export(place: str, file_format: str, out: Path, single: bool, trust_addresses: bool) -> None:
    """Write a run's detector as one file for other programs: uint8 images in, scores out.

    ONNX files (opset 20, any batch size) are for onnxruntime, OpenVINO and the like; torch.export.load reads
    the other. Images must be read and resized as `ssad_hpo.export.prepare` does it.
    """
    from ssad_hpo.experiment import load_detector
    from ssad_hpo.export import FORMATS

    if file_format not in FORMATS:
        raise click.UsageError(f"--format {file_format}: expected one of {', '.join(FORMATS)}")
    if (reason := unwritable(out)) is not None:
        raise click.UsageError(f"--out {str(out)!r}: {reason}")
    detector = load_detector(place, single=single, trust_addresses=trust_addresses)
    FORMATS[file_format](detector, out)
    channels, height, width = detector.image_shape
    colour = "grey" if channels == 1 else "colour"
    say(f"{plain(out)}: {colour} images of {width} × {height} pixels in, scores out")


@click.command(epilog="Example: `ssad-hpo register NAME --name screws`")
@click.argument("run")
@click.option("--name", required=True, help="Of the registered model, which is made if need be.")
@click.option("--single", is_flag=True, help=_SINGLE_HELP)
@click.option(*TRUST[0], **TRUST[1])
def register(run: str, name: str, single: bool, trust_addresses: bool) -> None:
    """Register a run's detector in MLflow, from where `mlflow models serve` serves it.

    RUN is a run folder, or its name below runs/. The model takes images in base64 and answers with scores.
    """
    from ssad_hpo.experiment import open_run, register_run
    from ssad_hpo.tracking import serve_command

    result = register_run(run, name, single=single, trust_addresses=trust_addresses)
    for reason in result.refused:
        warn(f"MLflow refused: {reason}")
    if result.error:
        warn(f"{result.error}; `ssad-hpo sync` tries again")
    if result.remaining or result.refused:
        raise Exit(1)
    say(f"registered; mlflow.pyfunc.load_model('models:/{plain(name)}/latest') loads it")
    tracking_uri = open_run(run).settings.tracking_uri
    assert tracking_uri is not None  # it is registered there
    say(f"  {plain(serve_command(tracking_uri, name))}")
