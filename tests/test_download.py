"""Downloading against a local server that misbehaves in one way per test."""
import gzip
import http.server
import os
import re
import threading

import pytest
from eimf.artifacts import UserError
from eimf.download import download, fetch

BODY = gzip.compress(os.urandom(300_000))  # incompressible, so the file stays longer than one chunk


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY; `faults` are taken one per request: "cut", "503", "damaged", "short length", "206 elsewhere"."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.ranges, self.body = [], [], True, BODY
        self.url = f"http://127.0.0.1:{self.server_address[1]}/files/"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else None
        if fault == "503":
            return self.send_error(503)
        if "Nothing" in self.path:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        size = len(server.body)
        if start >= size and asked:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = server.body[start + (7 if fault == "206 elsewhere" else 0):]
        if fault == "damaged":
            body = b"\x1f\x8b" + bytes(len(body) - 2)
        if fault == "short length":  # a complete answer, but of half a file
            body = body[:len(body) // 2]
        self.send_response(206 if asked and server.ranges else 200)
        if asked and server.ranges:
            first = start + (7 if fault == "206 elsewhere" else 0)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def get(server, tmp_path, **options):
    target = tmp_path / "x.json.gz"
    fetch(server.url + "x.json.gz", target, **{"wait": 0.01, "timeout": 5} | options)
    assert not list(tmp_path.glob("*.part"))
    return target


def test_plain(server, tmp_path):
    assert get(server, tmp_path).read_bytes() == BODY
    get(server, tmp_path)
    assert len(server.requests) == 1  # it was there already


def test_resumes_where_the_connection_broke(server, tmp_path):
    server.faults = ["cut", "cut"]
    assert get(server, tmp_path).read_bytes() == BODY
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in server.requests]
    assert starts[0] == 0 < starts[1] < starts[2] < len(BODY)


def test_any_number_of_breaks_that_bring_something(server, tmp_path):
    """`retries` counts failures in a row that bring nothing."""
    server.faults = ["cut"] * 8
    assert get(server, tmp_path, retries=1).read_bytes() == BODY
    assert len(server.requests) == 9


def test_resumes_what_an_earlier_run_left(server, tmp_path):
    (tmp_path / "x.json.gz.part").write_bytes(BODY[:100_000])
    assert get(server, tmp_path).read_bytes() == BODY
    assert server.requests == [("/files/x.json.gz", "bytes=100000-")]


def test_part_that_was_complete(server, tmp_path):
    (tmp_path / "x.json.gz.part").write_bytes(BODY)
    assert get(server, tmp_path).read_bytes() == BODY


def test_part_longer_than_the_file(server, tmp_path):
    (tmp_path / "x.json.gz.part").write_bytes(BODY + b"rest of another file")
    assert get(server, tmp_path).read_bytes() == BODY


def test_part_of_another_file(server, tmp_path):
    (tmp_path / "x.json.gz.part").write_bytes(gzip.compress(os.urandom(100_000)))
    assert get(server, tmp_path).read_bytes() == BODY


def test_server_without_ranges(server, tmp_path):
    server.ranges, server.faults = False, ["cut"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 2


def test_range_from_elsewhere(server, tmp_path, capsys):
    server.faults = ["cut", "206 elsewhere"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert "does not fit the 150" in capsys.readouterr().out
    assert [asked is None for _, asked in server.requests] == [True, False, True]


def test_busy_server(server, tmp_path, capsys):
    server.faults = ["503"] * 3
    assert get(server, tmp_path).read_bytes() == BODY
    assert capsys.readouterr().out.count("503") == 3


def test_no_length_announced(server, tmp_path):
    server.faults = ["no length"]
    assert get(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["damaged", "short length"])
def test_damaged_once(server, tmp_path, fault):
    server.faults = [fault]
    assert get(server, tmp_path).read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [None, None]  # discarded, not resumed


@pytest.mark.parametrize("fault", ["503", "damaged", "short length"])
def test_gives_up(server, tmp_path, fault):
    server.faults = [fault] * 100
    with pytest.raises(UserError, match="gave up after"):
        get(server, tmp_path, retries=2)
    assert len(server.requests) <= 5
    assert not (tmp_path / "x.json.gz").exists()


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="gave up after 2 attempts"):
        fetch("http://127.0.0.1:9/x.gz", tmp_path / "x.gz", retries=1, wait=0.01)


def test_cut_for_good_keeps_what_came(server, tmp_path):
    server.faults = ["cut"] + ["503"] * 10
    with pytest.raises(UserError, match="bytes are kept"):
        get(server, tmp_path, retries=2)
    kept = (tmp_path / "x.json.gz.part").stat().st_size
    assert 0 < kept < len(BODY)
    server.faults = []
    assert get(server, tmp_path).read_bytes() == BODY


def test_unknown_name(server, tmp_path):
    with pytest.raises(UserError, match="404.*Office_Products"):
        download("Nothing", tmp_path, server.url)
    assert len(server.requests) == 1  # no use in asking again


def test_folder_not_writable(server, tmp_path):
    (tmp_path / "x.json.gz.part").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        fetch(server.url + "x.json.gz", tmp_path / "x.json.gz", wait=0.01)


def test_stage_downloads_and_reads(server, tmp_path, run_script):
    """`--download` puts both files into the raw folder, and the stage goes on to read them."""
    lines = "".join(f'{{"reviewerID": "u{u}", "asin": "i{i}", "unixReviewTime": {i}}}\n' for u in range(20) for i in range(6))
    server.body = gzip.compress(lines.encode())
    server.faults = ["cut"]
    done = run_script("stages/01_preprocess.py", "--dataset", "Tiny", "--data-dir", tmp_path, "--download",
                      "--base-url", server.url)
    assert done.returncode == 0, done.stderr
    assert sorted({path for path, _ in server.requests}) == ["/files/meta_Tiny.json.gz", "/files/reviews_Tiny_5.json.gz"]
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == ["meta_Tiny.json.gz", "reviews_Tiny_5.json.gz"]
    assert (tmp_path / "Tiny" / "01_preprocess" / "manifest.json").is_file()
