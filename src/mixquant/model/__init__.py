"""A torch model in two precisions: PhaseLinear, the tracker of prompts, convert_, and the memory bill."""
