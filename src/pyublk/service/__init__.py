# SPDX-License-Identifier: MIT
"""What the command does, as a library: disks served by daemons, found, told of, stopped.

From the bottom up:

    processes, usage   processes beyond pid reuse; who uses a block device
    toml               what is wrong in a file, with its line
    plan, records      what to serve; what is kept of it while it is served
    logs               what servers print, kept small, removed with their disks
    reports, server    failures that cross processes; serving a spec until told to stop
    daemon             a server process of its own
    stopping           flushing, stopping, deleting, with users asked first
    recovering         another server for a disk that lost its own
    definitions        files that name disks, and what makes them so
    inventory          all about a disk
    doctor             what keeps this machine from serving disks
"""
