"""Say what an adapter is and what is wrong with it, before anything is written."""

import adapter_merge as am

found = am.inspect("adapter", "base")
print(found.method, found.modules, "weights")
for problem in found.problems:
    print(problem)
