"""The window of a forecast: read, saved with the configuration, refused in words."""

from datetime import timedelta

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_models import tiny_config

from solarchip_hf import SolarChipConfig
from solarchip_hf.models.forecast_window import read_window


def test_none_is_a_day_from_now_on():
    assert read_window(None) == (timedelta(hours=24), timedelta(0), "start")


def test_it_is_saved_with_the_configuration(tmp_path):
    window = {"horizon": "2D", "latency": "90min", "by": "peak"}
    tiny_config(forecast_window=window).save_pretrained(tmp_path)
    saved = SolarChipConfig.from_pretrained(tmp_path).forecast_window
    assert saved == window
    assert read_window(saved) == (timedelta(days=2), timedelta(minutes=90), "peak")


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ({"horizn": "24h"}, "expected a dict of horizon, latency, by"),
        ({"horizon": "0h"}, "horizon: expected a positive time"),
        ({"horizon": 24}, "horizon: expected a positive time"),
        ({"latency": "-1h"}, "latency: expected a time"),
        ({"by": "end"}, "expected 'start' or 'peak'"),
    ],
)
def test_nonsense_is_refused(window, said):
    with pytest.raises(ValueError, match=said):
        read_window(window)
    with pytest.raises(StrictDataclassError, match="forecast_window"):
        tiny_config(forecast_window=window)
