# SPDX-License-Identifier: MIT
"""`pyublk metrics`: the disks of this machine, for Prometheus."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING

import click

from pyublk.cli.failures import message, open_controller
from pyublk.errors import ExtraMissing

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class _Place(click.ParamType[tuple[str, int]]):
    """An address and a port, such as 127.0.0.1:9870, [::1]:9870 or :9870 (all addresses)."""

    name = "place"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):(\d{1,5})", str(value))
        if match is None or not int(match[3]) < 65536:
            self.fail(f"{value!r} is no address and port, such as 127.0.0.1:9870", param, ctx)
        return match[1] or match[2] or "0.0.0.0", int(match[3])


@click.command()
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    type=_Place(),
    help="Answer Prometheus here, until interrupted. Without ADDRESS: on all of IPv4.",
)
@click.option("--once", is_flag=True, help="Print the metrics, and end.")
@click.option("--dashboard", is_flag=True, help="Print a dashboard for Grafana, and end.")
def metrics(listen: tuple[str, int] | None, once: bool, dashboard: bool) -> None:
    """Export the metrics of all disks of this machine to Prometheus.

    The disks' servers are asked whenever Prometheus asks. With --once, the output suits the
    textfile collector of node_exporter. Anybody who reaches the address can read the metrics:
    listen where only Prometheus can reach it. This needs prometheus_client:
    pip install 'pyublk[metrics]'.
    """
    if [listen is not None, once, dashboard].count(True) != 1:
        raise click.UsageError("give one of --listen, --once and --dashboard")
    if dashboard:
        click.echo(resources.files("pyublk.service").joinpath("grafana.json").read_text())
    elif listen is None:
        with _registry() as registry:
            from prometheus_client import generate_latest

            click.echo(generate_latest(registry), nl=False)
    else:
        _serve(*listen)


def _serve(address: str, port: int) -> None:
    with _registry() as registry:
        from prometheus_client import start_http_server

        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            server, thread = start_http_server(port, address, registry)
        except OSError as error:
            raise OSError(error.errno, error.strerror, where) from None
        try:
            message(f"listening at http://{where}/metrics")
            threading.Event().wait()
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def _registry() -> Iterator["CollectorRegistry"]:
    """What collects the metrics of all disks. Raises ExtraMissing without prometheus_client."""
    try:
        from prometheus_client import CollectorRegistry
    except ImportError:
        raise ExtraMissing("prometheus_client", "metrics") from None
    from pyublk.service.metrics import DiskCollector
    from pyublk.service.observing import Observer

    with open_controller() as controller, Observer(controller) as observer:
        registry = CollectorRegistry()
        registry.register(DiskCollector(lambda: observer.samples(with_status=True)))
        yield registry
