"""The handler of Inference Endpoints, alone and behind HTTP: good is answered, bad is told so in JSON."""

import base64
import gzip
import http.client
import importlib.util
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from astropy.io import fits
from PIL import Image
from tiny_hub import SolarChipForImageClassification, saved_model, tiny_model, tiny_processor, write_files

from solarchip_hf.hub import EndpointHandler
from solarchip_hf.hub.serve import MAX_BODY, EndpointServer, main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    paths = write_files(tmp_path_factory.mktemp("files"))
    return {"aia171" if "AIA" in path.name else "hmi": path for path in paths}


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return saved_model(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def handler(features) -> EndpointHandler:
    return EndpointHandler(str(features), max_bytes=2**22, max_pixels=2048 * 2048, max_images=4, device="cpu")


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def error_of(answer) -> tuple[str, int]:
    assert set(answer) == {"error"}
    assert {"type", "message", "status"} <= set(answer["error"])
    assert "Traceback" not in answer["error"]["message"]
    return answer["error"]["type"], answer["error"]["status"]


def test_features_are_those_of_the_model(handler, files):
    content = files["aia171"].read_bytes()
    inputs = tiny_processor()([files["aia171"]], return_tensors="pt")
    with torch.no_grad():
        expected = tiny_model().solarchip(**inputs)
    answer = handler({"inputs": content, "parameters": {"tokens": True}})
    np.testing.assert_allclose(answer["features"], expected.pooler_output[0], atol=1e-5)
    np.testing.assert_allclose(answer["contrastive"], expected.contrastive_embeds[0, 0], atol=1e-5)
    assert np.shape(answer["tokens"]) == (17, 32)
    assert (answer["modality"], answer["approximate"]) == ("aia171", False)
    assert answer["time"].startswith("2014-02-0")
    plain = handler({"inputs": text(content)})
    assert plain["features"] == answer["features"]
    assert "tokens" not in plain
    assert handler({"inputs": [gzip.compress(content), text(content)]})[0]["features"] == answer["features"]


def test_forecasts_are_probabilities(tmp_path, files):
    calibration = {"method": "temperature", "temperature": 2.0, "thresholds": {"m_plus": 0.0, "x_plus": 1.0}}
    window = {"horizon": "36h", "latency": "6h"}
    folder = saved_model(
        tmp_path / "flare", SolarChipForImageClassification, calibration=calibration, forecast_window=window
    )
    handler = EndpointHandler(str(folder), device="cpu")
    alone = handler({"inputs": files["hmi"].read_bytes()})
    both = handler({"inputs": {name: text(path.read_bytes()) for name, path in files.items()}})
    for answer in (alone, both):
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert list(answer["probabilities"]) == ["0AB", "C", "M", "X"]
        reached = answer["probabilities"]["M"] + answer["probabilities"]["X"]
        assert answer["exceedance"]["m_plus"] == pytest.approx(reached, abs=1e-6)
        assert answer["calibrated"] is True
        assert answer["warnings"] == {"m_plus": True, "x_plus": False}
        start, end = (np.datetime64(answer[name].removesuffix("+00:00")) for name in ("valid_from", "valid_until"))
        assert end - start == np.timedelta64(36, "h")
    assert alone["valid_from"] == "2014-02-01T06:00:00+00:00"
    assert alone["synthetic"] is True
    assert all(image["synthetic"] for image in both["images"].values())
    assert alone["modality"] == "hmi"
    assert set(both["images"]) == {"hmi", "aia171"}
    logits = tiny_model(SolarChipForImageClassification)(**tiny_processor()([files["hmi"]], return_tensors="pt")).logits
    expected = (logits[0].detach() / 2).softmax(0)
    np.testing.assert_allclose(list(alone["probabilities"].values()), expected, atol=1e-5)


def test_translations_come_as_fits(tmp_path, files):
    path = Path(__file__).parents[1] / "translation" / "tiny_pipeline.py"
    spec = importlib.util.spec_from_file_location("tiny_pipeline", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.tiny_pipeline("vit").save_pretrained(tmp_path / "pipeline")
    handler = EndpointHandler(str(tmp_path / "pipeline"), device="cpu")
    parameters = {"num_samples": 2, "num_inference_steps": 2, "seed": 3}
    answer = handler({"inputs": text(files["hmi"].read_bytes()), "parameters": parameters})
    assert (answer["modality"], answer["unit"]) == ("aia171", "DN")
    assert "not an observation" in answer["notice"]
    for name in ("prediction", "uncertainty"):
        with fits.open(io.BytesIO(base64.b64decode(answer[name]))) as units:
            assert units[0].data.shape == (64, 64)
            assert units[0].header["GENERATD"] is True
    again = handler({"inputs": {"hmi": files["hmi"].read_bytes()}, "parameters": parameters})
    with (
        fits.open(io.BytesIO(base64.b64decode(again["prediction"]))) as units,
        fits.open(io.BytesIO(base64.b64decode(answer["prediction"]))) as others,
    ):
        np.testing.assert_array_equal(units[0].data, others[0].data)
    alone = handler({"inputs": files["hmi"].read_bytes(), "parameters": {"num_inference_steps": 1}})
    assert alone["uncertainty"] is None
    wrong = {"inputs": files["aia171"].read_bytes()}
    assert error_of(handler(wrong)) == ("unreadable_image", 422)
    assert error_of(handler({**wrong, "parameters": {"num_samples": 1000}})) == ("bad_request", 400)
    assert error_of(handler({**wrong, "parameters": {"modality": "hmi"}})) == ("bad_request", 400)


def test_bad_requests_are_told_in_words(handler, files, sdo_folder):
    good = files["aia171"].read_bytes()
    bomb = gzip.compress(bytes(2**23))
    assert len(bomb) < 2**14
    huge = good.replace(b"ZNAXIS1 =                   64", b"ZNAXIS1 =                99999", 1)
    huge = huge.replace(b"NAXIS1  =                   64", b"NAXIS1  =                99999", 1)
    picture = io.BytesIO()
    Image.new("L", (64, 64)).save(picture, format="PNG")
    cases = {
        "nothing": (None, "bad_request", 400),
        "no inputs": ({"image": "x"}, "bad_request", 400),
        "no base64": ({"inputs": "not base64!"}, "bad_request", 400),
        "a number": ({"inputs": 7}, "unsupported_media", 415),
        "a picture of PIL": ({"inputs": Image.new("L", (8, 8))}, "unsupported_media", 415),
        "no file": ({"inputs": []}, "bad_request", 400),
        "many files": ({"inputs": [good] * 5}, "too_many_images", 413),
        "long": ({"inputs": bytes(2**22 + 1)}, "too_large", 413),
        "long base64": ({"inputs": "A" * 2**23}, "too_large", 413),
        "bomb": ({"inputs": bomb}, "too_large", 413),
        "half a gzip": ({"inputs": gzip.compress(good)[:-20]}, "unreadable_image", 422),
        "gzip in gzip": ({"inputs": gzip.compress(gzip.compress(good))}, "unreadable_image", 422),
        "truncated": ({"inputs": good[:-2880]}, "unreadable_image", 422),
        "empty": ({"inputs": b""}, "unreadable_image", 422),
        "a page": ({"inputs": b"<!DOCTYPE html><html></html>"}, "unreadable_image", 422),
        "PNG": ({"inputs": picture.getvalue()}, "unreadable_image", 422),
        "a mapping": ({"inputs": {"hmi": good}}, "bad_request", 400),
        "another channel": ({"inputs": good, "parameters": {"modality": "hmi"}}, "unreadable_image", 422),
        "no channel": ({"inputs": good, "parameters": {"modality": "aia999"}}, "unfit_input", 422),
        "unknown parameter": ({"inputs": good, "parameters": {"temperature": 1}}, "bad_request", 400),
        "wrong parameter": ({"inputs": good, "parameters": {"tokens": "yes"}}, "bad_request", 400),
        "wide": ({"inputs": huge}, "too_large", 413),
        "a channel not trained": (
            {"inputs": (sdo_folder / "AIAsynoptic0304.fits").read_bytes()},
            "unreadable_image",
            422,
        ),
    }
    for name, (data, kind, status) in cases.items():
        assert error_of(handler(data)) == (kind, status), name
    answer = handler({"inputs": good[:-2880]})["error"]
    assert (answer["fieldname"], answer["advice"]) == ("file size (HDU 1)", "The file is truncated: fetch it again.")


def test_images_of_two_moments_are_refused(tmp_path, files):
    later = min(path for path in write_files(tmp_path / "files", days=2) if "AIA20140202" in path.name)
    folder = saved_model(tmp_path / "flare", SolarChipForImageClassification)
    answer = EndpointHandler(str(folder), device="cpu")(
        {"inputs": {"hmi": files["hmi"].read_bytes(), "aia171": later.read_bytes()}}
    )
    assert error_of(answer) == ("unfit_input", 422)
    assert "within 0:12:00" in answer["error"]["message"]


def test_code_of_other_repositories_is_never_run(features, tmp_path, monkeypatch):
    config = json.loads((features / "config.json").read_text())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for auto_map in (None, {"AutoConfig": "someone/else--configuration_solarchip.SolarChipConfig"}):
        (tmp_path / "config.json").write_text(json.dumps(config | ({"auto_map": auto_map} if auto_map else {})))
        with pytest.raises(ValueError, match="expected the folder's own code in auto_map"):
            EndpointHandler(str(tmp_path), device="cpu")


class Client:
    """Sends requests to a served folder and keeps what came back."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "solarchip_hf.hub.serve", str(folder), "--port", "0", "--max_megabytes", "4"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.port = int(self.process.stdout.readline().rstrip("/\n").rpartition(":")[2])

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(content)

    def raw(self, content: bytes) -> bytes:
        """What comes back to bytes that need not be HTTP."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def memory(self) -> float:
        """Resident MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@pytest.fixture(scope="module")
def client(features):
    client = Client(features)
    yield client
    client.process.kill()
    client.process.communicate()


def test_two_hundred_requests(client, files, sdo_folder, capsys):
    aia, hmi = (files[name].read_bytes() for name in ("aia171", "hmi"))
    real = (sdo_folder / "AIAsynoptic0171.fits").read_bytes()
    binary, words = {"Content_Type": "application/octet-stream"}, {"Content_Type": "application/json"}

    def document(data) -> bytes:
        return json.dumps(data).encode()

    good = [
        ("POST", "/", aia, binary),
        ("POST", "/", hmi, binary),
        ("POST", "/", real, {"Content_Type": "image/fits"}),
        ("POST", "/?modality=171&tokens=true", aia, binary),
        ("POST", "/", gzip.compress(hmi), {}),
        ("POST", "/", document({"inputs": text(aia)}), words),
        ("POST", "/", document({"inputs": [text(aia), text(hmi)], "parameters": {"tokens": True}}), words),
        ("GET", "/health", b"", {}),
    ]
    bad = [
        ("POST", "/", b"", binary),
        ("POST", "/", aia[:5000], binary),
        ("POST", "/", os.urandom(20_000), binary),
        ("POST", "/", gzip.compress(bytes(2**23)), binary),
        ("POST", "/?modality=hmi", aia, binary),
        ("POST", "/?depth=3", aia, binary),
        ("POST", "/", b"{", words),
        ("POST", "/", b"[" * 100_000, words),
        ("POST", "/", document({"inputs": None}), words),
        ("POST", "/", document({"inputs": "?"}), words),
        ("POST", "/", document({"inputs": {}}), words),
        ("POST", "/", document([]), words),
        ("POST", "/elsewhere", aia, binary),
        ("GET", "/", b"", {}),
        ("DELETE", "/", b"", {}),
        ("POST", "/", (sdo_folder / "broken" / "html_not_fits.fits").read_bytes(), binary),
    ]
    order = [(True, good[index % len(good)]) for index in range(100)]
    order += [(False, bad[index % len(bad)]) for index in range(100)]
    random.Random(0).shuffle(order)
    memory = []
    for index, (fine, (method, path, body, headers)) in enumerate(order):
        status, answer = client.send(method, path, body, **headers)
        if fine:
            assert status == 200, (method, path, answer)
            assert "error" not in answer
        else:
            assert 400 <= status < 500, (method, path, answer)
            assert answer["error"]["status"] == status
            assert "Traceback" not in json.dumps(answer)
        if index % 50 == 49:
            memory.append(client.memory())
    with capsys.disabled():
        print(
            f"\nserver's memory after 50, 100, 150, 200 requests: {', '.join(f'{value:.0f}' for value in memory)} MiB"
        )
    assert memory[-1] - memory[0] < 24


def test_what_is_no_request_at_all(client):
    for content in (b"\x16\x03\x01\x02\x00\x01\x00", b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"):
        answer = client.raw(content)
        assert answer.startswith(b"HTTP/1.1 4"), content
        assert error_of(json.loads(answer.partition(b"\r\n\r\n")[2]))[1] >= 400
    too_much = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert b'"too_large"' in client.raw(too_much)  # refused before it is read
    assert client.send("GET", "/health") == (200, {"status": "ok", "task": "features"})


@pytest.mark.parametrize("written", ["٣", "²", "5.0", "-1", "+5", "1_0", "0x5", ""])
def test_a_length_that_is_no_number_is_refused(client, written):
    answer = client.raw(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {written}\r\n\r\nabcde".encode())
    assert error_of(json.loads(answer.partition(b"\r\n\r\n")[2])) == ("length_required", 411)


def test_no_request_is_larger_than_the_limit(features, handler):
    small, large = (
        EndpointServer(("127.0.0.1", 0), one) for one in (handler, EndpointHandler(str(features), device="cpu"))
    )
    small.server_close()
    assert small.max_body == 4 * (4 * 2**22) // 3 + 2**20  # four files, as base64
    assert large.max_body == MAX_BODY < 16 * 64 * 2**20
    threading.Thread(target=large.serve_forever, daemon=True).start()
    for length, expected in ((str(MAX_BODY + 1), 413), ("9" * 6000, 413), ("5", 422)):
        with socket.create_connection(("127.0.0.1", large.server_port), timeout=60) as connection:
            connection.sendall(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nabcde".encode())
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["status"] == expected
    large.shutdown()
    large.server_close()


def test_two_users_at_once_do_not_mix_and_too_many_are_told_to_wait(handler, files):
    server = EndpointServer(("127.0.0.1", 0), handler, queue=4)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bodies = {name: path.read_bytes() for name, path in files.items()}

    def ask(name: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request("POST", "/", bodies[name])
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer.get("modality") or answer["error"]["type"]

    with ThreadPoolExecutor(4) as users:
        asked = ["hmi", "aia171"] * 8
        assert list(users.map(ask, asked)) == [(200, name) for name in asked]
        with server.work:  # while one is at work for long
            waiting = [users.submit(ask, "hmi") for _ in range(4)]
            deadline = time.monotonic() + 30
            while server.places._value and time.monotonic() < deadline:  # until all four have come in
                time.sleep(0.01)
            assert ask("aia171") == (429, "busy")
        assert [one.result() for one in waiting] == [(200, "hmi")] * 4
    server.shutdown()
    server.server_close()


def test_a_failure_of_the_server_is_no_traceback(features, files, caplog):
    handler = EndpointHandler(str(features), device="cpu")
    handler.model.forward = None
    assert error_of(handler({"inputs": files["hmi"].read_bytes()})) == ("internal_error", 500)
    assert "not callable" in caplog.text  # the log knows


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
