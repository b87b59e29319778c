"""Cards: valid, true to the folder's files, and silent on what is not known."""

import json
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from local_hub import card_errors
from tiny_hub import SolarChipForImageClassification, saved_model

from solarchip_hf import CardResult
from solarchip_hf.hub.card_check import card_problems
from solarchip_hf.hub.card_families import FAMILIES
from solarchip_hf.hub.cards import MARK, family_card, main, write_card

PAGES = Path(__file__).parents[2] / "model_cards"
FLARE = {
    "metric": "tss",
    "name": "TSS, M and above",
    "value": 0.41,
    "low": 0.3,
    "high": 0.52,
    "dataset": "SDO, 2018 to 2020",
    "split": "test",
    "protocol": "Daily forecasts of 24 h; intervals from blocks of 27 days.",
}
PRETRAINING = {
    "data": "SyntheticSun",
    "metrics": {"eval_loss": 3.0},
    "retrieval": [
        {
            "method": method,
            "pair": f"hmi / {name}",
            "gallery": 96,
            "chance@1": 1 / 96,
            "recall@1": value,
            "recall@5": 0.5,
        }
        for method, value in (("patch similarity", 0.25), ("untrained patch similarity", 0.01))
        for name in ("aia171", "aia193")
    ],
}


def parts(path: Path) -> tuple[dict, str]:
    """Metadata and text of a card, which is checked by two rules written apart."""
    content = path.read_text()
    assert card_problems(content) == []
    assert card_errors(content) == []
    card = ModelCard(content)
    return card.data.to_dict(), card.text


def section(text: str, name: str) -> str:
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_pages_of_the_families(family):
    path = PAGES / f"{family}.md"
    data, text = parts(path)
    assert path.read_text() == family_card(family), (
        f"python -m solarchip_hf.hub.cards --family {family} --output {path}"
    )
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"]
    assert data["widget"]
    assert "model-index" not in data  # no weights, so no results
    assert "No results are recorded." in text
    assert "Not for operational warnings" in section(text, "Limits")
    assert "arXiv" in text
    assert "million parameters" in section(text, "Memory")
    for code in text.split("```python\n")[1:]:
        compile(code.partition("```")[0], family, "exec")
    if family == "controlnet":
        assert "not observations" in section(text, "Limits")


def test_nothing_is_made_up(tmp_path):
    data, text = parts(write_card(saved_model(tmp_path / "solarchip" / "vit-tiny")))
    assert set(data) == {"license", "library_name", "pipeline_tag", "tags", "widget"}
    assert data["library_name"] == "solarchip_hf"  # there is no code beside the weights
    assert "How this was trained is not recorded." in text
    assert "No results are recorded." in text
    assert "is not recorded" in text.partition("## Use")[0]  # real or synthetic: nobody said
    assert "Measured" not in text
    assert "None" not in text
    assert "nan" not in text.lower().replace("finance", "")
    assert not (tmp_path / "solarchip" / "vit-tiny" / "card.json").exists()
    assert 'AutoModel.from_pretrained("solarchip/vit-tiny")' in text


def test_pretraining_speaks_through_its_files(tmp_path):
    folder = saved_model(tmp_path / "vit-tiny")
    (folder / "metrics.json").write_text(json.dumps(PRETRAINING))
    arguments = {"max_steps": 240, "learning_rate": 1e-3, "output_dir": "/home/me", "hub_token": "hf_x", "bf16": False}
    (folder / "training_args.json").write_text(json.dumps(arguments))
    data, text = parts(write_card(folder))
    assert text.index("Trained on synthetic images") < text.index("## Use")
    assert section(text, "Limits").strip().startswith("- **Trained on synthetic images**")
    assert "synthetic-data" in data["tags"]
    (result,) = data["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values == {"recall@1, patch similarity": 0.25, "recall@5, patch similarity": 0.5}
    assert "96 held-out observations" in result["metrics"][0]["args"]["protocol"]
    assert result["dataset"]["type"] == "synthetic-sun"
    assert "| control: recall@1, untrained patch similarity | 0.010 |" in text  # said, but not as the model's own
    assert "| learning rate | 0.001 |" in text
    assert "/home/me" not in text
    assert "hf_x" not in text
    assert "bf16" not in text


def test_results_with_protocol_and_interval_and_those_that_are_missing(tmp_path):
    calibration = {
        "method": "temperature",
        "temperature": 1.5,
        "fitted_on": "2016 to 2017",
        "thresholds": {"m_plus": 0.3},
    }
    folder = saved_model(tmp_path / "flare", SolarChipForImageClassification, calibration=calibration)
    missing = {**FLARE, "metric": "bss", "name": "BSS", "value": math.nan, "low": None, "high": None}
    path = write_card(
        folder, data="HMI, 2010 to 2017", synthetic=False, results=[CardResult(**FLARE), missing], license="cc-by-4.0"
    )
    data, text = parts(path)
    metric = data["model-index"][0]["results"][0]["metrics"]
    assert [(entry["type"], entry["value"]) for entry in metric] == [("tss", 0.41)]
    assert metric[0]["args"] == {"protocol": FLARE["protocol"], "interval_95": [0.3, 0.52]}
    assert "| TSS, M and above | 0.410 | 0.300 to 0.520 | SDO, 2018 to 2020, test |" in text
    assert "BSS" not in text
    assert data["license"] == "cc-by-4.0"
    assert "fitted on 2016 to 2017" in text
    assert "M+ 0.3 " in text
    assert "synthetic" not in text.lower()
    again = write_card(folder)  # what was told is kept
    assert again.read_text() == path.read_text()


def test_reports_of_tuning_and_translation_are_read(tmp_path):
    scores = {"tss": 0.4, "tss_low": 0.2, "tss_high": 0.6, "hss": None, "bss_training": 0.1, "auc": 0.8}
    report = {
        "data": "SyntheticSun", "synthetic": True, "forecast": "ours", "headline": "M+",
        "protocol": {"horizon": "1 days 00:00:00", "block": "27D", "threshold": "largest TSS on the validation part"},
        "samples": {"train": {"count": 73, "first": "2013-06-05 00:00", "last": "2014-03-20 00:00"},
                    "test": {"count": 18, "first": "2014-07-22 00:00", "last": "2014-09-28 00:00"}},
        "scores": {"M+": {"ours": scores, "climatology": {"tss": 0.0, "auc": 0.5}}},
    }  # fmt: skip
    folder = saved_model(tmp_path / "flare", SolarChipForImageClassification)
    (folder / "report.json").write_text(json.dumps(report))
    data, text = parts(write_card(folder))
    (result,) = data["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["tss", "bss_training", "auc"]
    assert "flares of M+ that happen within 24 h after the image" in result["metrics"][0]["args"]["protocol"]
    assert "| TSS, M+ | 0.400 | 0.200 to 0.600 | SyntheticSun, test |" in text
    assert "| control: TSS, M+: climatology | 0.000 |" in text
    assert "| train observations | 73, 2013-06-05 to 2014-03-20 |" in text
    table = {
        "data": "synthetic", "method": "ControlNet", "sources": ["hmi"], "target": "aia171", "unit": "DN",
        "block": "27D", "observations": 48, "rows": {
            "ControlNet": {"scores": {"rmse": {"estimate": 12.5, "low": 11, "high": 14}, "ssim": {"estimate": None}}},
            "training mean": {"scores": {"correlation_disk": {"estimate": 0.3}, "rmse": {"estimate": 30.0}}},
        },
    }  # fmt: skip
    (folder / "report.json").unlink()
    (folder / "fidelity.json").write_text(json.dumps(table))
    data, text = parts(write_card(folder))
    (result,) = data["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("rmse", 12.5)]
    assert "training mean | 0.300" in text


def test_what_a_trainer_knows(tmp_path):
    from datetime import UTC, datetime, timedelta

    import pandas as pd
    from tiny_hub import tiny_model, tiny_processor
    from torch.utils.data import TensorDataset
    from transformers import Trainer, TrainingArguments

    class Rows(TensorDataset):
        metadata = pd.DataFrame(
            {"time_nominal": [datetime(2012, 5, 1, tzinfo=UTC) + timedelta(days=day) for day in range(9)]}
        )

    import torch

    args = TrainingArguments(output_dir=tmp_path / "vit", max_steps=7, use_cpu=True, report_to=[])
    trainer = Trainer(tiny_model(), args, train_dataset=Rows(torch.zeros(9)), processing_class=tiny_processor())
    trainer.save_model()
    write_card(tmp_path / "vit", results=[CardResult(**FLARE)])
    _, text = parts(write_card(tmp_path / "vit", trainer=trainer, data="SyntheticSun", synthetic=True))
    assert "| training observations | 9, 2012-05-01 to 2012-05-09 |" in text
    assert "| steps | 7 |" in text
    assert "torch 2" in text
    assert "TSS" not in section(text, "Results")  # of an earlier training


def test_an_edited_card_is_left_alone(tmp_path, caplog):
    folder = saved_model(tmp_path / "vit")
    path = write_card(folder)
    assert MARK in path.read_text()
    path.write_text("---\nlicense: mit\n---\n# Mine\n")
    assert write_card(folder) == path
    assert path.read_text().endswith("# Mine\n")
    assert "left as it is" in caplog.text
    assert main([str(folder), "--overwrite"]) == 0
    assert MARK in path.read_text()


def test_memory_is_measured_by_another_process(tmp_path):
    _, text = parts(write_card(saved_model(tmp_path / "vit"), measure=True))
    line = next(line for line in section(text, "Memory").splitlines() if "Measured" in line)
    value, unit = line.split()[2:4]
    assert 0.1 < float(value) / {"MiB": 1024, "GiB": 1}[unit] < 4  # a process with torch in it
    assert "one observation of 2 channels at 32 px" in line


def test_what_a_dataset_says(tmp_path):
    manifest = {
        "observations": 12, "splits": {"train": 8, "gap": 1, "validation": 3}, "images": {"hmi": 12}, "failures": 2,
        "settings": {"size": 64, "dtype": "float16"}, "shards": [{"bytes": 2**20}],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metadata.parquet").touch()
    saved_model(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    path = write_card(tmp_path, repo_id="solarchip/days", data="AIA and HMI of JSOC", synthetic=False)
    content = path.read_text()
    assert card_problems(content) == []
    card = DatasetCard(content)
    assert card.data.size_categories == ["n<1K"]
    assert "license" not in card.data.to_dict()  # nobody said whose the images are
    assert [part["split"] for part in card.data.configs[0]["data_files"]] == ["train", "validation"]
    assert "2 files could not be used" in card.text
    assert "| gap observations | 1 |" in card.text


def test_wrong_metadata_is_found():
    def card(**data) -> str:
        return f"---\n{yaml.safe_dump(data)}---\n# x\n"

    result = {
        "task": {"type": "x"},
        "dataset": {"type": "sdo", "name": "SDO"},
        "metrics": [{"type": "tss", "value": 0.5}],
    }
    good = {"license": "apache-2.0", "tags": ["SDO"], "model-index": [{"name": "m", "results": [result]}]}
    assert card_problems(card(**good)) == []
    cases = {
        "license": {"license": "Apache License"},
        "pipeline_tag": {"pipeline_tag": "sun"},
        "library_name": {"library_name": "solar"},
        "tags": {"tags": "SDO"},
        "datasets": {"datasets": ["not a name!"]},
        "widget": {"widget": [{"text": "x"}]},
        "value of tss": {
            "model-index": [{"name": "m", "results": [{**result, "metrics": [{"type": "tss", "value": "-"}]}]}]
        },
        "dataset.name": {"model-index": [{"name": "m", "results": [{**result, "dataset": {"type": "sdo"}}]}]},
    }
    for words, data in cases.items():
        (problem,) = card_problems(card(**{**good, **data}))
        assert words in problem
    assert "between two lines of ---" in card_problems("# nothing")[0]
    assert "expected YAML" in card_problems("---\na: [\n---\n")[0]


def test_the_command(tmp_path, capsys):
    folder = saved_model(tmp_path / "vit")
    assert main([str(folder), "--data", "SyntheticSun, seed 3", "--synthetic"]) == 0
    assert "SyntheticSun, seed 3" in (folder / "README.md").read_text()
    capsys.readouterr()
    for wrong in ([], [str(tmp_path)], [str(folder), "--family", "vit"], [str(folder), "--datasets", "one two"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("cards: ")
    with pytest.raises(ValueError, match="expected some of data, synthetic"):
        write_card(folder, author="me")
    (folder / "metrics.json").write_text("{")
    assert main([str(folder)]) == 2
    assert "expected JSON" in capsys.readouterr().err
