"""A transport for tests: gloo under NCCL's rules. A job that would hang on NCCL hangs here too, and is named.

`calls` is the data that ranks post, `referee` the rules as a pure state machine, `server` runs it beside the
test, `link` is a rank's end of the line, `group` the process group, `run` starts a function under it (fixture
`strict`). docs/testing.md lists the rules, and where they are stricter than NCCL's.
"""
