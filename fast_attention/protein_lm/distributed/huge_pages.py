"""Large memory pages for training on CPU.

XLA frees the temporaries of a step (hundreds of megabytes) at its end and asks for them again in
the next; with 4 KiB pages the kernel hands them out one by one, which took about half of the time
of a step of the demo. glibc's allocator uses large pages if an environment variable says so when
a process starts.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Starts this command again, in the same process, with large pages, where that is possible.

    Does nothing but on Linux with glibc, or if the variable ``GLIBC_TUNABLES`` is set already: set
    it to the empty string to do without.
    """
    if TUNABLES in os.environ or not sys.platform.startswith("linux"):
        return
    if platform.libc_ver()[0] != "glibc" or not sys.executable:
        return
    environment = {**os.environ, TUNABLES: "glibc.malloc.hugetlb=1"}
    # As it was started, and with -P: no module is imported from the current folder.
    options = [] if sys.flags.safe_path else ["-P"]
    command = [sys.executable, *options, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)
