"""Measure the server of stage 08 with wrk on this machine: requests per second, latency, memory.

    apt-get install wrk
    python tests/measure_serving.py --dataset Beauty                # a finished run of stage 06; about 15 minutes
    python tests/measure_serving.py --dataset Beauty --minutes 0    # without the long look at memory; about 4 minutes
    python tests/measure_serving.py --dataset Beauty --seconds 0    # memory alone

Three loads on POST /recommend with the histories of the data set's test users, k 20:
  rate     250 clients, each waiting an exponential time of 250 / RATE seconds between an answer and its next request:
           close to RATE independent requests per second (--rate), however slow the server is
  highest  64 clients that wait for nothing: the highest rate, and the latency when the server is never idle
  memory   `rate` for --minutes, with the server's resident memory twelve times in that time
Then `--lines` with 60,000 of those histories on all cores: users per second, start excluded.
One worker runs on one core, wrk on another; several workers share all cores with wrk. Latency is what wrk sees, in milliseconds,
from sending a request to having its answer. `server_cores` is the CPU time that the server took. What is measured is put into
--out (data/results/serving.json), beside what an earlier call measured of the same run, and printed.
"""
import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

from eimf.artifacts import _version, load_json, save_json  # noqa: E402
from eimf.data import load_interactions, load_items  # noqa: E402
from eimf.recommender import choose_run  # noqa: E402

CLIENTS = 250  # of the load at a given rate; many, so that slow answers do not hold back the requests that follow
CORES = sorted(os.sched_getaffinity(0))
SCRIPT = """
local bodies, place, wait = {{}}, {seed}, {wait}
for line in io.lines("{bodies}") do bodies[#bodies + 1] = line end
math.randomseed({seed})
function request()
  place = place % #bodies + 1
  return wrk.format("POST", "/recommend", {{["content-type"] = "application/json"}}, bodies[place])
end
{delay}
function done(summary, latency)
  local p = {{}}
  for n, at in ipairs({{50, 90, 99, 99.9}}) do p[n] = string.format('"p%s": %.3f', at, latency:percentile(at) / 1000) end
  local e = summary.errors
  io.write(string.format('RESULT {{"requests": %d, "seconds": %.3f, "errors": %d, %s, "max": %.3f}}\\n', summary.requests,
    summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout, table.concat(p, ", "), latency.max / 1000))
end
"""
DELAY = "function delay() return math.floor(-wait * math.log(1 - math.random()) + .5) end"  # milliseconds


def wrk(port, bodies, seconds, clients, wait=None, cores=None):
    """One run of wrk: dict of rate, latencies in milliseconds, errors. `wait`: mean milliseconds between a client's requests."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT.format(bodies=bodies, wait=wait or 0, seed=os.getpid() % 1000, delay=DELAY if wait else ""))
        script.flush()
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "30s", "-s", script.name, f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120,
                              preexec_fn=lambda: os.sched_setaffinity(0, cores or CORES))
    found = re.search("^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    result = json.loads(found[1])
    return {"per_second": round(result["requests"] / result.pop("seconds"), 1)} | result


@contextlib.contextmanager
def server(arguments, cores):
    """A server process on the given cores; yields (process id, port)."""
    command = [sys.executable, str(ROOT / "stages" / "08_serve.py"), "--serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"serving run .*:(\d+) with", line)))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=300) as reply:
            assert reply.status == 200
        used = -1.0
        while used < (used := cpu_seconds(process.pid)) - .05:  # until all workers have loaded the model and are idle
            time.sleep(1)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(60)


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(d for child in children for d in descendants(int(child)))]


def resident(pid):
    """Resident memory of a process and those it started, MiB."""
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in descendants(pid))
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def cpu_seconds(pid):
    """CPU time that a process and those it started have used."""
    ticks = sum(sum(map(int, Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for p in descendants(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_others(seconds=2):
    """Cores' worth of CPU that other programs use now, measured before anything is started."""
    def used():
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return round((used() - before) / seconds, 2)


def write_bodies(folder, explain, path):
    """One request a line, of the test users' histories."""
    interactions, ids = load_interactions(folder), [item and item["id"] for item in load_items(folder)]
    _, start, middle, _ = interactions.evaluation_ranges("test")
    with open(path, "w") as file:
        for a, b in zip(start, middle):
            file.write(json.dumps({"history": [ids[n] for n in interactions.items[a:b]], "k": 20, "explain": explain}) + "\n")
    return path


def measure(args, run, folder):
    bodies = {e: write_bodies(args.data_dir / args.dataset / "01_preprocess", e, folder / f"bodies-{e}") for e in (True, False)}
    base = ["--data-dir", str(args.data_dir), "--dataset", args.dataset, "--run", run]
    wait = 1000 * CLIENTS / args.rate
    results = {}
    for workers in args.workers if args.seconds else [1]:
        alone = workers == 1 and len(CORES) > 1
        theirs, ours = ([CORES[0]], CORES[1:]) if alone else (CORES, CORES)
        with server([*base, "--workers", str(workers)], theirs) as (pid, port):
            wrk(port, bodies[True], 5, 64, cores=ours)  # warm up
            for explain in (True, False) if args.seconds else ():
                name = f"{workers} worker{'s' * (workers > 1)}, {'with' if explain else 'without'} reasons"
                before, started = cpu_seconds(pid), time.perf_counter()
                rate = wrk(port, bodies[explain], args.seconds, CLIENTS, wait, ours)
                rate["server_cores"] = round((cpu_seconds(pid) - before) / (time.perf_counter() - started), 2)
                results[name] = {"rate": rate, "highest": wrk(port, bodies[explain], args.seconds, 64, cores=ours), "resident_mib": resident(pid)}
                print(name, json.dumps(results[name]), flush=True)
            if workers == 1 and args.minutes:
                memory = []
                thread = threading.Thread(target=lambda: results.update(memory=wrk(port, bodies[True], int(60 * args.minutes), CLIENTS, wait, ours)))
                thread.start()
                for _ in range(12):
                    time.sleep(5 * args.minutes)
                    memory.append(resident(pid))
                thread.join()
                results["memory"] |= {"minutes": args.minutes, "resident_mib": memory}
    if args.seconds:
        results["lines"] = lines(base, bodies[False], folder)
        print("lines", json.dumps(results["lines"]), flush=True)
    return results


def lines(arguments, bodies, folder, number=60_000):
    """Users per second of --lines."""
    histories = bodies.read_text().splitlines()
    source = folder / "lines"
    source.write_text("".join(f"{histories[n % len(histories)]}\n" for n in range(number)))
    with open(source) as file:
        done = subprocess.run([sys.executable, str(ROOT / "stages" / "08_serve.py"), "--lines", *arguments], stdin=file,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return {"lines": number, "per_second": int(re.search(r"([\d,]+) a second", done.stderr)[1].replace(",", ""))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--dataset", default="Beauty")
    parser.add_argument("--run", help="a run under 06_train; by default the one that stage 08 takes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rate", type=float, default=1000, help="requests per second")
    parser.add_argument("--seconds", type=int, default=20, help="of each load; 0 for memory alone")
    parser.add_argument("--minutes", type=float, default=10, help="of the look at memory; 0 for none")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "serving.json")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed (Debian: apt-get install wrk)")
    run = args.run or choose_run(args.data_dir, args.dataset)[0]
    config = load_json(args.data_dir / args.dataset / "06_train" / run / "config.json")
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = {p: _version(p) for p in ("uvicorn", "httptools")}
    machine = {"asked_per_second": args.rate, "cpu": cpu[1] if cpu else platform.machine(), "cores": len(CORES),
               "cores_used_by_others": busy_others(), "packages": packages}
    result = {"dataset": args.dataset, "run": run, "items": config["items"], "clients_at_rate": CLIENTS}
    with tempfile.TemporaryDirectory() as folder:
        measured = {name: entry | machine for name, entry in measure(args, run, Path(folder)).items()}
    earlier = load_json(args.out) if args.out.is_file() else {}
    if any(earlier.get(key) != value for key, value in result.items()):
        earlier = {}
    result["measured"] = earlier.get("measured", {}) | measured
    save_json(args.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
