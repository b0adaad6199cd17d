"""`hylo bench`: what serving costs, a hybrid and its base measured in one run on the same vLLM."""
