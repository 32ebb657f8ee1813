"""vLLM's router where servers ask for a key: `python -m mixquant.commands.router URL OPTIONS...`.

The router does not pass a client's key on. It sends servers its own, from the variable OPENAI_API_KEY, and by itself
would do so for anybody. What makes it ask for a key too is a setting without an option: addresses where a client's key
must be welcome, here URL.
"""

from __future__ import annotations

import sys

KEY = "OPENAI_API_KEY"
"""The variable with the key that the router sends to servers."""

if __name__ == "__main__":
    from vllm_router.launch_router import launch_router, parse_router_args

    arguments = parse_router_args(sys.argv[2:])
    arguments.api_key_validation_urls = [sys.argv[1]]
    launch_router(arguments)
