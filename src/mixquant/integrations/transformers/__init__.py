"""Transformers: the quantizer behind `from_pretrained`, and the engine that evaluation runs on.

Importing this package registers the quantizer in Transformers' own registry.
"""

from transformers.utils import logging

from mixquant.integrations.transformers.quantizer import MixQuantConfig, MixQuantHfQuantizer, check_memory

__all__ = ["MixQuantConfig", "MixQuantHfQuantizer", "check_memory", "quiet"]


def quiet(progress_bars: bool) -> None:
    """Keep Transformers' own messages off, and its progress bars unless they are wanted."""
    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()
