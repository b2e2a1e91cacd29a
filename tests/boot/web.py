"""Serves one file by ranges at a port of loopback, and notes each answer in a log: a line with the
bytes of the range, when it was answered, and where it is. As if it were on another machine, systemd
lets it live.

    python web.py PORT FILE LOG
"""

import os
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyublk.service import title


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file: int
    log: Any

    def do_GET(self) -> None:
        state = os.stat(self.file)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked
        first, last = int(asked[1]), min(int(asked[2]), state.st_size - 1)
        body = os.pread(self.file, last + 1 - first, first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{state.st_size}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{state.st_ino:x}-{state.st_mtime_ns:x}"')
        self.end_headers()
        self.wfile.write(body)
        self.log.write(f"{len(body)} {time.time():.3f} {first}\n")

    def log_message(self, *_: object) -> None:
        pass


def main(port: str, file: str, log: str) -> None:
    title.be_spared()
    Handler.file = os.open(file, os.O_RDONLY)
    with open(log, "a", buffering=1) as Handler.log:
        ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
