"""vLLM's CPU platform under Ray, for a test: vLLM lets no CPU under Ray, for it has no name for them there.

Ray hands out the GPUs that it was told of, whether they are there or not; with their name vLLM's Ray executor places
CPU workers as it places GPU workers.
"""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
