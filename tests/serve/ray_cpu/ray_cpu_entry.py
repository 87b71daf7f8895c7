"""Entry point `vllm.platform_plugins`; it must not import vLLM."""


def register() -> str:
    return "ray_cpu_platform.RayCpuPlatform"
