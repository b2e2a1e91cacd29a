# SPDX-License-Identifier: MIT
"""What the project's maintainers run by `./run`: the package does not have it."""
