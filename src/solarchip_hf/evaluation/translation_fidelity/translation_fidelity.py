"""The `evaluate` metric `translation_fidelity`: generated solar images against observed ones."""

import datasets
import evaluate

from .ensemble_scores import ensemble_scores
from .fidelity_scores import fidelity_scores
from .image_scores import image_scores
from .magnetogram_scores import magnetogram_scores

# `evaluate` copies the files that are imported above, and no others: all parts of the metric stand there.
PARTS = (image_scores, magnetogram_scores, ensemble_scores)

_DESCRIPTION = """
Fidelity of generated solar images in physical units: correlation and concordance within 0.95 R with the radial profile
removed (the headline) and over the frame, RMSE, MAE, NMSE, PSNR and SSIM with a stated data range, total flux, PPE10
and power of coarse and fine structure; for magnetograms unsigned flux, polarity agreement against Hale's law and gain
over the zero field; for ensembles CRPS, spread-skill correlation and coverage. Invalid pixels (NaN) are left out and
counted.
"""

_CITATION = """
@article{galvez2019,
  author = {Galvez, Richard and others},
  title = {A Machine-learning Data Set Prepared from the NASA Solar Dynamics Observatory Mission},
  journal = {The Astrophysical Journal Supplement Series},
  volume = {242}, pages = {7}, year = {2019}
}
@article{park2019,
  author = {Park, Eunsu and others},
  title = {Generation of Solar UV and EUV Images from SDO/HMI Magnetograms by Deep Learning},
  journal = {The Astrophysical Journal Letters},
  volume = {884}, pages = {L23}, year = {2019}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: (N, H, H) generated images in physical units on the canonical grid, north up, NaN where invalid; or
        (N, m, H, H), m samples an image: their mean is scored as the prediction, and their spread besides.
    references: (N, H, H) the observed images.
    modality: "hmi", or "aia171" and the like.
    data_range: for PSNR and SSIM, in the images' unit (default: a table in DN at nominal exposure; 500 G for "hmi").
    times: N times in UTC, for magnetograms: they tell the cycle's polarity; or give northern_leader, -1 or +1.
    b0: heliographic latitude of the disk's centre in degrees, one or N (default 0).
    radius: solar radius in pixels (default: 406.67 H / 1024).

Returns:
    A dict with the mean of every score, per_sample, undefined, count, data_range, valid_pixels and missing_pixels.

Examples:
    A disk with two bright regions. The prediction is too faint by a fifth, and has one region only:

    >>> import evaluate
    >>> import numpy as np
    >>> from importlib.resources import files
    >>> fidelity = evaluate.load(str(files("solarchip_hf.evaluation") / "translation_fidelity"))
    >>> truth = np.full((1, 64, 64), 100.0)
    >>> truth[0, 30:34, 20:24] = truth[0, 40:44, 40:44] = 500.0
    >>> guess = 0.8 * truth
    >>> guess[0, 40:44, 40:44] = 80.0
    >>> scores = fidelity.compute(predictions=guess, references=truth, modality="aia171")
    >>> round(scores["correlation_disk"], 2), round(scores["flux_error"], 2), scores["data_range"]
    (0.7, -0.21, 3132.0)

    A magnetogram of one region in the south of cycle 24, where leaders are positive. The zero field is no good, which
    SSIM does not say and the others do:

    >>> truth = np.zeros((1, 64, 64))
    >>> truth[0, 20:23, 30:33], truth[0, 20:23, 34:37] = -300.0, 300.0
    >>> scores = fidelity.compute(
    ...     predictions=np.zeros((1, 64, 64)), references=truth, modality="hmi", times=["2013-01-01"]
    ... )
    >>> scores["ssim"] > 0.9, scores["rmse_gain_over_zero"], scores["unsigned_flux_error"]
    (True, 0.0, -1.0)
    >>> scores["polarity_agreement"], scores["polarity_agreement_hale"], scores["undefined"]["correlation"]
    (0.5, 1.0, 1)
"""


class TranslationFidelity(evaluate.Metric):
    """Fidelity of generated solar images; see `fidelity_scores` for the arithmetic."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": image, "references": image}),
                datasets.Features({"predictions": datasets.Sequence(image), "references": image}),
            ],
            reference_urls=["https://doi.org/10.3847/1538-4365/ab1005", "https://doi.org/10.3847/2041-8213/ab46bb"],
        )
        info.format = "numpy"  # as an argument, it is refused beside a list of features
        return info

    def _compute(self, predictions, references, **options):
        samples = predictions if predictions.ndim == 4 else None
        means = predictions if samples is None else samples.mean(axis=1)
        return fidelity_scores(means, references, samples=samples, **options)
