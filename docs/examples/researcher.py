"""A researcher compares label-free selectors on a task whose labels are known.

    python docs/examples/researcher.py [TRIALS STEPS]     a minute or two with 8 and 120

Trains candidates of two kinds once and lets every selector choose among them without labels; only then are
these read.
"""

import sys

import numpy as np
import optuna
from sklearn.metrics import roc_auc_score

import ssad_hpo

TRIALS, STEPS = (int(word) for word in (*sys.argv[1:], "8", "120")[:2])

data = ssad_hpo.controlled_data(
    "gravel", ssad_hpo.Augmentation("cutdiff", {"patch_area": 0.05, "patch_aspect": 1.0}), n_held_out=64
)
optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.NopPruner())
search = ssad_hpo.Search(["cutdiff", "cutavg"], keep=TRIALS)
objective = ssad_hpo.Objective(data.task, search, ssad_hpo.Training(steps=STEPS))
study.optimize(objective, n_trials=TRIALS)

candidates = ssad_hpo.candidates(study)
scores = np.stack([candidate.scores() for candidate in candidates], axis=1)
choices = {name: min(candidates, key=lambda c, name=name: c.criteria[name]) for name in ssad_hpo.CRITERIA}
for name, merits in (("mc", ssad_hpo.mc), ("sel", ssad_hpo.sel), ("hits", ssad_hpo.hits)):
    choices[name] = candidates[int(np.argmax(merits(scores)))]

# From here on labels: everything was chosen.
aucs = {c.number: roc_auc_score(data.labels, c.scores()) for c in candidates}
oracle = max(aucs.values())
print(f"{len(aucs)} candidates: average {np.mean(list(aucs.values())):.3f}, oracle {oracle:.3f}")
for name, choice in sorted(choices.items(), key=lambda item: -aucs[item[1].number]):
    found = aucs[choice.number]
    print(f"{name:22} AUC {found:.3f}  regret {oracle - found:.3f}  {choice.augmentation}")
