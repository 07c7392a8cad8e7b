"""Exported detectors: the same scores elsewhere, in files that need nothing of ssad_hpo."""

import io
import json
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ssad_hpo.augment import NONE, Augmentation
from ssad_hpo.combined import CombinedDetector, Head, Part, Scale
from ssad_hpo.data import read_images
from ssad_hpo.detector import untrained_detector
from ssad_hpo.export import FORMATS, OPSET, ScoringModule, export_onnx, export_torch, facts_of, prepare
from ssad_hpo.task import Training
from tests.combined_runs import clear_run
from tests.detectors import SHORT, textures, trained, with_training
from tests.image_folders import save

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def images():
    return textures(24)


@pytest.fixture(scope="module")
def small(images):
    return trained(images, SHORT)


@pytest.fixture(scope="module")
def lite0(images):
    training = Training(encoder="tf_efficientnet_lite0", precision="float32")
    detector = untrained_detector(training, (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
    detector.fit_density(detector.embed(images))
    return detector


@pytest.fixture(scope="module")
def combined(small, images):
    other = trained(images, Training(width=4, steps=4, batch_size=4, seed=1, evaluate_at=(1.0,)))
    other = with_training(other, score="classifier", precision="float32")
    third = with_training(small, score="patches", precision="float32")
    third.fit_patches(images)
    generator = torch.Generator().manual_seed(0)
    parts, members = [], (small, other, third)
    for detector in members:
        weights = torch.randn(detector.network.features, generator=generator, dtype=torch.float64)
        parts.append(Part(Scale(0.3, 0.7), Head(weights, 0.1), Scale(-0.2, 1.3), 0.6))
    return CombinedDetector(members, tuple(parts))


@pytest.fixture(scope="module")
def patches(images):
    training = Training(encoder="tf_efficientnet_lite0", precision="float32", score="patches")
    detector = untrained_detector(training, (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
    detector.fit_density(detector.embed(images))
    detector.fit_patches(images)
    return detector


@pytest.fixture(scope="module")
def sharing(images):
    """Two detectors with the same frozen stages."""
    training = Training(
        encoder="tf_efficientnet_lite0", frozen_stages=3, precision="float32", score="patches"
    )
    members = []
    for factor in (1.0, 1.2):
        detector = untrained_detector(training, (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
        with torch.no_grad():
            detector.network.encoder.model.blocks[6][0].conv_pw.weight.mul_(factor)
            detector.network.encoder.model.blocks[4][0].conv_pw.weight.mul_(factor)
        detector.fit_density(detector.learn(images))
        members.append(detector)
    part = Part(Scale(0.3, 0.7), None, None, 0.0)
    return CombinedDetector(tuple(members), (part, part))


@pytest.fixture(scope="module")
def classifier(small):
    return with_training(small, score="classifier")


KINDS = ["small", "lite0", "patches", "classifier", "combined", "sharing"]


@pytest.fixture(scope="module")
def onnx_file(request, tmp_path_factory):
    """The ONNX file of a kind of detector, which is written once: an export takes seconds."""
    written = {}

    def of(kind):
        if kind not in written:
            written[kind] = tmp_path_factory.mktemp("onnx") / "detector.onnx"
            export_onnx(request.getfixturevalue(kind), written[kind])
        return written[kind]

    return of


@pytest.fixture(params=KINDS)
def detector(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def file(detector, request, onnx_file):
    return onnx_file(request.node.callspec.params["detector"])


def assert_same(scores, detector, images):
    assert scores.shape == (len(images),)
    np.testing.assert_allclose(scores, detector.score(images).numpy(), rtol=1e-4, atol=1e-6)


def test_the_module_scores_as_the_detector_does(detector, images):
    assert_same(ScoringModule(detector)(images).numpy(), detector, images)


def test_onnxruntime_scores_as_the_detector_does_at_any_batch_size(detector, images, file):
    assert [p.name for p in file.parent.iterdir()] == ["detector.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 7, 24):
        (scores,) = session.run(["scores"], {"images": images[:count].numpy()})
        assert scores.dtype == np.float32
        assert_same(scores, detector, images[:count])


def test_members_of_a_combined_detector_share_frozen_stages_in_an_onnx_file(onnx_file):
    sizes, convolutions = [], []
    for path in map(onnx_file, ("patches", "sharing")):  # one such detector, and two
        graph = onnx.load(path).graph
        sizes.append(path.stat().st_size)
        convolutions.append(sum(node.op_type == "Conv" for node in graph.node))
    frozen = 15  # of EfficientNet-Lite0's first three stages, with its stem
    assert convolutions[1] == 2 * convolutions[0] - frozen
    assert sizes[1] < 2 * sizes[0]


def test_an_onnx_file_says_what_it_takes(small, onnx_file):
    model = onnx.load(onnx_file("small"))
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == OPSET
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert facts_of(small).items() <= kept.items()
    assert kept["image_height"] == kept["image_width"] == "32" and kept["image_channels"] == "1"
    (given,) = model.graph.input
    assert given.name == "images" and given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert (
        given.type.tensor_type.shape.dim[0].dim_param and given.type.tensor_type.shape.dim[2].dim_value == 32
    )


def test_openvino_scores_as_the_detector_does(detector, images, file):
    openvino = pytest.importorskip("openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"}  # or it computes in bfloat16 where the processor can
    model = openvino.compile_model(file, "CPU", config)
    assert_same(model(images.numpy())[0], detector, images)


_ELSEWHERE = """
import json, sys, torch
sys.modules["ssad_hpo"] = None  # as where it is not installed
facts = {"ssad_hpo.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts).module()
print(json.dumps([json.loads(facts["ssad_hpo.json"]), program(torch.load(sys.argv[2])).tolist()]))
"""


@pytest.mark.slow
def test_pytorch_loads_its_program_without_ssad_hpo(combined, images, tmp_path):
    export_torch(combined, tmp_path / "detector.pt2")
    torch.save(images, tmp_path / "images.pt")
    words = [sys.executable, "-P", "-c", _ELSEWHERE, tmp_path / "detector.pt2", tmp_path / "images.pt"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    facts, scores = json.loads(said)
    assert facts == facts_of(combined)
    assert_same(np.array(scores), combined, images)


def test_an_export_that_fails_leaves_the_file_as_it_was(small, tmp_path, monkeypatch):
    def broken(*words, **options):
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("torch.export.export", broken)
    (tmp_path / "detector.pt2").write_text("older")
    with pytest.raises(ValueError, match=r"cannot be written in PyTorch's format \(no such operator\)"):
        export_torch(small, tmp_path / "detector.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["detector.pt2"]
    assert (tmp_path / "detector.pt2").read_text() == "older"


@pytest.mark.parametrize("score", ["density", "patches"])
def test_a_detector_in_bfloat16_scores_about_as_its_file_does(images, score):
    training = Training(
        encoder="tf_efficientnet_lite0", weights="pretrained", precision="bfloat16", score=score
    )
    detector = untrained_detector(training, (1, 32, 32), Augmentation(NONE), torch.device("cpu"))
    detector.fit_density(detector.embed(images))
    detector.fit_patches(images)
    new = textures(40, seed=5)
    apart = (ScoringModule(detector)(new) / detector.score(new) - 1).abs()
    assert 1e-3 < apart.median() < 0.06 and apart.max() < 1 / 3


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_that_its_scores_differ_is_said_once_and_of_no_other_detector(combined, small, tmp_path, write):
    coarse = with_training(small, precision="bfloat16")
    together = CombinedDetector((small, coarse), combined.parts[:2])
    for detector in (coarse, together) if write is export_torch else (together,):
        with pytest.warns(UserWarning, match=r"file computes in float32.*--precision float32") as told:
            write(detector, tmp_path / "detector")
        assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(with_training(small, precision="float32"), tmp_path / "detector")


def test_without_onnx_a_sentence_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setattr("ssad_hpo.export.files._NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(ValueError, match=r"no_such_package.*pip install 'ssad-hpo\[onnx\]'"):
        export_onnx(small, tmp_path / "detector.onnx")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["grey.png", "colour.jpg", "alpha.png", "turned.jpg", "palette.png"])
def test_images_are_prepared_as_ssad_hpo_reads_them(tmp_path, name, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 210, 4), dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if name == "grey.png":
        image = image.convert("L")
    elif name == "palette.png":
        image = image.convert("RGB").quantize(40)
    elif name.endswith("jpg"):
        image = image.convert("RGB")
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    path = save(tmp_path / name, image, **options)
    expected, *_ = read_images([path], (32, 48), channels)
    assert np.array_equal(prepare(path, 32, 48, channels), expected.numpy())
    assert np.array_equal(prepare(io.BytesIO(path.read_bytes()), 32, 48, channels), expected.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("file_format", sorted(FORMATS))
def test_a_run_is_exported_from_the_command_line(call, tmp_path, file_format):
    folder = clear_run(tmp_path / "run", combine=2).run.folder
    ended = call("export", folder, "--format", file_format, "--out", tmp_path / "detector.bin")
    assert ended.code == 0, ended.err
    assert "grey images of 16 × 16 pixels" in ended.out and (tmp_path / "detector.bin").stat().st_size > 1000
    if file_format == "onnx":
        from ssad_hpo.experiment import load_detector

        new = textures(5, size=16)
        session = onnxruntime.InferenceSession(tmp_path / "detector.bin")
        assert_same(session.run(None, {"images": new.numpy()})[0], load_detector(folder), new)
