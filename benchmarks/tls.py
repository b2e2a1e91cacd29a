# SPDX-License-Identifier: MIT
"""What TLS costs the target `nbd`: `python -m benchmarks.tls`.

A kernel-free disk reads the same bytes from nbdkit's memory, 8 MiB at a time, without TLS and with
a certificate, in turns. Processor time is that of the client and the disk together.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pyublk.targets.nbd import Nbd
from pyublk.testing import Disk

from .objects import measured
from .programs import find, nbdkit, run

SIZE = 256 << 20
AT_ONCE = 8 << 20
ROUNDS = 4


def _certificate(folder: Path) -> None:
    """One that is signed by itself, for localhost, under the names that nbdkit looks for."""
    key, certificate = folder / "server-key.pem", folder / "server-cert.pem"
    run(
        *(find("openssl", "openssl"), "req", "-x509", "-newkey", "ec"),
        *("-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", str(key), "-out", str(certificate)),
    )
    (folder / "ca-cert.pem").write_bytes(certificate.read_bytes())


@contextmanager
def _read(uri: str, trusted: str | None) -> Iterator[Callable[[], None]]:
    with Disk(Nbd(uri, tls_certificates=trusted)) as disk:

        def read() -> None:
            for at in range(0, SIZE, AT_ONCE):
                disk.pread(AT_ONCE, at)

        yield read


def main() -> None:
    """Print nanoseconds of processor time for each byte."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        folder = Path(name)
        _certificate(folder)
        plain, secret = folder / "plain", folder / "secret"
        tls = ("--tls=require", f"--tls-certificates={folder}")
        servers.enter_context(nbdkit(plain, "memory", str(SIZE)))
        servers.enter_context(nbdkit(secret, *tls, "memory", str(SIZE)))
        trusted = str(folder / "ca-cert.pem")
        ways = {
            "without TLS": partial(_read, f"nbd+unix:///?socket={plain}", None),
            "with TLS": partial(_read, f"nbds+unix:///?socket={secret}", trusted),
        }
        for way, (_, busy) in measured(ways, ROUNDS).items():
            print(f"{way}: {busy / SIZE * 1e9:.2f} ns of processor time a byte", flush=True)


if __name__ == "__main__":
    main()
