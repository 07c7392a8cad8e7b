"""What a training computes with: memory layouts that are right everywhere, draws and threads of its own."""

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import optuna
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from tunings import TASK, TINY, all_of, quick

from ssad_hpo.baselines import train_autoencoder, train_deep_svdd
from ssad_hpo.bilevel import tune
from ssad_hpo.bounds import MOST_SEED
from ssad_hpo.detector import resolve_precision, train, untrained_network
from ssad_hpo.encoder import build_network
from ssad_hpo.numerics import seed_at, seeded, threads
from ssad_hpo.search import Objective, open_kept, records
from ssad_hpo.task import Augmentation, Search, Training

# Tiny tunings end anywhere.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::ssad_hpo.bilevel.CollapseWarning"),
]

CUTOUT = Augmentation("cutout")
SHORT = Training(width=4, steps=4, batch_size=4, evaluate_at=(0.5, 1.0), precision="float32")


def some_images(n=10, channels=1, size=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (n, channels, size, size), generator=generator).to(torch.uint8)


def trained_network(training, images):
    for checkpoint in train(images, CUTOUT, training):
        network = checkpoint.detector.network
    return network


# Memory layouts

# Everything that trains small encoders, at all widths up to 8; last with images so large that oneDNN with
# AVX-512 crashes where channels come last. Compared is with oneDNN switched off.
NARROW_TRAININGS = """
import sys
import torch
from tunings import TASK, TINY, quick
from dataclasses import replace
from ssad_hpo.baselines import train_autoencoder, train_deep_svdd
from ssad_hpo.bilevel import tune
from ssad_hpo.detector import train
from ssad_hpo.task import Augmentation, Training

torch.set_num_threads(1)

def images(size):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (24, 1, size, size), generator=generator).to(torch.uint8)

def detector(training, size):
    *_, last = train(images(size), Augmentation("cutout"), training)
    return last.detector.network

def tuned(training, size):
    short = replace(TINY, width=training.width, learning_rate=1e-3)
    return tune(TASK, quick("cutout", starts=(0.5,)), short).detector.network

def weights(make, *how):
    return torch.cat([w.flatten() for w in make(*how).state_dict().values()])

trainers = {
    "detector": detector,
    "tuning": tuned,
    "autoencoder": lambda training, size: train_autoencoder(images(size), training).network,
    "Deep SVDD": lambda training, size: train_deep_svdd(images(size), training).network,
}
cases = [(width, 64, name) for width in range(1, 9) for name in trainers]
cases += [(8, 128, "detector")]
for width, size, name in cases:
    training = Training(
        width=width, steps=4, batch_size=8, evaluate_at=(1.0,), precision="float32", learning_rate=1e-3
    )
    found = weights(trainers[name], training, size)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = weights(trainers[name], training, size)
    if not torch.allclose(found, expected, atol=1e-2):
        off = float((found - expected).abs().max())
        sys.exit(f"{name} of width {width}, images of {size}: off by {off}")
print("all alike")
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_narrow_networks_train_as_without_onednn_on_every_kind_of_cpu(isa, request):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NARROW_TRAININGS],
        cwd=request.path.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "all alike\n"), ended.stderr


def narrow_convolutions(compute):
    """For what a computation hands to strided 1x1 convolutions of few channels: is its layout NCHW?"""
    seen = []

    def look(module, inputs):
        if not isinstance(module, nn.Conv2d) or module.in_channels >= 16:
            return
        if module.kernel_size == (1, 1) and module.stride != (1, 1):
            for tensor in (inputs[0], module.weight):
                seen.append(tensor.is_contiguous())

    hook = register_module_forward_pre_hook(look)
    try:
        compute()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("width", range(1, 16))
@pytest.mark.parametrize(
    "compute",
    [
        lambda training, images: trained_network(training, images),
        lambda training, images: train_autoencoder(images, training).score(images),
        lambda training, images: train_deep_svdd(images, training).score(images),
        lambda training, images: build_network(
            "small", channels=images.shape[1], image_size=(32, 32), width=training.width
        )(images / 255),
    ],
    ids=["detector", "autoencoder", "Deep SVDD", "a bare network"],
)
def test_no_strided_1x1_convolution_of_few_channels_sees_channels_last(compute, width):
    # The layout that oneDNN cannot do there on any CPU.
    for channels in (1, 3):
        training = Training(width=width, steps=1, batch_size=4, evaluate_at=(1.0,))
        seen = narrow_convolutions(lambda c=channels, t=training: compute(t, some_images(channels=c)))
        assert seen and all(seen)


@pytest.mark.parametrize(("encoder", "width"), [("small", 16), ("small", 24), ("resnet18", 1)])
def test_networks_without_such_convolutions_keep_the_fast_layout(encoder, width):
    network = build_network(encoder, channels=3, image_size=(64, 64), width=width)
    assert network.memory_format == torch.channels_last
    wide = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)


@pytest.mark.parametrize(
    ("isa", "expected"),
    [("AVX2", "float32"), ("avx512_core", "float32"), ("AVX512_CORE_BF16", "bfloat16"), (None, "bfloat16")],
)
def test_auto_is_what_onednn_may_do(isa, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    if isa is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert resolve_precision(Training(), torch.device("cpu"), 64 * 64) == expected


# Draws


def bits(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


RESULTS = {
    "initial weights": lambda: untrained_network(SHORT, (1, 32, 32)).state_dict().values(),
    "detector": lambda: trained_network(SHORT, some_images()).state_dict().values(),
    "detector with dropout": lambda: (
        trained_network(replace(SHORT, encoder="mobilenet_v3_small", batch_size=2), some_images())
        .state_dict()
        .values()
    ),
    "autoencoder": lambda: train_autoencoder(some_images(), SHORT).network.state_dict().values(),
    "Deep SVDD": lambda: train_deep_svdd(some_images(), SHORT).network.state_dict().values(),
}


@contextmanager
def another_thread(repeats):
    """That calls a function again and again; threads take turns more often than they usually do."""
    over, interval = threading.Event(), sys.getswitchinterval()

    def repeat():
        while not over.wait(0.0005):
            repeats()

    thread = threading.Thread(target=repeat)
    thread.start()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join()


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_results_in_threads_are_those_of_a_lone_training_to_the_bit(make, request):
    alone = bits(make())
    with another_thread(lambda: torch.manual_seed(7)), ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(make) for _ in range(30 if "weights" in request.node.callspec.id else 4)]
        assert all(torch.equal(bits(future.result()), alone) for future in futures)


def test_tunings_in_threads_are_those_of_a_lone_one_to_the_bit():
    alone = all_of(tune(TASK, quick("cutout"), TINY))
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(tune, TASK, quick("cutout"), TINY) for _ in range(3)]
        assert all(all_of(future.result()) == alone for future in futures)


def test_a_study_with_two_jobs_judges_each_candidate_as_a_lone_trial_does(tmp_path):
    search = Search("rotation")
    found = []
    for jobs in (1, 2):
        study = optuna.create_study(pruner=optuna.pruners.NopPruner())
        for k in range(8):
            study.enqueue_trial({"augmentation": "rotation", "rotation.angle": 20.0 + 40 * (k % 4)})
        objective = Objective(TASK, search, SHORT, artifacts=tmp_path / str(jobs))
        study.optimize(objective, n_trials=8, n_jobs=jobs)
        kept = {}
        for trial, record in zip(study.trials, records(study), strict=True):
            scores = open_kept(record.address).scores.tolist()
            kept.setdefault(trial.params["rotation.angle"], []).append((record.criteria, scores))
        assert len(kept) == 4 and all(first == second for first, second in kept.values())
        found.append(kept)
    assert found[0] == found[1]


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_training_neither_reads_nor_changes_what_others_draw_meanwhile(make):
    drawn, generator = [torch.empty(0)], torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with another_thread(lambda: drawn.append(torch.rand(1))):
            make()
    count = sum(map(len, drawn))
    assert torch.equal(
        torch.cat(drawn), torch.cat([torch.rand(1, generator=generator) for _ in range(count)])
    )


def every_draw():
    """Initial weights and dropout of every kind, forwards and backwards."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(16, 8), nn.Dropout()
    )
    nn.init.trunc_normal_(layers[0].weight)
    layers[3].bias = nn.Parameter(torch.randn(8) * torch.rand(8) + torch.randint(9, (8,)) + torch.randperm(8))
    images = torch.ones(5, 3, 4, 4)
    layers(torch.rand_like(images) + torch.randint_like(images, 2, 7)).sum().backward()
    return bits(itertools.chain(layers.parameters(), (p.grad for p in layers.parameters())))


def test_draws_of_a_seed_are_those_that_a_global_generator_of_this_seed_would_give():
    with seeded(5):
        found = every_draw()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(found, every_draw())


@pytest.mark.parametrize("seed", [0, 1, 17, MOST_SEED - 1])
def test_a_seed_draws_at_no_step_what_its_neighbour_draws_at_another(seed):
    most_steps = 10_000_000
    assert seed_at(seed, most_steps) == (seed_at(seed, 0) + most_steps) % 2**63
    apart = (seed_at(seed + 1, 0) - seed_at(seed, 0)) % 2**63
    assert most_steps < apart < 2**63 - most_steps and 0 <= seed_at(seed, 0) <= MOST_SEED


def test_the_dropout_of_gpus_is_drawn_from_the_seed_as_well():
    images = torch.ones(200, 50, requires_grad=True)
    with seeded(5):
        output, mask = torch.native_dropout(images, 0.2, True)
        other, _ = torch.native_dropout(images, 0.2, True)
        output.sum().backward()
    with seeded(5):
        again, _ = torch.native_dropout(images, 0.2, True)
        everything, _ = torch.native_dropout(images, 0.2, False)
        nothing, _ = torch.native_dropout(images, 1.0, True)
    assert torch.equal(output, again) and not torch.equal(output, other)
    assert mask.dtype == torch.bool and 0.78 < mask.double().mean() < 0.82
    assert torch.equal(output, mask / 0.8) and torch.equal(images.grad, mask / 0.8)
    assert torch.equal(everything, images) and not nothing.any()


def test_a_draw_that_no_seed_could_fix_is_an_error_and_not_a_result_that_differs_each_time():
    with (
        seeded(0),
        pytest.raises(RuntimeError, match=r"^aten.randint_like.Tensor: draws from torch's global generator"),
    ):
        torch.randint_like(torch.ones(3), torch.tensor(5))


# Threads


def test_threads_are_so_many_inside_and_as_many_as_before_outside():
    with threads(3):
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError), threads(2):
            assert torch.get_num_threads() == 2
            raise KeyError
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 1


def test_the_default_is_one_thread_on_every_machine():
    with threads(2), threads():
        assert torch.get_num_threads() == 1


def test_studies_in_several_threads_leave_the_process_as_it_was():
    both_inside, first_left = threading.Barrier(2), threading.Event()

    def study(count, first):
        with threads(count):
            both_inside.wait(20)
            inside = torch.get_num_threads()
            if not first:
                first_left.wait(20)
                assert torch.get_num_threads() == count
        after = torch.get_num_threads()
        first_left.set()
        return inside, after

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(study, count, count == 2) for count in (2, 3)]
        assert [future.result() for future in futures] == [(2, 1), (3, 1)]
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_thread_is_an_error(count):
    with pytest.raises(ValueError, match=rf"^threads: expected at least 1, got {count}$"), threads(count):
        pass
