"""Run a script in a network namespace, as `ip netns exec NAME python SCRIPT ARGS` does.

in_netns.py NAME SCRIPT ARGS
"""

import ctypes
import os
import runpy
import sys

CLONE_NEWNET = 0x40000000

if __name__ == "__main__":
    name, *sys.argv = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
