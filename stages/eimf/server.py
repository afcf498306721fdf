"""What runs underneath the HTTP application: the recommender in use and its hot reload, micro-batching, counters, connections."""
import asyncio
import fcntl
import gc
import json
import logging
import os
import resource
import socket
import tempfile
from collections import deque
from itertools import islice
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .artifacts import UserError
from .recommender import Query, Recommender, choose_run, file_times, fingerprint

MAX_BATCH = 64  # queries in one kernel call; more only makes those in front wait for those behind
MAX_ROWS = 4000  # and rows of their answers, which take some microseconds each to write
GATHER_SECONDS = .0005  # pause between two kernel calls while fewer than ENOUGH wait: one call for four queries takes half the
ENOUGH = 8  # time of four calls, and a query that comes alone does not wait. A pause of 2 ms saves a fifth of the CPU time at 1,000
# queries a second on one core, but makes the 99th percentile of the latency 8 ms instead of 5.
SHORT = 1_000_000  # queries x items up to which a call is made by the thread that also reads requests: it takes milliseconds,
# and on one core two threads would lose more by taking turns. Longer calls go to a thread of their own.
MAX_WAITING = 4096  # queries that may wait; beyond that the answer is 503
CONNECTION_SECONDS = 30  # a connection that completes no response in this time is closed
CONNECTION_BYTES = 2 << 20  # and so is one that sends more than this before a response is complete
MAX_CONNECTIONS = 8192  # beyond that the one that has waited longest is closed; fewer where the system allows fewer open files
log = logging.getLogger("08_serve")


class Overloaded(Exception):
    """Too many queries are waiting."""


class Live:
    """The recommender in use. `watch` notices a new export, loads and tries it beside the old one, and swaps them.

    settings: data_dir, dataset, run (None: the newest, see choose_run), retrieval, threads.
    """

    def __init__(self, settings):
        self.settings, self.refused = settings, None
        self.root = Path(settings["data_dir"]) / settings["dataset"]
        self.current = self.load()

    def load(self):
        settings = self.settings
        run = settings["run"] or choose_run(settings["data_dir"], settings["dataset"])[0]
        return Recommender(settings["data_dir"], settings["dataset"], run, settings["retrieval"], settings["threads"])

    def poll(self):
        """Look once. Returns "loaded", "refused" or None (nothing new). The old recommender serves until the swap.

        What was refused is tried again when a file of it changes, as a manifest may be copied before the files it names.
        """
        found, looked = None, False
        try:
            found = fingerprint(self.root, self.current.run)
            if found is None:
                return None  # the run in use is being trained again; wait for it rather than change to an older one
            run = self.settings["run"] or choose_run(self.settings["data_dir"], self.settings["dataset"])[0]
            found = run, fingerprint(self.root, run), file_times(self.root, run)
            if found[:2] == (self.current.run, self.current.fingerprint):
                self.refused = None
                return None
            if found[1] is None or found == self.refused:
                return None
            looked = True
            fresh = self.load()
            fresh.to_json(fresh.recommend([Query(history=(fresh.ids[1],))]))
        except Exception as error:  # whatever is wrong with a new export, or with looking for one, the old one goes on serving
            found = found if looked else (found, repr(error))
            if found == self.refused:
                return None
            self.refused = found
            log.error("a new export is refused, run %s goes on serving: %s", self.current.run, error,
                      exc_info=not isinstance(error, (UserError, OSError)))
            return "refused"
        old, self.current, self.refused = self.current, fresh, None
        log.info("run %s is replaced by %s, trained %s", old.run, fresh.run, fresh.manifest["finished"])
        return "loaded"

    def watch(self, seconds, stop, metrics):
        """Poll until `stop` (a threading.Event) is set. Runs in a thread of its own."""
        while not stop.wait(seconds):
            metrics.set("eimf_resident_memory_bytes", resident_bytes())
            if result := self.poll():
                metrics.add(f'eimf_reloads_total{{result="{result}"}}')
                settle_memory()


class Batcher:
    """Answers queries in one thread at a time; those that arrive while it works are answered together next time."""

    def __init__(self, live, metrics):
        self.live, self.metrics = live, metrics
        self.groups, self.waiting, self.busy, self.ended = deque(), 0, False, 0.0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="recommend")

    async def ask(self, queries):
        """JSON text of each query's answer, or the exception that it raised, in a list. Raises Overloaded."""
        if self.waiting + len(queries) > MAX_WAITING:
            raise Overloaded
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.groups.append((deque(queries), [], future))  # still to be answered, answers so far
        self.waiting += len(queries)
        if not self.busy:
            self.busy = True
            self._schedule(loop)
        return await future

    def _schedule(self, loop):
        # Never at once: requests that are read in the same turn of the loop come along.
        loop.call_at(self.ended + GATHER_SECONDS if self.waiting < ENOUGH else self.ended, self._start, loop)

    def _start(self, loop):
        """Answer a batch: a part of each group, those that wait longest first; what is left of a group waits behind all others."""
        recommender = self.live.current  # one for the whole batch, whatever is swapped in meanwhile
        parts, size, rows = [], 0, 0
        for _ in range(len(self.groups)):
            if size == MAX_BATCH or rows >= MAX_ROWS:
                break
            queries, _, future = group = self.groups.popleft()
            if future.done():  # a client that went away has cancelled its own
                self.waiting -= len(queries)
                continue
            part = []
            while queries and size < MAX_BATCH and rows < MAX_ROWS:
                part.append(queries.popleft())
                size, rows = size + 1, rows + recommender.rows(part[-1])
            parts.append((group, part))
            if queries:
                self.groups.append(group)
        self.waiting -= size
        if size:
            self.metrics.observe("eimf_batch_queries", size)
        if size * len(recommender.ids) <= SHORT:
            self._finish(parts, self._work(parts, recommender), loop)
        else:
            self.pool.submit(lambda: loop.call_soon_threadsafe(self._finish, parts, self._work(parts, recommender), loop))

    @staticmethod
    def _work(parts, recommender):
        """JSON text or exception of each query of the parts, in one list."""
        return answer_all(recommender, [query for _, part in parts for query in part])

    def _finish(self, parts, results, loop):
        results = iter(results)
        for (queries, answers, future), part in parts:
            answers += islice(results, len(part))
            if not queries and not future.done():
                future.set_result(answers)
        self.busy, self.ended = bool(self.groups), loop.time()
        if self.busy:
            self._schedule(loop)


def answer_all(recommender, queries):
    """JSON text or exception of each query. A query that fails does not take the others with it."""
    try:
        known = [q for q in queries if q.user is None or q.user in recommender.users]
        texts = iter(recommender.to_json(recommender.recommend(known)))
        return [next(texts) if q.user is None or q.user in recommender.users else KeyError(q.user) for q in queries]
    except Exception as error:
        if len(queries) == 1:
            log.exception("a query failed")
            return [error]
        return [answer_all(recommender, [q])[0] for q in queries]


class Metrics:
    """Counters in Prometheus' text format, summed over all workers of the server.

    Each worker owns a row of a small file that all of them map; a worker that dies leaves its row, and its counts, to
    the one that replaces it.
    """
    SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)
    SIZES = (1, 2, 4, 8, 16, 32, 64)
    STATUSES = (200, 400, 401, 404, 405, 408, 413, 415, 422, 500, 503)
    HELP = {
        "eimf_requests_total": ("counter", "Requests answered, by route and status."),
        "eimf_request_seconds": ("histogram", "Time from a request's first byte to its last, by the server's clock."),
        "eimf_batch_queries": ("histogram", "Queries answered together by one model call."),
        "eimf_reloads_total": ("counter", "New exports found, by what became of them."),
        "eimf_resident_memory_bytes": ("gauge", "Resident memory of all workers."),
    }

    def __init__(self, routes, folder=None, workers=1):
        names = [f'eimf_requests_total{{route="{r}",status="{s}"}}' for r in (*routes, "other") for s in self.STATUSES]
        for name, bounds in (("eimf_request_seconds", self.SECONDS), ("eimf_batch_queries", self.SIZES)):
            names += [f'{name}_bucket{{le="{b}"}}' for b in (*bounds, "+Inf")] + [f"{name}_sum", f"{name}_count"]
        names += [f'eimf_reloads_total{{result="{r}"}}' for r in ("loaded", "refused")] + ["eimf_resident_memory_bytes"]
        self.index = {name: n for n, name in enumerate(names)}
        self.bounds = {"eimf_request_seconds": self.SECONDS, "eimf_batch_queries": self.SIZES}
        if folder is None:
            self.rows, mine = np.zeros((1, len(names))), 0
        else:
            path = Path(folder) / "metrics"
            self.file = open(path, "a+b")  # kept open: closing it would give up the lock
            self.file.truncate(workers * len(names) * 8)
            self.rows = np.memmap(path, dtype=np.float64, shape=(workers, len(names)), mode="r+")
            mine = next(row for row in range(workers) if self._claim(row))
        self.row = np.asarray(self.rows[mine])

    def _claim(self, row):
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)
            return True
        except OSError:
            return False

    def add(self, name, value=1):
        self.row[self.index[name]] += value

    def set(self, name, value):
        self.row[self.index[name]] = value

    def observe(self, name, value):
        bound = next((b for b in self.bounds[name] if value <= b), "+Inf")
        self.add(f'{name}_bucket{{le="{bound}"}}')
        self.add(f"{name}_sum", value)
        self.add(f"{name}_count")

    def request(self, route, status, seconds):
        name = f'eimf_requests_total{{route="{route}",status="{status}"}}'
        self.add(name if name in self.index else f'eimf_requests_total{{route="other",status="{status}"}}'
                 if status in self.STATUSES else f'eimf_requests_total{{route="other",status="{500 if status >= 500 else 400}"}}')
        self.observe("eimf_request_seconds", seconds)

    def render(self):
        """The text of GET /metrics. Buckets are cumulative, as the format asks."""
        totals, lines, family, below = np.array(self.rows).sum(0), [], None, 0.0
        for name, n in self.index.items():
            base = next(f for f in self.HELP if name.startswith(f))
            if base != family:
                family, below = base, 0.0
                lines += [f"# HELP {base} {self.HELP[base][1]}", f"# TYPE {base} {self.HELP[base][0]}"]
            value = totals[n]
            if "_bucket{" in name:
                value = below = below + value
            if value or not name.startswith("eimf_requests_total"):
                lines.append(f"{name} {value:.17g}")
        return "\n".join(lines) + "\n"


def settle_memory():
    """Free what is no longer used (an exported module refers to itself, so an old one would linger), then tell the garbage
    collector to leave alone what is there: going through all of it now and then would stop the server for .2 s each time."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def resident_bytes():
    """This process's resident memory; its peak where the system does not tell the present value."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Connection(AutoHTTPProtocol):
    """uvicorn's HTTP connection with one rule more: complete a response every CONNECTION_SECONDS, or be closed.

    That covers connections that never send a request, headers or bodies that trickle in, and clients that do not read
    what they asked for. When there are too many, the one that has waited longest goes first.
    """
    waiting = {}  # open connections, longest without a completed response first

    def connection_made(self, transport):
        super().connection_made(transport)
        self.received, self.mark = 0, self.loop.time()
        self.waiting[self] = None
        if len(self.waiting) > most_connections():
            next(iter(self.waiting)).abort()
        self.timer = self.loop.call_later(CONNECTION_SECONDS, self.check)

    def data_received(self, data):
        self.received += len(data)
        if self.received > CONNECTION_BYTES:
            return self.abort()
        return super().data_received(data)

    def on_response_complete(self):
        self.received, self.mark = 0, self.loop.time()
        if self in self.waiting:
            self.waiting[self] = self.waiting.pop(self)
        super().on_response_complete()

    def check(self):
        left = self.mark + CONNECTION_SECONDS - self.loop.time()
        if left <= 0:
            return self.abort()
        self.timer = self.loop.call_later(left, self.check)

    def abort(self):
        self.waiting.pop(self, None)
        self.transport.abort()

    def connection_lost(self, exc):
        self.waiting.pop(self, None)
        self.timer.cancel()
        super().connection_lost(exc)


def most_connections():
    """Connections that may be open at a time: enough files must be left to read a new export."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(files - 256, files // 2))


def serve(settings, host, port, workers):
    """Run the server until it is told to stop; requests in flight are finished first. settings: see service.create."""
    from .service import create
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256 if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS + 256, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    listener = listen(host, port)
    app = create(settings)  # also with several workers, so that a wrong folder is reported once and before any starts
    print(f"serving run {app.live.current.run} on http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]} "
          f"with {workers} worker{'s' * (workers > 1)}; Ctrl-C stops", flush=True)
    # asyncio's own loop: with uvloop the server was found no faster. The parser is httptools where it is installed; with h11 in its
    # place a request takes a third more CPU time.
    options = {"fd": listener.fileno(), "http": Connection, "loop": "asyncio", "ws": "none", "access_log": False, "log_level": "warning",
               "timeout_graceful_shutdown": 20, "server_header": False, "proxy_headers": False}
    if workers == 1:
        uvicorn.run(app, **options)
        return
    del app
    with tempfile.TemporaryDirectory(prefix="eimf-serve-") as folder:
        # Workers are new processes, which find their settings in the environment; the token is there already.
        os.environ["EIMF_SERVE"] = json.dumps(settings | {"metrics": folder, "workers": workers})
        uvicorn.run("eimf.service:create", factory=True, workers=workers, **options)


def listen(host, port):
    """A bound socket. Raises UserError if the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by its connections: asyncio does it only where it knows the family, and uvicorn hides that. Without it, the
    # second part of an answer waits 40 ms for the client's system to confirm the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # from now on clients wait for the server to be ready instead of being refused
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port or --host.") from None
    listener.set_inheritable(True)
    return listener
