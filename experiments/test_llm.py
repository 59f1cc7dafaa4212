"""The published code's test script by its old name and options: `flexprefill test-llm`."""

from __future__ import annotations

import sys

from flex_prefill.cli import main

if __name__ == "__main__":
    sys.exit(main(["test-llm", *sys.argv[1:]]))
