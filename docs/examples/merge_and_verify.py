"""Merge an adapter into its base and prove that the merged model computes what was trained."""

import adapter_merge as am

result = am.merge("base", "adapter", "merged")
print(result.output, f"{len(result.weights)} weights changed")
report = am.verify("base", "adapter", "merged")
assert report.passed, report.problems
