"""Measure the chat client against a local server: how busy it keeps the server, CPU seconds, memory.

    python tests/measure_llm_throughput.py                                      # 1 s answers at a concurrency of 64
    python tests/measure_llm_throughput.py --delay 0 --requests 100000          # the highest rate, memory over 100,000 requests
    python tests/measure_llm_throughput.py --out data/results/llm.json          # both, one after the other, into a file

The client runs in this process, on one core where the system allows to choose; the server in another. Prints one JSON line:
`busy` is the share of the calls' time that the server could have spent at most, `memory_mib` the client's resident memory after
each twentieth of the requests, its journal included.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from chat_server import GOOD, chat  # noqa: E402

from eimf.chat import ChatClient  # noqa: E402
from eimf.llm import Journal, Request  # noqa: E402

ANSWER = chat(GOOD)
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER


def serve(delay, pipe):
    """Answers after `delay` seconds; on one event loop, so that hundreds of calls wait at once."""

    async def connection(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                await reader.readexactly(length)
                if delay:
                    await asyncio.sleep(delay)
                writer.write(REPLY)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run():
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def resident():
    """Memory of this process now, MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure(delay, concurrency, n_requests, journal_path):
    """Dict of measurements of one run."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(delay, theirs), daemon=True)
    server.start()
    port = ours.recv()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    client = ChatClient(f"http://127.0.0.1:{port}/v1", "m", "sk-measure-0123456789", concurrency=concurrency, log=print)
    titles = "[" + ", ".join(f"Some product title number {i} (B00{i:07d})" for i in range(20)) + "]"
    source = (
        Request(
            f"data/U{i}",
            {"model": "m", "messages": [{"role": "user", "content": f"{i} {titles}"}], "temperature": 0.0, "max_tokens": 800},
        )
        for i in range(n_requests)
    )
    journal, memory = Journal(journal_path), []
    started, cpu = time.perf_counter(), time.process_time()
    for number, entry in enumerate(client.answers(source), 1):
        journal.add(entry)
        if number % max(1, n_requests // 20) == 0:
            memory.append(round(resident(), 1))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    journal.close()
    server.terminate()
    ideal = n_requests * delay / concurrency
    return {
        "requests": n_requests,
        "delay": delay,
        "concurrency": concurrency,
        "seconds": round(seconds, 2),
        "per_second": round(n_requests / seconds, 1),
        "busy": round(ideal / seconds, 4) if delay else None,
        "cpu_seconds": round(cpu, 2),
        "memory_mib": memory,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        **client.counts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds the server takes for an answer")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64 * 90)
    parser.add_argument("--out", type=Path, help="run both measurements and write them to this file")
    args = parser.parse_args()
    if args.out:
        found = {}
        for name, flags in (("one_second_answers", []), ("hundred_thousand_requests", ["--delay", "0", "--requests", "100000"])):
            done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args.delay, args.concurrency, args.requests, Path(folder) / "journal.jsonl")))
