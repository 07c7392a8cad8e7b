"""The report's tables, as HTML: figures that judge the choice, candidates, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from ssad_hpo.report.findings import Findings, Trial
from ssad_hpo.report.style import name_of
from ssad_hpo.task import Range

_FIGURES = {
    "auc_selected": "AUC selected",
    "auc_oracle": "AUC oracle",
    "auc_random": "AUC random",
    "auc_worst": "AUC worst",
    "auc_combined": "AUC combined",
    "regret": "regret",
    "spearman": "Spearman",
}
_MANY = 25  # rows beyond which the table scrolls in a box of its own
_ORDER = ("complete", "pruned", "failed", "interrupted")


def figures_list(findings: Findings) -> str:
    """The figures that compare the choice with the truth, or that there is none."""
    if not findings.figures:
        return (
            "<p class='remark'>There is no ground truth for these images, so this report cannot say how good "
            "the choice is. Look at the images scored highest.</p>"
        )
    complete = sum(trial.auc is not None for trial in findings.trials)
    word = "trials" if findings.course is None else "starts"
    count = "the only candidate" if complete == 1 else f"the {complete} complete {word}"
    headings = _FIGURES | ({"auc_combined": "AUC as it comes"} if findings.as_it_comes else {})
    items = "".join(
        f"<div><dt>{heading}</dt><dd>{findings.figures[name]:.3f}</dd></div>"
        for name, heading in headings.items()
        if name in findings.figures
    )
    return (
        f"<dl class='figures'>{items}</dl><p class='remark'>Ground truth was read after the choice. The "
        f"oracle is the best AUC among {count}, random their mean, regret oracle minus selected; "
        f"Spearman is the rank correlation of −{name_of(findings.criterion)} with the AUC, 1 is best.</p>"
    )


def decisions_list(findings: Findings) -> str:
    """What is decided of the unlabelled images; nothing where no images are held out to decide by."""
    decisions = findings.decisions
    if decisions is None:
        return ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in decisions.figures.items()
    )
    told = "".join(f"<p class='remark'>{escape(t[0].upper() + t[1:])}.</p>" for t in decisions.account)
    drift = "<p class='warning'>Drift: p-values may not hold.</p>" if decisions.drifted else ""
    return f"<h2>Decisions on the unlabeled images</h2><dl class='figures'>{items}</dl>{drift}{told}"


def confirmed_table(findings: Findings) -> str:
    """The best trials with other seeds; nothing where that was not asked for."""
    confirmed = findings.confirmed
    if confirmed is None:
        return ""
    headings = ["trial", *(f"seed {seed}" for seed in confirmed.seeds), "mean", "spread"]
    head = "".join(f"<th scope='col'>{heading}</th>" for heading in headings)
    rows = "".join(
        f"<tr{_marked(findings, number)}><td>{number}</td>"
        + "".join(f"<td>{f'{value:.4f}' if math.isfinite(value) else 'failed'}</td>" for value in values)
        + "</tr>"
        for number, values in confirmed.values.items()
    )
    return (
        f"<div class='scroll few' tabindex='0'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p class='remark'>{escape(name_of(findings.criterion))} of the "
        "trials that were trained again, lower is better; the lowest mean is chosen. The spread is a "
        "standard deviation over seeds.</p>"
    )


def candidates_table(findings: Findings) -> str:
    """Every trial, the best candidate first, then those that do not compete, with the reason."""
    names = list(dict.fromkeys(n for values in findings.space.kinds.values() for n in values))
    judged = bool(findings.figures)
    headings = ["trial", "f_aug", "status", *map(name_of, names), name_of(findings.criterion)]
    headings += ["AUC", "reason"] if judged else ["reason"]
    head = "".join(f"<th scope='col'>{escape(heading)}</th>" for heading in headings)
    ranked = sorted(
        findings.trials,
        key=lambda t: (_ORDER.index(t.status), t.value if t.value is not None else 0.0, t.number),
    )
    rows = "".join(_row(findings, trial, names, judged) for trial in ranked)
    counts = ", ".join(
        f"{count} {status}"
        for status in _ORDER
        if (count := sum(trial.status == status for trial in findings.trials))
    )
    scrolls = " many" if len(ranked) > _MANY else ""
    return (
        f"<p>{len(ranked)} trials: {counts}. Only complete ones compete; lower is better.</p>"
        f"<div class='scroll{scrolls}' tabindex='0'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(findings: Findings, trial: Trial, names: list[str], judged: bool) -> str:
    given = {} if trial.augmentation is None else trial.augmentation.hyperparameters
    kind = "" if trial.augmentation is None else name_of(trial.augmentation.kind)
    numbers = [given.get(name) for name in names]
    cells = ["" if value is None or isinstance(value, Range) else f"{value:.4g}" for value in numbers]
    cells.append("" if trial.value is None else f"{trial.value:.4f}")
    if judged:
        cells.append("" if trial.auc is None else f"{trial.auc:.3f}")
    return (
        f"<tr{_marked(findings, trial.number)}><td>{trial.number}</td><td class='word'>{kind}</td>"
        f"<td class='word'>{_status(findings, trial)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f"<td class='reason'>{escape(trial.reason or '')}</td></tr>"
    )


def _marked(findings: Findings, number: int) -> str:
    return " class='selected'" if number == findings.selected else ""


def _status(findings: Findings, trial: Trial) -> str:
    """The status, or what marks a candidate in the pictures too."""
    marks = ["★ selected"] if trial.number == findings.selected else []
    if findings.oracle is not None and trial.number == findings.oracle.number:
        marks.append("□ best AUC")
    return ", ".join(marks) or trial.status


def settings_list(settings: Mapping[str, str]) -> str:
    """Names and values."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in settings.items()
    )
    return f"<dl class='settings'>{items}</dl>"
