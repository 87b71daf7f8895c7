"""Write an adapter as a LoRA folder of limited rank, and print what is lost of each weight's change."""

import adapter_merge as am

result = am.factor("base", "adapter", "factors", am.FactorOptions(rank=4))
print(f"at most {result.certificate.max_relative_error:.2g} of a weight's change is lost")
