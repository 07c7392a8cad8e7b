"""ST-SSAD before the training: hyperparameters that move with a pretrained encoder as it comes."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held_out import held_out_task
from test_tuned_kinds import all_of
from tunings import TINY, Interrupter, Interruption, random_task

from ssad_hpo.bilevel import (
    DEFAULT_TRAINING,
    PATCHES,
    PATCHES_HELD_OUT,
    PATCHES_IN_TURN,
    PATCHES_IN_TURN_HELD_OUT,
    PATCHES_IN_TURN_TRAINING,
    StoppedStart,
    TunedStart,
    Tuning,
    prepare,
    tune,
)
from ssad_hpo.bilevel.focus import LEAST
from ssad_hpo.bilevel.ways import way_of
from ssad_hpo.data import Source, find_source
from ssad_hpo.detector import train
from ssad_hpo.encoder import Network
from ssad_hpo.experiment import (
    StudyInterrupted,
    open_result,
    read_trajectory,
    report_run,
    resume_study,
    run_study,
    tuned_training_for,
    tuning_for,
)
from ssad_hpo.files import FileError
from ssad_hpo.search import candidates, records, select
from ssad_hpo.task import PRETRAINED, DetectorError, Task, Training

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

KINDS = ["cutdiff", "cutout", "rotation"]
IN_TURN = {
    "virtual_rate": 0.1, "virtual_images": 4, "warm_start": 0.1, "warm_start_on": "start", "look": 0.5,
    "validation_unlabeled": 5, "validation_held_out": 5, "batch_norm": "train", "annealing": True,
}  # fmt: skip
LITE0 = Training(
    encoder="tf_efficientnet_lite0", weights="pretrained", frozen_stages=3, encoder_batch_norm="eval",
    steps=2, batch_size=2, evaluate_at=(1.0,), precision="float32",
)  # fmt: skip
BEFORE = Tuning(KINDS, steps_before=3, learning_rate=0.2, validation_train=3, starts=(0.4, 0.8), survivors=2)
TASK = random_task(8, 6, size=32)


@pytest.fixture(scope="module")
def result():
    return tune(TASK, BEFORE, LITE0)


def test_every_kind_moves_from_every_start_and_the_lowest_train(result):
    kinds = Counter(type(end) for end in result.starts)
    assert kinds == {TunedStart: 2, StoppedStart: 4} and len(result.starts) == BEFORE.total
    looks = {}
    for index, start in enumerate(prepare(TASK, BEFORE, LITE0)):
        way = way_of(start)
        steps = list(way.train(until=BEFORE.steps_before))
        assert [outer.step for outer in steps] == [1, 2, 3]
        assert all(outer.training_loss is None for outer in steps) and way.trained == 0
        looks[index] = way.look()
        end = result.starts[index]
        assert end.augmentation == way.augmentation != end.start
        if isinstance(end, StoppedStart):
            assert (end.step, end.value) == (0, looks[index])
        else:
            assert end.trajectory == tuple(steps)
    trained = {i for i, end in enumerate(result.starts) if isinstance(end, TunedStart)}
    assert trained == set(sorted(looks, key=lambda i: looks[i])[:2])


def test_what_trains_is_the_detector_that_a_search_would_train(result):
    for end in result.tuned:
        (last,) = train(TASK.train, end.augmentation, LITE0)
        ours, theirs = end.detector.network.state_dict(), last.detector.network.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert end.training_loss == last.loss


def test_points_move_down_the_loss_of_the_encoder_as_it_comes():
    """By differences: the first step goes against the slope, at the rate that was asked for."""
    tuning = replace(
        BEFORE, space="cutout", starts=({"patch_area": 0.1, "patch_aspect": 1.0},), temperature=2
    )
    (start,) = prepare(TASK, tuning, LITE0)
    way = way_of(start)
    generator = way.generator.get_state()
    value = {}
    for step in (-1e-2, 1e-2):
        other = way_of(replace(start, point=start.point + torch.tensor([step, 0.0], dtype=torch.float64)))
        other.generator.set_state(generator)
        (outer,) = other.train(until=1)
        value[step] = outer.validation_loss
    slope = (value[1e-2] - value[-1e-2]) / 2e-2
    assert abs(slope) > 1e-4
    before = way.point.clone()
    list(way.train(until=1))
    moved = float(way.point[0] - before[0])
    assert moved == pytest.approx(-0.2 if slope > 0 else 0.2, rel=1e-3)  # Adam's first step is the rate


def test_steps_pass_augmented_images_alone_and_all_passes_are_counted(monkeypatch):
    passed = []
    features_of = Network.features_of

    def counted(network, images):
        passed.append(len(images))
        return features_of(network, images)

    monkeypatch.setattr(Network, "features_of", counted)
    task = held_out_task(image_size=32)
    tuning = replace(BEFORE, starts=(0.5,), survivors=1, choose_by="shift")
    way = way_of(prepare(task, tuning, LITE0)[0])
    _ = way.as_it_comes.embeddings
    passed.clear()
    list(way.train(until=3))
    way.look()
    assert passed == [3, 3, 3, len(task.train)]
    monkeypatch.undo()

    result = tune(task, tuning, LITE0)
    images = sum(map(len, task.sets().values()))
    for end in result.starts:
        goes_on = isinstance(end, TunedStart)
        trained = 2 * LITE0.batch_size * LITE0.steps if goes_on else 0
        judged = images + len(task.train) if goes_on else 0  # its copies as well
        assert end.cost.forward == sum([3, 3, 3, len(task.train)]) + trained + judged
        assert (end.cost.backward, end.cost.second) == (9 + trained, 0)
    shared = images + len(task.train)  # the encoder as it comes, judged once
    assert result.cost.forward == shared + sum(end.cost.forward for end in result.starts)


@pytest.mark.parametrize("loss", ["two_sided_alignment", "contrast_alignment", "pu_auc"])
def test_it_looks_at_what_stands_out_unless_the_loss_is_of_ranks(loss):
    task = held_out_task(image_size=32)
    more = torch.cat([task.unlabeled, *[task.held_out] * 3, 255 - task.held_out])
    task = Task("more", task.train, more, task.held_out)
    way = way_of(prepare(task, replace(BEFORE, loss=loss), LITE0)[0])
    learned, unlabeled, held_out = way.as_it_comes.embeddings
    assert (len(learned), len(held_out)) == (len(task.train), len(task.held_out))
    looked_at = len(unlabeled) < len(task.unlabeled)
    assert looked_at == (loss != "pu_auc") and len(unlabeled) >= LEAST
    whole = way_of(prepare(task, replace(BEFORE, loss=loss, focus=False), LITE0)[0]).as_it_comes.embeddings[1]
    assert len(whole) == len(task.unlabeled)
    among = (unlabeled[:, None] == whole).all(2).any(1)
    assert among.all()
    assert len(tune(task, replace(BEFORE, loss=loss, space="cutout"), LITE0).tuned) == 2


FEW = replace(BEFORE, space=["cutdiff", "cutout"], starts=(0.5,), survivors=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def few():
    return all_of(tune(TASK, FEW, LITE0))


@pytest.mark.parametrize("at", [1, 3, 5, 6])
def test_one_that_was_cut_off_goes_on_to_the_same_end_bit_for_bit(tmp_path, few, at):
    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(TASK, FEW, LITE0, recorder=Interrupter(at), checkpoint=checkpoint)
    again = Interrupter(0)
    assert all_of(tune(TASK, FEW, LITE0, recorder=again, checkpoint=checkpoint)) == few
    assert -again.left <= 9 - at  # of seven; what a checkpoint held is not done again
    assert all_of(tune(TASK, FEW, LITE0, checkpoint=checkpoint)) == few


def test_a_training_that_was_cut_off_is_done_again(tmp_path, few, monkeypatch):
    calls = 0

    def cut(*given):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Interruption
        return train(*given)

    monkeypatch.setattr("ssad_hpo.bilevel.before.train", cut)
    with pytest.raises(Interruption):
        tune(TASK, FEW, LITE0, checkpoint=tmp_path / "tuning.pt")
    assert all_of(tune(TASK, FEW, LITE0, checkpoint=tmp_path / "tuning.pt")) == few
    assert calls == 2


def test_a_start_that_fails_is_told_and_the_others_go_on(monkeypatch):
    calls = 0

    def once(learned, augmented, unlabeled):
        nonlocal calls
        calls += 1
        return augmented.sum() * (float("nan") if calls == 1 else 1)

    found = tune(TASK, replace(BEFORE, loss=once), LITE0)
    assert "nan" in found.starts[0].reason and "before the training under cutdiff" in found.starts[0].reason
    assert len(found.tuned) == 2

    def broken(*given):
        raise DetectorError("diverged: loss nan")
        yield

    monkeypatch.setattr("ssad_hpo.bilevel.before.train", broken)
    with pytest.raises(
        DetectorError, match=r"^no starting point could be tuned: start \d: diverged: loss nan"
    ):
        tune(TASK, BEFORE, LITE0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": 2}, r"^order: it is of hyperparameters that move while the detector trains"),
        ({"detector_steps": 2}, r"^detector_steps: it is of hyper.* with 3 steps before the training"),
        *(({name: value}, rf"^{name}: it is of hyperparameters") for name, value in IN_TURN.items()),
        ({"steps_before": -1}, r"^steps_before: "),
        ({"steps_before": 2.5}, r"^steps_before: "),
    ],
)
def test_settings_without_a_use_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(BEFORE, **changed)


def test_a_loss_of_what_the_encoder_learns_is_refused():
    with pytest.raises(ValueError, match=r"^loss: density_pu_auc .* use order 2 with steps_before=0"):
        replace(BEFORE, loss="density_pu_auc")


def test_a_loss_that_is_not_finite_at_the_end_fails_the_start_alone():
    calls = 0

    def at_the_look(learned, augmented, unlabeled):
        nonlocal calls
        calls += 1
        return augmented.sum() * (float("nan") if calls == 4 else 1)

    found = tune(TASK, replace(BEFORE, loss=at_the_look, space="cutout", survivors=1), LITE0)
    assert "diverged: validation loss nan before the training" in found.starts[0].reason
    assert len(found.tuned) == 1


def test_drawn_weights_see_nothing_before_they_train():
    with pytest.raises(ValueError, match=r"^steps_before: an encoder without weights sees nothing"):
        prepare(TASK, BEFORE, TINY)


def test_a_checkpoint_of_another_number_of_steps_is_refused(tmp_path):
    checkpoint = tmp_path / "tuning.pt"
    tune(TASK, replace(BEFORE, space="cutout", survivors=1), LITE0, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"differs in tuning.steps_before"):
        tune(TASK, replace(BEFORE, space="cutout", survivors=1, steps_before=4), LITE0, checkpoint=checkpoint)


def test_all_starts_train_where_no_number_is_said():
    found = tune(TASK, replace(BEFORE, space="cutout", survivors=None), LITE0)
    assert len(found.tuned) == len(found.starts) == 2
    assert [len(end.trajectory) for end in found.tuned] == [3, 3]


# As a run: what a tuning of folders is


@pytest.mark.usefixtures("workplace")
def test_a_folder_is_tuned_by_default_before_the_training_and_reported(call, make_category, tmp_path):
    folder = make_category(tmp_path / "cloth")
    words = "--image-size 32 --steps 2 --batch-size 2 --threads 1 --no-tracking --run r".split()
    said = call("tune", folder, *words)
    assert said.code == 0, said.err
    result = open_result("r")
    tuning = result.run.settings.tuning
    assert tuning.steps_before == PATCHES.steps_before and tuning.space == PATCHES.space
    assert f"after {PATCHES.steps_before} steps of the hyperparameters" in said.out
    trials = records(result.study)
    assert [trial.frozen for trial in trials] == [False] * 8 + [True]
    states = Counter(record.status for record in trials)
    assert states == {"complete": PATCHES.survivors + 1, "pruned": 8 - PATCHES.survivors}
    assert not any(trial.curve for trial in trials)  # the validation loss is no criterion
    for start in candidates(result.study)[:-1]:
        way = read_trajectory(start)
        assert [outer.step for outer in way] == [*range(1, PATCHES.steps_before + 1)]
        assert all(outer.training_loss is None for outer in way)
    page = report_run("r").read_text(encoding="utf-8")
    assert page.count("stopped before its training") == 8 - PATCHES.survivors
    assert "of the encoder as it comes" in page
    assert list((result.run.folder / "report").glob("trajectories*.png"))


@pytest.mark.parametrize("held_out", [False, True])
def test_what_folders_are_tuned_by_and_trained_with(held_out, make_category, tmp_path):
    share = {"held_out_share": 0.4} if held_out else {}
    source = find_source(make_category(tmp_path / "cloth"), image_size=32, **share)
    usual, in_turn = (tuning_for(source, PRETRAINED, in_turn=turn) for turn in (False, True))
    assert usual == (PATCHES_HELD_OUT if held_out else PATCHES)
    assert in_turn == (PATCHES_IN_TURN_HELD_OUT if held_out else PATCHES_IN_TURN)
    for tuning, training in ((usual, PRETRAINED), (in_turn, PATCHES_IN_TURN_TRAINING)):
        assert tuned_training_for(source, tuning) == training
    for tuning in (usual, in_turn):
        assert tuning_for(source, TINY) == tuning_for(None, PRETRAINED) == Tuning() != tuning
        assert tuned_training_for(None, tuning) == DEFAULT_TRAINING


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", [[], ["--steps-before", "0"]], ids=["before", "in turn"])
def test_the_command_takes_the_defaults_of_the_way_it_is_told(words, call, make_category, tmp_path):
    folder = make_category(tmp_path / "cloth")
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr("ssad_hpo.experiment.run_study", lambda *given, **others: asked.append(given) or 1 / 0)
        call("tune", folder, "--image-size", "32", "--held-out-share", "0.4", "--no-tracking", *words)
    ((source, tuning, training),) = asked
    assert tuning == tuning_for(source, PRETRAINED, in_turn=bool(words))
    assert training == tuned_training_for(source, tuning)
    assert tuning.steps_before == (0 if words else 12) and training.steps == (64 if words else 20)


HELD_OUT = Source("controlled", {"image_size": 32, "n_train": 16, "n_unlabeled": 14, "n_held_out": 12})
AS_FOLDERS = replace(
    BEFORE, space=["cutout", "cutavg"], loss="whitened_contrast", choose_by="shift", combine=8, survivors=1
)


def run_of(folder, listeners=(), **changed):
    tuning = replace(AS_FOLDERS, **changed)
    return run_study(HELD_OUT, tuning, LITE0, run=folder, tracking_uri=None, listeners=listeners)


def found_of(result):
    kept = [(c.number, c.augmentation, c.criteria, c.scores().tolist()) for c in candidates(result.study)]
    trials = [(t.state, t.params) for t in result.study.trials]
    combined = result.evidence.combined
    together = None if combined is None else combined.scores.tolist()
    return [kept, trials, result.selected.number, result.evidence.members, together, result.evaluation]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "whole")


class Stops:
    """Interrupts a run when something is told of a trial."""

    def __init__(self, trial, event):
        self.at = trial, event

    def hear(self, trial, event):
        if (trial, event) == self.at:
            raise KeyboardInterrupt

    def trial_started(self, trial, params, tags):
        self.hear(trial, "started")

    def trial_progress(self, trial, step, metrics):
        self.hear(trial, f"step {step}")

    def trial_ended(self, trial, status, metrics, reason=None):
        self.hear(trial, status)


@pytest.mark.parametrize("at", [("0", "step 2"), ("3", "step 1"), ("trained", "started"), ("4", "started"),
                                ("4", "complete")], ids=lambda at: " ".join(at))  # fmt: skip
def test_a_run_that_was_stopped_anywhere_ends_alike(tmp_path, run, at):
    """In the looks, in the training, before the encoder as it comes is added (trial 4), and while it is."""
    if at[0] == "trained":
        at = next(str(c.number) for c in candidates(run.study)), "step 5"  # the last of its training
    with pytest.raises(StudyInterrupted):
        run_of(tmp_path / "run", [Stops(*at)])
    again = resume_study(tmp_path / "run")
    assert found_of(again) == found_of(run)
    assert found_of(resume_study(tmp_path / "run")) == found_of(run)
    assert sum(trial.frozen for trial in records(again.study)) == 1


def test_the_encoder_as_it_comes_competes_and_is_reported(tmp_path, run):
    numbers = [c.number for c in candidates(run.study)]
    assert len(numbers) == 2 and numbers[-1] == AS_FOLDERS.total == 4
    encoder = candidates(run.study)[-1]
    assert encoder.title == "the encoder as it comes"
    assert select(run.study, "shift").number == run.selected.number
    lowest = min(candidates(run.study), key=lambda c: c.criteria["shift"])
    assert run.selected.number == lowest.number
    page = report_run(run.run.folder).read_text(encoding="utf-8")
    assert "before the detectors trained, down the loss of the encoder as it comes" in page
    assert "training loss near a coin" not in page
    # Chosen by what it has not, it stays aside; and one may choose among the starts by that.
    by_loss = run_of(tmp_path / "loss", choose_by="validation_loss", combine=1)
    assert [c.number for c in candidates(by_loss.study)] == numbers[:1]
    assert select(run.study, "validation_loss").number == numbers[0]


@pytest.mark.usefixtures("workplace")
def test_no_label_reaches_it(tmp_path, make_category):
    """Other names and folders of the unlabelled images, the same bits."""
    found = []
    for name in ("cloth", "shuffled"):
        folder = make_category(tmp_path / name)
        if name == "shuffled":
            files = sorted((folder / "test").glob("*/*.png"))
            (folder / "test" / "other").mkdir()
            for number, file in enumerate(files):
                file.rename(folder / "test" / ("other" if number % 2 else "good") / f"{number:03}x.png")
        source = find_source(folder, image_size=32, held_out_share=0.4)
        result = run_study(source, AS_FOLDERS, LITE0, run=tmp_path / f"run-{name}", tracking_uri=None)
        found.append(found_of(result)[:-1])
    assert found[0] == found[1]


def test_a_trajectory_keeps_what_it_had_no_training_loss_for(run, tmp_path):
    start = candidates(run.study)[0]
    way = read_trajectory(start)
    assert [outer.training_loss for outer in way] == [None] * AS_FOLDERS.steps_before
    file = Path(start.address) / "trajectory.csv"
    broken = tmp_path / "artifacts"
    shutil.copytree(start.address, broken)
    rows = file.read_text(encoding="utf-8").splitlines()
    for row in (
        rows[1].replace(",,", ",nan,"),
        rows[1].rpartition(",")[0] + ",",
        rows[1].replace(",", ",1,", 1),
    ):
        (broken / "trajectory.csv").write_text("\n".join([rows[0], row]), encoding="utf-8")
        with pytest.raises(FileError, match="trajectory"):
            read_trajectory(replace(start, address=str(broken)))
