"""The decoder: Qwen2 and Llama in one module, with its parameters as plain pytrees."""
