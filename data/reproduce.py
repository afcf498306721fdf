"""Make the paper's tables and figures: every run of experiments.py, most informative first, then the report.

    bash run_all.sh --reproduce --raw-dir DIR                  # everything; stops and goes on at any point
    bash run_all.sh --reproduce --raw-dir DIR --budget 2h      # what fits into two hours
    bash run_all.sh --reproduce --raw-dir DIR --only table3 --list

Reads   the raw files of each data set in --raw-dir, recorded LLM answers `<name>.responses.jsonl[.gz]` in --llm-dir
Writes  <data-dir>/<data set>[-<split>][-<variant>]/   the stages' folders
        <data-dir>/reproduction/<folder>/<task>.json, .log, .lock     what each task ran, printed, and who holds it
        <data-dir>/reproduction/numbers.json, report.md, report.html, *.svg  see paper_report.py
        data/results/   with --publish: numbers.json, report.md and its figures, the copies under version control. Publishing adds: what was
                        run elsewhere stays, unless there are more seeds of it here or its settings have changed; see paper_merge.py

A run that is done is skipped, if its arguments and inputs are still the same. Several processes may work in one data folder, on one
machine: a lock on each task sees that no two take the same one, and a process waits for what others still hold. Exit codes: 0 all is done;
1 a mistake, or runs failed; 2 unknown arguments; 3 the budget ended first.
"""
import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))

import experiments  # noqa: E402
import paper_merge  # noqa: E402
import paper_numbers  # noqa: E402
import paper_report  # noqa: E402
from eimf.artifacts import load_json, load_lines, run as run_main, save_json  # noqa: E402
from experiments import DATASETS, GUESSED_EIMF, GUESSED_SECONDS, MODELS, NAMES, NEED_TEXT, PAPER, VARIANTS, arguments, folder_of  # noqa: E402

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TEXT_STAGES = ("02_encode_text", "03_cluster_users", "04_infer_interests", "05_encode_interests")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", type=Path, default=ROOT / "data", help="folder that holds all data sets")
    add("--raw-dir", type=Path, help="folder of the raw files (default: <data-dir>/raw)")
    add("--download", action="store_true", help="fetch the public raw files that are missing")
    add("--llm-dir", type=Path, help="folder of recorded LLM answers (default: ../shared/llm beside the repository, if it is there); "
        "a data set without any gets the offline summariser")
    add("--datasets", default=",".join(PAPER), help=f"of {', '.join(DATASETS)} (default: %(default)s)")
    add("--only", default=",".join(NAMES), help="groups of experiments (default: %(default)s)")
    add("--seeds", type=int, default=5, help="trainings of each model (default: %(default)s)")
    add("--train-args", default=experiments.TRAIN, help="arguments of stage 06 for all runs (default: %(default)r)")
    add("--budget", type=duration, metavar="TIME", help="stop after this time, such as 2h, 90m or 1h30m; the same command goes on")
    add("--jobs", type=int, default=0, help="runs at a time (default: one a core up to 4; on a GPU, half the cores up to 8)")
    add("--list", action="store_true", help="print what would be run, with the time it takes, and stop")
    add("--report", action="store_true", help="run nothing, only write the report of what is done")
    add("--publish", action="store_true", help="add the numbers to those in data/results/, and write the report of all of them")
    args = parser.parse_args(argv)
    for name, known in (("datasets", DATASETS), ("only", NAMES)):
        chosen = tuple(dict.fromkeys(getattr(args, name).split(",")))
        unknown = [c for c in chosen if c not in known]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is none of {', '.join(known)}")
        setattr(args, name, chosen)
    if args.seeds < 1 or args.jobs < 0:
        parser.error("--seeds must be at least 1, --jobs at least 0")
    if args.publish and args.train_args != experiments.TRAIN:
        parser.error(f"--publish: all that is published has --train-args {experiments.TRAIN!r}; change TRAIN in experiments.py for others")
    args.raw_dir = args.raw_dir or args.data_dir / "raw"
    beside = ROOT.parent / "shared" / "llm"
    args.llm_dir = args.llm_dir or (beside if beside.is_dir() else None)
    return args


def duration(text):
    """Seconds in "2h", "90m", "1h30m" or "45s"."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; expected such as 2h, 90m or 1h30m")
    return sum(float(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1)))


def shown(seconds):
    minutes = round(seconds / 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def recorded_answers(args):
    """{data set: file name in --llm-dir}."""
    found = {}
    for dataset in args.datasets:
        for ending in (".responses.jsonl.gz", ".responses.jsonl"):
            if args.llm_dir and (args.llm_dir / (DATASETS[dataset] + ending)).is_file():
                found.setdefault(dataset, DATASETS[dataset] + ending)
    return found


@dataclass(eq=False)
class Task:
    """Stages run one after the other in one data folder. `commands` name folders by RAW_DIR and LLM_DIR, as the report does."""
    folder: str
    name: str
    commands: list
    dataset: str
    rank: float
    run: experiments.Run = None
    after: list = field(default_factory=list)

    @property
    def label(self):
        return f"{self.folder}/{self.name}"


def tasks_of(runs, args, answers):
    """Tasks by priority: before a run, stage 01 of its folder, and stages 02-05 where the model needs them."""
    tasks = {}

    def prepare(dataset, split, variant, needs_text, rank):
        key = folder_of(dataset, split, variant)
        source = ["--source", DATASETS[dataset], "--raw-dir", "RAW_DIR", "--split", split, *["--download"] * args.download]
        events = tasks.setdefault((key, "events"), Task(
            key, "events", [["stages/01_preprocess.py", "--dataset", key, *source]], dataset, rank))
        if not needs_text:
            return events
        cluster, infer, _ = (shlex.split(flags) for flags in VARIANTS[variant])
        if not infer and dataset in answers:
            infer = ["--llm", "recorded", "--responses", f"LLM_DIR/{answers[dataset]}", "--match", "user"]
        extra = dict(zip(TEXT_STAGES, ([], cluster, infer, [])))
        return tasks.setdefault((key, "text"), Task(
            key, "text", [[f"stages/{stage}.py", "--dataset", key, *extra[stage]] for stage in TEXT_STAGES], dataset, rank, after=[events]))

    if "table1" in args.only:
        for dataset in args.datasets:
            prepare(dataset, "file-order", "", False, 0)
    for run, (rank, _) in runs.items():
        before = prepare(run.dataset, run.split, run.variant, run.model in NEED_TEXT, rank)
        tasks[run.folder, run.name] = Task(
            run.folder, run.name, [experiments.training(run, args.train_args), ["stages/07_evaluate.py", "--dataset", run.folder, "--run", run.name]],
            run.dataset, rank, run, [before])
    return list(tasks.values())


class State:
    """What is done, on disk. A task's record says what it ran; the stages' manifests whether that still holds."""

    def __init__(self, data_dir):
        self.data_dir, self.root = data_dir, data_dir / "reproduction"

    def path(self, task, ending):
        path = self.root / task.folder / f"{task.name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, task):
        """The task's record, None if there is none of these commands."""
        try:
            record = load_json(self.path(task, ".json"))
        except (FileNotFoundError, ValueError):
            return None
        return record if record.get("commands") == task.commands else None

    def save(self, task, state):
        save_json(self.path(task, ".json"), {"state": state, "commands": task.commands})

    def outcome(self, task):
        """"done", "failed", or None if it has yet to run."""
        record = self.record(task)
        if record is None:
            return None
        if record["state"] == "done" and not all(self._holds(task, command) for command in task.commands if command[0].startswith("stages/")):
            return None
        return record["state"]

    def _holds(self, task, command):
        """Whether the stage's folder is complete and what it was made from has not changed."""
        stage = Path(command[0]).stem
        root = self.data_dir / task.folder
        try:
            manifest = load_json(root / stage / (task.run.name if task.run else "") / "manifest.json")
            for key, digest in manifest["inputs"].items():
                source, _, file = key.rpartition("/")
                if re.match(r"\d\d_", source) and load_json(root / source / "manifest.json")["outputs"][file]["sha256"] != digest:
                    return False
        except (FileNotFoundError, ValueError, KeyError):
            return False
        return True

    def has_titles(self, task):
        return load_json(self.data_dir / task.folder / "01_preprocess" / "stats.json").get("items_with_title", 0) > 0

    def seconds(self, task):
        """How long a finished run took: training, over all its resumptions, and evaluation. None if it is not known."""
        root = self.data_dir / task.folder
        try:
            log = load_lines(root / "06_train" / task.name / "log.jsonl")
            trained = log[-1]["seconds"] if log else load_json(root / "06_train" / task.name / "manifest.json")["wall_seconds"]
            return trained + load_json(root / "07_evaluate" / task.name / "manifest.json")["wall_seconds"]
        except (FileNotFoundError, ValueError, KeyError):
            return None


class Clock:
    """Estimates from the run times measured so far: of the same model, else of models of the same kind, else a guess."""

    def __init__(self):
        self.measured = defaultdict(list)

    def add(self, task, seconds):
        if task.run and seconds and task.run.model != "pop":
            for key in ((task.dataset, task.run.model), (task.dataset, "--eimf" in MODELS[task.run.model])):
                self.measured[key].append(seconds)

    def estimate(self, task):
        if not task.run or task.run.model == "pop":
            return 30.0
        taught = "--eimf" in MODELS[task.run.model]
        known = self.measured.get((task.dataset, task.run.model)) or self.measured.get((task.dataset, taught))
        return sum(known) / len(known) if known else GUESSED_SECONDS[task.dataset] * (GUESSED_EIMF if taught else 1)


class Runner:
    """Runs tasks, several at a time, until all are done or the budget ends."""

    def __init__(self, tasks, args, state):
        self.args, self.state, self.clock = args, state, Clock()
        self.jobs, self.threads = args.jobs, 1
        self.tasks, self.running, self.failed, self.unavailable, self.started = tasks, [], [], [], time.time()
        for task in tasks:
            if state.outcome(task) == "done":
                self.clock.add(task, state.seconds(task))
        # Within one priority the quick ones first: more is known sooner.
        self.pending = sorted((t for t in tasks if state.outcome(t) != "done"), key=lambda t: (t.rank, self.clock.estimate(t)))
        self.log = None

    def left(self):
        """Seconds of work left on all jobs together."""
        now = time.time()
        return (sum(map(self.clock.estimate, self.pending))
                + sum(max(0, self.clock.estimate(job["task"]) - now + job["started"]) for job in self.running)) / self.jobs

    def say(self, text):
        print(text, flush=True)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.log.flush()

    def work(self):
        """Returns True if everything was done, or is not available or failed; False if the budget ended."""
        self.state.root.mkdir(parents=True, exist_ok=True)
        if not self.jobs:
            import torch
            self.jobs = max(1, min(8, CORES // 2) if torch.cuda.is_available() else min(4, CORES))
        self.threads = max(1, CORES // self.jobs)
        self.log = open(self.state.root / "reproduce.log", "a", encoding="utf-8")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.say(f"{len(self.tasks) - len(self.pending)} of {len(self.tasks)} tasks are done, {len(self.pending)} to go, {self.jobs} at a time, "
                 f"about {shown(self.left())}" + (f" of which {shown(self.args.budget)} now" if self.args.budget else ""))
        waiting = None
        try:
            while self.pending or self.running:
                if self.args.budget and time.time() - self.started > self.args.budget:
                    self.say(f"the budget of {shown(self.args.budget)} is used up; the same command goes on, about {shown(self.left())} are left")
                    return False
                self.finish_jobs()
                self.start_jobs()
                if self.pending and not self.running and waiting != len(self.pending):
                    waiting = len(self.pending)
                    self.say(f"waiting for {waiting} tasks that other processes work at")
                time.sleep(.2 if self.running else 1)
        finally:
            for job in self.running:  # what is stopped goes on from its checkpoint
                os.killpg(job["process"].pid, signal.SIGTERM)
            for job in self.running:
                job["process"].wait()
            self.log.close()
        return True

    def start_jobs(self):
        for task in list(self.pending):
            if len(self.running) >= self.jobs:
                return
            for ends in (self.unavailable, self.failed):
                if any(t in ends for t in task.after):
                    self.pending.remove(task)
                    ends.append(task)
                    break
            else:
                missing = [t for t in task.after if self.state.outcome(t) != "done"]
                for t in missing:  # it was done, and something has changed it since
                    if t not in self.pending and all(job["task"] is not t for job in self.running):
                        self.pending.insert(0, t)
                lock = None if missing else self.take(task)
                if lock is None:
                    continue
                self.pending.remove(task)
                if self.state.outcome(task) == "done":  # by another process, meanwhile
                    self.clock.add(task, self.state.seconds(task))
                elif task.name == "text" and not self.state.has_titles(task):
                    self.unavailable.append(task)
                    self.say(f"{task.folder}: no item has a title, so nothing that reads titles can run here")
                else:
                    self.start(task, lock)
                    continue
                lock.close()

    def take(self, task):
        """The task's lock, None if another process has it."""
        lock = open(self.state.path(task, ".lock"), "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return None
        return lock

    def start(self, task, lock):
        """The lock is handed to the child, so it holds for as long as anybody works at the task."""
        with open(self.state.path(task, ".log"), "ab") as log:
            process = subprocess.Popen(["bash", "-euc", "\n".join(self.command(c) for c in task.commands)], stdout=log, stderr=log,
                                       stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock.fileno()], cwd=ROOT)
        self.running.append({"task": task, "process": process, "lock": lock, "started": time.time()})

    def command(self, words):
        """A shell line: folders filled in, and what does not change the result added."""
        places = {"RAW_DIR": self.args.raw_dir, "LLM_DIR": self.args.llm_dir}
        words = [re.sub(r"^(RAW_DIR|LLM_DIR)\b", lambda m: str(Path(places[m[1]]).resolve()), word) for word in words]
        if words[0].startswith("stages/"):
            words += ["--data-dir", str(self.args.data_dir.resolve()), "--skip-done", "--threads", str(self.threads)]
            if "01_preprocess" in words[0]:
                words = words[:-2]
        return shlex.join([sys.executable, *words])

    def finish_jobs(self):
        for job in [job for job in self.running if job["process"].poll() is not None]:
            task, code = job["task"], job["process"].returncode
            self.running.remove(job)
            self.state.save(task, "done" if code == 0 else "failed")
            if code == 0 and self.state.outcome(task) == "done":
                seconds = self.state.seconds(task)
                self.clock.add(task, seconds)
                what = f"done, {(time.time() - job['started']) / 60:.1f} min"
                if task.run:
                    metrics = load_json(self.args.data_dir / task.folder / "07_evaluate" / task.name / "metrics.json")
                    what = f"test Recall@50 {metrics['test']['recall@50']:.4f}, {seconds / 60:.1f} min"
            else:
                log = self.state.path(task, ".log")
                lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
                reason = next((line for line in reversed(lines) if "error: " in line), lines[-1] if lines else "no output")
                self.failed.append(task)
                what = f"failed with exit code {code}: {reason} ({log})"
            job["lock"].close()
            number = len(self.tasks) - len(self.pending) - len(self.running)
            self.say(f"[{number}/{len(self.tasks)}] {task.label}: {what}; {len(self.running)} running, about {shown(self.left())} left")


def print_list(runner, runs):
    """What would be run, in order."""
    for task in runner.pending:
        if task.run:
            print(f"{task.rank:3.0f}  {shown(runner.clock.estimate(task)):>12}  {task.label}  ({', '.join(runs[task.run][1])})")
    runner.jobs = runner.jobs or CORES
    done = sum(1 for t in runner.tasks if t.run) - sum(1 for t in runner.pending if t.run)
    print(f"{done} runs are done, {sum(1 for t in runner.pending if t.run)} to go: about {shown(runner.left())} with {runner.jobs} at a time")


def remaining(tasks, runs, numbers, clock):
    """{group: [runs that `numbers` lack, estimated seconds]}, but for runs that need titles where there are none."""
    done = {experiments.Run(*paper_merge.key_of(m), seed) for m in numbers["models"] for seed in m["seeds"]}
    seconds = defaultdict(list)
    for task in tasks:
        if task.run and task.run not in done and not (task.run.model in NEED_TEXT and task.dataset in numbers["no_titles"]):
            seconds[runs[task.run][1][0]].append(clock.estimate(task))
    return {group: [len(of), float(round(sum(of)))] for group, of in seconds.items()}


def main(argv=None):
    args = parse(argv)
    answers = recorded_answers(args)
    runs = experiments.plan(args.datasets, args.only, args.seeds, answers)
    if "sample" in args.datasets and not (args.raw_dir / "reviews_sample_5.json.gz").is_file():
        subprocess.run([sys.executable, str(ROOT / "data/make_sample.py"), "--out", str(args.raw_dir)], check=True)
    tasks, state = tasks_of(runs, args, answers), State(args.data_dir)
    runner = Runner(tasks, args, state)
    if args.list:
        print_list(runner, runs)
        return 0
    complete = args.report or runner.work()
    numbers, results = paper_numbers.collect(args, runs, {task.run: task for task in tasks if task.run}, state), ROOT / "data" / "results"
    if args.publish:
        published = results / "numbers.json"
        numbers, dropped = paper_merge.merge(load_json(published) if published.is_file() else numbers, numbers)
        if dropped:
            print("no longer published: " + "; ".join(dropped))
        runs = experiments.plan(numbers["asked"]["datasets"], numbers["asked"]["groups"], numbers["seeds"])
        tasks = tasks_of(runs, args, answers)
    numbers["remaining"] = remaining(tasks, runs, numbers, runner.clock)
    paper_report.write(args, numbers, results)
    for task in runner.failed:
        print(f"failed: {task.label}, see {state.path(task, '.log')}", file=sys.stderr)
    return 1 if runner.failed else 0 if complete else 3


if __name__ == "__main__":
    run_main(main)
