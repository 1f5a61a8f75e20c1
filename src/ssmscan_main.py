"""The command's entry point, outside of the package: importing that brings PyTorch, and takes a second or two.

Ctrl-C is answered from the first moment on.
"""

import sys


def main() -> int:
    """Run the command and return its exit status."""
    try:
        from ssmscan import cli
    except KeyboardInterrupt:
        print("ssmscan: interrupted.", file=sys.stderr)
        return 130
    return cli.main()
