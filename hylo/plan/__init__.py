"""What a conversion costs, before anything is spent: parameters, cache, and memory to serve and to train."""
