"""Downloads from a real server on this machine that fails in every way seen in the wild."""

import multiprocessing
import runpy
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_archive import write_aia, write_hmi

from solarchip_hf.data import download_sdo, pair_observations, scan_archive

START = datetime(2015, 1, 1, tzinfo=UTC)
HTML = b"<!DOCTYPE html>\n<html><body>The archive is down for maintenance.</body></html>\n"
EXAMPLE = Path(__file__).parents[2] / "examples" / "download_sdo.py"


class Archive:
    """Files by path, the faults that the next requests of a path meet, and every request that came."""

    def __init__(self):
        self.files, self.faults, self.requests = {}, {}, []
        self.ranges = True
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                archive.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/data"

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, path, content):
        self.files[f"/data/{path}"] = content

    def answer(self, handler):
        path, span = handler.path, handler.headers.get("Range")
        self.requests.append((path, span))
        faults = self.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        content = self.files.get(path)
        if fault == "drop":
            handler.close_connection = True
            return
        if isinstance(fault, int) or content is None:
            handler.send_response(fault or 404)
            handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", str(len(HTML)))
            handler.end_headers()
            handler.wfile.write(HTML)
            return
        body = HTML if fault == "html" else content[: len(content) // 2] if fault == "broken file" else content
        begin = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges and fault is None else 0
        if begin >= len(body) and begin:
            handler.send_error(416)
            return
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        handler.send_header("Content-Length", str(len(body) - begin))
        handler.end_headers()
        handler.wfile.write(body[begin : len(body) // 2] if fault == "cut" else body[begin:])
        handler.close_connection = True


@pytest.fixture
def server():
    archive = Archive()
    yield archive
    archive.close()


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Three days of HMI, AIA 171 and AIA 1700 as they lie in the tree."""
    scratch = tmp_path_factory.mktemp("scratch")
    files = {}
    for day in range(3):
        slot = START + timedelta(days=day)
        for moment, path in (
            (slot, write_hmi(scratch, slot)),
            (slot, write_aia(scratch, slot, 171)),
            (slot + timedelta(minutes=2), write_aia(scratch, slot + timedelta(minutes=2), 1700, EXPTIME=1.0)),
        ):
            folder = "hmi/fits" if path.name.startswith("hmi") else "aia/synoptic"
            hour = "" if path.name.startswith("hmi") else f"/H{moment:%H}00"
            files[f"{folder}/{slot:%Y/%m/%d}{hour}/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture
def tree(server, contents):
    for path, content in contents.items():
        server.add(path, content)
    return server


def fetch(server, folder, **options):
    settings = {"modalities": ["hmi", "171", "1700"], "backoff": 0.01, "progress": False, "sources": [server.url]}
    return download_sdo("2015-01-01", "2015-01-04", folder, **(settings | options))


def of(server, part):
    return next(path for path in server.files if part in path)


def test_a_range_of_days_arrives_where_scan_and_pairing_find_it(tree, contents, tmp_path):
    table = fetch(tree, tmp_path)
    assert table.attrs["report"] == {"present": 0, "downloaded": 9, "absent": 0, "failed": 0}
    assert {Path(path).read_bytes() for path in table["path"]} == set(contents.values())
    assert table["bytes"].tolist() == [Path(path).stat().st_size for path in table["path"]]
    assert sorted(path.name for path in tmp_path.rglob("*.part")) == []
    catalog = scan_archive(tmp_path, workers=1, progress=False)
    assert catalog["usable"].all()
    assert pair_observations(catalog)["observed"].tolist() == [3, 3, 3]
    count = len(tree.requests)
    again = fetch(tree, tmp_path)
    assert again.attrs["report"] == {"present": 9, "downloaded": 0, "absent": 0, "failed": 0}
    assert len(tree.requests) == count  # nothing was asked for twice
    assert again["path"].tolist() == table["path"].tolist()


@pytest.mark.parametrize("fault", ["html", "cut", "drop", "broken file", 503, 429])
def test_failures_that_pass_are_tried_again(tree, contents, tmp_path, fault):
    path = of(tree, "0171")
    tree.faults[path] = [fault, fault]
    table = fetch(tree, tmp_path)
    assert table.attrs["report"]["downloaded"] == 9
    assert Counter(asked for asked, _ in tree.requests)[path] == 3
    assert (tmp_path / "aia/2015/01/01" / Path(path).name).read_bytes() in contents.values()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("html", "HTML"),
        ("cut", "bytes came"),
        ("broken file", "truncated"),
        (503, "HTTP 503"),
        ("drop", "RemoteDisconnected"),
        (403, "HTTP 403"),
    ],
)
def test_failures_that_stay_are_reported_and_leave_no_file(tree, tmp_path, fault, reason):
    path = of(tree, "0171")
    tree.ranges = False
    tree.faults[path] = [fault] * 10
    table = fetch(tree, tmp_path, retries=2)
    failed = table[table["status"] == "failed"]
    assert len(failed) == 1
    assert path in failed["reason"].iloc[0]
    assert reason in failed["reason"].iloc[0]
    assert table.attrs["report"]["downloaded"] == 8
    assert not (tmp_path / "aia/2015/01/01" / Path(path).name).exists()
    tree.faults.clear()
    assert fetch(tree, tmp_path).attrs["report"] == {"present": 8, "downloaded": 1, "absent": 0, "failed": 0}


def test_what_is_absent_is_told_and_not_asked_for_again(tree, tmp_path):
    del tree.files[of(tree, "0171")], tree.files[of(tree, "hmi.M_720s.20150102")]
    table = fetch(tree, tmp_path)
    assert table.attrs["report"] == {"present": 0, "downloaded": 7, "absent": 2, "failed": 0}
    assert set(table.loc[table["status"] == "absent", "modality"]) == {"hmi", "aia171"}
    asked = [path for path, _ in tree.requests if "0171" in path and "2015/01/01" in path]
    assert len(asked) == 4  # 00:00, then 00:02, 00:04 and 00:06: what lies before midnight is another day's folder
    count = len(tree.requests)
    assert fetch(tree, tmp_path).attrs["report"] == {"present": 7, "downloaded": 0, "absent": 2, "failed": 0}
    assert len(tree.requests) == count
    assert fetch(tree, tmp_path, retry_absent=True).attrs["report"]["absent"] == 2
    assert len(tree.requests) > count
    count = len(tree.requests)
    assert fetch(tree, tmp_path, near_real_time=True).attrs["report"]["absent"] == 2
    assert [path for path, _ in tree.requests[count:] if "nrt" in path]  # which nobody had been asked for


def test_a_neighbouring_frame_serves_within_the_tolerance(tree, tmp_path):
    content = write_aia(tmp_path, START + timedelta(minutes=4), 171).read_bytes()
    del tree.files[of(tree, "0171")]
    tree.add("aia/synoptic/2015/01/01/H0000/AIA20150101_0004_0171.fits", content)
    table = fetch(tree, tmp_path / "wide")
    assert table.attrs["report"]["downloaded"] == 9
    assert (tmp_path / "wide/aia/2015/01/01/AIA20150101_0004_0171.fits").read_bytes() == content
    assert fetch(tree, tmp_path / "tight", tolerance="3min").attrs["report"]["absent"] == 1


def test_another_image_than_the_name_promises_is_refused(tree, contents, tmp_path):
    tree.files[of(tree, "0171")] = next(c for path, c in contents.items() if "1700" in path)
    tree.files[of(tree, "hmi.M_720s.20150102")] = next(
        c for path, c in contents.items() if "hmi.M_720s.20150103" in path
    )
    table = fetch(tree, tmp_path, retries=0)
    reasons = " ".join(table.loc[table["status"] == "failed", "reason"])
    assert "expected an image of aia171, got aia1700" in reasons
    assert "expected an image of 2015-01-02T00:00, got one of 2015-01-03" in reasons
    assert table.attrs["report"]["failed"] == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_file_is_gone_on_with(tree, contents, tmp_path, ranges):
    path = of(tree, "hmi.M_720s.20150101")
    content = tree.files[path]
    tree.ranges = ranges
    part = tmp_path / "hmi/2015/01/01" / f".{Path(path).name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:5000])
    assert fetch(tree, tmp_path).attrs["report"]["downloaded"] == 9
    assert [span for asked, span in tree.requests if asked == path] == ["bytes=5000-"]
    assert part.with_name(Path(path).name).read_bytes() == content
    assert not part.exists()


def test_a_part_of_another_file_is_thrown_away(tree, tmp_path):
    path = of(tree, "hmi.M_720s.20150101")
    part = tmp_path / "hmi/2015/01/01" / f".{Path(path).name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rubbish" * 1000)
    assert fetch(tree, tmp_path).attrs["report"]["downloaded"] == 9
    assert part.with_name(Path(path).name).read_bytes() == tree.files[path]


def test_killed_in_the_middle_and_called_again(tree, tmp_path):
    """Ended by SIGKILL while a file is half here; the second call fetches the rest only."""
    path = of(tree, "20150102_0000_0171")
    tree.faults[path] = ["cut"] * 5  # half a file, then a pause of a minute
    child = multiprocessing.get_context("fork").Process(
        target=fetch, args=(tree, tmp_path), kwargs={"backoff": 60, "threads": 1}
    )
    child.start()
    part = tmp_path / "aia/2015/01/02" / f".{Path(path).name}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    tree.faults.clear()
    here = {file.name for file in tmp_path.rglob("*.fits")}
    assert 3 <= len(here) < 9
    half = part.stat().st_size
    assert 0 < half <= len(tree.files[path]) // 2
    tree.requests.clear()
    table = fetch(tree, tmp_path)
    assert table.attrs["report"] == {"present": len(here), "downloaded": 9 - len(here), "absent": 0, "failed": 0}
    assert (path, f"bytes={half}-") in tree.requests
    assert not here & {Path(asked).name for asked, _ in tree.requests}


def test_the_command_fetches_and_says_what_came(tree, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    options = ["--start", "2015-01-01", "--end", "2015-01-04", "--source", tree.url, "--retries", "0"]
    command = [str(tmp_path), *options, "--modalities", "hmi", "171", "1700"]
    path = of(tree, "0171")
    tree.faults[path] = ["html"]
    with pytest.raises(SystemExit, match="same command again"):
        main(command)
    assert "8 downloaded, 0 absent, 1 failed" in capsys.readouterr().out
    main(command)
    assert "8 present, 1 downloaded, 0 absent, 0 failed" in capsys.readouterr().out


def test_mirrors_and_near_real_time_stand_in(tree, contents, tmp_path):
    mirror = Archive()
    try:
        for path, content in contents.items():
            mirror.add(path, content)
        dead = "http://127.0.0.1:9"  # nothing listens there
        table = fetch(tree, tmp_path / "outage", sources=[dead, mirror.url], retries=1, threads=1)
        assert table.attrs["report"]["downloaded"] == 9
        assert table["url"].str.startswith(mirror.url).all()
    finally:
        mirror.close()
    path = of(tree, "20150103_0000_0171")
    content = tree.files.pop(path)
    tree.files[path.replace("synoptic/", "synoptic/nrt/")] = content
    assert fetch(tree, tmp_path / "science").attrs["report"]["absent"] == 1
    table = fetch(tree, tmp_path / "nrt", near_real_time=True)
    assert table.attrs["report"]["downloaded"] == 9
    assert (tmp_path / "nrt/aia/2015/01/03" / f"nrt_{Path(path).name}").read_bytes() == content


def test_a_dead_server_costs_its_retries_a_few_times_only(tree, tmp_path, monkeypatch):
    pauses = []  # nothing listens at port 9
    monkeypatch.setattr("solarchip_hf.data.transfer.time.sleep", pauses.append)
    table = fetch(tree, tmp_path, sources=["http://127.0.0.1:9"], retries=2, threads=1, backoff=1.0)
    assert table.attrs["report"]["failed"] == 9
    assert len(pauses) == 3 * 2  # three files with all their tries, the others with one
    assert all(low <= pause <= 1.5 * low for low, pause in zip([1, 2] * 3, pauses, strict=True))


def test_fido_lists_the_files_that_are_there(tmp_path, contents, monkeypatch):
    """Sunpy's own client against directory listings of a server here; files come through the same verification."""
    pytest.importorskip("sunpy.net")
    from sunpy.net.dataretriever.sources.aia_synopsis import AIASynopsisClient

    class Listing(SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(tmp_path / "tree"), **options)

        def log_message(self, *arguments):
            pass

    for path, content in contents.items():
        target = tmp_path / "tree" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    next((tmp_path / "tree").rglob("AIA20150102_0000_0171.fits")).unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        pattern = AIASynopsisClient.pattern.replace("https://jsoc1.stanford.edu/data", url)
        monkeypatch.setattr(AIASynopsisClient, "pattern", pattern)
        table = download_sdo(
            "2015-01-01", "2015-01-03", tmp_path / "out", modalities=["171", "1700"], sources=[url],
            search="fido", retries=0, progress=False,
        )  # fmt: skip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert table["modality"].tolist() == ["aia1700", "aia171"] * 2
    assert table["status"].tolist() == ["downloaded", "downloaded", "downloaded", "absent"]
    assert len(list((tmp_path / "out").rglob("*.fits"))) == 3


def test_ill_posed_calls_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one slot"):
        download_sdo("2015-01-02", "2015-01-01", tmp_path)
    with pytest.raises(ValueError, match="'tree' or 'fido'"):
        download_sdo("2015-01-01", "2015-01-02", tmp_path, search="ftp")
    with pytest.raises(ValueError, match="http:// or https://"):
        download_sdo("2015-01-01", "2015-01-02", tmp_path, sources=["file:///etc"])
    with pytest.raises(ValueError, match="positive time"):
        download_sdo("2015-01-01", "2015-01-02", tmp_path, cadence="0D")
    with pytest.raises(ValueError, match="0, 0, 1 or more"):
        download_sdo("2015-01-01", "2015-01-02", tmp_path, retries=-1)
