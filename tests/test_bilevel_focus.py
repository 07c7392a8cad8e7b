"""Tunings that look at the unlabelled images that stand out: which these are, and a resume knows them."""

from dataclasses import replace

import pytest
import torch
from tunings import TASK, TINY, Interrupter, Interruption, all_of, quick, random_task

from ssad_hpo.bilevel import focus, tune
from ssad_hpo.bilevel.descent import Descent
from ssad_hpo.bilevel.focus import LEAST, standing_out
from ssad_hpo.task import Task

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

NORMAL = random_task(30 + 20 + 36, 8)
FOCUSED = Task(
    "few anomalies",
    NORMAL.train[:30],
    torch.cat([NORMAL.unlabeled[:4], NORMAL.train[50:]]),
    NORMAL.train[30:50],
)


def slowly(scores, held_out):
    """The same by going through all thresholds."""
    best = 0.0
    for threshold in scores.tolist():
        among = sum(score >= threshold for score in scores.tolist()) / len(scores)
        expected = sum(score >= threshold for score in held_out.tolist()) / len(held_out)
        best = max(best, among - expected)
    count = max(LEAST, round(2 * best * len(scores)))
    ranked = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return sorted(ranked[:count])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rounded", [False, True], ids=["", "with ties"])
def test_those_that_stand_out_are_twice_the_excess_of_the_highest(share, rounded):
    generator = torch.Generator().manual_seed(3)
    scores, held_out = (torch.randn(n, generator=generator).double() for n in (120, 50))
    scores[: round(share * 120)] += 4
    if rounded:
        scores, held_out = scores.round(), held_out.round()
    assert standing_out(scores, held_out).tolist() == slowly(scores, held_out)


def test_half_of_those_that_stand_out_are_anomalous_however_many_there_are():
    generator = torch.Generator().manual_seed(0)
    for anomalies in (40, 100, 200):
        scores, held_out = (torch.randn(n, generator=generator).double() for n in (1000, 500))
        scores[:anomalies] += 6
        found = standing_out(scores, held_out)
        share = float((found < anomalies).double().mean())
        assert (found < anomalies).sum() == anomalies and 0.3 < share <= 0.55


def test_few_images_are_all_looked_at():
    scores = torch.arange(9.0).double()
    assert standing_out(scores, scores + 100).tolist() == list(range(9))


def test_the_validation_loss_sees_those_that_stand_out_alone(monkeypatch):
    seen, chosen, every = [], [], 3
    batch, choose = Descent._validation_batch, Descent._focus

    def looked_at(descent):
        found = batch(descent)
        seen.append(found.unlabeled)
        return found

    def chosen_by(descent):
        choose(descent)
        chosen.append((descent.step, descent.focused))

    monkeypatch.setattr("ssad_hpo.bilevel.descent.EVERY", every)
    monkeypatch.setattr(Descent, "_validation_batch", looked_at)
    monkeypatch.setattr(Descent, "_focus", chosen_by)
    training = replace(TINY, steps=20)
    tune(FOCUSED, quick("cutdiff", starts=(0.5,), validation_unlabeled=60), training)
    assert len(chosen) == -(-len(seen) // every) > 1
    for number, images in enumerate(seen):
        places = chosen[number // every][1]
        among = FOCUSED.unlabeled[places].float() / 255
        assert LEAST <= len(places) < len(FOCUSED.unlabeled)
        assert torch.equal(images.flatten(1).sort(0).values, among.flatten(1).sort(0).values)


@pytest.mark.parametrize("loss", ["two_sided_alignment", "pu_auc"])
def test_without_held_out_images_or_with_a_loss_of_ranks_all_are_looked_at(loss):
    task = FOCUSED if loss == "pu_auc" else TASK
    tuning = quick("cutdiff", loss=loss, starts=(0.5,))
    assert all_of(tune(task, tuning, TINY)) == all_of(tune(task, replace(tuning, focus=False), TINY))
    assert tuning.focuses == (loss != "pu_auc")


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_tuning_that_is_cut_off_goes_on_looking_at_the_same_images(after, tmp_path, monkeypatch):
    monkeypatch.setattr("ssad_hpo.bilevel.descent.EVERY", 2)
    tuning = quick("cutdiff", checkpoint_every=1)
    whole = tune(FOCUSED, tuning, TINY)
    assert all_of(whole) != all_of(tune(FOCUSED, replace(tuning, focus=False), TINY))
    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(FOCUSED, tuning, TINY, checkpoint=checkpoint, recorder=Interrupter(after))
    assert all_of(tune(FOCUSED, tuning, TINY, checkpoint=checkpoint)) == all_of(whole)


def test_its_images_count_in_the_cost():
    tuning = quick("cutdiff", starts=(0.5,))
    costs = [tune(FOCUSED, replace(tuning, focus=on), TINY).cost for on in (True, False)]
    steps = (TINY.steps - tuning.warm_start_steps(TINY.steps)) // tuning.detector_steps
    looks = -(-steps // focus.EVERY)
    images = len(FOCUSED.train) + len(FOCUSED.unlabeled) + len(FOCUSED.held_out)
    assert costs[0].forward - costs[1].forward == looks * images


def test_encoders_with_dropout_can_be_focused(tmp_path):
    """Dropout in evaluation mode draws nothing."""
    few = Task("large", *(images[:20].repeat(1, 1, 2, 2) for images in (NORMAL.train, FOCUSED.unlabeled)))
    few = replace(few, held_out=NORMAL.train[50:60].repeat(1, 1, 2, 2))
    training = replace(TINY, encoder="mobilenet_v2", batch_size=2, steps=6)
    tuning = quick("cutdiff", order=1, starts=(0.5,))
    result, again = (tune(few, tuning, training) for _ in range(2))
    assert len(result.kept.trajectory) == 2 and torch.equal(result.kept.scores, again.kept.scores)


def test_a_checkpoint_from_before_there_was_a_focus_is_gone_on_with_where_that_changes_nothing(tmp_path):
    checkpoint, tuning = tmp_path / "tuning.pt", quick("cutdiff", starts=(0.5,))
    first = tune(TASK, tuning, TINY, checkpoint=checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    del content["settings"]["tuning.focus"]
    torch.save(content, checkpoint)
    assert all_of(tune(TASK, tuning, TINY, checkpoint=checkpoint)) == all_of(first)
    tune(FOCUSED, replace(tuning, focus=False), TINY, checkpoint=tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"another tuning \(differs in tuning.focus\)"):
        tune(FOCUSED, tuning, TINY, checkpoint=tmp_path / "other.pt")
