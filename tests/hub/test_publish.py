"""From a model in memory to the Hub and back, through a server that speaks the Hub's routes."""

import json
import shutil
from pathlib import Path

import pytest
from hub_worker import SentError
from local_hub import OTHER_TOKEN, TOKEN
from tiny_hub import MODALITIES, saved_model, tiny_processor, write_files

from solarchip_hf import pair_observations, prepare_dataset, scan_archive
from solarchip_hf.hub.publish import collect

EXAMPLES = Path(__file__).parents[2] / "examples"
HELPERS = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
PUSH = HELPERS + ("import json, torch\nfrom tiny_hub import *\nfrom solarchip_hf.hub import push_folder, push_to_hub\n")
LOAD = (
    "import sys, torch\nfrom transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, "
    "AutoModelForPreTraining\n"
)


@pytest.fixture(scope="module")
def pushed(owner, sdo_folder) -> dict:
    """A public and a private model on the Hub; what the owner's own models make of a real file."""
    printed = owner.run(
        PUSH
        + """
model, classifier, processor = tiny_model(), tiny_model(SolarChipForImageClassification), tiny_processor()
publication = push_to_hub(model, "solarchip/vit-base", processor=processor, endpoint=True,
                          card={"data": "SyntheticSun, seed 0", "synthetic": True})
push_to_hub(classifier, "solarchip/secret", processor=processor, private=True)
inputs = processor([FILE], return_tensors="pt")
with torch.no_grad():
    features = model.solarchip(**inputs).contrastive_embeds[0, 0].tolist()
    logits = classifier(**inputs).logits[0].tolist()
print(json.dumps({"commit": publication.commit, "files": sorted(publication.files), "features": features,
                  "logits": logits}))
""",
        FILE=sdo_folder / "AIAsynoptic0171.fits",
    )
    return json.loads(printed)


def test_what_lies_on_the_hub(pushed, hub):
    files = hub.files("solarchip/vit-base")
    assert sorted(files) == pushed["files"]
    assert set(files) >= {"README.md", "config.json", "handler.py", "model.safetensors", "requirements.txt"}
    config = json.loads(files["config.json"])
    assert set(config["auto_map"]) >= {"AutoModel", "AutoModelForPreTraining", "AutoModelForImageClassification"}
    card = files["README.md"].decode()
    assert "library_name: transformers" in card  # since the code is there
    assert 'AutoModel.from_pretrained("solarchip/vit-base", trust_remote_code=True)' in card
    assert "**Trained on synthetic images.**" in card
    assert hub.repositories["model", "solarchip/secret"].private


def test_a_stranger_loads_it_without_the_package(pushed, stranger, sdo_folder):
    printed = stranger.run(
        LOAD
        + """
processor = AutoImageProcessor.from_pretrained("solarchip/vit-base", trust_remote_code=True)
inputs = processor([FILE], return_tensors="pt")
with torch.no_grad():
    features = AutoModel.from_pretrained("solarchip/vit-base", trust_remote_code=True)(**inputs).contrastive_embeds
    pinned = AutoModel.from_pretrained("solarchip/vit-base", trust_remote_code=True, revision=COMMIT)
    classifier = AutoModelForImageClassification.from_pretrained("solarchip/vit-base", trust_remote_code=True)
    shape = list(classifier(**inputs).logits.shape)
pretraining = AutoModelForPreTraining.from_pretrained("solarchip/vit-base", trust_remote_code=True)
assert not [name for name in sys.modules if name.split(".")[0] in ("solarchip_hf", "diffusers", "scipy")]
import json
print(json.dumps([features[0, 0].tolist(), shape, type(pretraining).__name__]))
""",
        FILE=sdo_folder / "AIAsynoptic0171.fits",
        COMMIT=pushed["commit"],
    )
    features, shape, name = json.loads(printed.splitlines()[-1])
    assert features == pytest.approx(pushed["features"], abs=1e-5)
    assert (shape, name) == ([1, 4], "SolarChipForPreTraining")


def test_the_endpoint_runs_as_it_lies_on_the_hub(pushed, stranger, sdo_folder):
    printed = stranger.run(
        """
import json, sys
from huggingface_hub import snapshot_download
folder = snapshot_download("solarchip/vit-base")
sys.path.insert(0, folder)
from handler import EndpointHandler
answer = EndpointHandler(folder)({"inputs": open(FILE, "rb").read()})
assert "solarchip_hf" not in sys.modules
print(json.dumps(answer["contrastive"]))
""",
        FILE=sdo_folder / "AIAsynoptic0171.fits",
    )
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(pushed["features"], abs=1e-5)


def test_what_transformers_itself_pushes_loads_too(owner):
    owner.run(
        PUSH
        + """
from transformers import AutoImageProcessor, AutoModel
tiny_model().push_to_hub("solarchip/plain")
tiny_processor().push_to_hub("solarchip/plain")
assert type(AutoModel.from_pretrained("solarchip/plain")) is SolarChipModel
assert AutoImageProcessor.from_pretrained("solarchip/plain").modalities == MODALITIES
"""
    )


def test_what_is_private_is_for_its_owner(pushed, stranger, owner, sdo_folder):
    load = (
        LOAD + 'AutoModelForImageClassification.from_pretrained("solarchip/secret", trust_remote_code=True, token=WHO)'
    )
    for token in (False, OTHER_TOKEN):
        with pytest.raises(SentError, match="If this is a private repository") as refused:
            stranger.run(load, WHO=token)
        assert refused.value.kind == "OSError"
    stranger.run(load, WHO=TOKEN)
    logits = owner.run(
        LOAD
        + """
import json, solarchip_hf
model = AutoModelForImageClassification.from_pretrained("solarchip/secret")
inputs = AutoImageProcessor.from_pretrained("solarchip/secret")([FILE], return_tensors="pt")
print(json.dumps(model.eval()(**inputs).logits[0].tolist()))
""",
        FILE=sdo_folder / "AIAsynoptic0171.fits",
    )
    assert json.loads(logits.splitlines()[-1]) == pytest.approx(pushed["logits"], abs=1e-5)


def test_only_owners_write(stranger_home, tmp_path, hub, owner):
    folder = saved_model(tmp_path / "model")
    with pytest.raises(SentError, match="403"):
        owner.run(PUSH + 'push_folder(FOLDER, "solarchip/taken", token=WHO)', FOLDER=folder, WHO=OTHER_TOKEN)
    assert ("model", "solarchip/taken") not in hub.repositories


def test_a_wrong_revision_is_said(pushed, stranger):
    for name in ("of-1999", "0" * 40):
        with pytest.raises(SentError, match=f"{name} is not a valid git identifier"):
            stranger.run(
                LOAD + 'AutoModel.from_pretrained("solarchip/vit-base", trust_remote_code=True, revision=NAME)',
                NAME=name,
            )


def test_a_branch_of_its_own(pushed, owner, hub, tmp_path):
    folder = saved_model(tmp_path / "vit-base")
    before = hub.files("solarchip/vit-base")
    owner.run(PUSH + 'push_folder(FOLDER, "solarchip/vit-base", revision="trial", code=False)', FOLDER=folder)
    assert hub.files("solarchip/vit-base") == before
    trial = hub.files("solarchip/vit-base", "trial")
    assert not [name for name in trial if name.endswith(".py")]  # the code of main was taken away
    assert "library_name: solarchip_hf" in trial["README.md"].decode()


def cached(home: Path) -> list[str]:
    """What lies in a cache of weights: whole files and pieces."""
    return sorted(path.name for path in home.rglob("blobs/*") if path.stat().st_size > 50_000)


def test_a_download_that_breaks_off_is_continued(pushed, stranger, hub, tmp_path):
    weights = len(hub.files("solarchip/vit-base")["model.safetensors"])
    hub.cut, hub.cut_count = {"model.safetensors": weights // 3}, 2
    printed = stranger.run(
        """
from huggingface_hub import hf_hub_download
print(hf_hub_download("solarchip/vit-base", "model.safetensors", cache_dir=CACHE))
""",
        CACHE=tmp_path,
    )
    assert hub.cut_count == 0
    assert Path(printed.strip()).read_bytes() == hub.files("solarchip/vit-base")["model.safetensors"]


def test_a_download_that_never_comes_leaves_nothing_behind(pushed, stranger, hub, tmp_path):
    hub.cut, hub.cut_count = {"model.safetensors": 0}, 99
    code = (
        LOAD
        + """
import time
plain, time.sleep = time.sleep, lambda seconds: None  # between the tries
try:
    AutoModel.from_pretrained("solarchip/vit-base", trust_remote_code=True, cache_dir=CACHE)
finally:
    time.sleep = plain
"""
    )
    with pytest.raises(SentError) as broken:
        stranger.run(code, CACHE=tmp_path)
    hub.cut_count = 0
    assert "Can't load the model for 'solarchip/vit-base'" in broken.value.text  # transformers' words ...
    assert "peer closed connection" in str(broken.value)  # ... and the cause in the chain
    assert cached(tmp_path) == []
    assert not list(tmp_path.rglob("*.incomplete"))
    stranger.run(code, CACHE=tmp_path)  # and the next try is none the worse for it
    assert len(cached(tmp_path)) == 1


def test_what_never_goes_up(tmp_path):
    folder = saved_model(tmp_path / "solarchip" / "vit-base")
    unwanted = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.ckpt", "pytorch_model.bin"]
    unwanted += ["training_args.json", "notes.txt", "mine.py", ".token", "checkpoint-10/model.safetensors"]
    unwanted += ["checkpoint-10/optimizer.pt", "runs/now/events.out.tfevents", "global_step1/weights.safetensors"]
    for name in unwanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "figures").mkdir()
    (folder / "figures" / "training.png").write_text("x")
    publication = collect(folder, "solarchip/vit-base")
    assert not set(publication.files) & set(unwanted)
    assert set(publication.skipped) == {name for name in unwanted if not name.startswith(".")}
    assert "figures/training.png" in publication.files
    assert sorted(path.name for path in folder.glob("*.py")) == ["mine.py"]  # nothing is written here
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected weights as safetensors, got none"):
        collect(folder, "solarchip/vit-base")
    with pytest.raises(ValueError, match=r"expected a saved SolarCHIP model .* got none of their files"):
        collect(tmp_path, "solarchip/vit-base")


def test_weights_of_an_earlier_push_go_with_it(owner, hub):
    push = PUSH + 'push_to_hub(tiny_model(), "solarchip/sharded", processor=tiny_processor(), max_shard_size=SIZE)'
    owner.run(push, SIZE="60KB")
    first = {name for name in hub.files("solarchip/sharded") if ".safetensors" in name}
    assert len(first) > 2
    owner.run(push, SIZE="1GB")
    assert {name for name in hub.files("solarchip/sharded") if ".safetensors" in name} == {"model.safetensors"}
    commits = len(hub.repositories["model", "solarchip/sharded"].commits)
    owner.run(push, SIZE="1GB")  # nothing has changed, so there is nothing to commit
    assert len(hub.repositories["model", "solarchip/sharded"].commits) == commits


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    archive, folder = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("data") / "synthetic-sun"
    write_files(archive, days=4)
    pairs = pair_observations(scan_archive(archive, workers=1, progress=False), "6min", modalities=MODALITIES)
    prepare_dataset(pairs, folder, tiny_processor(), workers=0, rows_per_shard=2, progress=False)
    return folder


def test_a_dataset_goes_there_and_back(prepared, owner, hub):
    printed = owner.run(
        PUSH
        + """
from solarchip_hf.data import load_observations
publication = push_folder(FOLDER, "solarchip/synthetic-sun", private=True, progress=False)
here, there = load_observations(FOLDER), load_observations("solarchip/synthetic-sun", split="train")
assert len(here) == len(there) == 4
for mine, other in zip(here, there, strict=True):
    assert torch.equal(mine["pixel_values"], other["pixel_values"]) and torch.equal(mine["observed"], other["observed"])
stream = load_observations("solarchip/synthetic-sun", streaming=True, shuffle=False, modalities=["171"])
print(json.dumps([float(row["pixel_values"].sum()) for row in stream]))
""",
        FOLDER=prepared,
    )
    assert len(json.loads(printed.splitlines()[-1])) == 4
    files = hub.files("solarchip/synthetic-sun", kind="dataset")
    assert not [name for name in files if name.startswith(".preparation")]
    assert sum(name.endswith(".arrow") for name in files) == 2
    assert "# solarchip/synthetic-sun: SolarCHIP observations" in files["README.md"].decode()
    with pytest.raises(SentError, match="a dataset repository that can be reached, got 'solarchip/absent'"):
        owner.run('from solarchip_hf.data import load_observations; load_observations("solarchip/absent")')
    with pytest.raises(SentError, match="of-1999"):
        owner.run('from solarchip_hf.data import load_observations\n'
                  'load_observations("solarchip/synthetic-sun", revision="of-1999")')  # fmt: skip


def test_a_dataset_that_breaks_off_is_told_and_comes_whole_the_next_time(prepared, owner, hub):
    owner.run(PUSH + 'push_folder(FOLDER, "solarchip/far-away", progress=False)', FOLDER=prepared)
    shard = next(name for name in hub.files("solarchip/far-away", kind="dataset") if name.endswith(".arrow"))
    hub.cut, hub.cut_count = {shard: 10}, 99
    code = """
import time
from solarchip_hf.data import load_observations
plain, time.sleep = time.sleep, lambda seconds: None  # between the tries
try:
    print(len(load_observations("solarchip/far-away")))
finally:
    time.sleep = plain
"""
    with pytest.raises(SentError, match=r"got 'solarchip/far-away': .* peer closed connection") as broken:
        owner.run(code)
    assert broken.value.kind == "FileNotFoundError"
    hub.cut_count = 0
    assert owner.run(code) == "4\n"


def test_a_push_that_was_interrupted_goes_on(prepared, owner, hub, tmp_path, monkeypatch):
    folder = tmp_path / "synthetic-sun"
    shutil.copytree(prepared, folder)
    for path in folder.glob("data/*.arrow"):  # contents that the Hub has not seen
        path.write_bytes(path.read_bytes() + b" ")
    (folder / "metadata.parquet").write_bytes((folder / "metadata.parquet").read_bytes() + b" ")
    code = HELPERS.replace(str(Path(__file__).parent), str(EXAMPLES)) + (
        'from push_to_hub import main\nprint(main([FOLDER, "--repo_id", "solarchip/resumed"]))'
    )
    monkeypatch.setattr(hub, "puts_left", 1)
    assert owner.run(code, FOLDER=folder) == "2\n"
    assert hub.puts_left < 0
    assert hub.files("solarchip/resumed", kind="dataset") == {}  # all of it or nothing
    hub.puts_left = 3  # one of the four is there already
    assert owner.run(code, FOLDER=folder).endswith("\n0\n")
    assert len(hub.files("solarchip/resumed", kind="dataset")) == 8


def test_a_pipeline_goes_there_and_back(owner, hub):
    printed = owner.run(
        PUSH
        + """
sys.path.insert(0, TRANSLATION)
from tiny_pipeline import random_images, tiny_pipeline
from solarchip_hf import SolarChipControlNetPipeline
pipeline, image = tiny_pipeline("vit"), random_images("hmi", 1)
publication = push_to_hub(pipeline, "solarchip/hmi-to-aia171", endpoint=True)
again = SolarChipControlNetPipeline.from_pretrained("solarchip/hmi-to-aia171")
again.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 2, "num_samples": 2}
mine, other = (
    part(image, generator=torch.Generator().manual_seed(0), **options).samples for part in (pipeline, again)
)
difference = (mine - other).nan_to_num().abs().max()
print(json.dumps([difference.item(), mine.nan_to_num().std().item(), list(again.identity)]))
""",
        TRANSLATION=Path(__file__).parents[1] / "translation",
    )
    difference, spread, identity = json.loads(printed.splitlines()[-1])
    assert difference < 1e-4 * spread
    assert identity == ["solarchip/hmi-to-aia171", hub.repositories["model", "solarchip/hmi-to-aia171"].refs["main"]]
    files = hub.files("solarchip/hmi-to-aia171")
    assert {"model_index.json", "autoencoder/model.safetensors", "controlnet/config.json", "handler.py"} <= set(files)
    card = files["README.md"].decode()
    assert "pipeline_tag: image-to-image" in card
    assert "Source: HMI magnetogram. Target, of which it draws samples: AIA 171 Å." in card
