# SPDX-License-Identifier: MIT
"""Traces of disks: blktrace's records read, paired to requests, summed up, exported and drawn."""

from pyublk.traces.exports import to_chrome, to_csv, to_fio
from pyublk.traces.plots import plot
from pyublk.traces.records import Action, Category, Record, TraceError, read_records, write_records
from pyublk.traces.requests import Request, Trace, read, write
from pyublk.traces.summary import OperationSummary, Range, Summary, summarize

__all__ = [
    "Action",
    "Category",
    "OperationSummary",
    "Range",
    "Record",
    "Request",
    "Summary",
    "Trace",
    "TraceError",
    "plot",
    "read",
    "read_records",
    "summarize",
    "to_chrome",
    "to_csv",
    "to_fio",
    "write",
    "write_records",
]
