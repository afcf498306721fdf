"""Stage folders: atomic files, manifests, locks, what makes a result stale, what is never written down."""
import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from eimf import artifacts
from eimf.artifacts import (Stage, UserError, argument_parser, atomic, command, load_array, load_json, load_lines, save_array,
                            save_json, save_lines, sha256)


def arguments(tmp_path, **changes):
    return argparse.Namespace(**{"dataset": "d", "data_dir": tmp_path, "skip_done": True, "seed": 0, "rate": 0.5} | changes)


def first(tmp_path, content="x", **changes):
    """Run a stage that writes one file of the given content."""
    stage = Stage("01_preprocess", arguments(tmp_path, **changes))
    stage.begin()
    save_lines(stage.folder / "a.txt", [content])
    return stage.finish({"lines": 1})


def second(tmp_path, **changes):
    """A stage that reads the first one's folder; not yet run."""
    stage = Stage("02_encode_text", arguments(tmp_path, **changes))
    stage.input("01_preprocess")
    return stage


def finish(stage):
    stage.begin()
    save_lines(stage.folder / "b.txt", ["y"])
    stage.finish()


def script(root, tmp_path, body):
    """Write a Python program that can import eimf; returns the command that runs it."""
    path = tmp_path / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(root / 'stages')!r})\n" + textwrap.dedent(body))
    return [sys.executable, str(path)]


# ---- files


def test_round_trips(tmp_path):
    value = {"é": [1, 2.5, None, "\u2028"], "nested": {"a": True}}
    save_json(tmp_path / "a.json", value)
    assert load_json(tmp_path / "a.json") == value
    array = np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]
    save_array(tmp_path / "a.npy", array)
    found = load_array(tmp_path / "a.npy")
    assert found.dtype == np.int32 and (found == array).all()
    rows = [{"t": "line\nbreak"}, {"t": "é"}]
    save_lines(tmp_path / "a.jsonl", rows)
    assert load_lines(tmp_path / "a.jsonl") == rows
    assert sha256(tmp_path / "a.jsonl") == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl", "a.npy"]


def test_no_pickle(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        save_array(tmp_path / "a.npy", np.array([{}], object))
    with open(tmp_path / "b.npy", "wb") as file:  # what an array of objects starts with; a pickle would follow
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_array(tmp_path / "b.npy")
    assert not (tmp_path / "a.npy").exists()


def test_no_nan_in_json(tmp_path):
    with pytest.raises(ValueError):
        save_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_readers_of_the_old_file_are_not_disturbed(tmp_path):
    """The new file takes the name; the old one is not written over."""
    save_lines(tmp_path / "a.txt", ["old"])
    with open(tmp_path / "a.txt") as reader:
        save_lines(tmp_path / "a.txt", ["new"])
        assert reader.read() == "old\n"
    assert (tmp_path / "a.txt").read_text() == "new\n"


def test_failed_write_leaves_the_old_file(tmp_path):
    save_lines(tmp_path / "a.txt", ["old"])
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.txt") as file:
        file.write("half of the n")
        file.flush()
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_killed_in_the_middle_of_a_write(root, tmp_path):
    """kill -9 while a stage writes over an earlier result: the old file is whole, the folder is not complete, a second run
    ends with the same files as an undisturbed one."""
    program = """
        import argparse, time
        from pathlib import Path
        from eimf.artifacts import Stage, atomic, save_lines
        stage = Stage("01_preprocess", argparse.Namespace(dataset="d", data_dir=Path(sys.argv[1]), skip_done=False))
        stage.begin()
        save_lines(stage.folder / "a.txt", ["new"])
        with atomic(stage.folder / "b.txt") as file:
            file.write("half")
            file.flush()
            if len(sys.argv) > 2:
                print("writing", flush=True)
                time.sleep(60)
            file.write(" and half")
        stage.finish()
        """
    command = script(root, tmp_path, program)
    for data in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / data)], check=True)
    folder = tmp_path / "killed" / "d" / "01_preprocess"
    process = subprocess.Popen([*command, str(tmp_path / "killed"), "wait"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (folder / "b.txt").read_text() == "half and half"
    assert len(list(folder.glob("*.tmp-*"))) == 1
    assert not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match="has not finished there. Run: python stages/01_preprocess.py --dataset d"):
        second(tmp_path / "killed")
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    undisturbed = tmp_path / "whole" / "d" / "01_preprocess"
    assert sorted(os.listdir(folder)) == sorted(os.listdir(undisturbed))
    assert load_json(folder / "manifest.json")["outputs"] == load_json(undisturbed / "manifest.json")["outputs"]


def test_lock(root, tmp_path):
    """A second process is refused while the first one writes, and not after the first one was killed."""
    command = script(root, tmp_path, """
        import argparse, time
        from eimf.artifacts import Stage
        stage = Stage("01_preprocess", argparse.Namespace(dataset="d", data_dir=sys.argv[1]))
        stage.begin()
        print("locked", flush=True)
        time.sleep(60)
        """)
    process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="is being written by another process"):
        first(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    stage = Stage("01_preprocess", arguments(tmp_path))
    stage.begin()
    stage.finish()
    first(tmp_path)  # finish() let go of it, though `stage` lives


# ---- manifest


def test_manifest(tmp_path):
    stage = Stage("01_preprocess", arguments(tmp_path, seed=7))
    (tmp_path / "raw.txt").write_text("raw")
    stage.input_file(tmp_path / "raw.txt")
    stage.begin()
    save_lines(stage.folder / "a.txt", ["x"])
    (stage.folder / "sub").mkdir()
    save_json(stage.folder / "sub" / "b.json", {})
    stage.log.info("a message")
    stage.finish({"lines": 1})
    manifest = load_json(stage.folder / "manifest.json")
    assert manifest["stage"] == "01_preprocess" and manifest["run"] is None and manifest["seed"] == 7
    assert manifest["inputs"] == {"raw.txt": hashlib.sha256(b"raw").hexdigest()}
    assert manifest["outputs"] == {"a.txt": {"bytes": 2, "sha256": hashlib.sha256(b"x\n").hexdigest()},
                                   "sub/b.json": {"bytes": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()}}
    assert manifest["arguments"]["rate"] == 0.5 and manifest["summary"] == {"lines": 1}
    assert manifest["packages"]["numpy"] == np.__version__
    assert manifest["wall_seconds"] >= 0 and 10 < manifest["peak_memory_mib"] < 100_000
    assert "a message" in (stage.folder / "stage.log").read_text()


def test_secrets_are_not_written(tmp_path, capsys):
    stage = Stage("04_infer_interests", arguments(tmp_path, api_key="sk-secret-1",
                                                  base_url="https://me:sk-secret-2@host/v1?a=b@c"))
    stage.begin()
    save_lines(stage.folder / "a.txt", ["x"])
    stage.finish()
    stage.is_done()
    written = b"".join(path.read_bytes() for path in stage.folder.rglob("*") if path.is_file())
    assert b"sk-secret" not in written
    assert "sk-secret" not in "".join(capsys.readouterr())
    assert load_json(stage.folder / "manifest.json")["arguments"]["base_url"] == "https://***@host/v1?a=b@c"


def test_chosen_outputs(tmp_path):
    stage = Stage("01_preprocess", arguments(tmp_path))
    stage.begin()
    for name in ("a.txt", "b.txt"):
        save_lines(stage.folder / name, [name])
    assert list(stage.finish(outputs=["b.txt"])["outputs"]) == ["b.txt"]


# ---- skipping


def test_skip_and_reasons(tmp_path, capsys):
    def reason(stage):
        done = stage.is_done()
        out = capsys.readouterr().out
        assert done == ("skipped" in out)
        return out.strip()

    first(tmp_path)
    assert reason(second(tmp_path)) == "02_encode_text: running, no finished result yet"
    finish(second(tmp_path))
    assert reason(second(tmp_path)) == "02_encode_text: skipped, arguments and inputs are unchanged"
    assert not second(tmp_path, skip_done=False).is_done() and capsys.readouterr().out == ""

    assert reason(second(tmp_path, rate=0.25)).endswith("--rate was 0.5 and is 0.25")
    assert reason(second(tmp_path, new_flag=None)).endswith("unchanged")  # a flag at None says nothing
    assert reason(second(tmp_path, new_flag=1)).endswith("--new-flag was None and is 1")
    for volatile in ("threads", "device", "api_key", "base_url", "raw_dir", "download", "quiet"):
        assert reason(second(tmp_path, **{volatile: "other"})).endswith("unchanged")

    first(tmp_path)  # the same content again: nothing to do
    assert reason(second(tmp_path)).endswith("unchanged")
    first(tmp_path, content="changed")
    assert reason(second(tmp_path)).endswith("input 01_preprocess/a.txt changed")
    finish(second(tmp_path))
    assert reason(second(tmp_path)).endswith("unchanged")

    output = tmp_path / "d" / "02_encode_text" / "b.txt"
    output.write_text("longer")
    assert reason(second(tmp_path)).endswith("output b.txt is missing or has another size")
    output.unlink()
    assert reason(second(tmp_path)).endswith("output b.txt is missing or has another size")
    finish(second(tmp_path))
    (output.parent / "manifest.json").write_text('{"arguments": ')
    assert reason(second(tmp_path)).endswith("manifest.json is damaged")
    (output.parent / "manifest.json").write_text("[]")
    assert reason(second(tmp_path)).endswith("manifest.json is damaged")


def test_data_folder_may_move(tmp_path):
    first(tmp_path / "old")
    finish(second(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert second(tmp_path / "new").is_done()


def test_runs_are_apart(tmp_path):
    for name in ("remi-s0", "remi-s1"):
        stage = Stage("06_train", arguments(tmp_path), run=name)
        stage.begin()
        save_lines(stage.folder / "log.jsonl", [{"run": name}])
        stage.finish()
    stage = Stage("07_evaluate", arguments(tmp_path), run="remi-s1")
    assert load_lines(stage.input("06_train", run="remi-s1") / "log.jsonl") == [{"run": "remi-s1"}]
    assert list(stage.inputs) == ["06_train/remi-s1/log.jsonl"]
    with pytest.raises(UserError, match="remi-s2 has no manifest.json"):
        stage.input("06_train", run="remi-s2")


# ---- what earlier stages left


def test_upstream_missing(tmp_path):
    with pytest.raises(UserError, match=f"Run: python stages/01_preprocess.py --dataset d --data-dir {re.escape(str(tmp_path))}$"):
        second(tmp_path)
    assert command("06_train", "d", artifacts.DATA, "r") == "python stages/06_train.py --dataset d --run r"
    stage = Stage("06_train", arguments(tmp_path))
    assert stage.input("05_encode_interests", optional=True) is None
    (tmp_path / "d" / "05_encode_interests").mkdir(parents=True)
    with pytest.raises(UserError, match="05_encode_interests has not finished"):
        stage.input("05_encode_interests", optional=True)


def test_upstream_damaged(tmp_path):
    first(tmp_path)
    folder = tmp_path / "d" / "01_preprocess"
    (folder / "a.txt").write_text("cut short or longer")
    with pytest.raises(UserError, match="a.txt: expected 2 bytes as recorded in manifest.json, found 19. Run stage 01"):
        second(tmp_path)
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match="expected 2 bytes as recorded in manifest.json, found no file"):
        second(tmp_path)
    for text in ('{"outputs": ', "[]", "{}", "\x00"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="manifest.json is damaged. Run stage 01_preprocess again"):
            second(tmp_path)


@pytest.mark.parametrize("name", ["../d", "a/b", "..", ".", "", "a/"])
def test_names_stay_inside_the_data_folder(tmp_path, name):
    with pytest.raises(UserError, match="--dataset is .*; expected the name of one folder"):
        Stage("01_preprocess", arguments(tmp_path, dataset=name))
    with pytest.raises(UserError, match="--run is"):
        Stage("06_train", arguments(tmp_path), run=name)


def test_input_file_missing(tmp_path):
    with pytest.raises(UserError, match="gone.txt: no such file"):
        Stage("01_preprocess", arguments(tmp_path)).input_file(tmp_path / "gone.txt")


# ---- run()


def ending(root, tmp_path, body, **kwargs):
    command = script(root, tmp_path, "from eimf.artifacts import *\nimport os, signal, time\n" + textwrap.dedent(body))
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_exit_codes(root, tmp_path):
    done = ending(root, tmp_path, """
        def main():
            raise UserError("found a, expected b")
        run(main)""")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: found a, expected b\n")
    assert ending(root, tmp_path, "run(lambda: None)").returncode == 0
    assert ending(root, tmp_path, "run(lambda: 3)").returncode == 3
    done = ending(root, tmp_path, "run(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))")
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr
    for body in ("__import__('numpy').empty(1 << 58)", "__import__('torch').empty(1 << 60)"):
        done = ending(root, tmp_path, f"run(lambda: {body})")
        assert done.returncode == 1 and done.stderr.startswith("error: out of memory (") and "Traceback" not in done.stderr
    done = ending(root, tmp_path, "run(lambda: [][0])")
    assert done.returncode == 1 and "IndexError" in done.stderr  # a bug keeps its traceback


def test_file_system_refuses(root, tmp_path):
    (tmp_path / "file").write_text("")
    done = ending(root, tmp_path, f"""
        import argparse
        run(lambda: Stage("01", argparse.Namespace(dataset="d", data_dir={str(tmp_path / 'file')!r})).begin())""")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "Not a directory" in done.stderr
    done = ending(root, tmp_path, "run(lambda: open('/no/such/file'))")
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr  # stages say which file they need; this is a bug


def test_reader_goes_away(root, tmp_path):
    command = script(root, tmp_path, """
        from eimf.artifacts import run
        def main():
            for i in range(200_000):
                print(i)
        run(main)""")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


def test_common_arguments(tmp_path):
    parser = argument_parser("What it does, 100 % of it.\n\n    an example")
    parser.add_argument("--rate", type=float, default=0.5, help="the rate")
    parser.add_argument("--name", help="the name (default: the folder's)")
    args = parser.parse_args(["--data-dir", str(tmp_path)])
    assert (args.dataset, args.data_dir, args.skip_done, args.rate) == ("sample", tmp_path, False, 0.5)
    text = parser.format_help()
    assert "\n    an example" in text and "(default: 0.5)" in text and "None" not in text
    for bad in (["--unknown"], ["--rat", "1"]):
        with pytest.raises(SystemExit) as error:
            parser.parse_args(bad)
        assert error.value.code == 2


def test_manifest_is_last(tmp_path, monkeypatch):
    """While a stage runs again, its folder does not look complete."""
    first(tmp_path)
    stage = Stage("01_preprocess", arguments(tmp_path))
    stage.begin()
    assert not (stage.folder / "manifest.json").exists()
    save_lines(stage.folder / "a.txt", ["x"])
    time.sleep(0.01)
    stage.finish()
    times = {path.name: path.stat().st_mtime_ns for path in stage.folder.iterdir() if path.name not in (".lock", "stage.log")}
    assert max(times, key=times.get) == "manifest.json"
    assert json.loads((stage.folder / "manifest.json").read_text())["outputs"].keys() == {"a.txt"}
