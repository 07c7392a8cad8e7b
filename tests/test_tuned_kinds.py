"""ST-SSAD of several kinds: a first look at all starting points, those that go on, and a resume of it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from combined_runs import CLEAR
from held_out import held_out_task
from test_bilevel_resume import Interrupter, Interruption
from tunings import TASK, TINY, quick

from ssad_hpo.bilevel import FailedStart, StoppedStart, TunedStart, tune
from ssad_hpo.experiment import (
    StudyInterrupted,
    load_detector,
    open_result,
    report_run,
    resume_study,
    run_study,
)
from ssad_hpo.experiment.combining import evidence_of
from ssad_hpo.search import candidates, records
from ssad_hpo.task import DetectorError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

KINDS = ["cutdiff", "cutout", "rotation"]
# Six starting points of three kinds; a look of one step of the hyperparameters, then two have three more.
SEVERAL = quick(KINDS, survivors=2, look=0.25, checkpoint_every=1)


def all_of(result):
    """Everything that a tuning gave, in a form that compares bit for bit."""
    found = [result.chosen, replace(result.cost, seconds=0)]
    for end in result.starts:
        found.append((type(end).__name__, end.start, replace(end.cost, seconds=0)))
        if isinstance(end, TunedStart):
            weights = {n: t.tolist() for n, t in end.detector.network.state_dict().items()}
            found.append((end.augmentation, end.trajectory, end.criteria, end.scores.tolist(), weights))
        elif isinstance(end, StoppedStart):
            found.append((end.augmentation, end.step, end.value))
    return found


@pytest.fixture(scope="module")
def whole():
    return all_of(tune(TASK, SEVERAL, TINY))


def test_every_kind_starts_everywhere_and_the_best_of_a_look_go_on():
    result = tune(TASK, SEVERAL, TINY)
    assert SEVERAL.total == 6 and [end.start.kind for end in result.starts] == [
        k for k in KINDS for _ in (0, 1)
    ]
    kinds = Counter(type(end) for end in result.starts)
    assert kinds == {TunedStart: 2, StoppedStart: 4}
    for end in result.starts:
        if isinstance(end, StoppedStart):
            assert end.step == 6 and end.augmentation != end.start
        else:
            assert [outer.step for outer in end.trajectory] == [6, 8, 10, 12]


def test_those_that_go_on_are_the_lowest_after_the_look():
    """With all but one sent on, the one that stops is the highest of those that the others tell."""
    values = {}
    for survivors in (1, 5):
        result = tune(TASK, replace(SEVERAL, survivors=survivors), TINY)
        values[survivors] = {i: e.value for i, e in enumerate(result.starts) if isinstance(e, StoppedStart)}
        assert len(values[survivors]) == 6 - survivors
    ((highest, value),) = values[5].items()
    assert values[1][highest] == value == max(values[1].values())


def test_a_start_that_goes_on_after_a_look_ends_as_one_without_it():
    tuning = quick("cutdiff", survivors=1, look=0.25, starts=(0.5, 0.8))
    looked, plain = tune(TASK, tuning, TINY), tune(TASK, replace(tuning, survivors=None), TINY)
    (index,) = [i for i, end in enumerate(looked.starts) if isinstance(end, TunedStart)]
    ours, theirs = looked.starts[index], plain.starts[index]
    assert ours.trajectory == theirs.trajectory and torch.equal(ours.scores, theirs.scores)
    assert ours.cost.forward > theirs.cost.forward  # a look is judged as well


def test_as_many_survivors_as_starts_need_no_look():
    tuning = quick("cutdiff", survivors=2)
    assert all_of(tune(TASK, tuning, TINY)) == all_of(tune(TASK, replace(tuning, survivors=None), TINY))


def test_values_start_with_the_kinds_that_have_them():
    tuning = quick(KINDS, starts=({"angle": 30.0}, {"patch_area": 0.1}, 0.5))
    result = tune(TASK, tuning, TINY)
    assert [end.start.kind for end in result.starts] == ["cutdiff"] * 2 + ["cutout"] * 2 + ["rotation"] * 2
    assert tuning.total == len(result.starts) == 6
    with pytest.raises(ValueError, match=r"^starts: expected values of patch_area, patch_aspect, got 'size'"):
        tune(TASK, quick(KINDS, starts=({"size": 1.0},)), TINY)


def test_a_warm_start_is_of_all_kinds_in_turn(monkeypatch):
    import ssad_hpo.bilevel.descent as descent

    seen = []

    def applied(images, kind, *rest):
        seen.append(kind)
        return apply(images, kind, *rest)

    apply = descent.apply
    monkeypatch.setattr(descent, "apply", applied)
    tune(TASK, quick(KINDS, starts=(0.5,), survivors=1), TINY)
    assert seen[:4] == ["cutdiff", "cutout", "rotation", "cutdiff"]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
@pytest.mark.parametrize("at", [1, 2, 5, 7, 9, 12])
def test_an_interrupted_look_or_what_follows_goes_on_to_the_same_end(tmp_path, whole, warm_start_on, at):
    tuning = replace(SEVERAL, warm_start_on=warm_start_on)
    expected = whole if warm_start_on == "range" else all_of(tune(TASK, tuning, TINY))
    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(TASK, tuning, TINY, recorder=Interrupter(at), checkpoint=checkpoint)
    again = Interrupter(0)
    assert all_of(tune(TASK, tuning, TINY, recorder=again, checkpoint=checkpoint)) == expected
    assert -again.left <= 13 - at  # what a checkpoint held is not done again
    assert all_of(tune(TASK, tuning, TINY, checkpoint=checkpoint)) == expected


def test_a_checkpoint_holds_no_more_networks_than_can_go_on(tmp_path):
    """Two that go on, one under way, and the shared warm start."""
    from ssad_hpo.bilevel.checkpoint import CheckpointFile

    most = []
    save = CheckpointFile.save

    def counted(file):
        save(file)
        progress = file.progress
        states = [*(look["state"] for look in progress.looks), *progress.finished]
        most.append(sum(state is not None for state in states))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFile, "save", counted)
        tune(TASK, SEVERAL, TINY, checkpoint=tmp_path / "tuning.pt")
    assert max(most) == 2


def test_a_start_that_fails_in_its_look_is_told_and_the_others_go_on(listener):
    calls = 0

    def once(train, augmented, unlabeled):
        nonlocal calls
        calls += 1
        return augmented.sum() * (float("nan") if calls == 1 else 1)

    result = tune(TASK, replace(SEVERAL, loss=once), TINY, recorder=listener)
    assert isinstance(result.starts[0], FailedStart) and "nan" in result.starts[0].reason
    ends = {trial: status for trial, status, *_ in listener.of("ended")}  # the last word of each
    assert Counter(ends.values()) == {"failed": 1, "pruned": 3, "complete": 2}

    def broken(train, augmented, unlabeled):
        return augmented.sum() * float("nan")

    with pytest.raises(DetectorError, match=r"^no starting point could be tuned: start 0: diverged"):
        tune(TASK, replace(SEVERAL, loss=broken), TINY)


def test_a_look_by_a_criterion_of_held_out_images():
    result = tune(held_out_task(), replace(SEVERAL, choose_by="shift"), TINY)
    assert len(result.tuned) == 2
    assert result.kept.criteria["shift"] == min(end.criteria["shift"] for end in result.tuned)


# As a run


PLAIN = {"loss": "mmd", "focus": False, "steps_before": 4, "order": 1, "detector_steps": 4, "warm_start": 0.3,
         "virtual_images": 16, "validation_unlabeled": 96, "look": 0.2}  # fmt: skip
TUNED_RUN = replace(SEVERAL, space=["cutout", "cutavg"], order=1, choose_by="shift", combine=2, loss="pu_auc")


def run_of(folder, listeners=()):
    return run_study(CLEAR, TUNED_RUN, TINY, run=folder, tracking_uri=None, listeners=listeners)


def found_of(result):
    evidence = result.evidence
    kept = [(c.number, c.augmentation, c.criteria, c.scores().tolist()) for c in candidates(result.study)]
    trials = [(t.state, t.params, t.intermediate_values) for t in result.study.trials]
    combined = [evidence.combined.scores.tolist(), evidence.combined.held_out.tolist()]
    return [kept, trials, evidence.p_anomalies, evidence.members, combined, result.aucs, result.evaluation]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "whole")


def test_the_ends_of_a_tuning_are_combined_and_judged_as_those_of_a_search(run):
    states = Counter(record.status for record in records(run.study))
    assert states == {"complete": 2, "pruned": 2} and len(run.study.trials) == TUNED_RUN.total
    ranked = sorted(candidates(run.study), key=lambda c: c.criteria["shift"])
    assert run.evidence.members == tuple(c.number for c in ranked) and run.selected == ranked[0]
    assert run.evaluation.auc_combined is not None and 0 < run.evidence.p_anomalies <= 1
    from ssad_hpo import data

    scores = load_detector(run.run.folder).score(data.load(CLEAR).unlabeled)
    torch.testing.assert_close(scores, run.evidence.combined.scores, rtol=1e-4, atol=1e-4)
    assert found_of(open_result(run.run.folder)) == found_of(run)


@pytest.mark.parametrize(
    ("changed", "fitted"),
    [
        ({}, True),
        ({"loss": "mmd"}, True),  # the look was by held-out images
        ({"loss": "mmd", "choose_by": "dsv", "focus": False}, False),
        ({"loss": "mmd", "survivors": None, "focus": False}, False),
        ({"loss": "mmd", "survivors": None}, True),  # they say what stands out
        ({"survivors": None}, True),
        (PLAIN | {"choose_by": "shift"}, False),  # what parts starts before a training is the loss
    ],
)
def test_evidence_says_when_its_images_had_a_part_in_the_tuning(run, changed, fitted):
    settings = replace(run.run.settings, method=replace(TUNED_RUN, **changed))
    evidence = evidence_of(replace(run.run, settings=settings), run.study, run.selected)
    assert evidence.fitted == fitted
    seen = replace(evidence, p_anomalies=0.01).account("start")[0]
    assert ("since starts were tuned by these images" in seen) == fitted


def test_one_end_alone_is_no_combination(tmp_path):
    result = run_study(CLEAR, replace(TUNED_RUN, combine=1), TINY, run=tmp_path / "one", tracking_uri=None)
    assert result.evidence.combined is None and not result.run.combined.exists()


@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_a_run_that_was_stopped_in_a_look_or_after_it_ends_alike(tmp_path, run, at):
    class Stops(Interrupter):
        def trial_ended(self, *heard):
            pass

    with pytest.raises(StudyInterrupted):
        run_of(tmp_path / "run", [Stops(at)])
    assert found_of(resume_study(tmp_path / "run")) == found_of(run)


def test_a_report_has_a_picture_of_the_course_for_every_kind_that_ended(run):
    page = report_run(run.run.folder)
    kinds = {c.augmentation.kind for c in candidates(run.study)}
    names = ["trajectories.png"] if len(kinds) == 1 else [f"trajectories-{kind}.png" for kind in kinds]
    assert all((page.parent / name).is_file() for name in names)
    assert page.read_text(encoding="utf-8").count("stopped at step 6 of 12") == 2
