"""Options of the command line, in groups that commands share.

A new option is one line here: its flag, its type and what it is for. Options of a group that stands for a
dataclass have the names and the defaults of its fields, and reach it by `taken`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import get_current_context
from click.core import ParameterSource

from ssad_hpo.address import hides_password, without_password
from ssad_hpo.bounds import MOST_ARRAY_BYTES, MOST_IMAGE_PIXELS
from ssad_hpo.cli.display import warn
from ssad_hpo.cli.groups import Fractions, Group, Starts, option

if TYPE_CHECKING:
    from ssad_hpo.bilevel import Tuning
    from ssad_hpo.task import Cluster, Search, Training


def _search() -> Search:
    from ssad_hpo.task import Search

    return Search()


def _sweep() -> Search:
    return replace(_search(), pruner="asha")


def training_of_demo(hard: bool, seed: int) -> Training:
    """Short trainings, which are enough for the clear task; the hard one takes the usual ones."""
    from ssad_hpo.task import Training

    return Training(seed=seed) if hard else Training(steps=160, batch_size=16, seed=seed)


def search_of_demo() -> Search:
    """As many of the short ones as two cores train in four minutes, without bfloat16 instructions too."""
    return replace(_search(), n_trials=12)


def _search_of_held_out() -> Search:
    from ssad_hpo.task import COMBINED

    return COMBINED


def _cluster() -> Cluster:
    from ssad_hpo.task import Cluster

    return Cluster()


def _training() -> Training:
    from ssad_hpo.task import Training

    return Training()


def _training_of_folders() -> Training:
    from ssad_hpo.task import PRETRAINED

    return PRETRAINED


def _tuning() -> Tuning:
    from ssad_hpo.bilevel import Tuning

    return Tuning()


def _tuning_of_folders() -> Tuning:
    from ssad_hpo.bilevel import PATCHES

    return PATCHES


def _tuning_of_held_out() -> Tuning:
    from ssad_hpo.bilevel import PATCHES_HELD_OUT

    return PATCHES_HELD_OUT


def _tuned_training() -> Training:
    from ssad_hpo.bilevel import DEFAULT_TRAINING

    return DEFAULT_TRAINING


SKIP_UNREADABLE = option(
    "--skip-unreadable", is_flag=True, help="Leave out files that cannot be read, and say which."
)
BIT_DEPTH = option(
    "--bit-depth", type=int,
    help="Bits of a grey value in files of 16 bits, such as 12; by default those of the run.",
)  # fmt: skip
MAX_PIXELS = option(
    "--max-pixels", type=int, default=MOST_IMAGE_PIXELS,
    help="Pixels of an image file, at most; while it is read, it takes up to 8 bytes of memory for each.",
)  # fmt: skip
MAX_BYTES = option(
    "--max-bytes", type=int, default=MOST_ARRAY_BYTES, help="Bytes of the arrays in a file, at most."
)
TRUST = option(
    "--trust-addresses", is_flag=True,
    help="Let a run from elsewhere send passwords and images to the servers that it names.",
)  # fmt: skip
DEVICE = option("--device", help="Where to compute: cpu, or cuda for a GPU; by default the processor.")
THREADS = option("--threads", type=int, help="Processor threads of a training; chosen by default.")
SEED = option("--seed", type=int, help="Fixes everything that is drawn.")

IMAGES = Group(
    "Images",
    option("--category", help="The category to take from a folder that has several."),
    option("--anomaly", help="Take test/good and test/ANOMALY only, a pair as in published benchmarks."),
    option("--train", type=Path, help="A folder of normal images; goes with --unlabeled."),
    option("--unlabeled", type=Path, help="A folder with the unlabelled mixture of normal and anomalous."),
    option("--held-out", help="A folder of more normal images, which no detector is trained on."),
    option(
        "--held-out-share",
        type=float,
        help="Or the share of train to set aside for that; by default a quarter of 200 images or more.",
    ),
    option("--image-size", type=int, default=256, help="Shorter side of images of folders, pixels."),
    option(
        "--keep-ratio/--squeeze",
        "keep_ratio",
        default=True,
        help="Whether tall or wide images stay so, or become squares.",
    ),
    option("--bit-depth", type=int, default=16, help="Bits of a grey value in files of 16 bits, such as 12."),
    MAX_PIXELS,
    SKIP_UNREADABLE,
)

_RANGES = option(
    "--range", "ranges", multiple=True,
    help="Search or fix a hyperparameter: cutavg.patch_area=0.01:0.1 or cutavg.patch_aspect=1; repeatable. "
    "By default the range of its kind.",
)  # fmt: skip

SPACE = Group(
    "Search space",
    option("--augmentation", "-a", "kinds", multiple=True,
           help="A kind of augmentation to search: cutout, cutavg, cutdiff, cutpaste, rotation; repeatable. "
                "By default cutavg; where good images of folders are held out, all patches."),
    _RANGES,
)  # fmt: skip

TUNED_SPACE = Group(
    "Search space",
    option("--augmentation", "-a", "kinds", multiple=True,
           help="A kind to tune: cutout, cutavg, cutdiff, cutpaste, rotation; repeatable. By default, for "
                "folders, all patches."),
    _RANGES,
)  # fmt: skip

# Those of `ssad_hpo.CRITERIA`, in words here, since libraries load slowly; a test compares.
CRITERIA_TOLD = (
    "dsv, dsv_unclamped, discordance, base, mmd, std, smooth_alignment, soft_alignment; with held-out images "
    "shift, pu_auc, excess"
)
_COMBINED = (
    option("--combine", type=int, help="How many of the best candidates score together in the end."),
    option(
        "--contrast-heads/--no-contrast-heads",
        "contrast_heads",
        help="Whether these also look for what tells the unlabelled images from held-out ones.",
    ),
)
_SEARCHED = (
    option("--criterion", help=f"What chooses without labels, the lowest: {CRITERIA_TOLD}."),
    option(
        "--trials",
        "-n",
        "n_trials",
        type=int,
        help="How many candidates to train, with --resume in all; 0 for a pretrained encoder as it comes.",
    ),
    option("--sampler", help="What proposes candidates: tpe, random, grid, or gp for one kind alone."),
    option("--grid-points", type=int, help="Values per hyperparameter that the sampler grid tries."),
    option("--pruner", help="What stops poor trials early: none, asha or median."),
    option("--reduction-factor", type=int, help="With asha, the best of every so many trials goes on."),
    SEED,
    option("--keep", type=int, help="How many of the best detectors to keep."),
    *_COMBINED,
    option(
        "--confirm",
        type=int,
        help="Train so many of the best again with two other seeds each, and choose by the mean.",
    ),
)
SEARCH = Group("Search", *_SEARCHED, defaults=_search, held_out=_search_of_held_out)
SWEEP = Group("Search", *_SEARCHED, defaults=_sweep, held_out=_search_of_held_out)

_TRAINED = (
    option(
        "--encoder", help="The network: small, a torchvision classifier such as resnet18, or one of timm's."
    ),
    option("--weights", help="What the encoder begins with: none, pretrained, or a file."),
    option("--frozen-stages", type=int, help="First stages of the encoder that stay as they are."),
    option(
        "--encoder-batch-norm",
        help="Batch norms of the encoder while it trains: train, or eval to hold them.",
    ),
    option("--width", type=int, help="Channels of the small encoder's first stage."),
    option("--steps", type=int, help="Training steps of each detector."),
    option("--batch-size", type=int, help="Normal images in a step; as many augmented ones join them."),
    option("--learning-rate", type=float, help="Learning rate of SGD, which trains the detector."),
    option(
        "--encoder-learning-rate",
        type=float,
        help="That of the encoder; by default the same, a tenth of it for a pretrained one.",
    ),
    option(
        "--score",
        help="How images are scored: density (as a whole), patches (by what is most anomalous in them), or "
        "classifier.",
    ),
    option(
        "--contamination",
        type=float,
        help="The share of anomalies that you believe in, if you do: how many augmented images criteria see.",
    ),
)
TRAINING = Group(
    "Training",
    *_TRAINED,
    option("--evaluate-at", type=Fractions(),
           help="Shares of the steps at which trials are judged, and may be stopped."),
    option("--precision", help="Arithmetic of the training: auto, float32 or bfloat16."),
    defaults=_training,
    of_folders=_training_of_folders,
)  # fmt: skip
TUNED_TRAINING = Group("Training", *_TRAINED, SEED, defaults=_tuned_training, of_folders=_training_of_folders)

CLUSTER = Group(
    "Cluster",
    option("--address", help="The Ray cluster to use: auto or HOST:PORT. By default one on this machine."),
    option("--checkpoint-path",
           help="A folder or URI that all nodes reach, for checkpoints. By default in the run folder."),
    option("--cpus-per-trial", type=float, help="Processors of a trial, which gets as many threads."),
    option("--gpus-per-trial", type=float,
           help="Share of a GPU; 0.25 lets four trials share one. Above 0 trains there."),
    option("--max-concurrent", type=int, help="Trials at once; by default as many as fit."),
    defaults=_cluster,
)  # fmt: skip

TUNING = Group(
    "Tuning",
    option("--loss", help="What goes down: two_sided_alignment, soft_alignment, smooth_alignment, mmd or "
                          "mmd_normalised; with held-out images contrast_alignment, whitened_contrast, "
                          "pu_auc or density_pu_auc."),
    option("--order", type=int,
           help="Order of the gradient; 2 goes through the virtual step as well, with --steps-before 0."),
    option("--starts", type=Starts(), multiple=True,
           help="Where tuning starts: shares of the first hyperparameter's range as 0.4,0.9, or values as "
                "patch_area=0.02,patch_aspect=1; repeatable."),
    option("--survivors", type=int, help="How many starts train to the end, after a look at all."),
    option("--look", type=float, help="Share of their steps for that look, with --steps-before 0."),
    option("--steps-before", type=int,
           help="Steps of the hyperparameters before the training, with a pretrained encoder as it comes; 0 "
                "moves them while it trains, with other defaults for folders (docs/tuning.md)."),
    option("--detector-steps", type=int,
           help="Training steps to each step of the hyperparameters, with --steps-before 0."),
    option("--warm-start", type=float,
           help="Share of the training steps before the hyperparameters move, with --steps-before 0."),
    option("--focus/--no-focus", "focus",
           help="Whether to look at those unlabelled images alone that stand out against held-out ones; not "
                "with losses of PU-AUC."),
    option("--choose-by", help=f"What keeps one start, the lowest: validation_loss, {CRITERIA_TOLD}."),
    *_COMBINED,
    defaults=_tuning,
    of_folders=_tuning_of_folders,
    held_out=_tuning_of_held_out,
)  # fmt: skip

_RUN = option(
    "--run", help="The run folder to make: a path, or a name below runs/; by default its task and time."
)
_TRACKED = (
    option("--tracking-uri", default="default",
           help="MLflow's address; 'default' is MLFLOW_TRACKING_URI or sqlite:///mlflow.db."),
    option("--experiment",
           help="MLflow's experiment; by default the one that its environment names, else ssad_hpo."),
    option("--no-tracking", is_flag=True, help="Write nothing to MLflow."),
)  # fmt: skip
_STORAGE = option(
    "--storage", envvar="SSAD_HPO_STORAGE", show_envvar=True,
    help="A database's URL for Optuna's study; by default a file in the run folder.",
)  # fmt: skip
RUN = Group("Run", DEVICE, THREADS, _RUN, _STORAGE, *_TRACKED)
SWEEP_RUN = Group("Run", _RUN, _STORAGE, *_TRACKED)
TUNING_RUN = Group("Run", DEVICE, THREADS, _RUN, *_TRACKED)
DEMO_RUN = Group("Run", THREADS, _RUN, *_TRACKED)


def tracked(given: dict[str, Any]) -> dict[str, Any]:
    """Options of a run as arguments of `run_study`."""
    context = get_current_context()
    for name, variable in (("storage", "SSAD_HPO_STORAGE"), ("tracking_uri", "MLFLOW_TRACKING_URI")):
        typed = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if typed and hides_password(without_password(given[name])):
            flag = name.replace("_", "-")
            of_cluster = " and of the cluster" if context.info_name == "sweep" else ""
            who = f"all users of this machine{of_cluster}"
            warn(f"--{flag}: {who} see its password; set {variable} instead")
    off = given.pop("no_tracking")
    return {**given, "tracking_uri": None if off else given["tracking_uri"]}
