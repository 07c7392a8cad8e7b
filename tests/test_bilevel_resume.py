"""ST-SSAD: a tuning that was stopped goes on from its checkpoint to the same end, bit for bit."""

from dataclasses import replace

import pytest
import torch
from tunings import TASK, TINY, Interrupter, Interruption, all_of, quick, random_task

from ssad_hpo.bilevel import tune
from ssad_hpo.bilevel.checkpoint import CheckpointFile
from ssad_hpo.criteria import base

# Tiny trainings end anywhere; what is a sign of collapse has its own tests.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_an_interrupted_tuning_goes_on_to_the_same_end_bit_for_bit(tmp_path, warm_start_on, at):
    tuning = quick("cutpaste", warm_start_on=warm_start_on)
    whole = all_of(tune(TASK, tuning, TINY))
    checkpoint, interrupter = tmp_path / "deep" / "tuning.pt", Interrupter(at)
    with pytest.raises(Interruption):
        tune(TASK, tuning, TINY, recorder=interrupter, checkpoint=checkpoint)
    assert interrupter.ended[-1][:2] == (str((at - 1) // 4), "interrupted")
    resumed = Interrupter(0)
    assert all_of(tune(TASK, tuning, TINY, recorder=resumed, checkpoint=checkpoint)) == whole
    # Something of the first attempt was kept, if it came that far; and no half file lies about.
    assert (-resumed.left < 8) == (at > 2)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("warm_start_on", ["range", "start"])
def test_a_warm_start_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, warm_start_on):
    tuning = quick("cutpaste", warm_start_on=warm_start_on, checkpoint_every=1)  # saved after 2 and 4 steps
    whole, checkpoint = all_of(tune(TASK, tuning, TINY)), tmp_path / "tuning.pt"
    saved = []

    save = CheckpointFile.save

    def save_and_note(file):
        save(file)
        progress = file.progress
        saved.append((progress.warm_start or progress.current or {"step": None})["step"])
        if len(saved) == 1:
            raise Interruption

    monkeypatch.setattr(CheckpointFile, "save", save_and_note)
    with pytest.raises(Interruption):
        tune(TASK, tuning, TINY, checkpoint=checkpoint)
    assert all_of(tune(TASK, tuning, TINY, checkpoint=checkpoint)) == whole
    assert saved[:2] == [2, 4]


def test_what_became_of_a_start_is_given_when_it_is_safe_and_again_after_a_resume(tmp_path):
    checkpoint, given = tmp_path / "tuning.pt", []

    def keep(index, tuned):
        assert checkpoint.exists()
        given.append((index, tuned.scores.tolist()))
        if len(given) == 1:
            raise Interruption

    with pytest.raises(Interruption):
        tune(TASK, quick("cutdiff"), TINY, checkpoint=checkpoint, keep=keep)
    result = tune(TASK, quick("cutdiff"), TINY, checkpoint=checkpoint, keep=keep)
    first, *rest = [(index, tuned.scores.tolist()) for index, tuned in enumerate(result.starts)]
    assert given == [first, first, *rest]


def test_dropout_draws_the_same_after_a_resume(tmp_path):
    training = replace(TINY, encoder="mobilenet_v2", batch_size=2, steps=6)
    tuning = quick("cutdiff", starts=(0.5,), checkpoint_every=1)
    task = random_task(4, 4, size=32)
    whole = tune(task, tuning, training).kept
    checkpoint = tmp_path / "tuning.pt"
    with pytest.raises(Interruption):
        tune(task, tuning, training, recorder=Interrupter(2), checkpoint=checkpoint)
    resumed = tune(task, tuning, training, checkpoint=checkpoint).kept
    assert resumed.trajectory == whole.trajectory and torch.equal(resumed.scores, whole.scores)


def test_a_finished_tuning_is_read_from_its_checkpoint_without_training(tmp_path, listener):
    checkpoint = tmp_path / "tuning.pt"
    first = tune(TASK, quick("cutdiff"), TINY, checkpoint=checkpoint)
    again = tune(TASK, quick("cutdiff"), TINY, recorder=listener, checkpoint=checkpoint)
    assert all_of(again) == all_of(first) and listener.heard == []
    # Another way to choose needs no training either.
    other = tune(TASK, quick("cutdiff", choose_by="std"), TINY, checkpoint=checkpoint)
    assert all_of(other)[:2] == all_of(first)[:2] and other.choose_by == "std"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"task": random_task(seed=1)}, "task"),
        ({"tuning": quick("cutout")}, "augmentation"),
        ({"tuning": quick("cutdiff", learning_rate=0.1)}, "tuning.learning_rate"),
        ({"tuning": quick("cutdiff", loss=base)}, "tuning.loss"),
        ({"tuning": quick("cutdiff", starts=(0.4, 0.8))}, "tuning.starts"),
        ({"training": replace(TINY, seed=1)}, "training.seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_tuning_is_rejected_and_kept(tmp_path, changed, named):
    checkpoint = tmp_path / "tuning.pt"
    tune(TASK, quick("cutdiff"), TINY, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    given = {"task": TASK, "tuning": quick("cutdiff"), "training": TINY} | changed
    with pytest.raises(ValueError, match=rf"another tuning \(differs in {named}\)"):
        tune(**given, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "cut"])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    checkpoint = tmp_path / "tuning.pt"
    if content is None:
        tune(TASK, quick("cutdiff", starts=(0.5,)), TINY, checkpoint=checkpoint)
        content = checkpoint.read_bytes()[:2000]
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: .*tuning\.pt is no checkpoint of a tuning"):
        tune(TASK, quick("cutdiff"), TINY, checkpoint=checkpoint)
