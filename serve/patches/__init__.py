"""What the plugin changes inside vLLM: exact row scales, a kernel for CPUs, identity of adapters, the compile key."""
