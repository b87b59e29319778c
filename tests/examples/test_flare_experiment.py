"""examples/flare_experiment.py, made small: every arm is scored, what is kept is used again, nonsense is refused."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import flare_experiment


def test_the_experiment_runs_from_nothing_and_again(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--span", "2013-01-01", "2013-11-01", "--parts", "2013-05-20", "2013-08-20"]
    options += ["--cadence", "4D", "--unlabelled", "2D", "--labels", "0.5", "--seeds", "2", "--workers", "1"]
    options += ["--pretraining_steps", "1", "--epochs", "1"]
    assert flare_experiment.main(options) == 0
    report = json.loads((tmp_path / "seeds.json").read_text())
    scores = report["scores"]["M+"]
    assert {"pretrained, frozen probe", "same network from scratch", "climatology", "persistence"} <= set(scores)
    assert {"past-rate logistic", "magnetogram forest", "true hazard of the simulation"} <= set(scores)
    assert {"persistence, calibrated", "magnetogram forest, calibrated"} <= set(scores)
    assert len(scores["pretrained, frozen probe"]["bss"]["seeds"]) == 2
    assert [len(report["run"]["tries"][arm]) for arm in list(scores)[:2]] == [3, 3]
    for arm, chosen in report["tries"].items():  # those of each seed, beside the scores
        assert len(chosen) == 2, arm
        assert all([sum(one["chosen"] for one in tries), len(tries)] == [1, 3] for tries in chosen), arm
        assert all({"learning_rate", "weight_decay", "score", "step"} <= one.keys() for one in chosen[0]), arm
    rows = json.loads((tmp_path / "prepared" / "manifest.json").read_text())["splits"]
    counts = {name: part["count"] for name, part in report["samples"].items()}
    assert rows["train"] > 1.8 * counts["train"]  # images without labels, for pretraining alone
    assert (rows["validation"], rows["test"]) == (counts["validation"], counts["test"])
    assert report["synthetic"]
    assert report["claim"]["better"] == "pretrained, frozen probe"
    assert (tmp_path / "figures" / "seeds.png").is_file()
    backbone = (tmp_path / "backbone" / "model.safetensors").stat().st_mtime_ns
    said = capsys.readouterr().out
    assert "**Synthetic** data" in said
    assert "3 tries of learning rate and weight decay" in said
    assert said.count('"chosen": true') == 4  # two networks, two seeds
    assert flare_experiment.main([*options, "--seeds", "1"]) == 0
    again = json.loads((tmp_path / "seeds.json").read_text())["tries"]
    assert again == {arm: chosen[:1] for arm, chosen in report["tries"].items()}
    assert (tmp_path / "backbone" / "model.safetensors").stat().st_mtime_ns == backbone
    assert flare_experiment.main([*options, "--sun", "5"]) == 2
    assert "expected a new folder, or the settings of" in capsys.readouterr().err


def test_numbers_that_work_with_no_data_are_refused_before_any_work(tmp_path, capsys):
    for arguments, said in (
        (["--seeds", "0"], "--seeds, --epochs, --pretraining_steps: expected"),
        (["--labels", "2"], "--labels: exp"),
    ):
        assert flare_experiment.main(["--output", str(tmp_path / "new"), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_bad_input_ends_in_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert flare_experiment.main(["--output", str(tmp_path / "file")]) == 2
    assert flare_experiment.main(["--output", str(tmp_path), "--span", "2013-01-01", "2012-01-01"]) == 2
    assert "flare_experiment.py: --span: expected two dates, the later one last" in capsys.readouterr().err
