"""Names on the Hub as commands check them: there, of another kind, private, missing, cached, out of reach."""

import pytest
from hub_worker import SentError, Worker
from local_hub import TOKEN, LocalHub
from tiny_hub import saved_model

CHECK = "from solarchip_hf.hub.command_checks import check_saved\ncheck_saved(NAME, KIND)\n"


def refused(worker: Worker, name: str, kind: str, sentence: str) -> None:
    with pytest.raises(SentError, match=sentence) as error:
        worker.run(CHECK, NAME=name, KIND=kind)
    assert error.value.kind in ("FileNotFoundError", "ValueError")
    assert "\n" not in error.value.text


def test_names_on_the_hub(tmp_path):
    folder = saved_model(tmp_path / "model")
    push = "from solarchip_hf.hub import push_folder\npush_folder(FOLDER, NAME, private=PRIVATE)\n"
    workers = []
    try:
        with LocalHub({TOKEN: "solarchip"}) as hub:
            owner, stranger = (
                Worker(hub.environment(tmp_path / name, token))
                for name, token in (("owner", TOKEN), ("stranger", None))
            )
            workers += [owner, stranger]
            owner.run(push, FOLDER=folder, NAME="solarchip/vit-base", PRIVATE=False)
            owner.run(push, FOLDER=folder, NAME="solarchip/secret", PRIVATE=True)
            for worker in (owner, stranger):
                worker.run(CHECK, NAME="solarchip/vit-base", KIND="model")
                refused(worker, "solarchip/vit-base", "pipeline", "which is a pretrained model without a head")
                refused(
                    worker, "solarchip/vit-huge", "model", "no such folder here, and the Hub has no such repository"
                )
            owner.run(CHECK, NAME="solarchip/secret", KIND="model")
            refused(stranger, "solarchip/secret", "model", "or it is private: then run `hf auth login`")
        # The Hub is gone for whoever has no connection: what is in the cache serves, of the rest a sentence tells.
        workers.append(later := Worker(hub.environment(tmp_path / "stranger")))
        later.run(CHECK, NAME="solarchip/vit-base", KIND="model")
        refused(later, "solarchip/cnn-base", "model", "no such folder here, and the Hub was not reachable")
    finally:
        for worker in workers:
            worker.close()
