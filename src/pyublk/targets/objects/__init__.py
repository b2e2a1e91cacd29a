# SPDX-License-Identifier: MIT
"""Disks of a web server's file, or of an object store's objects, by obstore (`url`, `s3`)."""
