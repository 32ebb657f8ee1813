"""How fast: arms of one model take turns in one run, request by request, and each figure stands beside its ceiling."""
