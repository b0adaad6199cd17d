"""Serving hybrids with vLLM: a plugin that vLLM finds by its entry point. Nothing outside this folder imports vLLM."""
