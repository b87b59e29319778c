"""What trackers are given: scalars and images, read back from TensorBoard's own files."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Blobs, arguments, tiny_model
from transformers import TrainerCallback

from solarchip_hf.training import SolarChipTrainer, SolarChipTrainingArguments
from solarchip_hf.training.trackers import EvaluationFigures


def trainer_in(folder, **options) -> SolarChipTrainer:
    args = arguments(folder, eval_strategy="steps", eval_steps=2, **options)
    held_out = Blobs(10, seed=1, missing=False)
    return SolarChipTrainer(tiny_model(), args, train_dataset=Blobs(40), eval_dataset=held_out)


def test_tensorboard_gets_terms_retrieval_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_in(tmp_path / "out", report_to="tensorboard")
    trainer.evaluate()  # before training, when transformers knows no folder yet
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    events = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir())), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/cls_loss", "train/patch_temperature", "train/grad_norm", "eval/patch_recall@1"} <= set(
        tags["scalars"]
    )
    assert set(tags["images"]) == {"eval/reconstruction", "eval/retrieval"}
    drawn = events.Images("eval/reconstruction")
    assert [image.step for image in drawn] == [0, 2, 4]
    pixels = [np.asarray(Image.open(BytesIO(image.encoded_image_string))) for image in drawn]
    assert pixels[0].shape[-1] == 3
    assert pixels[0].std() > 20
    assert not np.array_equal(pixels[0], pixels[-1])  # the network has moved


def test_tensorboard_is_the_default_and_nothing_is_drawn_without_a_tracker(tmp_path, monkeypatch):
    assert SolarChipTrainingArguments(output_dir=str(tmp_path), use_cpu=True).report_to == ["tensorboard"]
    assert SolarChipTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none").report_to == []
    trainer = trainer_in(tmp_path)
    monkeypatch.setattr(EvaluationFigures, "_figures", lambda self: pytest.fail("drawn for nobody"))
    trainer.evaluate()
    assert not (tmp_path / "runs").exists()


class StandIn(TrainerCallback):
    """Has what transformers' callbacks of trackio and W&B have: a module with `log` and `Image`."""

    _initialized = True

    def __init__(self):
        self.logged = []
        self._trackio = self

    def Image(self, pixels):
        return pixels

    def log(self, values):
        self.logged.append(values)


def test_trackers_with_a_module_of_their_own_get_images_in_their_form(tmp_path):
    trainer = trainer_in(tmp_path)
    tracker = StandIn()
    trainer.add_callback(tracker)
    trainer.evaluate()
    (values,) = tracker.logged
    assert values["train/global_step"] == 0
    assert values["eval/reconstruction"].dtype == values["eval/retrieval"].dtype == np.uint8
