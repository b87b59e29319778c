"""The `evaluate` metric `flare_skill`: skill of probabilistic flare forecasts."""

import datasets
import evaluate

from .skill_scores import as_forecasts, flare_scores

_DESCRIPTION = """
Skill of probabilistic flare forecasts: TSS, HSS, POD, FAR, CSI, ACC, Brier skill against named climatology, ROC area
and reliability at every class boundary (C+, M+, X+), and the Gandin-Murphy-Gerrity score of ordered classes. A score
whose denominator is zero is NaN, and counted.
"""

_CITATION = """
@article{gerrity1992,
  author = {Gerrity, Joseph P.},
  title = {A Note on Gandin and Murphy's Equitable Skill Score},
  journal = {Monthly Weather Review},
  volume = {120}, pages = {2709--2712}, year = {1992}
}
@article{bloomfield2012,
  author = {Bloomfield, D. Shaun and Higgins, Paul A. and McAteer, R. T. James and Gallagher, Peter T.},
  title = {Toward Reliable Benchmarking of Solar Flare Forecasting Methods},
  journal = {The Astrophysical Journal Letters},
  volume = {747}, pages = {L41}, year = {2012}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N,) probabilities of a yes/no event, or (N, K) probabilities of ordered classes.
    references: (N,) 0/1, or classes 0..K-1 (0AB, C, M, X for K = 4). Drop unknown windows (-1) first.
    threshold: probability from which a warning is issued (default 0.5): a number, or for classes one a boundary.
    climatology: frequencies of the training part, for `bss_training` and `rpss_training`: a number, or K of them.
    decision: "argmax" or "threshold", how a class is chosen for `gmgs`.
    headline: boundary whose scores stand at the top of the result (default "M+").
    num_bins: bins of the reliability table (default 10).

Returns:
    A dict with tss, hss, pod, pofd, far, csi, acc, bias, brier, bss, bss_sample, auc, the table tp, fp, fn, tn,
    base_rate, reliability, undefined and undefined_scores; with classes also one such dict under each of "C+", "M+",
    "X+", and gmgs, class_acc, rps, rpss_sample, class_table.

Examples:
    A yes/no event. Two of three flares were warned of, with one false alarm in five quiet windows:

    >>> import evaluate
    >>> from importlib.resources import files
    >>> flare_skill = evaluate.load(str(files("solarchip_hf.evaluation") / "flare_skill"))
    >>> scores = flare_skill.compute(
    ...     predictions=[0.9, 0.6, 0.2, 0.7, 0.1, 0.1, 0.0, 0.3], references=[1, 1, 1, 0, 0, 0, 0, 0]
    ... )
    >>> round(scores["pod"], 3), round(scores["far"], 3), round(scores["tss"], 3), round(scores["csi"], 3)
    (0.667, 0.333, 0.467, 0.5)
    >>> scores["tp"], scores["fp"], scores["fn"], scores["tn"], scores["bss_reference"]
    (2, 1, 1, 4, 'sample')

    Ordered classes 0AB, C, M, X. No X flare occurred, so that POD, TSS, AUC and BSS of X+ and GMGS are undefined:

    >>> scores = flare_skill.compute(
    ...     predictions=[[0.7, 0.2, 0.1, 0.0], [0.2, 0.5, 0.3, 0.0], [0.1, 0.3, 0.5, 0.1], [0.1, 0.4, 0.4, 0.1]],
    ...     references=[0, 1, 2, 1],
    ... )
    >>> round(scores["M+"]["tss"], 3), round(scores["C+"]["acc"], 3), scores["class_table"][2]
    (0.667, 1.0, [0, 0, 1, 0])
    >>> scores["X+"]["pod"], scores["gmgs"], "X+ pod" in scores["undefined_scores"]
    (nan, nan, True)
"""


class FlareSkill(evaluate.Metric):
    """Skill of probabilistic flare forecasts; see `flare_scores` for the arithmetic."""

    def _info(self) -> evaluate.MetricInfo:
        labels = datasets.Value("int64")
        probability = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Sequence(probability), "references": labels}),
                datasets.Features({"predictions": probability, "references": labels}),
            ],
            reference_urls=["https://doi.org/10.1088/2041-8205/747/2/L41"],
        )

    def add_batch(self, *, predictions=None, references=None, **other):
        """Adds forecasts and what happened, as lists, arrays, tensors or pandas columns of any index.

        They are checked here: the base class would cut a reference of 0.5 down to 0, looks a column's first row up by
        the label 0, and takes the next forecasts for the kind of those that it refused.
        """
        if predictions is not None and references is not None:
            predictions, references = as_forecasts(predictions, references)
        super().add_batch(predictions=predictions, references=references, **other)

    def _compute(self, predictions, references, **options):
        return flare_scores(predictions, references, **options)
