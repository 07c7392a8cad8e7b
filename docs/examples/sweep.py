"""A platform team runs a sweep on Ray and hands over what it chose.

    python docs/examples/sweep.py [auto]       a minute on a machine of its own; "auto" joins a cluster

The trials run as Ray trials with ASHA; this process alone writes to the study and to MLflow.
"""

import sys
from pathlib import Path

import ssad_hpo

cluster = ssad_hpo.Cluster(
    address=sys.argv[1] if len(sys.argv) > 1 else None, cpus_per_trial=1, max_concurrent=2
)
search = ssad_hpo.Search("cutavg", n_trials=6, pruner="asha", reduction_factor=2)
training = ssad_hpo.Training(steps=60, batch_size=16, evaluate_at=(0.5, 1.0))
images = ssad_hpo.Source("controlled", {"image_size": 32, "n_held_out": 40})

result = ssad_hpo.run_study(
    images, search, training, cluster=cluster, tracking_uri=f"sqlite:///{Path('mlflow.db').absolute()}"
)
states = [trial.state.name for trial in result.study.trials]
print(f"{states.count('COMPLETE')} trials ran to their end, {states.count('PRUNED')} were stopped early")
evaluation = result.evaluation
print(f"selected {result.selected.augmentation}")
print(f"AUC selected {evaluation.auc_selected:.3f}, random {evaluation.auc_random:.3f}")
print("report:", ssad_hpo.report_run(result.run.folder))
detector = ssad_hpo.load_detector(result.run.folder)
print(
    "a detector of",
    sum(p.numel() for p in detector.network.parameters()),
    "weights, for images of",
    detector.image_shape,
)
