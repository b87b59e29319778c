"""The collator stacks, and refuses what does not stack with a sentence."""

import numpy as np
import pytest
import torch

from solarchip_hf.training.collator import SolarChipDataCollator


def observation(modalities=2, size=8, **extra):
    return {"pixel_values": np.full((modalities, size, size), 0.5, dtype=np.float32), **extra}


def test_stacks_arrays_tensors_and_lists():
    batch = SolarChipDataCollator(["hmi", "aia171"])(
        [
            observation(observed=np.array([True, False])),
            {"pixel_values": torch.zeros(2, 8, 8, dtype=torch.float64), "observed": [True, True]},
            observation(),
        ]
    )
    assert batch["pixel_values"].shape == (3, 2, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["observed"].tolist() == [[True, False], [True, True], [True, True]]
    assert set(batch) == {"pixel_values", "observed"}


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ([], "at least one"),
        ([observation(), observation(size=4)], r"observation 1 of the batch: pixel_values: expected \(2, 8, 8\)"),
        ([observation(), observation(modalities=3)], "observation 1"),
        ([{"observed": [True]}], "expected `pixel_values`, got the keys"),
        ([{"pixel_values": np.zeros((8, 8))}], r"\(modalities, N, N\)"),
        ([observation(observed=[True])], r"observed: expected \(2,\), got \(1,\)"),
        ([observation(modalities=1)], "expected 2 modalities"),
    ],
)
def test_refuses_ragged_observations(observations, message):
    with pytest.raises(ValueError, match=message):
        SolarChipDataCollator(["hmi", "aia171"])(observations)
