"""Sixteen clients at a pair on the loopback, while its servers are killed in turn: what clients see, and for how long.

    python -m benchmarks.pair_soak --minutes 10        # from the root of a checkout, with the tests' packages

The pair and the clients are those of tests/commands/test_pair.py, which runs the same for a minute: a prefill server, a
decode server and vLLM's router, with the shipped model in float32 on a CPU. Every answer is compared with one engine's.
Exit code 1 where a client got wrong tokens, or waited for more than 30 seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests import pairs
from tests.commands.test_pair import NEW_TOKENS, PROMPTS, single_engine
from tests.soak import RETRIABLE, soak

from mixquant.devices import device_name

FIRST_SECONDS, EVERY_SECONDS = 20, 55
"""When the first process is killed, and how long until the next."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    seconds = 60 * parser.parse_args().minutes
    import torch

    expected = single_engine(pairs.POLICY)
    moments = [float(at) for at in range(FIRST_SECONDS, round(seconds - EVERY_SECONDS / 2), EVERY_SECONDS)]
    with tempfile.TemporaryDirectory() as folder, pairs.running(Path(folder)) as pair:
        found = soak(pair, PROMPTS, expected, NEW_TOKENS, plan=[*moments, seconds])
    print(f"{device_name(torch.device('cpu'))}, shared with other work; 1 prefill server, 1 decode server\n")
    print("\n".join(found.table()))
    sys.exit(not set(found.outcomes) <= {"right", *RETRIABLE})


if __name__ == "__main__":
    main()
