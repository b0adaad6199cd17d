"""What a GPU does otherwise: latents kept and read by kernels, recurrences by the kernels that vLLM carries."""
