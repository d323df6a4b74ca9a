"""SoftCoT adapters in vLLM: a plugin for its server, and `SoftCoTLLM` for programs."""
