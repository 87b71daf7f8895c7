"""Every error of adapter-merge has a cause and says what was expected, what was found and what helps."""

import adapter_merge as am

try:
    am.merge("base", "not-there", "merged")
except am.AdapterMergeError as error:
    for problem in error.problems:
        print(problem.cause, problem.expected, problem.got, problem.hint, sep="\n")
