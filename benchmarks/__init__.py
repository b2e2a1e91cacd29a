# SPDX-License-Identifier: MIT
"""What pyublk costs, beside the others, in one boot.

python -m benchmarks           disks: fio's four jobs on every contender (see --help)
python -m benchmarks.ring      io_uring round trips on this machine's kernel
python -m benchmarks.scaling   several queues, threads and workers
python -m benchmarks.many      many disks in a process: starts, stops, memory, requests a second
python -m benchmarks.memory    memory of an idle server; start of a 1 TiB RAM disk
"""
