"""Every command that the README quotes is run here, and its results block is what the result files give."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import requests

from chat_server import GOOD, ChatServer
from eimf.artifacts import load_json
from tiny import make_tiny_bert


def commands(root):
    """The README's commands, comments stripped."""
    blocks = re.findall(r"```bash\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.S)
    return [re.sub(r"\s{2,}#.*", "", line).strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_results_block_is_what_the_files_give(run_script):
    done = run_script("data/make_results.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_sample_files_of_the_layout_exist(root):
    for name in re.findall(r"`(\w+\.py)`", (root / "README.md").read_text(encoding="utf-8")):
        assert list(root.glob(f"*/{name}")), f"README names {name}"


@pytest.fixture
def make_results(tmp_path, load_script):
    """Write figures into one block of a README: call(name, figures) -> its text; call.check() -> what --check exits with."""
    module = load_script("data/make_results.py")
    module.ROOT = tmp_path
    (tmp_path / "data/results").mkdir(parents=True)

    def call(name, figures):
        module.BLOCKS = {name: module.BLOCKS[name]} if name in module.BLOCKS else module.BLOCKS
        (tmp_path / "data/results" / module.BLOCKS[name][0]).write_text(json.dumps(figures))
        (tmp_path / "README.md").write_text(f"a\n<!-- {name}: python data/make_results.py -->\nold\n<!-- end of {name} -->\nz\n")
        module.main([])
        text = (tmp_path / "README.md").read_text()
        assert text.startswith("a\n") and text.endswith("z\n") and "old" not in text
        return text

    def check():
        with pytest.raises(SystemExit) as stop:
            module.main(["--check"])
        return stop.value.code

    call.check, call.columns = check, module.COLUMNS
    return call


def test_make_results_renders_and_checks(make_results, tmp_path):
    """A row a model, the paper's beside it, what was compared with its verdict; a changed number is noticed."""
    def entry(model, split="file-order", variant="", seeds=(0, 1)):
        metrics = dict.fromkeys(make_results.columns, {"mean": .25, "sd": .01 if len(seeds) > 1 else None})
        return {"model": model, "dataset": "Beauty", "split": split, "variant": variant, "seeds": list(seeds), "metrics": metrics}

    gain = {"family": "help", "dataset": "Beauty", "split": "file-order", "a": ["", "remi-eimf"], "b": ["", "remi"], "gain": .02, "low": .01, "high": .03,
            "seeds": 2, "p_users_holm": .003, "p_seeds_holm": .04, "verdict": "better"}
    numbers = {"headline": "EIMF helps here.", "datasets": {"Beauty": {"published": {"remi-eimf": {"recall@50": .3636}}}},
               "models": [entry("remi", seeds=[0]), entry("remi-eimf"), entry("remi-eimf", variant="phrases"), entry("remi", "random")],
               "comparisons": [gain, gain | {"b": ["phrases", "remi-eimf"], "verdict": "worse"}]}
    text = make_results("results", numbers)
    assert "| remi | 1 | 0.2500 | 0.2500 |" in text and "| remi-eimf | 2 | 0.2500 ± 0.0100 |" in text and "| *paper, remi-eimf* |  |  | *0.3636* |" in text
    assert "**Beauty, file-order split**" in text and "**Beauty, random split**" in text and text.count("*paper") == 1
    assert ("- remi-eimf against remi, R@50: +0.0200 (95 % interval +0.0100 to +0.0300; 2 seeds; over users p = .003, over seeds p = .040): "
            "**better**.") in text and "worse" not in text
    assert "EIMF helps here." in text and make_results.check() == 0
    (tmp_path / "data/results/numbers.json").write_text(json.dumps(numbers).replace("0.0100", "0.0101").replace("0.25", "0.26"))
    assert "differs" in str(make_results.check())


def test_make_results_renders_every_backbone(make_results):
    """Default and tuned, with and without EIMF, the paper's beside the file-order split alone, and what the search kept."""
    def entry(model, mean, split="file-order", seeds=(0,)):
        return {"model": model, "dataset": "Office", "split": split, "variant": "", "seeds": list(seeds),
                "metrics": {"recall@50": {"mean": mean, "sd": .01 if len(seeds) > 1 else None}}}

    numbers = {"datasets": {"Office": {"published": {"mind": {"recall@50": .1593}}}},
               "models": [entry("mind", .14, seeds=(0, 1, 2)), entry("mind-tuned", .2), entry("mind-tuned-eimf", .21), entry("dnn", .17), entry("mind-tuned", .19, "random")],
               "comparisons": [{"family": "taught", "dataset": "Office", "split": "file-order", "a": ["", "mind-tuned-eimf"], "b": ["", "mind-tuned"], "gain": .01, "verdict": "not significant"}],
               "together": [{"dataset": "Office", "split": "random", "backbones": ["mind", "dnn"], "gain": .012, "low": .01, "high": .02, "seeds": 3, "p_users_holm": .001,
                             "p_seeds_holm": .04, "verdict": "better"}],
               "tuning": {"Office": {"mind": {"flags": "--dropout 0.5", "trials": [{"minutes": 1.5}] * 6}, "dnn": {"flags": "", "trials": [{"minutes": 1.0}] * 6}}}}
    text = make_results("backbones", numbers)
    assert "| mind | 0.1400 ± 0.0100 (3) |  | 0.2000 (1) | 0.2100 (1) | +0.0100, not significant | *0.1593* |  |" in text
    assert "| mind |  |  | 0.1900 (1) |  |  |  |  |" in text and "| dnn | 0.1700 (1) |  |  |  |  |  |  |" in text
    assert "with 6 trainings of each backbone (15 minutes in all, one thread each): mind `--dropout 0.5`; dnn its defaults." in text
    line = "The 2 backbones together, tuned, on Office, random: EIMF adds +.0120 Recall@50 to their mean [+.0100, +.0200]; over users p = .001, over 3 seeds p = .040: better."
    assert text.index("Office, random split") < text.index(line) and text.count("together") == 1


def test_make_results_renders_the_cores_speed(make_results):
    machine = {"cpu": "Some CPU", "kernel": "avx2", "threads": 2, "clock": "wall", "rounds": 5, "fma_gflops": 117.4, "memory_gbs": 46.8, "load": 0.2}
    row = {"items": 12101, "eimf users/s": 14999.6, "torch users/s": None, "eimf, float products alone users/s": 7000.4,
           "share of peak, float products alone": .815, "one user, prepared, ms": .0866}
    other = {"machine": machine | {"cpu": "Another", "kernel": "neon"}, "rows": [row | {"items": 500}]}
    text = make_results("core", {"scoring": {"avx2": {"machine": machine, "rows": [row]}, "neon": other}})
    assert "| 12101 |  | 15000 |  |  |  | 7000 | 82% | 0.09 |  |" in text
    assert "Some CPU, avx2, wall clock, medians of 5, peak 117 GFLOP/s and 47 GB/s" in text and "Another, neon" in text and "| 500 |" in text


def test_make_results_renders_the_clients_throughput(make_results):
    figures = {"one_second_answers": {"delay": 1.0, "busy": .9512, "concurrency": 64, "requests": 5760},
               "hundred_thousand_requests": {"per_second": 978.2, "requests": 100000, "peak_memory_mib": 53.2}}
    text = make_results("llm", figures)
    assert "takes 1 s" in text and "95.1% busy" in text and "978 requests" in text and "100,000 of them take 53 MiB" in text


def test_make_results_renders_the_servers_speed(make_results):
    machine = {"asked_per_second": 1000.0, "cpu": "Some CPU", "cores": 2, "cores_used_by_others": .01}
    load = {"rate": {"p50": 2.81, "p99": 5.36, "p99.9": 30.9, "server_cores": .62},
            "highest": {"per_second": 2989.7, "p50": 19.8, "p99": 40.0}}
    measured = {"1 worker, with reasons": load | machine, "lines": {"lines": 60000, "per_second": 14844} | machine,
                "memory": {"minutes": 10.0, "per_second": 922.7, "requests": 553656, "errors": 0, "resident_mib": [392.6, 393.2, 393.8]} | machine}
    text = make_results("serving", {"dataset": "Beauty", "run": "remi-s0", "items": 12101, "measured": measured})
    assert "| 1 worker, with reasons | 2.8 | 5.4 | 30.9 | 0.62 | 2,990 | 20 | 40 |" in text and "p99 at 1,000/s" in text
    assert "10 minutes at 923 requests/s (553,656 in all, 0 errors): 393 MiB early, 394 MiB in the end" in text
    assert "all 2 cores: 14,844 users" in text and "run remi-s0, 12,101 items, 2 cores (Some CPU)" in text
    text = make_results("serving", {"dataset": "Beauty", "run": "remi-s0", "items": 12101, "measured": {"1 worker, with reasons": load | machine}})
    assert "Memory" not in text and "--lines" not in text


def test_make_results_renders_the_training_speed(make_results):
    rows = [{"what": "REMI", "threads": 1, "steps_per_second": 80.2, "spread": [79.0, 82.0]},
            {"what": "public REMI loop, without what it never uses", "threads": 1, "steps_per_second": 20.0, "spread": [19.0, 21.0]},
            {"what": "public REMI loop, as shipped", "threads": 1, "steps_per_second": 8.0, "spread": [8.0, 8.0]}]
    here = {"machine": "Some CPU, 2 cores", "torch": "2.13.0", "rounds": 3}
    found = {"rates": {"avx2int8": here | {"rows": rows}, "neon": here | {"machine": "Another", "rows": rows[:1]}}}
    text = make_results("training", found)
    assert "| REMI | 1 | 80.2 | 79 to 82 | 4.0 | 10.0 |" in text and "Some CPU, 2 cores, torch 2.13.0, medians of 3" in text
    assert "| REMI | 1 | 80.2 | 79 to 82 |  |  |" in text and "Another, torch" in text  # the peers were not measured there
    assert "best validation" not in text and "growth" not in text
    best = {"what": "EIMF(REMI)", "threads": 2, "best_iteration": 6000, "recall@50": .2381, "seconds_to_best": 109.6, "iterations": 8000,
            "seconds_to_stop": 142.7, "validation_seconds": 3.2}
    growth = [{"what": "REMI, 1,000,000 items", "threads": 2, "steps_per_second": 2.4, "spread": [2.4, 2.4]}]
    text = make_results("training", found | {"to_best": {"neon": here | best}, "growth": {"neon": here | {"rows": growth}}})
    assert "(R@50 0.2381) at step 6,000 after 110 s, stopped after 143 s; validations took 3 s" in text and "| REMI, 1,000,000 items | 2 | 2.4 |" in text


@pytest.mark.slow
def test_every_command_runs(sample, root, tmp_path, shared):
    """In order, in a copy where the sample was run; placeholders are filled in, long runs cut short where it says so."""
    folder, _ = sample
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "OPENAI_API_KEY": "sk-test"}
    make_tiny_bert(folder / "path/to/model", ["pen", "mug"])
    (folder / "my_model.py").write_text("from eimf.backbones import Backbone, even_share\n\n\nclass MyModel(Backbone):\n"
                                        "    def forward(self, vectors, mask):\n        share = even_share(mask)\n"
                                        "        return share @ (vectors * mask[:, :, None]), share\n")
    rng = np.random.default_rng(0)
    rows = [f"c{u},s{i},{1_600_000_000 + t},{['pen', 'mug'][i % 2]} number {i}" for u in range(120)
            for t, i in enumerate(rng.choice(np.arange(u % 2, 40, 2), 8, replace=False))]
    (folder / "clicks.csv").write_text("\n".join(["customer,sku,ts,title", *rows]) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = None
    with ChatServer(lambda number, body: GOOD) as chat:
        filled = {"DIR": str(shared / "data/raw"), "http://localhost:8000/v1": chat.url, "localhost:8000": f"127.0.0.1:{port}"}
        try:
            for command in commands(root):
                run = command
                for placeholder, value in filled.items():
                    run = run.replace(placeholder, value)
                if run == "bash run_all.sh":
                    continue  # the fixture ran it
                if run.startswith("bash tests/run.sh"):
                    run += " --collect-only -q"  # the tests cannot run themselves
                elif run.startswith("bash run_all.sh --dataset Office"):
                    run += " --stop-stage 1"  # hours; test_pipeline runs the rest on Office
                elif "--reproduce" in run:
                    run += " --list"  # hours; test_reproduce runs all of it on the sample
                elif "stages/06_train.py" in run:
                    run += " --max-iterations 200"
                elif run == "python data/make_results.py":
                    run += " --check"  # the copy's few results must not replace the README's
                elif "--serve" in run:
                    server = subprocess.Popen([*run.split(), "--port", str(port)], cwd=folder, env=environment,
                                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    wait_for(f"http://127.0.0.1:{port}/health")
                    continue
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", run], cwd=folder, env=environment, capture_output=True,
                                      text=True, timeout=600, stdin=subprocess.DEVNULL)
                assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
                if "curl" in run:
                    answer = json.loads(done.stdout)
                    assert len(answer["items"]) == 5 and not answer["unknown_items"], answer
        finally:
            if server:
                server.send_signal(signal.SIGTERM)
                server.wait(timeout=30)
    assert load_json(folder / "data/shop/04_infer_interests/usage.json")["llm"] == "openai"


def wait_for(url):
    for _ in range(300):
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:  # not there yet, or still loading
            time.sleep(.2)
    pytest.fail(f"{url} does not answer")


def test_misuse_exits_2_with_usage_and_prompts_for_nothing(root):
    for arguments in (["--bogus"], ["--seeds"], ["--seeds", "x"], ["--stage", "nine"], ["--split", "half"],
                      ["--stage", "6", "--stop-stage", "3"], ["--recipe", "nope"], ["--backbone", "pop"], ["--train-args", "--dim 8 --run mine"],
                      ["--train-args", "--seed=3"]):
        done = subprocess.run(["bash", "run_all.sh", *arguments], cwd=root, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=60)
        assert done.returncode == 2 and "usage: bash run_all.sh" in done.stderr, (arguments, done)


def test_stage_names_and_numbers(root):
    for name in ("3", "03", "03_cluster_users", "cluster_users"):
        done = subprocess.run(["bash", "-c", f'source <(sed -n "/^number()/,/^}}/p" run_all.sh); number {name}'], cwd=root,
                              capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "3", (name, done)


def test_missing_tools_get_one_sentence(root, tmp_path):
    """No compiler, and a Python without headers: one line that says what to install."""
    home = tmp_path / "environment"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "bin/python").chmod(0o755)
    cases = [({"CXX": "no-such-compiler"}, "no C++ compiler was found; install one")]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/bin").mkdir()
    (tmp_path / "bare/bin/python").write_text("#!/bin/sh\necho /nowhere/include\n")
    (tmp_path / "bare/bin/python").chmod(0o755)
    cases.append(({"VIRTUAL_ENV": str(tmp_path / "bare")}, "/nowhere/include/Python.h is missing; install Python's headers"))
    for change, message in cases:
        done = subprocess.run(["bash", "run_all.sh", "--setup-only", "pipeline"], cwd=root, capture_output=True, text=True, timeout=60,
                              env=os.environ | {"VIRTUAL_ENV": str(home)} | change)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done
