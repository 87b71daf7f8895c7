"""The plugin's changes of vLLM: exact row scales, a kernel for CPUs, identity of adapters, the compile key."""
