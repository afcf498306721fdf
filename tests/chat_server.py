"""A local chat-completions server whose every answer, good or faulty, is chosen by the test."""

import contextlib
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(content, finish_reason="stop", **message):
    """The JSON bytes of a chat completion."""
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": "served-model",
            "choices": [
                {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}}
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    ).encode()


GOOD = '{"1": "gel pens", "2": "desk lamps"}'


class ChatServer:
    """`behave(number, body)` returns what to do with call `number` (from 0): a str is the answer's content; a dict may have
    status, headers, body (bytes), delay (seconds), and kind: "reset", "truncated", "drip", "drip headers" or "hang".

    calls: list of (seconds since start, body). active: calls that wait for their answer. Use as a context
    manager; `url` ends in /v1.
    """

    def __init__(self, behave):
        self.behave, self.calls, self.headers = behave, [], []
        self.active = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.calls)
                    outer.calls.append((time.monotonic() - outer.started, body))
                    outer.headers.append((self.path, dict(self.headers)))
                    outer.active += 1
                action = outer.behave(number, body)
                if isinstance(action, str):
                    action = {"body": chat(action)}
                outer.closing.wait(action.get("delay", 0))
                with outer.lock:  # before the client can know of the answer and call again
                    outer.active -= 1
                with contextlib.suppress(ConnectionError):
                    outer.reply(self, action)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def reply(self, handler, action):
        kind, body = action.get("kind"), action.get("body", b"")
        if kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        if kind == "hang":
            self.closing.wait(60)
            handler.close_connection = True
            return
        if kind == "drip headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.closing.wait(0.05):  # until the client closes the connection
                handler.wfile.write(b"x")
            handler.close_connection = True
            return
        handler.send_response(action.get("status", 200))
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | action.get("headers", {})
        ).items():
            handler.send_header(name, value)
        handler.end_headers()
        if kind == "truncated":
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
        elif kind == "drip":
            for i in range(len(body)):
                handler.wfile.write(body[i : i + 1])
                handler.wfile.flush()
                if self.closing.wait(0.05):
                    break
            handler.close_connection = True
        else:
            handler.wfile.write(body)

    def __enter__(self):
        self.started = time.monotonic()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
